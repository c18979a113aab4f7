//! Trained rows before tokens, or before keys and values.

pub(crate) mod apt;
pub(crate) mod idpg;
pub(crate) mod lpt;
pub(crate) mod prefix;
pub(crate) mod prompt;
pub(crate) mod smop;
pub(crate) mod vpt;
