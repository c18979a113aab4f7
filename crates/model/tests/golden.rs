//! Logits of every model in `tests/golden` and in the shared fixtures against `transformers`, both paddings; pooled
//! sentence embeddings; greedy generation with the cache.

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};

use common::*;
use engraft_model::{LoadOptions, load};
use engraft_nn::weight::Storage;
use engraft_nn::{Inputs, KvCache, Layout, Model, Pass, Task};
use engraft_tensor::frozen::Precision;
use engraft_tensor::{Tensor, no_grad};
use serde_json::Value;

/// Compares all inputs of a model; gives how many there were.
fn check(root: &Path, name: &str, options: &LoadOptions, tolerance: f32) -> usize {
    let loaded = load(&root.join("models").join(name), options).unwrap_or_else(|e| panic!("{name}: {e}"));
    let dir = root.join("inputs").join(name);
    let mut count = 0;
    for suffix in ["", "_left", "_short", "_size"] {
        let path = dir.join(format!("inputs{suffix}.safetensors"));
        if !path.exists() {
            continue;
        }
        let batch = read_batch(&path);
        let expected = read_logits(&dir.join(format!("base_logits{suffix}.safetensors")), &batch.places);
        let found = run(loaded.model.as_ref(), &batch.inputs, None);
        let distance = distance(&found, &expected);
        assert!(distance < tolerance, "{name}{suffix}: {distance:e}");
        count += 1;
    }
    count
}

fn names(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root.join("models")).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn logits_equal_the_reference() {
    let names = names(&golden());
    assert!(names.len() >= 48, "{names:?}");
    let mut inputs = 0;
    for name in names {
        inputs += check(&golden(), &name, &LoadOptions::default(), 1e-4);
    }
    assert!(inputs >= 92, "{inputs}");
}

#[test]
fn shared_logits_equal_the_reference() {
    let Some(root) = shared("oracle") else { return };
    for name in names(&root) {
        check(&root, &name, &LoadOptions::default(), 1e-4);
    }
}

#[test]
fn logits_in_bf16_are_near() {
    let options = LoadOptions { precision: Precision::Bf16, ..LoadOptions::default() };
    for name in names(&golden()) {
        check(&golden(), &name, &options, 3e-2);
    }
}

#[test]
fn nf4_keeps_blocks_in_four_bits() {
    let path = golden().join("models/llama");
    let dense = load(&path, &LoadOptions::default()).unwrap();
    let storage = Storage::Nf4 { block: 64, double: true };
    let small = load(&path, &LoadOptions { storage, ..LoadOptions::default() }).unwrap();
    assert!(small.bytes.blocks * 4 < dense.bytes.blocks, "{:?} {:?}", small.bytes, dense.bytes);
    assert_eq!((small.bytes.head, small.bytes.vectors), (dense.bytes.head, dense.bytes.vectors));
    let batch = read_batch(&golden().join("inputs/llama/inputs.safetensors"));
    let logits = |m: &dyn Model| run(m, &batch.inputs, None);
    let distance = distance(&logits(small.model.as_ref()), &logits(dense.model.as_ref()));
    assert!(distance > 1e-3 && distance < 0.5, "{distance}");
}

/// Greedy continuation with the cache; checks each step's logits against a forward without one.
fn greedy(model: &dyn Model, prompt: &[i64], steps: usize, stop: Option<i64>) -> Vec<i64> {
    let cache = Arc::new(Mutex::new(KvCache::new(model.info().layers, 1, prompt.len() + steps)));
    // An encoder reads the prompt; its decoder begins with token 0.
    let encodes = model.info().task == Task::Seq2Seq;
    let given = if encodes { vec![0] } else { prompt.to_vec() };
    let inputs = |ids: &[i64], first: usize| {
        let layout =
            Layout::new(&[ids.len()], (first..first + ids.len()).map(|p| p as i32).collect()).unwrap();
        let ids = Tensor::from_i64(ids.to_vec(), [ids.len()]).unwrap();
        if encodes { batch(&[prompt]).with_target(ids, layout) } else { Inputs::tokens(ids, None, layout) }
    };
    let (mut all, mut fed) = (given.clone(), 0);
    while all.len() < given.len() + steps {
        let inputs_now = inputs(&all[fed..], fed);
        let cx = Pass::new(inputs_now.layout.clone(), None).cached(cache.clone());
        let logits = no_grad(|| model.forward(&inputs_now, &cx)).unwrap().to_vec().unwrap();
        let last = &logits[logits.len() - model.info().outputs..];
        if all.len() % 7 == 0 {
            let whole = run(model, &inputs(&all, 0), None);
            let distance = distance(last, &whole[whole.len() - last.len()..]);
            assert!(distance < 1e-5, "cached against whole: {distance:e}");
        }
        let next = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as i64;
        if stop == Some(next) {
            break;
        }
        fed = all.len();
        all.push(next);
    }
    all.split_off(given.len())
}

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn greedy_generation_equals_the_reference() {
    let mut count = 0;
    for entry in std::fs::read_dir(golden().join("generation")).unwrap() {
        let expected = json(&entry.unwrap().path());
        let name = expected["model"].as_str().unwrap();
        let loaded = model(&golden().join("models").join(name));
        let greedily = |row: &&Value| row["num_beams"].as_u64().is_none_or(|beams| beams == 1);
        for row in expected["rows"].as_array().unwrap().iter().filter(greedily) {
            let new = ids(&row["new_tokens"]);
            let found = greedy(loaded.model.as_ref(), &ids(&row["prompt"]), new.len(), None);
            assert_eq!(found, new, "{name}");
            count += 1;
        }
    }
    assert!(count >= 26, "{count}");
}

#[test]
fn a_trained_story_model_tells_its_stories() {
    let Some(dir) = shared("data/models/stories260k") else { return };
    let loaded = model(&dir);
    for story in json(&dir.join("reference.json"))["generations"].as_array().unwrap() {
        let (prompt, expected) = (ids(&story["prompt_ids"]), ids(&story["greedy_ids"]));
        let logits = run(loaded.model.as_ref(), &batch(&[&prompt]), None);
        let last = &logits[logits.len() - loaded.model.info().outputs..];
        for (found, expected) in last.iter().zip(story["prompt_last_logits_first8"].as_array().unwrap()) {
            assert!((*found as f64 - expected.as_f64().unwrap()).abs() < 2e-4, "{found} {expected}");
        }
        assert_eq!(greedy(loaded.model.as_ref(), &prompt, expected.len(), Some(1)), expected);
    }
}

#[test]
fn a_trained_sentence_encoder_gives_its_embeddings() {
    let Some(dir) = shared("data/models/all-minilm-l6-v2") else { return };
    let loaded = model(&dir);
    let reference = json(&dir.join("reference.json"));
    let sentences = reference["sentences"].as_array().unwrap();
    let rows: Vec<Vec<i64>> = sentences.iter().map(|s| ids(&s["input_ids"])).collect();
    let all: Vec<&[i64]> = rows.iter().map(Vec::as_slice).collect();
    let found = run(loaded.model.as_ref(), &batch(&all), None);
    for (found, sentence) in found.chunks(384).zip(sentences) {
        // The reference is scaled to length one, which the model leaves to its user.
        let length = found.iter().map(|v| v * v).sum::<f32>().sqrt();
        let found: Vec<f32> = found.iter().map(|v| v / length).collect();
        let expected: Vec<f32> =
            sentence["embedding"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        assert!(distance(&found, &expected) < 1e-4);
    }
}
