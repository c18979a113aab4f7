//! What several methods share.

pub(crate) mod activations;
pub(crate) mod biases;
pub(crate) mod bilevel;
pub(crate) mod bits;
pub(crate) mod branch;
pub(crate) mod divisors;
pub(crate) mod fields;
pub(crate) mod gate;
pub(crate) mod gated_prompts;
pub(crate) mod kronecker;
pub(crate) mod low_rank;
pub(crate) mod matrices;
pub(crate) mod mixture;
pub(crate) mod network;
pub(crate) mod numpy_random;
pub(crate) mod orthogonal;
pub(crate) mod places;
pub(crate) mod projection;
pub(crate) mod scores;
pub(crate) mod sequences;
pub(crate) mod sparse;
pub(crate) mod staged;
pub(crate) mod tasks;
pub(crate) mod token_rows;
pub(crate) mod torch_random;
pub(crate) mod wavelets;
