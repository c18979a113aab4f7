//! Every adapter that `peft` and `adapters` made: its logits, its merged logits, and the file written back.
//!
//! The cases are `tests/golden/cases` and, where they are there, `../shared/oracle/cases` (see tools/golden/README.md).

mod fixtures;

use std::path::Path;
use std::sync::{Arc, Mutex};

use engraft_method::{LoadedAdapter, load_adapter, save_adapter, stored_as};
use engraft_model::Loaded;
use engraft_nn::weight::Storage;
use engraft_nn::{
    Adapter, Builder, Init, Inputs, Kind, KvCache, Layout, Pass, Patch, Replacement, merged_tensors,
};
use engraft_store::{Dtype, Limits, read_adapter};
use engraft_tensor::frozen::Precision;
use engraft_tensor::{Tensor, no_grad};
use engraft_train::adapter_parts;
use serde_json::Value;

#[test]
fn committed_cases() {
    let count = all_cases(&fixtures::golden());
    assert!(count >= 200 || std::env::var("ENGRAFT_ONLY").is_ok(), "only {count} cases");
}

#[test]
fn cases_from_outside() {
    match fixtures::oracle() {
        Some(root) => assert!(all_cases(&root) > 0),
        None => println!("skipped: ../shared/oracle is not there"),
    }
}

/// Checks all cases below `root` and reports every failure; gives their number.
fn all_cases(root: &Path) -> usize {
    let names = fixtures::directories(&root.join("cases"));
    let mut failures = Vec::new();
    for name in names.iter().filter(|name| fixtures::wanted(name)) {
        failures.extend(case(root, name).into_iter().map(|problem| format!("{name}: {problem}")));
    }
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), names.len(), failures.join("\n"));
    names.len()
}

/// The problems of one case.
fn case(root: &Path, name: &str) -> Vec<String> {
    let dir = root.join("cases").join(name);
    let meta: Value = serde_json::from_slice(&std::fs::read(dir.join("case.json")).unwrap()).unwrap();
    let base = meta["model"].as_str().unwrap();
    let inputs = meta["inputs"].as_str().unwrap_or("inputs.safetensors");
    let inputs =
        if inputs.contains('/') { dir.join(inputs) } else { root.join("inputs").join(base).join(inputs) };
    let grid = fixtures::grid(&inputs);
    let files = read_adapter(&dir.join("adapter"), &Limits::default()).unwrap();
    let loaded = fixtures::model_of(&root.join("models").join(base), &files);
    let (sites, info) = (loaded.model.sites(), loaded.model.info());
    let parts = adapter_parts(&files, loaded.model.as_ref());
    let parts = match parts.map_err(|e| e.to_string()) {
        Ok(parts) => parts,
        Err(e) => return vec![e],
    };
    let adapter = match load_adapter(&parts.config, parts.tensors.clone(), sites, info) {
        Ok(adapter) => adapter,
        Err(e) => return vec![e.to_string()],
    };
    let mut problems =
        round_trip(&adapter, &parts.config, &parts.tensors, &loaded, meta["copies_of_tables"] == true);
    problems.extend(parts.notes);
    problems.extend(files.weights.iter().filter_map(|(key, raw)| {
        let stored = stored_as(&adapter.methods, key, sites);
        // Other whole numbers are compared with their type, as tensors.
        let whole = [Dtype::I32, Dtype::I64].contains(&raw.dtype);
        let same = format!("{stored:?}") == raw.dtype.to_string();
        (!whole && !same).then(|| format!("{key} is {} and saved as {stored:?}", raw.dtype))
    }));
    let methods = adapter.methods;
    let adapted = Arc::new(adapter.adapter);
    let mut compare = |adapter: &Arc<Adapter>, file: &str, tolerance: &str| {
        let cx = Pass::new(grid.inputs.layout.clone(), Some(adapter.clone()));
        let first = || loaded.model.features(&grid.inputs, &Pass::new(grid.inputs.layout.clone(), None));
        let looked = methods.iter().try_for_each(|(m, _)| m.before_forward(adapter, &first, &cx));
        let logits = match looked.and_then(|()| no_grad(|| loaded.model.forward(&grid.inputs, &cx))) {
            Ok(logits) => grid.unpack(&logits, info.task.per_sequence()),
            Err(e) => return problems.push(format!("{file}: {e}")),
        };
        let off = fixtures::difference(&logits, &dir.join(file));
        if f64::from(off) > meta[tolerance].as_f64().unwrap() {
            problems.push(format!("{file}: off by {off:e}"));
        }
    };
    compare(&adapted, "logits.safetensors", "tolerance");
    if meta["merge"] == true {
        match merged(&adapted, &loaded) {
            Ok(merged) => compare(&merged, "merged_logits.safetensors", "merge_tolerance"),
            Err(e) => problems.push(e.to_string()),
        }
    }
    problems
}

/// Adapters that look at the text that is given go on with it as `peft` does: all texts of a case at once, with a cache.
#[test]
fn texts_are_continued_as_by_peft() {
    let root = fixtures::golden();
    let mut problems = Vec::new();
    for name in fixtures::directories(&root.join("cases")).iter().filter(|name| fixtures::wanted(name)) {
        let dir = root.join("cases").join(name);
        let meta: Value = serde_json::from_slice(&std::fs::read(dir.join("case.json")).unwrap()).unwrap();
        let Some(texts) = meta["generation"].as_array() else { continue };
        let ids = |text: &Value, key: &str| -> Vec<i64> {
            text[key].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
        };
        let base = root.join("models").join(meta["model"].as_str().unwrap());
        let loaded = fixtures::model(&base, Precision::F32, Storage::Dense);
        let files = read_adapter(&dir.join("adapter"), &Limits::default()).unwrap();
        let (sites, info) = (loaded.model.sites(), loaded.model.info());
        let adapter = load_adapter(&files.config, fixtures::tensors(&files.weights), sites, info).unwrap();
        let expected: Vec<Vec<i64>> = texts.iter().map(|text| ids(text, "new_tokens")).collect();
        let prompts = texts.iter().map(|text| ids(text, "prompt")).collect();
        let found = continued(&loaded, &Arc::new(adapter.adapter), prompts, expected[0].len());
        if found != expected {
            problems.push(format!("{name}: {found:?} in place of {expected:?}"));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// The likeliest `count` tokens after each text, one by one.
fn continued(loaded: &Loaded, adapter: &Arc<Adapter>, texts: Vec<Vec<i64>>, count: usize) -> Vec<Vec<i64>> {
    let model = &loaded.model;
    let cache = Arc::new(Mutex::new(KvCache::new(model.info().layers, texts.len(), 64)));
    let (mut found, mut next) = (vec![Vec::new(); texts.len()], texts.clone());
    for _ in 0..count {
        let lengths: Vec<usize> = next.iter().map(Vec::len).collect();
        let before = |i: usize| if found[i].is_empty() { 0 } else { texts[i].len() + found[i].len() - 1 };
        let positions =
            (0..texts.len()).flat_map(|i| (before(i)..before(i) + lengths[i]).map(|at| at as i32)).collect();
        let layout = Layout::new(&lengths, positions).unwrap();
        let ids: Vec<i64> = next.concat();
        let rows = ids.len();
        let inputs = Inputs::tokens(Tensor::from_i64(ids, [rows]).unwrap(), None, layout.clone());
        let cx = Pass::new(layout.clone(), Some(adapter.clone())).cached(cache.clone());
        let logits = no_grad(|| model.forward(&inputs, &cx)).unwrap();
        let (width, logits) = (logits.width(), logits.to_vec().unwrap());
        for (i, rows) in layout.sequences().iter().enumerate() {
            let row = &logits[(rows.end - 1) * width..rows.end * width];
            let best = (0..width).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i64;
            found[i].push(best);
            next[i] = vec![best];
        }
    }
    found
}

/// An adapter that only replaces tensors by what merging makes of them.
fn merged(adapter: &Adapter, loaded: &Loaded) -> engraft_nn::Result<Arc<Adapter>> {
    let sites = loaded.model.sites();
    let mut b = Builder::new(sites, loaded.model.info(), 0);
    for m in merged_tensors(sites, adapter)? {
        // As the engine sees it, not as the file stores it.
        let transposed = matches!(m.site.kind, Kind::Linear { transposed: true, .. });
        let value = if transposed { m.value.t()? } else { m.value };
        let shape = value.shape().to_vec();
        let param = b.fixed(&m.site.path, &shape, Init::Values(value))?;
        let patch = match m.site.kind {
            Kind::Vector { .. } => Patch::Vector(Box::new(Replacement(param))),
            _ => Patch::Weight(Box::new(Replacement(param))),
        };
        b.patch(m.site.id, patch)?;
    }
    Ok(Arc::new(b.finish()))
}

/// Saved again, the adapter has the same keys, shapes, values and configuration; `copies` says that its file has those of
/// tables too.
fn round_trip(
    adapter: &LoadedAdapter,
    config: &Value,
    tensors: &[(String, Tensor)],
    loaded: &Loaded,
    copies: bool,
) -> Vec<String> {
    let base = config["base_model_name_or_path"].as_str().unwrap_or("");
    let (sites, info) = (loaded.model.sites(), loaded.model.info());
    let saved = save_adapter(&adapter.adapter, &adapter.methods, &adapter.train_also, base, sites, info);
    let (new_config, new_tensors) = match saved {
        Ok(saved) => saved,
        Err(e) => return vec![format!("saving: {e}")],
    };
    let mut problems = Vec::new();
    for (key, value) in tensors {
        match new_tensors.iter().find(|(k, _)| k == key) {
            None => problems.push(format!("{key} is not saved")),
            Some((_, new))
                if (new.shape(), new.dtype()) != (value.shape(), value.dtype())
                    || new.to_bytes().unwrap() != value.to_bytes().unwrap() =>
            {
                problems.push(format!("{key} is saved otherwise"));
            }
            Some(_) => {}
        }
    }
    // Most were saved with peft's `save_embedding_layers` off; by default peft writes the table too, and so do we.
    let table = |key: &str| !copies && key.ends_with(".base_layer.weight");
    let unknown = new_tensors.iter().filter(|(key, _)| !table(key) && !tensors.iter().any(|(k, _)| k == key));
    problems.extend(unknown.map(|(key, _)| format!("{key} is saved and was not there")));
    problems.extend(configs_differ(config, &new_config));
    problems
}

/// Keys whose values differ. What a file does not say, ours may.
fn configs_differ(old: &Value, new: &Value) -> Vec<String> {
    // What AdapterHub says of the model.
    let free = ["model_class", "model_name"];
    // Written as the choice it stands for, with the same meaning.
    let same = |a: &Value, b: &Value| a == b || a.as_f64().is_some() && a.as_f64() == b.as_f64();
    let differs = |(key, value): (&String, &Value)| {
        let equal = free.contains(&key.as_str()) || same(value, &new[key]);
        (!equal).then(|| format!("`{key}` was {value} and is {}", new[key]))
    };
    old.as_object().unwrap().iter().filter_map(differs).collect()
}
