//! AdapterHub's directories, as its library wrote them and as we write them.

mod fixtures;

use std::path::{Path, PathBuf};

use engraft_method::{load_adapter, save_adapter};
use engraft_nn::weight::Storage;
use engraft_store::{Limits, Weights, read_adapter};
use engraft_tensor::frozen::Precision;
use engraft_train::write_hub_files;
use serde_json::Value;

/// Every file of a directory and those below it, by its place.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

/// What ours lacks or says otherwise; what the library says of the model's class is left open, and so are numbers' forms.
fn differs(old: &Value, new: &Value) -> Option<String> {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            let open = |key: &String| ["model_class", "model_name"].contains(&key.as_str());
            let pairs = old.iter().filter(|(key, _)| !open(key));
            let mut found = pairs.filter_map(|(key, value)| {
                differs(value, new.get(key).unwrap_or(&Value::Null)).map(|what| format!("{key}: {what}"))
            });
            found.next()
        }
        (Value::Array(old), Value::Array(new)) if old.len() == new.len() => {
            old.iter().zip(new).find_map(|(old, new)| differs(old, new))
        }
        _ if old == new || old.as_f64().is_some() && old.as_f64() == new.as_f64() => None,
        _ => Some(format!("was {old} and is {new}")),
    }
}

#[test]
fn directories_are_written_as_the_library_writes_them() {
    let root = fixtures::golden();
    let (mut count, mut setups, mut failures) = (0, 0, Vec::new());
    for name in fixtures::directories(&root.join("cases")) {
        let dir = root.join("cases").join(&name);
        let meta: Value = serde_json::from_slice(&std::fs::read(dir.join("case.json")).unwrap()).unwrap();
        if meta["format"] != "adapterhub" || !fixtures::wanted(&name) {
            continue;
        }
        count += 1;
        let from = dir.join("adapter");
        setups += usize::from(from.join("adapter_setup.json").exists());
        let model = root.join("models").join(meta["model"].as_str().unwrap());
        let loaded = fixtures::model(&model, Precision::F32, Storage::Dense);
        let (sites, info) = (loaded.model.sites(), loaded.model.info());
        let read = read_adapter(&from, &Limits::default()).unwrap();
        let adapter = load_adapter(&read.config, fixtures::tensors(&read.weights), sites, info).unwrap();
        let (config, tensors) =
            save_adapter(&adapter.adapter, &adapter.methods, &adapter.train_also, "", sites, info).unwrap();
        let out = tempfile::tempdir().unwrap();
        let left_out = write_hub_files(out.path(), &config, tensors, info).unwrap();
        if !left_out.is_empty() {
            failures.push(format!("{name}: {left_out:?} left out"));
        }
        for old in files(&from) {
            let place = old.strip_prefix(&from).unwrap();
            let new = out.path().join(place);
            let problem = match (new.exists(), old.extension().and_then(|e| e.to_str())) {
                (false, _) => Some("is not written".to_owned()),
                (true, Some("json")) => {
                    let read = |path: &Path| serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
                    differs(&read(&old), &read(&new))
                }
                (true, _) => {
                    let read = |path: &Path| Weights::open_file(path, &Limits::default()).unwrap();
                    let (old, new) = (read(&old), read(&new));
                    let same = |(name, t): (&str, &engraft_store::RawTensor)| {
                        new.get(name).is_some_and(|n| n.shape == t.shape && n.bytes() == t.bytes())
                    };
                    let count = old.len() == new.len();
                    (!count || !old.iter().all(same)).then(|| "holds other tensors".to_owned())
                }
            };
            failures.extend(problem.map(|problem| format!("{name}: {}: {problem}", place.display())));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let all = std::env::var("ENGRAFT_ONLY").is_err();
    assert!(!all || count > 60 && setups > 3, "{count} cases, {setups} setups");
}
