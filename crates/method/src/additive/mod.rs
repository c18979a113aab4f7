//! New modules beside or behind the frozen ones.

pub(crate) mod adamix;
pub(crate) mod adapter_fusion;
pub(crate) mod adaptformer;
pub(crate) mod beft;
pub(crate) mod bottleneck;
pub(crate) mod ciat;
pub(crate) mod coda;
pub(crate) mod compacter;
pub(crate) mod hyperformer;
pub(crate) mod ia3;
pub(crate) mod krona_b;
pub(crate) mod lst;
pub(crate) mod mov;
pub(crate) mod pha;
pub(crate) mod reft;
pub(crate) mod res_tuning;
pub(crate) mod side_tuning;
pub(crate) mod sparse_adapter;
pub(crate) mod ssf;
