//! Several kinds of change in one adapter, by design.

mod from_peft;
mod lora;
pub(crate) mod mam;
mod prefix;
mod prompt;
pub(crate) mod propetl;
pub(crate) mod s4;
mod union;
pub(crate) mod unipelt;

pub(crate) use from_peft::from_peft;
pub(crate) use union::{Alone, alone, hub_prefix, hub_prompt};
