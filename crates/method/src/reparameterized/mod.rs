//! Low-dimensional changes of weights that fold into them.

pub(crate) mod c3a;
pub(crate) mod dvora;
pub(crate) mod fourierft;
pub(crate) mod kadaptation;
pub(crate) mod krona;
pub(crate) mod loha;
pub(crate) mod lokr;
pub(crate) mod lora;
pub(crate) mod miss;
pub(crate) mod nola;
pub(crate) mod phm;
pub(crate) mod pvera;
pub(crate) mod randlora;
pub(crate) mod said;
pub(crate) mod unilora;
pub(crate) mod vblora;
pub(crate) mod vera;
pub(crate) mod waveft;
