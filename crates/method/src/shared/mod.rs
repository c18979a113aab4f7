//! What several methods share.

pub(crate) mod biases;
pub(crate) mod kronecker;
pub(crate) mod numpy_random;
pub(crate) mod places;
pub(crate) mod projection;
pub(crate) mod torch_random;
pub(crate) mod wavelets;
