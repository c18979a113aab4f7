//! Setups of AdapterHub: a fusion in a directory of its own beside those of the adapters that it fuses.
//!
//! `adapter_setup.json` lies in the directory around them all. Either that directory or the fusion's own may be named; what is
//! read is one adapter: `{"adapters": [{"config": …, "name": …}, …], "fusion_config": …, "name": …}` and all tensors.

use crate::adapter::{AdapterFiles, AdapterForm, own_weights, read_adapter_config, weights_of};
use crate::error::{Error, Result};
use crate::head::read_head;
use crate::json::read_config;
use crate::limits::Limits;
use crate::paths;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const SETUP: &str = "adapter_setup.json";
const CONFIG: &str = "adapter_fusion_config.json";
const WEIGHTS: &str = "model_adapter_fusion.safetensors";
const PICKLE: &str = "pytorch_model_adapter_fusion.bin";

/// The directory of the fusion that `dir` is, or holds as a setup.
pub(crate) fn fusion_in(dir: &Path) -> Result<Option<PathBuf>> {
    if dir.join(CONFIG).exists() {
        return Ok(Some(dir.to_owned()));
    }
    if !dir.join(SETUP).exists() {
        return Ok(None);
    }
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join(CONFIG).exists())
        .collect();
    found.sort();
    match &found[..] {
        [one] => Ok(Some(one.clone())),
        [] => Err(Error::missing(
            dir,
            "a setup of AdapterHub without a fusion: name the directory of one of its adapters",
        )),
        several => Err(Error::missing(
            dir,
            format!("a setup of {} fusions: name the directory of one of them", several.len()),
        )),
    }
}

/// The configuration of a fusion and its adapters, and the directories of these.
pub(crate) fn read_fusion_config(dir: &Path, limits: &Limits) -> Result<(Value, Vec<PathBuf>)> {
    let path = dir.join(CONFIG);
    paths::allowed_link(dir, &path)?;
    let config = read_config(&path, limits)?;
    let names: Vec<&str> = match config.get("adapter_names").or_else(|| config.get("name")) {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        Some(Value::String(names)) => names.split(',').collect(),
        _ => Vec::new(),
    };
    if names.is_empty() {
        return Err(Error::malformed(&path, "expected `adapter_names`, the adapters that are fused"));
    }
    let around = dir.join("..");
    let (mut adapters, mut dirs) = (Vec::new(), Vec::new());
    for name in names {
        let own = paths::beneath(&around, name, &path)?;
        let (_, adapter) = read_adapter_config(&own, limits)?;
        adapters.push(json!({ "config": adapter.get("config"), "name": name }));
        dirs.push(own);
    }
    let whole =
        json!({ "adapters": adapters, "fusion_config": config.get("config"), "name": config.get("name") });
    Ok((whole, dirs))
}

/// Reads a fusion and its adapters.
pub(crate) fn read_fusion(dir: &Path, limits: &Limits) -> Result<AdapterFiles> {
    let (config, dirs) = read_fusion_config(dir, limits)?;
    let mut weights = weights_of(dir, (&[WEIGHTS], &[PICKLE]), limits)?;
    for own in dirs {
        weights.join(own_weights(&own, limits)?);
    }
    Ok(AdapterFiles { form: AdapterForm::AdapterHub, config, weights, head: read_head(dir, limits)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::read_adapter;
    use crate::write::Entry;
    use std::collections::BTreeMap;

    fn json_at(path: &Path, value: &Value) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, value.to_string()).unwrap();
    }

    #[test]
    fn a_fusion_is_read_with_its_adapters() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let tensor = |path: PathBuf, name: &str| {
            crate::write_safetensors(&path, &[Entry::f32(name, &[1], &[2.0])], &BTreeMap::new()).unwrap();
        };
        json_at(&at("adapter_setup.json"), &json!({ "adapter_setup": {} }));
        let e = read_adapter(dir.path(), &Limits::default()).unwrap_err().to_string();
        assert!(e.contains("without a fusion"), "{e}");
        let fusion = json!({ "adapter_names": ["a", "b"], "config": { "query": true }, "name": "a,b" });
        json_at(&at("a,b/adapter_fusion_config.json"), &fusion);
        tensor(at("a,b/model_adapter_fusion.safetensors"), "x.adapter_fusion_layer.a,b.query.weight");
        for name in ["a", "b"] {
            let config = json!({ "config": { "reduction_factor": 4 }, "name": name, "model_type": "bert" });
            json_at(&at(&format!("{name}/adapter_config.json")), &config);
            tensor(at(&format!("{name}/adapter.safetensors")), &format!("x.adapters.{name}.adapter_up.bias"));
        }
        for path in [dir.path().to_owned(), at("a,b")] {
            let found = read_adapter(&path, &Limits::default()).unwrap();
            assert_eq!((found.form, found.weights.len()), (AdapterForm::AdapterHub, 3));
            assert_eq!(
                found.config["adapters"][1],
                json!({ "config": { "reduction_factor": 4 }, "name": "b" })
            );
            assert_eq!(found.config["fusion_config"], fusion["config"]);
        }
        json_at(&at("a,b/adapter_fusion_config.json"), &json!({ "adapter_names": ["../c"], "name": "c" }));
        let e = read_adapter(dir.path(), &Limits::default()).unwrap_err().to_string();
        assert!(e.contains("plain file name"), "{e}");
    }
}
