//! What several methods share.

pub(crate) mod kronecker;
pub(crate) mod places;
