//! AdapterHub's directories, as its library wrote them and as we write them.

mod fixtures;

use std::path::{Path, PathBuf};

use engraft_method::{load_adapter, save_adapter};
use engraft_store::{HEAD_CONFIG, HEAD_WEIGHTS, Limits, Weights, read_adapter};
use engraft_train::{HubModel, Parts, adapter_parts, label_names, write_hub_files};
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

/// What ours lacks, adds or says otherwise; what the model is called is left open, and so are numbers' forms.
fn differs(old: &Value, new: &Value) -> Option<String> {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            // The library leaves the name of a fusion out where it follows from those of its adapters.
            if let Some(key) = new.keys().find(|key| !old.contains_key(*key) && *key != "kwargs") {
                return Some(format!("{key} is {} and was not there", new[key]));
            }
            let pairs = old.iter().filter(|(key, _)| *key != "model_name");
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
    let (mut count, mut setups, mut heads, mut failures) = (0, 0, 0, Vec::new());
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
        let read = read_adapter(&from, &Limits::default()).unwrap();
        let loaded = fixtures::model_of(&model, &read);
        let (sites, info) = (loaded.model.sites(), loaded.model.info());
        let parts = adapter_parts(&read, loaded.model.as_ref()).unwrap();
        let adapter = load_adapter(&parts.config, parts.tensors, sites, info).unwrap();
        let (config, tensors) =
            save_adapter(&adapter.adapter, &adapter.methods, &adapter.train_also, "", sites, info).unwrap();
        let out = tempfile::tempdir().unwrap();
        let is_direft = config["config"].get("subtract_projection") == Some(&Value::Bool(false));
        let labels = label_names(&from).unwrap();
        let of = HubModel {
            model: loaded.model.as_ref(),
            config: &loaded.config,
            name: meta["model_name"].as_str().unwrap_or_default(),
            labels: labels.as_deref(),
        };
        let written = write_hub_files(out.path(), &config, tensors, &of);
        if is_direft {
            // The library does not read from a file that P·h stays.
            assert!(written.unwrap_err().to_string().contains("direft"), "{name}");
            continue;
        }
        let left_out = written.unwrap();
        // A flexible head is written as that of the model's class, and one that is the model's own not at all.
        let other_head = ["flexible", "of_model"].iter().any(|form| meta["head"] == *form);
        heads += usize::from(from.join(HEAD_CONFIG).exists() && !other_head);
        if !left_out.is_empty() {
            failures.push(format!("{name}: {left_out:?} left out"));
        }
        for old in files(&from) {
            let place = old.strip_prefix(&from).unwrap();
            if other_head && [HEAD_CONFIG, HEAD_WEIGHTS].iter().any(|name| place == Path::new(name)) {
                continue;
            }
            let new = out.path().join(place);
            let problem = match (new.exists(), old.extension().and_then(|e| e.to_str())) {
                (false, _) => Some("is not written".to_owned()),
                (true, Some("json")) => {
                    let read = |path: &Path| serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
                    let (mut old, new): (Value, Value) = (read(&old), read(&new));
                    if meta["head"] == "flexible" {
                        old["model_class"] = info.class.into();
                    }
                    differs(&old, &new)
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
    assert!(!all || count > 60 && setups > 3 && heads > 3, "{count} cases, {setups} setups, {heads} heads");
}

/// A committed case's adapter, copied, with its head's configuration changed.
fn with_head(case: &str, change: impl Fn(&mut Value)) -> tempfile::TempDir {
    let (dir, from) =
        (tempfile::tempdir().unwrap(), fixtures::golden().join("cases").join(case).join("adapter"));
    for file in files(&from) {
        std::fs::copy(&file, dir.path().join(file.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join(HEAD_CONFIG);
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
    dir
}

fn parts(dir: &Path, model: &str) -> engraft_train::Result<Parts> {
    let files = read_adapter(dir, &Limits::default())?;
    let loaded = fixtures::model_of(&fixtures::golden().join("models").join(model), &files);
    adapter_parts(&files, loaded.model.as_ref())
}

#[test]
fn a_head_that_computes_something_else_is_told() {
    let error = |change: &dyn Fn(&mut Value), case: &str, model: &str| {
        parts(with_head(case, change).path(), model).map(|_| ()).unwrap_err().to_string()
    };
    let flexible = "bert__seq_bn_flexible";
    let pooled = error(&|c| c["config"]["use_pooler"] = false.into(), flexible, "bert");
    assert!(pooled.contains("use_pooler false") && pooled.contains("without it"), "{pooled}");
    let layers = error(&|c| c["config"]["layers"] = 2.into(), flexible, "bert");
    assert!(layers.contains("layers 2"), "{layers}");
    let asks = error(&|c| c["config"]["head_type"] = "question_answering".into(), flexible, "bert");
    assert!(asks.contains("question_answering"), "{asks}");
    let class = |c: &mut Value| c["model_class"] = "BertForMultipleChoice".into();
    assert!(error(&class, "bert__seq_bn_head", "bert").contains("BertForMultipleChoice"));
    // The base's own head over words takes the place of another.
    let words = with_head("gpt2__seq_bn_flexible", |c| c["config"]["head_type"] = "causal_lm".into());
    let found = parts(words.path(), "gpt2").unwrap();
    assert!(found.notes[0].contains("left out") && found.config.get("modules_to_save").is_none());
    // What the class has not trained is no part of the adapter.
    let own = parts(&fixtures::golden().join("cases/llama__seq_bn_head/adapter"), "llama").unwrap();
    assert!(own.notes.is_empty() && own.tensors.iter().all(|(name, _)| !name.contains("lm_head")));
    let names = label_names(&fixtures::golden().join("cases/bert__seq_bn_head/adapter")).unwrap();
    assert_eq!(names.unwrap(), ["no", "yes", "maybe"]);
}

#[test]
fn an_adapter_fits_the_trunk_alone_and_a_class_with_a_head() {
    for (case, model) in [("bert__seq_bn", "bert_encoder"), ("bert_encoder__double_seq_bn", "bert")] {
        let files =
            read_adapter(&fixtures::golden().join("cases").join(case).join("adapter"), &Limits::default())
                .unwrap();
        let loaded = fixtures::model_of(&fixtures::golden().join("models").join(model), &files);
        let parts = adapter_parts(&files, loaded.model.as_ref()).unwrap();
        let read = load_adapter(&parts.config, parts.tensors, loaded.model.sites(), loaded.model.info());
        assert!(read.is_ok_and(|read| read.dead.is_empty()), "{case}");
    }
}
