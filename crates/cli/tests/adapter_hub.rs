//! `engraft convert --to adapterhub`: what was trained here computes the same when it is read back in AdapterHub's form.

#[path = "common/program.rs"]
mod program;

use std::path::{Path, PathBuf};

use engraft_store::{Limits, Weights};

use program::{refused, succeeds};

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(path).canonicalize().unwrap()
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// The adapter that two steps of `method` leave on the batches of a trajectory of `model`.
fn trained(dir: &Path, model: &str, trajectory: &str, method: &str) -> String {
    let recipe = format!(
        "model = {:?}\n[method]\n{method}\n[data]\nformat = \"tensors\"\npath = {:?}\n[train]\nsteps = 2\nbatch_size = 2\nlearning_rate = 0.05\n",
        golden(&format!("models/{model}")),
        golden(&format!("trajectories/{trajectory}/batches.safetensors")),
    );
    let (file, run) = (dir.join("recipe.toml"), dir.join("run"));
    std::fs::write(&file, recipe).unwrap();
    succeeds(&["train", &text(&file), "--out", &text(&run)]);
    text(&run.join("adapter"))
}

fn logits(dir: &Path, model: &str, adapter: &str) -> Vec<f32> {
    let to = text(&dir.join("logits.safetensors"));
    let (model, inputs) = (
        text(&golden(&format!("models/{model}"))),
        text(&golden(&format!("inputs/{model}/inputs.safetensors"))),
    );
    succeeds(&["logits", "--model", &model, "--adapter", adapter, "--inputs", &inputs, "--out", &to]);
    let file = Weights::open_file(Path::new(&to), &Limits::default()).unwrap();
    file.get("logits").unwrap().to_f32().unwrap()
}

/// The largest difference over the largest of `expected`.
fn off(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    found.iter().zip(expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs())) / largest
}

/// Converts `adapter`, and reads it again.
fn keeps_its_logits(dir: &Path, model: &str, adapter: &str, what: &str) {
    let (base, out) = (text(&golden(&format!("models/{model}"))), text(&dir.join("hub")));
    succeeds(&["convert", adapter, "--to", "adapterhub", "--model", &base, "--out", &out]);
    let (before, after) = (logits(dir, model, adapter), logits(dir, model, &out));
    assert!(off(&after, &before) < 1e-5, "{what}: off by {}", off(&after, &before));
}

fn fusion(cases: &[&str]) -> String {
    let paths: Vec<String> =
        cases.iter().map(|case| format!("{:?}", golden(&format!("cases/{case}/adapter")))).collect();
    format!("name = \"adapter_fusion\"\nadapters = [{}]", paths.join(", "))
}

#[test]
fn what_was_trained_here_is_read_back() {
    let of_outputs = "name = \"ia3\"\nfeedforward = []\nroles = [\"k\", \"v\", \"up\"]";
    let runs = [
        ("bert", "bert__lora", "name = \"lora\"\nrank = 3\nalpha = 5".to_owned()),
        ("bert", "bert__lora", of_outputs.to_owned()),
        ("llama", "llama__lora", "name = \"ia3\"".to_owned()),
        ("bert", "bert__lora", "name = \"prefix\"\ntokens = 3\nform = \"adapterhub\"".to_owned()),
        (
            "llama",
            "llama__lora",
            "name = \"prefix\"\ntokens = 3\nform = \"adapterhub\"\nprojection = 6".to_owned(),
        ),
        (
            "bert",
            "bert__lora",
            "name = \"prefix\"\ntokens = 3\nform = \"adapterhub\"\nlayers = [1]".to_owned(),
        ),
        ("llama", "llama__lora", "name = \"unipelt\"\nprojection = 4\nlayers = [0, 2]".to_owned()),
        ("llama", "llama__lora", "name = \"mam\"\nprojection = 4\nlayers = [1]".to_owned()),
        ("gpt2", "gpt2__lora", "name = \"bottleneck\"\nlayers = [1]".to_owned()),
        ("bert", "bert__lora", "name = \"prompt\"\ntokens = 3\nform = \"adapterhub\"".to_owned()),
        ("bert", "bert__lora", "name = \"reft\"\nrank = 2".to_owned()),
        ("bert", "bert__lora", fusion(&["bert__seq_bn", "bert__seq_bn_gelu"])),
        ("bert", "bert__lora", fusion(&["bert__seq_bn", "bert__seq_bn_leave_out"])),
    ];
    for (model, trajectory, method) in runs {
        let dir = tempfile::tempdir().unwrap();
        let adapter = trained(dir.path(), model, trajectory, &method);
        keeps_its_logits(dir.path(), model, &adapter, &method);
    }
}

#[test]
fn what_is_in_the_form_of_peft_computes_the_same_in_that_of_adapter_hub() {
    for case in [
        "bert__ia3_attention",
        "gpt2_hub__lora",
        "llama__ia3",
        "llama__lora_rslora_patterns",
        "mistral__ia3",
        "t5_flan__ia3",
        "vit__lora",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (model, adapter) =
            (case.split("__").next().unwrap(), text(&golden(&format!("cases/{case}/adapter"))));
        keeps_its_logits(dir.path(), model, &adapter, case);
    }
}

#[test]
fn what_the_library_computes_otherwise_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let convert = |model: &str, adapter: &str| {
        let (model, out) = (text(&golden(&format!("models/{model}"))), text(&dir.path().join("hub")));
        refused(&["convert", adapter, "--to", "adapterhub", "--model", &model, "--out", &out])
    };
    let case = |case: &str| text(&golden(&format!("cases/{case}/adapter")));
    assert!(convert("bert", &case("bert__lora_all_linear")).contains("attention.output.dense"));
    assert!(convert("llama", &case("llama__lora_lora_bias")).contains("lora_bias"));
    assert!(convert("bert", &case("bert__ia3")).contains("feedforward = []"));
    assert!(convert("llama", &case("llama__prefix")).contains("form = \"adapterhub\""));
    assert!(convert("bert", &case("bert__prompt")).contains("form = \"adapterhub\""));
    assert!(convert("llama", &case("llama__prompt")).contains("embeddings know positions"));
    let places = trained(dir.path(), "bert", "bert__lora", &fusion(&["bert__seq_bn", "bert__double_seq_bn"]));
    assert!(convert("bert", &places).contains("refuses to fuse such adapters"));
}
