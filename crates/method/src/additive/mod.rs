//! New modules beside or behind the frozen ones.

pub(crate) mod beft;
pub(crate) mod bottleneck;
pub(crate) mod ia3;
pub(crate) mod sparse_adapter;
