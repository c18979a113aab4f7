//! Trained rows before tokens, or before keys and values.

pub(crate) mod prefix;
pub(crate) mod prompt;
pub(crate) mod vpt;
