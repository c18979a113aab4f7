//! Limits on what a file may ask of us. Sizes are checked before parsing, so that a hostile header
//! costs no more than its own bytes. Every error names the limit that `--limit NAME=N` raises.

use crate::error::{Error, Result};
use std::path::Path;

/// Upper bounds, all inclusive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a safetensors header.
    pub safetensors_header: u64,
    /// Tensors in one safetensors file.
    pub tensors: u64,
    /// Dimensions of one tensor.
    pub dims: u64,
    /// Bytes of one tensor name.
    pub name: u64,
    /// Bytes of a config, generation config, manifest or adapter config.
    pub config_json: u64,
    /// Bytes of a `*.safetensors.index.json`.
    pub index_json: u64,
    /// Bytes of a `tokenizer.json`.
    pub tokenizer_json: u64,
    /// Nesting of any JSON.
    pub json_depth: u64,
    /// Bytes of an adapter's weight file.
    pub adapter_file: u64,
    /// Bytes of one line of `events.jsonl`.
    pub event_line: u64,
}

const MIB: u64 = 1 << 20;

impl Default for Limits {
    fn default() -> Self {
        Self {
            safetensors_header: 32 * MIB,
            tensors: 100_000,
            dims: 8,
            name: 512,
            config_json: 4 * MIB,
            index_json: 32 * MIB,
            tokenizer_json: 128 * MIB,
            json_depth: 64,
            adapter_file: 4096 * MIB,
            event_line: MIB,
        }
    }
}

impl Limits {
    /// The names that [`Limits::set`] takes.
    pub const NAMES: [&'static str; 10] = [
        "safetensors_header",
        "tensors",
        "dims",
        "name",
        "config_json",
        "index_json",
        "tokenizer_json",
        "json_depth",
        "adapter_file",
        "event_line",
    ];

    /// Changes one limit by name, as `--limit NAME=N` does. An unknown name is an error listing all.
    pub fn set(&mut self, name: &str, value: u64) -> Result<()> {
        let slot = match name {
            "safetensors_header" => &mut self.safetensors_header,
            "tensors" => &mut self.tensors,
            "dims" => &mut self.dims,
            "name" => &mut self.name,
            "config_json" => &mut self.config_json,
            "index_json" => &mut self.index_json,
            "tokenizer_json" => &mut self.tokenizer_json,
            "json_depth" => &mut self.json_depth,
            "adapter_file" => &mut self.adapter_file,
            "event_line" => &mut self.event_line,
            _ => {
                return Err(Error::Request(format!(
                    "unknown limit `{name}`; the limits are {}",
                    Self::NAMES.join(", ")
                )));
            }
        };
        *slot = value;
        Ok(())
    }
}

/// Fails when `found` is above `max`.
pub(crate) fn check(
    path: &Path,
    what: &'static str,
    limit: &'static str,
    max: u64,
    found: u64,
) -> Result<()> {
    if found <= max {
        return Ok(());
    }
    Err(Error::Limit { path: path.to_owned(), what, limit, max, found })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_name_can_be_set_and_no_other() {
        for name in Limits::NAMES {
            let mut limits = Limits::default();
            limits.set(name, 7).unwrap();
            assert_ne!(limits, Limits::default(), "{name}");
        }
        assert!(Limits::default().set("nmae", 1).is_err());
    }

    #[test]
    fn the_error_names_the_limit() {
        let e = check(Path::new("x"), "rank", "dims", 8, 9).unwrap_err().to_string();
        assert!(e.contains("dims = 8") && e.contains("--limit dims=N"), "{e}");
        assert!(check(Path::new("x"), "rank", "dims", 8, 8).is_ok());
    }
}
