//! Low-dimensional changes of weights that fold into them.

pub(crate) mod adalora;
pub(crate) mod autolora;
pub(crate) mod bilora;
pub(crate) mod boft;
pub(crate) mod capaboost;
pub(crate) mod deft;
pub(crate) mod delora;
pub(crate) mod dylora;
pub(crate) mod glora;
pub(crate) mod gralora;
pub(crate) mod hira;
pub(crate) mod hiwi;
pub(crate) mod hra;
pub(crate) mod lily;
pub(crate) mod lora;
pub(crate) mod loramoe;
pub(crate) mod molora;
pub(crate) mod oft;
pub(crate) mod osf;
pub(crate) mod peanut;
pub(crate) mod periodiclora;
pub(crate) mod poly;
pub(crate) mod psoft;
pub(crate) mod road;
pub(crate) mod sora;
