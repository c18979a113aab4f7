//! Bytes on disk: safetensors, adapter directories, checkpoints, the Hub cache.
//!
//! This crate knows names, types, shapes and bytes, and nothing of tensors that compute. Whatever it
//! reads may be damaged or hostile: sizes are bounded by [`Limits`] before parsing, and every fault
//! is an [`Error`] that says what was expected, found, where, and what to do. Whatever it writes is
//! written aside, synced and renamed, through the trait [`disk::Disk`].

mod absent;
pub mod adapter;
pub mod atomic;
pub mod checkpoint;
pub mod disk;
mod download;
mod error;
mod head;
mod header;
pub mod hub;
pub mod json;
mod limits;
mod paths;
mod pickle;
pub mod process;
pub mod run;
mod setup;
pub mod sim;
#[cfg(test)]
mod testing;
mod weights;
mod write;

pub use adapter::{
    AdapterFiles, AdapterForm, is_adapter, read_adapter, read_adapter_config, write_adapter, write_adapter_as,
};
pub use atomic::write_atomic;
pub use error::{Error, Result};
pub use head::{HEAD_CONFIG, HEAD_WEIGHTS, SavedHead, read_head};
pub use header::Dtype;
pub use json::{python_json, read_config, read_json};
pub use limits::Limits;
pub use weights::{RawTensor, Weights};
pub use write::{Body, Entry, write_model, write_safetensors};
