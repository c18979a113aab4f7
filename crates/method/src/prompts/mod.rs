//! Trained rows before tokens, or before keys and values.

pub(crate) mod apt;
pub(crate) mod cartridge;
pub(crate) mod dept;
pub(crate) mod idpg;
pub(crate) mod llama_adapter;
pub(crate) mod llama_adapter_v2;
pub(crate) mod lpt;
pub(crate) mod mpt;
pub(crate) mod p_tuning;
pub(crate) mod prefix;
mod projector;
pub(crate) mod prompt;
pub(crate) mod smop;
pub(crate) mod transfer;
pub(crate) mod vpt;
pub(crate) mod xprompt;
