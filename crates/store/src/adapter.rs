//! Adapter directories: `adapter_config.json` and `adapter_model.safetensors`, as `peft` writes them.
//!
//! AdapterHub's form (`adapter_config.json` without `peft_type`, weights often pickled in
//! `pytorch_adapter.bin`) is recognised, and so are its fusions (`setup.rs`). Writing replaces the weights first and the config last, each
//! whole, so that a crash leaves a directory that loads or one whose config is still the old one.

use crate::atomic::{discard, parent, write_aside};
use crate::disk::{Disk, RealDisk};
use crate::error::{Error, Result};
use crate::head::{SavedHead, read_head};
use crate::json::{python_json, read_config};
use crate::limits::{Limits, check};
use crate::paths;
use crate::pickle::convert_once;
use crate::setup;
use crate::weights::Weights;
use crate::write::{Body, Entry};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Name of the config in both forms.
pub const CONFIG: &str = "adapter_config.json";
/// Name of the weights as `peft` writes them.
pub const WEIGHTS: &str = "adapter_model.safetensors";
const HUB_WEIGHTS: &str = "adapter.safetensors";
const PICKLES: [&str; 2] = ["adapter_model.bin", "pytorch_adapter.bin"];

/// Whose conventions an adapter directory follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterForm {
    /// `peft`, and our own methods that use its layout: the config has `peft_type`.
    Peft,
    /// AdapterHub's `adapters` library.
    AdapterHub,
}

/// An adapter directory as read.
#[derive(Debug)]
pub struct AdapterFiles {
    /// Which form it has.
    pub form: AdapterForm,
    /// The whole config.
    pub config: Value,
    /// Its tensors by name.
    pub weights: Weights,
    /// The head that AdapterHub's library has saved beside it.
    pub head: Option<SavedHead>,
}

/// Reads an adapter directory.
pub fn read_adapter(dir: &Path, limits: &Limits) -> Result<AdapterFiles> {
    if let Some(fusion) = setup::fusion_in(dir)? {
        return setup::read_fusion(&fusion, limits);
    }
    let (form, config) = read_adapter_config(dir, limits)?;
    Ok(AdapterFiles { form, config, weights: own_weights(dir, limits)?, head: read_head(dir, limits)? })
}

/// The tensors of an adapter's directory, without those of a head beside it.
pub(crate) fn own_weights(dir: &Path, limits: &Limits) -> Result<Weights> {
    weights_of(dir, (&[WEIGHTS, HUB_WEIGHTS], &PICKLES), limits)
}

/// Whether `dir` looks like an adapter's directory.
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(CONFIG).is_file() || matches!(setup::fusion_in(dir), Ok(Some(_)))
}

/// The tensors in the file of a directory that has one of these names, `pickles` being those of files that are not read.
pub(crate) fn weights_of(
    dir: &Path,
    (names, pickles): (&[&str], &[&str]),
    limits: &Limits,
) -> Result<Weights> {
    let path = weights_path(dir, names, pickles)?;
    let size = path.metadata().map_err(|e| Error::io("read", &path, e))?.len();
    check(&path, "file size in bytes", "adapter_file", limits.adapter_file, size)?;
    Weights::open_file(&path, limits)
}

/// Reads only the config of an adapter directory.
pub fn read_adapter_config(dir: &Path, limits: &Limits) -> Result<(AdapterForm, Value)> {
    if let Some(fusion) = setup::fusion_in(dir)? {
        return Ok((AdapterForm::AdapterHub, setup::read_fusion_config(&fusion, limits)?.0));
    }
    let path = dir.join(CONFIG);
    if !path.exists() {
        let text =
            format!("expected an adapter directory with {CONFIG} and {WEIGHTS}{}", adapters_below(dir));
        return Err(Error::missing(&path, text));
    }
    paths::allowed_link(dir, &path)?;
    let config = read_config(&path, limits)?;
    let Value::Object(map) = &config else {
        return Err(Error::malformed(&path, "expected a JSON object"));
    };
    let form = match map.get("peft_type") {
        Some(Value::String(_)) => AdapterForm::Peft,
        Some(other) => {
            let text = format!("`peft_type` must be a string such as \"LORA\", found {other}");
            return Err(Error::malformed(&path, text));
        }
        // AdapterHub writes these keys, whatever the method.
        None if map.contains_key("model_type")
            || map.contains_key("config")
            || map.contains_key("architecture") =>
        {
            AdapterForm::AdapterHub
        }
        None => {
            let text = "expected `peft_type` (peft) or `config` and `model_type` (AdapterHub), found neither";
            return Err(Error::malformed(&path, text));
        }
    };
    Ok((form, config))
}

/// Words on the adapters one level below: `peft` saves an adapter that has a name of its own in a folder of that name.
fn adapters_below(dir: &Path) -> String {
    let below = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = below.filter(|path| path.join(CONFIG).is_file()).collect();
    found.sort();
    match found.first() {
        Some(one) if found.len() == 1 => format!("; there is one in {}", one.display()),
        Some(one) => format!("; there are {} below it, the first in {}", found.len(), one.display()),
        None => String::new(),
    }
}

fn weights_path(dir: &Path, names: &[&str], pickles: &[&str]) -> Result<PathBuf> {
    for name in names {
        let path = dir.join(name);
        if path.exists() {
            paths::allowed_link(dir, &path)?;
            return Ok(path);
        }
    }
    match pickles.iter().find(|name| dir.join(name).exists()) {
        Some(name) => {
            Err(Error::missing(dir, format!("the weights are only in {}", convert_once(name, names[0]))))
        }
        None => Err(Error::missing(&dir.join(names[0]), "the adapter's weights are not there")),
    }
}

/// Writes an adapter directory in `peft`'s bytes, creating it when needed. Other files in it stay.
pub fn write_adapter(dir: &Path, config: &Value, entries: &[Entry]) -> Result<()> {
    write_adapter_on(&RealDisk, dir, config, entries)
}

/// [`write_adapter`] on a given disk.
pub fn write_adapter_on(disk: &dyn Disk, dir: &Path, config: &Value, entries: &[Entry]) -> Result<()> {
    let weights = Body::safetensors(entries, &BTreeMap::new())?;
    let config = Body::bytes(python_json(config).into_bytes());
    make_dir(disk, dir)?;
    let (weights_to, config_to) = (dir.join(WEIGHTS), dir.join(CONFIG));
    // Both are complete on disk before either name changes.
    let weights_aside = write_aside(disk, &weights_to, &weights)?;
    let config_aside =
        write_aside(disk, &config_to, &config).inspect_err(|_| discard(disk, &weights_aside))?;
    for (aside, to) in [(&weights_aside, &weights_to), (&config_aside, &config_to)] {
        if let Err(e) = disk.rename(aside, to) {
            discard(disk, &weights_aside);
            discard(disk, &config_aside);
            return Err(Error::io("replace", to, e));
        }
        disk.sync_dir(dir).map_err(|e| Error::io("sync", dir, e))?;
    }
    Ok(())
}

/// Writes a directory of an adapter in another form: its configuration and, before it, the weights, under these names.
pub fn write_adapter_as(
    dir: &Path,
    (config_name, config): (&str, &Value),
    weights: Option<(&str, &[Entry])>,
) -> Result<()> {
    make_dir(&RealDisk, dir)?;
    if let Some((name, entries)) = weights {
        crate::write_safetensors(&dir.join(name), entries, &BTreeMap::new())?;
    }
    crate::write_atomic(&dir.join(config_name), python_json(config).as_bytes())
}

/// Creates a directory and those above it, durably.
fn make_dir(disk: &dyn Disk, dir: &Path) -> Result<()> {
    if dir.as_os_str().is_empty() || disk.exists(dir) {
        return Ok(());
    }
    let above = parent(dir);
    make_dir(disk, above)?;
    disk.create_dir(dir, false).map_err(|e| Error::io("create", dir, e))?;
    disk.sync_dir(above).map_err(|e| Error::io("sync", above, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message(dir: &Path) -> String {
        read_adapter(dir, &Limits::default()).unwrap_err().to_string()
    }

    #[test]
    fn written_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("new/deep/adapter");
        let config = json!({"r": 8, "peft_type": "LORA", "lora_dropout": 0.0});
        for value in [1.0, 2.0] {
            write_adapter(&at, &config, &[Entry::f32("w", &[1], &[value])]).unwrap();
            let read = read_adapter(&at, &Limits::default()).unwrap();
            assert_eq!(read.form, AdapterForm::Peft);
            assert_eq!(read.config, config);
            assert_eq!(read.weights.get("w").unwrap().to_f32().unwrap(), [value]);
        }
        assert_eq!(RealDisk.list(&at).unwrap(), [CONFIG, WEIGHTS]);
        let text = std::fs::read_to_string(at.join(CONFIG)).unwrap();
        assert_eq!(text, "{\n  \"lora_dropout\": 0.0,\n  \"peft_type\": \"LORA\",\n  \"r\": 8\n}");
    }

    #[test]
    fn faults_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let set = |text: &str| std::fs::write(dir.path().join(CONFIG), text).unwrap();
        assert!(message(dir.path()).contains("expected an adapter directory"));
        set("{}");
        assert!(message(dir.path()).contains("peft_type"));
        set(r#"{"peft_type": 3}"#);
        assert!(message(dir.path()).contains("found 3"));
        set(r#"{"config": {}, "model_type": "bert"}"#);
        assert!(message(dir.path()).contains("weights are not there"));
        std::fs::write(dir.path().join("pytorch_adapter.bin"), b"x").unwrap();
        assert!(message(dir.path()).contains("convert it once"));
        crate::write_safetensors(
            &dir.path().join(HUB_WEIGHTS),
            &[Entry::f32("w", &[1], &[1.0])],
            &BTreeMap::new(),
        )
        .unwrap();
        assert_eq!(read_adapter(dir.path(), &Limits::default()).unwrap().form, AdapterForm::AdapterHub);
        let tight = Limits { adapter_file: 10, ..Limits::default() };
        let e = read_adapter(dir.path(), &tight).unwrap_err().to_string();
        assert!(e.contains("adapter_file = 10"), "{e}");
    }

    #[test]
    fn adapters_below_are_pointed_at() {
        let dir = tempfile::tempdir().unwrap();
        for (name, said) in [("b", "there is one in"), ("a", "there are 2 below it, the first in")] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join(CONFIG), "{}").unwrap();
            let said = format!("{said} {}", dir.path().join(name).display());
            assert!(message(dir.path()).contains(&said), "{}", message(dir.path()));
        }
    }

    #[test]
    fn mutants_of_a_config_give_an_error_or_a_value() {
        let good = br#"{"peft_type": "LORA", "r": 8, "target_modules": ["q", "v"], "x": {"y": [1.5, null]}}"#;
        let path = Path::new("adapter_config.json");
        let read = (0..3000)
            .filter(|seed| {
                let mutant = crate::testing::Rng::new(*seed).corrupt(good);
                let ours = crate::json::parse_json(path, &mutant, 64).ok();
                assert_eq!(ours, serde_json::from_slice(&mutant).ok(), "seed {seed}");
                ours.is_some()
            })
            .count();
        assert!(read > 100 && read < 2500, "{read}");
    }
}
