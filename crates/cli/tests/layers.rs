//! `--drop-layers`: an adapter left out of the first layers (AdapterDrop).

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
        let out = tempfile::tempdir().unwrap().path().join("o");
        let more = (layers + 1).to_string();
        let refused = logits(model, &out, &["--adapter", adapter, "--drop-layers", &more]);
        assert_eq!(refused.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&refused.stderr).contains(&format!("{layers} layers")));
    }
}

#[test]
fn an_adapter_without_layers_has_none_to_drop() {
    let out = tempfile::tempdir().unwrap().path().join("o");
    let adapter = golden().join("cases/llama__prompt/adapter");
    let refused = logits("llama", &out, &["--adapter", adapter.to_str().unwrap(), "--drop-layers", "1"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("the adapter has no part in these layers"), "{said}");
}
