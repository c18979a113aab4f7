//! `--drop-layers`, an adapter left out of the first layers (AdapterDrop); `--choose`, what an adapter leaves open until then.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use engraft_store::{Limits, Weights};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn logits(model: &str, out: &Path, more: &[&str]) -> Output {
    let (inputs, model) = (golden().join("inputs").join(model), golden().join("models").join(model));
    let mut command = Command::new(env!("CARGO_BIN_EXE_engraft"));
    command.arg("logits").arg("--model").arg(model).arg("--inputs").arg(inputs.join("inputs.safetensors"));
    command.arg("--out").arg(out).args(more).output().unwrap()
}

fn values(model: &str, more: &[&str]) -> Vec<f32> {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    let output = logits(model, &out, more);
    assert!(output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
    Weights::open_file(&out, &Limits::default()).unwrap().get("logits").unwrap().to_f32().unwrap()
}

#[test]
fn all_layers_dropped_are_the_base() {
    for (model, case, layers) in [("llama", "llama__lora", 3), ("gpt2", "gpt2__seq_bn", 2)] {
        let adapter = golden().join("cases").join(case).join("adapter");
        let adapter = adapter.to_str().unwrap();
        let with = |n: usize| values(model, &["--adapter", adapter, "--drop-layers", &n.to_string()]);
        let (base, whole) = (values(model, &[]), values(model, &["--adapter", adapter]));
        assert_eq!(with(layers), base, "{case}");
        assert_eq!(with(0), whole, "{case}");
        assert!(with(1) != base && with(1) != whole, "{case}");
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("o");
        let more = (layers + 1).to_string();
        let refused = logits(model, &out, &["--adapter", adapter, "--drop-layers", &more]);
        assert_eq!(refused.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&refused.stderr).contains(&format!("{layers} layers")));
    }
}

#[test]
fn an_adapter_without_layers_has_none_to_drop() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("o");
    let adapter = golden().join("cases/llama__prompt/adapter");
    let refused = logits("llama", &out, &["--adapter", adapter.to_str().unwrap(), "--drop-layers", "1"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("the adapter has no part in these layers"), "{said}");
}

/// What the adapter of `case` gives on its model, with `more` arguments.
fn of_case(model: &str, case: &str, more: &[&str]) -> Vec<f32> {
    let adapter = golden().join("cases").join(case).join("adapter");
    values(model, &[&["--adapter", adapter.to_str().unwrap()], more].concat())
}

#[test]
fn what_an_adapter_leaves_open_is_chosen_in_use() {
    let adapter = golden().join("cases/llama__dylora/adapter");
    let adapter = adapter.to_str().unwrap();
    let whole = of_case("llama", "llama__dylora", &[]);
    assert_eq!(of_case("llama", "llama__dylora", &["--choose", "eval_rank=4"]), whole, "all its ranks");
    let two = of_case("llama", "llama__dylora", &["--choose", "eval_rank=2"]);
    assert!(two != whole && two != values("llama", &[]));
    // As the file says it where the setting was made there, and as the weights say it when merged.
    let dir = tempfile::tempdir().unwrap();
    let (by_hand, merged) = (dir.path().join("by_hand"), dir.path().join("merged"));
    std::fs::create_dir(&by_hand).unwrap();
    std::fs::copy(
        Path::new(adapter).join("adapter_model.safetensors"),
        by_hand.join("adapter_model.safetensors"),
    )
    .unwrap();
    let config = std::fs::read_to_string(Path::new(adapter).join("adapter_config.json")).unwrap();
    std::fs::write(by_hand.join("adapter_config.json"), config.replace("\"eval_r\": null", "\"eval_r\": 2"))
        .unwrap();
    assert_eq!(values("llama", &["--adapter", by_hand.to_str().unwrap()]), two);
    let model = golden().join("models/llama");
    let done = Command::new(env!("CARGO_BIN_EXE_engraft"))
        .args(["merge", "--adapter", adapter, "--choose", "eval_rank=2", "--model"])
        .arg(&model)
        .arg("--out")
        .arg(&merged)
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let inputs = golden().join("inputs/llama/inputs.safetensors");
    let out = dir.path().join("o.safetensors");
    let mut command = Command::new(env!("CARGO_BIN_EXE_engraft"));
    command.arg("logits").arg("--model").arg(&merged).arg("--inputs").arg(inputs).arg("--out").arg(&out);
    assert!(command.status().unwrap().success());
    let of_merged =
        Weights::open_file(&out, &Limits::default()).unwrap().get("logits").unwrap().to_f32().unwrap();
    assert!(of_merged.iter().zip(&two).all(|(a, b)| (a - b).abs() < 1e-4));
}

#[test]
fn what_is_not_open_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("o");
    for (case, choice, expected) in [
        ("llama__dylora", "eval_rank=5", "`eval_rank`: expected at most the rank 4, found 5"),
        ("llama__dylora", "eval_rank=few", "`eval_rank`: expected a whole number"),
        ("llama__dylora", "rank=2", "leaves `eval_rank` open"),
        ("llama__lora", "eval_rank=2", "LoRA leaves nothing open"),
        ("llama__dylora", "eval_rank", "expected SETTING=VALUE"),
    ] {
        let adapter = golden().join("cases").join(case).join("adapter");
        let refused = logits("llama", &out, &["--adapter", adapter.to_str().unwrap(), "--choose", choice]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{said}");
        assert!(said.contains(expected) && !said.contains("does not fit"), "{said}");
    }
}

#[test]
fn a_place_that_cannot_be_written_is_told_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    for out in [Path::new("/proc/x/y"), &dir.path().join("no/such/o"), dir.path()] {
        // A model that is not there would be the next mistake.
        let refused = logits("no_such_model", out, &[]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{said}");
        assert!(said.contains(out.to_str().unwrap()) && !said.contains("no_such_model"), "{said}");
    }
}
