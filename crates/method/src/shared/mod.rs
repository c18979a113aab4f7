//! What several methods share.

pub(crate) mod biases;
pub(crate) mod bilevel;
pub(crate) mod fields;
pub(crate) mod low_rank;
pub(crate) mod mixture;
