//! Low-dimensional changes of weights that fold into them.

pub(crate) mod lora;
pub(crate) mod rosa;
