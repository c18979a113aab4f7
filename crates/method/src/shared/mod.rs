//! What several methods share.

pub(crate) mod biases;
pub(crate) mod bilevel;
pub(crate) mod fields;
pub(crate) mod low_rank;
pub(crate) mod matrices;
pub(crate) mod mixture;
pub(crate) mod mt19937;
pub(crate) mod orthogonal;
pub(crate) mod scores;
pub(crate) mod sparse;
pub(crate) mod staged;
