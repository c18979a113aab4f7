//! Adapters whose classifier has another number of labels than the base, made by `peft`: logits, merging, the class that the
//! merged model says it is.

use std::path::{Path, PathBuf};
use std::process::Command;

use engraft_store::{Limits, Weights};
use serde_json::Value;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(path)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Runs the program on paths and words; gives its messages.
fn succeeds(args: &[&dyn AsRef<std::ffi::OsStr>]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engraft"));
    let output = command.args(args.iter().map(|a| a.as_ref())).env("HF_HUB_OFFLINE", "1").output().unwrap();
    let messages = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{messages}");
    messages
}

/// The largest difference of the logits of real tokens over the largest one; the program's own files have no mask of them.
fn apart(found: &Path, expected: &Path) -> f32 {
    let open = |path: &Path| Weights::open_file(path, &Limits::default()).unwrap();
    let (found, expected) = (open(found), open(expected));
    let values = |file: &Weights, name: &str| file.get(name).unwrap().to_f32().unwrap();
    let (a, b) = (values(&found, "logits"), values(&expected, "logits"));
    assert_eq!(found.get("logits").unwrap().shape, expected.get("logits").unwrap().shape);
    let mask = expected.get("mask").map_or(vec![1; b.len()], |mask| mask.bytes().to_vec());
    let width = b.len() / mask.len();
    let real = |i: usize| mask[i / width] == 1;
    let largest = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    a.iter().zip(&b).enumerate().filter(|(i, _)| real(*i)).fold(0.0f32, |m, (_, (a, b))| m.max((a - b).abs()))
        / largest
}

/// Writes the logits of a model under an adapter; gives the program's messages.
fn adapted_logits(base: &Path, adapter: &Path, inputs: &Path, out: &Path) -> String {
    succeeds(&[&"logits", &"--model", &base, &"--adapter", &adapter, &"--inputs", &inputs, &"--out", &out])
}

#[test]
fn heads_of_another_size_are_those_of_the_reference() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    let mut count = 0;
    for entry in std::fs::read_dir(golden("heads")).unwrap() {
        let case = entry.unwrap().path();
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let expected = json(&case.join("case.json"));
        let base = golden("models").join(expected["model"].as_str().unwrap());
        let (adapter, inputs, logits) =
            (case.join("adapter"), case.join("inputs.safetensors"), case.join("logits.safetensors"));
        let messages = adapted_logits(&base, &adapter, &inputs, &out);
        assert!(!messages.contains("at random"), "{name}: {messages}");
        let difference = apart(&out, &logits);
        assert!(difference < 1e-4, "{name}: {difference:e}");
        count += 1;
        if expected["merge"] != true {
            continue;
        }
        let merged = dir.path().join(&name);
        succeeds(&[&"merge", &"--model", &base, &"--adapter", &adapter, &"--out", &merged]);
        let config = json(&merged.join("config.json"));
        assert_eq!(config["architectures"][0], expected["class"], "{name}");
        assert_eq!(
            config["id2label"].as_object().unwrap().len() as u64,
            expected["labels"].as_u64().unwrap()
        );
        succeeds(&[&"logits", &"--model", &merged, &"--inputs", &inputs, &"--out", &out]);
        let difference = apart(&out, &logits);
        assert!(difference < 2e-4, "{name} merged: {difference:e}");
        // The head that the base has not, or has in another size, is found in the merged model and goes along as a whole.
        let extracted = dir.path().join(format!("{name} extracted"));
        let messages = succeeds(&[
            &"extract", &"--model", &base, &"--tuned", &merged, &"--rank", &"64", &"--out", &extracted,
        ]);
        assert!(messages.contains("the tuned model's head is in the adapter"), "{name}: {messages}");
        adapted_logits(&base, &extracted, &inputs, &out);
        let difference = apart(&out, &logits);
        assert!(difference < 5e-4, "{name} extracted: {difference:e}");
    }
    assert!(count >= 6, "{count}");
}

/// Rows of the base alone, or of an adapter without a head, have no answer of the size that another adapter's head has.
#[test]
fn rows_without_a_head_of_that_size_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let case = golden("heads/bert__lora");
    let given = Weights::open_file(&case.join("inputs.safetensors"), &Limits::default()).unwrap();
    let rows = given.get("input_ids").unwrap().shape[0];
    let run = |model: &str, ids: Vec<i64>, adapters: [&Path; 2]| {
        let bytes = |values: Vec<i64>| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let tokens = bytes(given.get("input_ids").unwrap().to_i64().unwrap());
        let ids = bytes(ids);
        let shape = given.get("input_ids").unwrap().shape.clone();
        let entry = |name: &str, shape: &[usize], bytes: Vec<u8>| {
            engraft_store::Entry::new(name, engraft_store::Dtype::I64, shape, bytes)
        };
        let entries = [entry("adapter_ids", &[rows], ids), entry("input_ids", &shape, tokens)];
        let inputs = dir.path().join("mixed.safetensors");
        engraft_store::write_safetensors(&inputs, &entries, &Default::default()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_engraft"));
        command.arg("logits").arg("--model").arg(golden("models").join(model)).arg("--inputs").arg(&inputs);
        command.arg("--out").arg(dir.path().join("o.safetensors"));
        command.arg("--adapter").arg(adapters[0]).arg("--beside").arg(adapters[1]);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (adapter, headless) = (case.join("adapter"), golden("cases/bert__seq_bn/adapter"));
    for (id, expected) in [(-1, "is of the base alone (-1)"), (1, "is of adapter 1, which brings no head")] {
        let mut ids = vec![0; rows];
        ids[1] = id;
        let (code, said) = run("bert", ids, [&adapter, &headless]);
        assert!(code == Some(2) && said.contains(expected) && said.contains("row 1 (from 0)"), "{said}");
    }
    assert_eq!(run("bert", vec![0; rows], [&adapter, &headless]).0, Some(0));
    // Of one size, the base's own head answers.
    let own = golden("cases/bert__lora/adapter");
    let mut ids = vec![0; rows];
    ids[0] = -1;
    let (code, said) = run("bert", ids.clone(), [&own, &headless]);
    assert!(code == Some(0) && !said.contains("random"), "{said}");
    // A model that has no head says whose rows are meaningless.
    let (code, said) = run("bert_encoder", ids, [&adapter, &adapter]);
    assert!(code == Some(0) && said.contains("row 0 (from 0) is of the base alone (-1), and "), "{said}");
}

#[test]
fn a_head_that_the_tuned_model_has_untied_is_extracted() {
    let dir = tempfile::tempdir().unwrap();
    for (model, case) in [("llama_tied", "lora_tokens_head"), ("qwen2", "lora_tokens_apart")] {
        let (base, adapter) =
            (golden("models").join(model), golden("cases").join(format!("{model}__{case}")).join("adapter"));
        let at = |name: &str| dir.path().join(format!("{model} {name}"));
        let (merged, extracted) = (at("merged"), at("extracted"));
        succeeds(&[
            &"merge",
            &"--model",
            &base,
            &"--adapter",
            &adapter,
            &"--out",
            &merged,
            &"--dtype",
            &"f32",
        ]);
        succeeds(&[
            &"extract", &"--model", &base, &"--tuned", &merged, &"--rank", &"64", &"--out", &extracted,
        ]);
        let (before, wanted, found) = (at("base logits"), at("merged logits"), at("extracted logits"));
        let inputs = golden("inputs").join(model).join("inputs.safetensors");
        succeeds(&[&"logits", &"--model", &base, &"--inputs", &inputs, &"--out", &before]);
        succeeds(&[&"logits", &"--model", &merged, &"--inputs", &inputs, &"--out", &wanted]);
        adapted_logits(&base, &extracted, &inputs, &found);
        assert!(apart(&before, &wanted) > 0.1, "{model}");
        let left = apart(&found, &wanted);
        assert!(left < 1e-4, "{model}: {left:e}");
    }
}
