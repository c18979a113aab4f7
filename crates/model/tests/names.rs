//! Files whose tensors are called or arranged otherwise give the same logits: old names of norms, no prefix, buffers and heads of
//! other tasks beside the model, a tied head that is stored all the same.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use common::*;
use engraft_model::{Error, LoadOptions, Loaded, load};
use engraft_nn::Inputs;
use engraft_store::{Dtype, Entry, Weights, write_safetensors};
use engraft_tensor::{Tensor, no_grad};

/// A copy of a model with its tensors renamed and more beside them: (name, shape) of f32 ones, and an i64 buffer.
fn copy(of: &str, rename: impl Fn(&str) -> String, more: &[(&str, &[usize])]) -> PathBuf {
    let from = golden().join("models").join(of);
    let weights = tensors(&from.join("model.safetensors"));
    let dir = std::env::temp_dir().join(format!("engraft-names-{of}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    fs::copy(from.join("config.json"), dir.join("config.json")).unwrap();
    let renamed = |(name, t): (&str, &engraft_store::RawTensor)| {
        Entry::new(rename(name), t.dtype, &t.shape, t.bytes().to_vec())
    };
    let mut entries: Vec<Entry<'_>> = weights.iter().map(renamed).collect();
    for (name, shape) in more {
        let bytes = 0.5f32.to_le_bytes().repeat(shape.iter().product());
        entries.push(Entry::new(*name, Dtype::F32, shape, bytes));
    }
    let buffer: Vec<u8> = (0..40i64).flat_map(i64::to_le_bytes).collect();
    entries.push(Entry::new(rename("bert.embeddings.position_ids"), Dtype::I64, &[1, 40], buffer));
    write_safetensors(&dir.join("model.safetensors"), &entries, &BTreeMap::new()).unwrap();
    dir
}

fn check(of: &str, dir: PathBuf) -> Loaded {
    let (expected, found) = (model(&golden().join("models").join(of)), model(&dir));
    fs::remove_dir_all(dir).unwrap();
    let inputs = batch(&[&[5, 9, 17, 33], &[12, 4, 77, 6, 80]]);
    let logits = |m: &Loaded| run(m.model.as_ref(), &inputs, None);
    assert_eq!(logits(&found), logits(&expected), "{of}");
    found
}

#[test]
fn old_names_of_norms_and_other_heads() {
    let old = |name: &str| match name.contains("LayerNorm") {
        true => name.replace(".weight", ".gamma").replace(".bias", ".beta"),
        false => name.to_owned(),
    };
    let more: &[(&str, &[usize])] =
        &[("cls.seq_relationship.weight", &[2, 32]), ("bert.pooler.dense.weight", &[32, 32])];
    let loaded = check("bert_mlm", copy("bert_mlm", old, more));
    assert_eq!(loaded.unused_tensors, ["bert.pooler.dense.weight", "cls.seq_relationship.weight"]);
    let site =
        |path: &str| loaded.model.sites().iter().find(|s| s.path == path).unwrap().tensor.clone().unwrap();
    // Merging writes what the file holds.
    assert_eq!(site("bert.embeddings.LayerNorm.weight"), "bert.embeddings.LayerNorm.gamma");
    assert_eq!(site("cls.predictions.decoder"), "bert.embeddings.word_embeddings.weight");
    assert_eq!(site("cls.predictions.bias"), "cls.predictions.bias");
}

#[test]
fn a_trunk_without_its_prefix() {
    let bare = |name: &str| name.trim_start_matches("roberta.").to_owned();
    let loaded = check("roberta_token", copy("roberta_token", bare, &[]));
    let site = loaded.model.sites().iter().find(|s| s.path.ends_with("0.attention.self.query")).unwrap();
    assert_eq!(site.path, "roberta.encoder.layer.0.attention.self.query");
    assert_eq!(site.tensor.as_deref(), Some("encoder.layer.0.attention.self.query.weight"));
}

#[test]
fn a_head_that_is_stored_is_tied_only_if_it_is_the_same() {
    let dir = golden().join("models/llama_tied");
    let loaded = model(&dir);
    let head =
        |m: &Loaded| m.model.sites().iter().find(|s| s.path == "lm_head").unwrap().tensor.clone().unwrap();
    assert_eq!(head(&loaded), "model.embed_tokens.weight");
    let more: &[(&str, &[usize])] = &[("lm_head.weight", &[101, 32])];
    let untied = copy("llama_tied", |n| n.to_owned(), more);
    let other = load(&untied, &LoadOptions::default());
    fs::remove_dir_all(untied).unwrap();
    // The buffer of another family is not one of this model's, but its name says that it is a buffer.
    let other = other.unwrap();
    assert_eq!(head(&other), "lm_head.weight");
    let logits = run(other.model.as_ref(), &batch(&[&[5, 9, 17]]), None);
    assert!(
        logits[..101].iter().all(|v| (v - logits[0]).abs() < 1e-5),
        "all rows of the stored head are equal"
    );
}

#[test]
fn too_long_and_unknown_inputs_are_errors() {
    let loaded = model(&golden().join("models/bert"));
    let model = loaded.model.as_ref();
    let text = |ids: &[i64]| {
        let inputs = batch(&[ids]);
        let cx = engraft_nn::Pass::new(inputs.layout.clone(), None);
        no_grad(|| model.forward(&inputs, &cx)).unwrap_err().to_string()
    };
    assert!(text(&[5; 41]).contains("needs 41 positions") && text(&[5; 41]).contains("has 40"));
    assert!(text(&[5, 103]).contains("103"));
    assert!(text(&[]).contains("empty"));
    let plain = batch(&[&[5, 6]]);
    let types = Tensor::from_i64(vec![0, 2], [2]).unwrap();
    let inputs = Inputs::tokens(plain.ids().unwrap().clone(), Some(types), plain.layout);
    let cx = engraft_nn::Pass::new(inputs.layout.clone(), None);
    assert!(no_grad(|| model.forward(&inputs, &cx)).is_err(), "type 2 of 2");
    assert!(matches!(
        Weights::open(&golden(), &Default::default()).map_err(Error::from),
        Err(Error::Store(_))
    ));
}

/// Files of `peft` number their targets by the order of modules (TinyLoRA, Lily, UniLoRA).
#[test]
fn weights_are_declared_in_the_order_of_modules() {
    let text = fs::read_to_string(golden().join("modules.json")).unwrap();
    let file: serde_json::Value = serde_json::from_str(&text).unwrap();
    let models = file["models"].as_object().unwrap();
    assert!(models.len() > 15);
    for (name, modules) in models {
        let loaded = model(&golden().join("models").join(name));
        let sites = loaded.model.sites();
        let declared: Vec<&str> = sites.iter().filter(|s| s.is_weight()).map(|s| s.path.as_str()).collect();
        let modules = modules.as_array().unwrap().iter().map(|m| m.as_str().unwrap());
        // A module that nothing reads is none of the sites.
        let known: Vec<&str> = modules.filter(|m| declared.contains(m)).collect();
        assert_eq!(declared, known, "{name}");
    }
}
