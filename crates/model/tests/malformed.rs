//! Directories that are not models: an error that says what is wrong, no panic, no huge allocation.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::*;
use engraft_model::{Error, LoadOptions, load};
use engraft_nn::Task;
use serde_json::{Value, json};

/// A copy of a model in a directory of its own, `config.json` changed.
fn copy(name: &str, of: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
    let from = golden().join("models").join(of);
    let dir = std::env::temp_dir().join(format!("engraft-model-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    fs::copy(from.join("model.safetensors"), dir.join("model.safetensors")).unwrap();
    let mut config: Value =
        serde_json::from_str(&fs::read_to_string(from.join("config.json")).unwrap()).unwrap();
    change(&mut config);
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    dir
}

fn error(dir: &Path, options: &LoadOptions) -> Error {
    let Err(error) = load(dir, options) else { panic!("{} loads", dir.display()) };
    fs::remove_dir_all(dir).unwrap();
    error
}

/// The error's text names every one of `parts`.
fn refused(name: &str, of: &str, parts: &[&str], change: impl FnOnce(&mut Value)) {
    let text = error(&copy(name, of, change), &LoadOptions::default()).to_string();
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
}

#[test]
fn configurations_that_make_no_sense() {
    refused("empty", "llama", &["`model_type` is missing", "llama, mistral"], |c| *c = json!({}));
    refused("list", "llama", &["`model_type` is missing"], |c| *c = json!([1, 2]));
    refused("other", "llama", &["`mamba`", "llama, mistral"], |c| c["model_type"] = json!("mamba"));
    refused("class", "bert", &["`GPT2LMHeadModel`"], |c| c["architectures"] = json!(["GPT2LMHeadModel"]));
    refused("no-class", "bert", &["`architectures` does not say"], |c| c["architectures"] = Value::Null);
    refused("zero", "llama", &["`hidden_size` must be", "found 0"], |c| c["hidden_size"] = json!(0));
    let many = ["`hidden_size` must be", "`rms_norm_eps` must be", "`hidden_act`", "`vocab_size` is missing"];
    refused("types", "llama", &many, |c| {
        c["hidden_size"] = json!("48");
        c["rms_norm_eps"] = json!([]);
        c["hidden_act"] = json!("swoosh");
        c["vocab_size"] = Value::Null;
    });
    refused("heads", "llama_bf16", &["multiple of `num_attention_heads` (5)"], |c| {
        c["num_attention_heads"] = json!(5);
        c["num_key_value_heads"] = json!(5);
        c["head_dim"] = Value::Null;
    });
    refused("groups", "llama", &["multiple of `num_key_value_heads` (3)"], |c| {
        c["num_key_value_heads"] = json!(3)
    });
    refused("bert-heads", "bert", &["multiple of `num_attention_heads` (5)"], |c| {
        c["num_attention_heads"] = json!(5)
    });
    refused("layers", "llama", &["`num_hidden_layers`"], |c| c["num_hidden_layers"] = json!(1_000_000_000));
    refused("layers2", "bert", &["`num_hidden_layers` is 1000000"], |c| {
        c["num_hidden_layers"] = json!(1_000_000)
    });
    refused("width", "llama", &["`hidden_size` must be"], |c| c["hidden_size"] = json!(u64::MAX));
    refused("rope", "llama", &["`spiral`"], |c| c["rope_parameters"] = json!({"rope_type": "spiral"}));
    refused("rope2", "llama", &["rope_parameters.factor"], |c| {
        c["rope_parameters"] = json!({"rope_type": "linear"})
    });
    refused("odd", "llama", &["must be even"], |c| c["head_dim"] = json!(11));
    refused("decoder", "bert", &["`is_decoder`"], |c| c["is_decoder"] = json!(true));
    refused("window", "qwen2", &["`layer_types` names 1"], |c| c["layer_types"] = json!(["full_attention"]));
    refused("pad", "roberta", &["`pad_token_id` must be below"], |c| c["pad_token_id"] = json!(1000));
}

#[test]
fn pictures_that_make_no_sense() {
    refused("patch-zero", "vit", &["`patch_size` must be", "found 0"], |c| c["patch_size"] = json!(0));
    refused("patch-large", "vit", &["`patch_size` (13 × 13)", "(12 × 12)"], |c| {
        c["patch_size"] = json!(13)
    });
    refused("image-list", "vit", &["`image_size` must be", "[12,12,12]"], |c| {
        c["image_size"] = json!([12, 12, 12])
    });
    refused("image-text", "deit", &["`image_size` must be", "`hidden_size` must be"], |c| {
        c["image_size"] = json!("12");
        c["hidden_size"] = json!(-3);
    });
    refused("image-huge", "dinov2", &["`image_size` must be"], |c| c["image_size"] = json!(u64::MAX));
    refused("vit-heads", "vit", &["`hidden_size` (32) must be a multiple", "(5)"], |c| {
        c["num_attention_heads"] = json!(5)
    });
    refused("dino-oblong", "dinov2", &["as many patches down as across", "3 and 2"], |c| {
        c["image_size"] = json!([12, 8])
    });
    refused("dino-ratio", "dinov2", &["`mlp_ratio`"], |c| c["mlp_ratio"] = json!(1e-9));
    refused("dino-ratio-large", "dinov2", &["mlp.fc1.weight"], |c| c["mlp_ratio"] = json!(1e300));
    refused("vit-layers", "vit", &["`num_hidden_layers` is 90000"], |c| {
        c["num_hidden_layers"] = json!(90_000)
    });
    // Nothing of this size is made: only shapes are compared.
    refused("image-wide", "vit", &["position_embeddings", "[1, 268435457, 32]"], |c| {
        c["image_size"] = json!(65_536)
    });
}

#[test]
fn large_sizes_cost_nothing() {
    // Widths that the limit lets pass, far beyond the file: only names and shapes are compared.
    refused("wide", "llama", &["[1048576]", "… and 20 more"], |c| c["hidden_size"] = json!(1 << 20));
    refused("many", "bert", &["[200000000, 32]"], |c| c["vocab_size"] = json!(200_000_000));
}

#[test]
fn tensors_that_do_not_fit_are_listed_together() {
    let dir = copy("rows", "llama", |c| {
        c["vocab_size"] = json!(128);
        c["num_hidden_layers"] = json!(2);
        c["attention_bias"] = json!(true);
    });
    let shown = dir.display().to_string();
    let Error::Tensors(mismatch) = error(&dir, &LoadOptions::default()) else { panic!("another error") };
    let text = mismatch.to_string();
    let row = |name: &str| {
        mismatch.rows.iter().find(|r| r.tensor == name).unwrap_or_else(|| panic!("{name}: {text}"))
    };
    let embed = row("model.embed_tokens.weight");
    assert_eq!((embed.expected.as_str(), embed.found.as_str()), ("[128, 48]", "[101, 48]"));
    assert_eq!(row("model.layers.0.self_attn.q_proj.bias").found, "absent");
    assert_eq!(row("model.layers.2.mlp.up_proj.weight").expected, "nothing");
    // Embedding and head, four biases in two layers, nine tensors of the third layer.
    assert_eq!((mismatch.rows.len(), mismatch.total), (2 + 8 + 9, 30));
    for part in [
        "19 tensors in ",
        &shown,
        "(30 in all)",
        "tensor  ",
        "expected",
        "… and 9 more",
        "set `vocab_size = 101`",
    ] {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
}

#[test]
fn tensors_of_nothing_known_are_refused() {
    let dir = copy("extra", "llama", |_| ());
    let path = dir.join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&whole[8..8 + length]).unwrap();
    let end = whole.len() - 8 - length;
    for (index, name) in ["lm_head.bias", "extra.tensor", "qa_outputs.bias"].iter().enumerate() {
        let offsets = [end + 4 * index, end + 4 * index + 4];
        header[name] = json!({ "dtype": "F32", "shape": [1], "data_offsets": offsets });
    }
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(&whole[8 + length..]);
    bytes.extend_from_slice(&[0; 12]);
    fs::write(&path, bytes).unwrap();
    let Error::Tensors(mismatch) = error(&dir, &LoadOptions::default()) else { panic!("another error") };
    let mut names: Vec<&str> = mismatch.rows.iter().map(|row| row.tensor.as_str()).collect();
    names.sort();
    assert_eq!(names, ["extra.tensor", "lm_head.bias"], "a head of another task is passed over");
}

#[test]
fn cut_and_damaged_files() {
    let dir = copy("cut", "bert", |_| ());
    let whole = fs::read(dir.join("model.safetensors")).unwrap();
    for length in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(dir.join("model.safetensors"), &whole[..length]).unwrap();
        assert!(load(&dir, &LoadOptions::default()).is_err(), "{length}");
    }
    fs::write(dir.join("config.json"), "{").unwrap();
    assert!(error(&dir, &LoadOptions::default()).to_string().contains("config.json:1:"));
    assert!(load(Path::new("/nonexistent"), &LoadOptions::default()).is_err());
}

#[test]
fn another_task_gets_a_new_head() {
    let options = |task, labels| LoadOptions { task: Some(task), labels, ..LoadOptions::default() };
    let dir = golden().join("models");
    let load = |name: &str, task, labels| load(&dir.join(name), &options(task, labels)).unwrap();
    let m = load("bert_encoder", Task::SequenceClassification, Some(4));
    assert_eq!(m.new_tensors, ["classifier.weight", "classifier.bias"], "the pooler is in the file");
    assert_eq!(m.model.info().outputs, 4);
    let m = load("bert_mlm", Task::SequenceClassification, Some(2));
    assert_eq!(m.new_tensors.len(), 4, "pooler and classifier: {:?}", m.new_tensors);
    assert!(m.unused_tensors.iter().all(|n| n.starts_with("cls.")) && m.unused_tensors.len() == 5);
    let m = load("bert", Task::SequenceClassification, Some(7));
    assert_eq!(m.new_tensors, ["classifier.weight", "classifier.bias"], "another number of labels");
    let m = load("bert", Task::SequenceClassification, Some(3));
    assert!(m.new_tensors.is_empty(), "the file's head fits");
    let m = load("roberta_mlm", Task::TokenClassification, Some(5));
    assert_eq!(m.new_tensors, ["classifier.weight", "classifier.bias"]);
    let m = load("bert", Task::Embedding, None);
    assert!(m.model.sites().iter().any(|s| s.path == "encoder.layer.0.attention.self.query"));
    let m = load("llama", Task::SequenceClassification, Some(3));
    assert_eq!(
        (m.new_tensors, m.unused_tensors),
        (vec!["score.weight".into()], vec!["lm_head.weight".to_string()])
    );
    let logits = |seed| {
        let options = LoadOptions { seed, ..options(Task::SequenceClassification, Some(3)) };
        let m = engraft_model::load(&dir.join("llama"), &options).unwrap();
        run(m.model.as_ref(), &batch(&[&[5, 9, 17], &[4, 8]]), None)
    };
    assert_eq!((logits(1).len(), logits(1)), (6, logits(1)));
    assert_ne!(logits(1), logits(2));
    let refused = |name: &str, task, labels| {
        engraft_model::load(&dir.join(name), &options(task, labels)).err().unwrap().to_string()
    };
    assert!(refused("llama", Task::MaskedLm, None).contains("masked-lm is not one of llama models"));
    assert!(refused("bert_encoder", Task::SequenceClassification, None).contains("labels"));
    assert!(refused("bert_encoder", Task::MaskedLm, None).contains("cls.predictions.bias"));
}
