//! Several kinds of change in one adapter, by design.

mod lora;
pub(crate) mod mam;
mod prefix;
mod prompt;
pub(crate) mod propetl;
pub(crate) mod s4;
mod union;
pub(crate) mod unipelt;

pub(crate) use union::{Alone, alone};
