//! What several methods share.

pub(crate) mod biases;
pub(crate) mod matrices;
pub(crate) mod orthogonal;
