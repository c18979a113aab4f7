//! Low-dimensional changes of weights that fold into them.

pub(crate) mod adalora;
pub(crate) mod autolora;
pub(crate) mod bilora;
pub(crate) mod capaboost;
pub(crate) mod dylora;
pub(crate) mod lora;
pub(crate) mod loramoe;
pub(crate) mod molora;
pub(crate) mod periodiclora;
pub(crate) mod poly;
pub(crate) mod sora;
