//! Bytes on disk: safetensors, adapter directories, checkpoints, the Hub cache.
