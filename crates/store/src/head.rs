//! The head that AdapterHub's library saves beside an adapter: `head_config.json` and `model_head.safetensors`.

use crate::adapter::{AdapterForm, read_adapter_config, weights_of};
use crate::error::{Error, Result};
use crate::json::read_config;
use crate::limits::Limits;
use crate::paths;
use crate::setup;
use crate::weights::Weights;
use serde_json::Value;
use std::path::Path;

/// Name of a head's configuration.
pub const HEAD_CONFIG: &str = "head_config.json";
/// Name of its weights.
pub const HEAD_WEIGHTS: &str = "model_head.safetensors";
const PICKLE: &str = "pytorch_model_head.bin";

/// A head beside an adapter.
#[derive(Debug)]
pub struct SavedHead {
    /// `head_config.json`; null where there is none.
    pub config: Value,
    /// Its tensors, by the names that they have in the model that it was saved from.
    pub weights: Weights,
}

/// The head beside the adapter of `dir`; none beside one that is not of AdapterHub's form. A fusion's lies beside its setup or itself,
/// or is the one that its adapters have in common.
///
/// # Errors
/// Weights that are only there as a pickle, and adapters of a fusion that have heads of their own.
pub fn read_head(dir: &Path, limits: &Limits) -> Result<Option<SavedHead>> {
    let Some(fusion) = setup::fusion_in(dir)? else {
        let ours = is_there(dir) && read_adapter_config(dir, limits)?.0 == AdapterForm::AdapterHub;
        return if ours { head_in(dir, limits).map(Some) } else { Ok(None) };
    };
    let setup = fusion.join("..");
    if let Some(own) = [setup.as_path(), &fusion].into_iter().find(|dir| is_there(dir)) {
        return head_in(own, limits).map(Some);
    }
    let mut found: Option<SavedHead> = None;
    for adapter in setup::read_fusion_config(&fusion, limits)?.1.iter().filter(|dir| is_there(dir)) {
        let head = head_in(adapter, limits)?;
        if found.as_ref().is_some_and(|known| !known.equals(&head)) {
            let text = format!(
                "the adapters of this fusion have heads that differ: put the {HEAD_CONFIG} and {HEAD_WEIGHTS} that belong to it beside \
                 the setup, or take them out of the adapters' directories"
            );
            return Err(Error::missing(dir, text));
        }
        found = Some(head);
    }
    Ok(found)
}

/// Whether a directory holds the weights of a head.
fn is_there(dir: &Path) -> bool {
    [HEAD_WEIGHTS, PICKLE].iter().any(|name| dir.join(name).exists())
}

fn head_in(dir: &Path, limits: &Limits) -> Result<SavedHead> {
    let path = dir.join(HEAD_CONFIG);
    let config = match path.exists() {
        true => {
            paths::allowed_link(dir, &path)?;
            read_config(&path, limits)?
        }
        false => Value::Null,
    };
    Ok(SavedHead { config, weights: weights_of(dir, (&[HEAD_WEIGHTS], &[PICKLE]), limits)? })
}

impl SavedHead {
    fn equals(&self, other: &SavedHead) -> bool {
        let mut all = self.weights.iter();
        self.weights.len() == other.weights.len()
            && all.all(|(name, raw)| {
                other.weights.get(name).is_some_and(|o| o.shape == raw.shape && o.bytes() == raw.bytes())
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write::Entry;
    use serde_json::json;
    use std::collections::BTreeMap;

    fn written(dir: &Path, value: f32) {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join(HEAD_CONFIG), json!({ "num_labels": 3 }).to_string()).unwrap();
        let (values, path) = ([value], dir.join(HEAD_WEIGHTS));
        let entries = [Entry::f32("score.weight", &[1], &values)];
        crate::write_safetensors(&path, &entries, &BTreeMap::new()).unwrap();
    }

    #[test]
    fn a_head_lies_beside_its_adapter() {
        let dir = tempfile::tempdir().unwrap();
        let config = |value: Value| {
            std::fs::write(dir.path().join("adapter_config.json"), value.to_string()).unwrap();
        };
        let read = || read_head(dir.path(), &Limits::default());
        config(json!({ "config": {}, "model_type": "bert" }));
        assert!(read().unwrap().is_none());
        std::fs::write(dir.path().join(PICKLE), b"x").unwrap();
        assert!(read().unwrap_err().to_string().contains("convert it once"));
        written(dir.path(), 1.0);
        let head = read().unwrap().unwrap();
        assert_eq!((head.config["num_labels"].as_u64(), head.weights.len()), (Some(3), 1));
        config(json!({ "peft_type": "LORA" }));
        assert!(read().unwrap().is_none());
    }

    #[test]
    fn a_fusion_has_one_head() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let json_at = |path: &str, value: Value| {
            std::fs::create_dir_all(at(path).parent().unwrap()).unwrap();
            std::fs::write(at(path), value.to_string()).unwrap();
        };
        json_at("adapter_setup.json", json!({ "adapter_setup": {} }));
        json_at("a,b/adapter_fusion_config.json", json!({ "adapter_names": ["a", "b"], "name": "a,b" }));
        for name in ["a", "b"] {
            json_at(&format!("{name}/adapter_config.json"), json!({ "config": {}, "model_type": "bert" }));
            written(&at(name), 1.0);
        }
        let read = || read_head(dir.path(), &Limits::default());
        let value = |head: SavedHead| head.weights.get("score.weight").unwrap().to_f32().unwrap()[0];
        assert_eq!(value(read().unwrap().unwrap()), 1.0);
        written(&at("b"), 2.0);
        assert!(read().unwrap_err().to_string().contains("heads that differ"));
        written(dir.path(), 3.0);
        assert_eq!(value(read().unwrap().unwrap()), 3.0);
    }
}
