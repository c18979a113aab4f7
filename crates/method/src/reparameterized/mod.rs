//! Low-dimensional changes of weights that fold into them.

pub(crate) mod boft;
pub(crate) mod deft;
pub(crate) mod delora;
pub(crate) mod glora;
pub(crate) mod gralora;
pub(crate) mod hira;
pub(crate) mod hiwi;
pub(crate) mod hra;
pub(crate) mod lily;
pub(crate) mod lora;
pub(crate) mod oft;
pub(crate) mod peanut;
pub(crate) mod road;
