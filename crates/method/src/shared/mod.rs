//! What several methods share.

pub(crate) mod mt19937;
pub(crate) mod scores;
pub(crate) mod sparse;
pub(crate) mod staged;
