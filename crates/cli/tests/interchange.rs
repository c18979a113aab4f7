//! Adapters made by `peft` whose tables share a tensor, whose task is another class's, whose base is in half precision: what the
//! program reads, merges and writes.

use std::path::{Path, PathBuf};
use std::process::Command;

use engraft_store::{Dtype, Limits, Weights};
use serde_json::Value;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(path)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn succeeds(args: &[&dyn AsRef<std::ffi::OsStr>]) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engraft"));
    let output = command.args(args.iter().map(|a| a.as_ref())).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The largest difference of the logits that count over the largest of them.
fn apart(found: &Path, expected: &Path) -> f32 {
    let open = |path: &Path| Weights::open_file(path, &Limits::default()).unwrap();
    let (found, expected) = (open(found), open(expected));
    let values = |file: &Weights, name: &str| file.get(name).unwrap().to_f32().unwrap();
    let (a, b) = (values(&found, "logits"), values(&expected, "logits"));
    let mask = expected.get("mask").unwrap();
    let width = b.len() / mask.bytes().len();
    let counts = |i: &usize| mask.bytes()[i / width] == 1;
    let largest = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    (0..b.len()).filter(counts).fold(0.0f32, |m, i| m.max((a[i] - b[i]).abs())) / largest
}

/// Merges a case, reads the merged model, and compares its logits with the adapter's; gives its directory.
fn merged(dir: &Path, case: &str) -> PathBuf {
    let model = case.split("__").next().unwrap();
    let (base, case) = (golden(&format!("models/{model}")), golden(&format!("cases/{case}")));
    let (out, logits) = (dir.join(case.file_name().unwrap()), dir.join("logits.safetensors"));
    let inputs = golden(&format!("inputs/{model}/inputs.safetensors"));
    succeeds(&[&"merge", &"--model", &base, &"--adapter", &case.join("adapter"), &"--out", &out]);
    succeeds(&[&"logits", &"--model", &out, &"--inputs", &inputs, &"--out", &logits]);
    let off = apart(&logits, &case.join("logits.safetensors"));
    assert!(off < 2e-4, "{}: {off:e}", case.display());
    out
}

#[test]
fn tables_that_share_a_tensor_get_their_own_where_they_change() {
    let dir = tempfile::tempdir().unwrap();
    for (case, own) in [
        // The encoder's change takes the shared name, so the others need theirs.
        ("t5__lora_encoder_table", &["decoder.embed_tokens.weight", "lm_head.weight"][..]),
        ("t5__lora_embed", &["decoder.embed_tokens.weight", "lm_head.weight"]),
        ("t5__lora_shared_head", &["lm_head.weight"]),
        ("t5__lora_shared", &[]),
        ("t5__lora_tokens", &[]),
        // These files hold the shared tensor again under every name.
        ("t5_flan__lora_encoder_table", &[]),
        ("t5_flan__trainable_tokens", &[]),
        ("t5_flan__trainable_tokens_apart", &[]),
        ("t5_untied__trainable_tokens", &[]),
        ("bert_mlm__trainable_tokens", &[]),
        ("qwen2__lora_tokens_apart", &["lm_head.weight"]),
    ] {
        let out = merged(dir.path(), case);
        let base = golden(&format!("models/{}", case.split("__").next().unwrap()));
        let names = |dir: &Path| -> Vec<String> {
            let file = Weights::open(dir, &Limits::default()).unwrap();
            file.names().map(str::to_owned).collect()
        };
        let before = names(&base);
        let new: Vec<String> = names(&out).into_iter().filter(|name| !before.contains(name)).collect();
        assert_eq!(new, own, "{case}");
        // T5 reads from this key whether what the head reads is scaled, and ties by values.
        let tie = &json(&out.join("config.json"))["tie_word_embeddings"];
        let expected = if case.starts_with("t5") || own.is_empty() {
            json(&base.join("config.json"))["tie_word_embeddings"].clone()
        } else {
            false.into()
        };
        assert_eq!(*tie, expected, "{case}");
        assert!(merged_again(&out, dir.path()), "{case}");
    }
}

/// Whether a merged model can be merged into once more.
fn merged_again(model: &Path, dir: &Path) -> bool {
    if !model.file_name().unwrap().to_string_lossy().starts_with("t5__") {
        return true;
    }
    let out = dir.join(format!("{}-again", model.file_name().unwrap().to_string_lossy()));
    succeeds(&[
        &"merge",
        &"--model",
        &model,
        &"--adapter",
        &golden("cases/t5__lora_embed/adapter"),
        &"--out",
        &out,
    ]);
    out.join("config.json").is_file()
}

#[test]
fn an_adapter_of_features_serves_a_classifier() {
    let dir = tempfile::tempdir().unwrap();
    let (case, out) = (golden("cases/bert__lora_features"), dir.path().join("logits.safetensors"));
    succeeds(&[
        &"logits",
        &"--model",
        &golden("models/bert"),
        &"--adapter",
        &case.join("adapter"),
        &"--inputs",
        &golden("inputs/bert/inputs.safetensors"),
        &"--out",
        &out,
    ]);
    assert!(apart(&out, &case.join("logits.safetensors")) < 2e-4);
}

#[test]
fn what_belongs_to_the_model_is_written_in_its_type() {
    let dir = tempfile::tempdir().unwrap();
    let case = golden("cases/bert_bf16__lora_bias");
    let inputs = golden("inputs/bert_bf16/inputs.safetensors");
    let recipe = format!(
        "model = {:?}\n[method]\nfrom = {:?}\n[data]\nformat = \"tensors\"\npath = {inputs:?}\nshuffle = false\n[train]\nsteps = 1\nbatch_size = 2\nlearning_rate = 1e-9\ndtype = \"f32\"\n",
        golden("models/bert_bf16"),
        case.join("adapter"),
    );
    let (file, run) = (dir.path().join("r.toml"), dir.path().join("run"));
    std::fs::write(&file, recipe).unwrap();
    succeeds(&[&"train", &file, &"--out", &run]);
    let open =
        |dir: &Path| Weights::open_file(&dir.join("adapter_model.safetensors"), &Limits::default()).unwrap();
    let (found, expected) = (open(&run.join("adapter")), open(&case.join("adapter")));
    let types = |file: &Weights| -> Vec<(String, Dtype)> {
        file.iter().map(|(name, tensor)| (name.to_owned(), tensor.dtype)).collect()
    };
    assert_eq!(types(&found), types(&expected));
    assert!(types(&found).iter().any(|(_, dtype)| *dtype == Dtype::BF16));
}
