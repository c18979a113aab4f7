//! Low-dimensional changes of weights that fold into them.

pub(crate) mod kadaptation;
pub(crate) mod krona;
pub(crate) mod loha;
pub(crate) mod lokr;
pub(crate) mod lora;
pub(crate) mod phm;
