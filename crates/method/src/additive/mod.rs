//! New modules beside or behind the frozen ones.

pub(crate) mod beft;
pub(crate) mod bottleneck;
pub(crate) mod coda;
pub(crate) mod hyperformer;
pub(crate) mod ia3;
