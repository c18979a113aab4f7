//! `trained_share`: a budget dealt out to the methods and groups of layers of a union.

#[path = "common/program.rs"]
mod program;

use std::path::{Path, PathBuf};

use program::{engraft, refused, succeeds};
use serde_json::Value;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(path).canonicalize().unwrap()
}

/// A recipe of these tables on tiny models.
fn recipe(dir: &Path, model: &str, methods: &[&str]) -> String {
    let tables: String = methods.iter().map(|method| format!("[[method]]\n{method}\n")).collect();
    let text = format!(
        "model = {:?}\n{tables}[data]\nformat = \"tensors\"\npath = {:?}\n[train]\nsteps = 1\nbatch_size = 2\n",
        golden(&format!("models/{model}")),
        golden(&format!("trajectories/{model}__lora/batches.safetensors")),
    );
    let file = dir.join("r.toml");
    std::fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

/// Numbers in the file of the adapter that a run of these leaves, by method, and the model's.
fn trained(model: &str, methods: &[&str]) -> (Vec<usize>, usize, Value) {
    let dir = tempfile::tempdir().unwrap();
    let (file, run) = (recipe(dir.path(), model, methods), dir.path().join("run"));
    succeeds(&["train", &file, "--out", run.to_str().unwrap()]);
    let limits = engraft_store::Limits::default();
    let adapter = engraft_store::read_adapter(&run.join("adapter"), &limits).unwrap();
    let of = |number: usize| {
        let own = adapter.weights.iter().filter(|(name, _)| name.starts_with(&format!("{number}.")));
        own.map(|(_, raw)| raw.shape.iter().product::<usize>()).sum()
    };
    let weights = engraft_store::Weights::open(&golden(&format!("models/{model}")), &limits).unwrap();
    let total = weights.names().map(|name| weights.get(name).unwrap().shape.iter().product::<usize>()).sum();
    ((0..methods.len()).map(of).collect(), total, adapter.config)
}

/// A design of groups of layers: each has methods of its own and a part of the budget.
#[test]
fn every_group_of_a_design_gets_its_part() {
    let (counts, total, config) = trained(
        "llama",
        &[
            "name = \"bottleneck\"\nlayers = [0]\ntrained_share = 0.02",
            "name = \"prefix\"\nlayers = [1]\ntrained_share = 0.01",
            "name = \"lora\"\nroles = [\"q\", \"v\"]\nlayers = [1, 2]\ntrained_share = 0.04",
            "name = \"krona_b\"\nlayers = [2]",
        ],
    );
    for (count, share) in counts.iter().zip([0.02, 0.01, 0.04]) {
        let off = *count as f64 / (share * total as f64) - 1.0;
        assert!(off.abs() < 0.1, "{count} of {total} for {share}: off by {off:.2}");
    }
    assert_eq!(config["methods"][1]["layers_to_transform"], serde_json::json!([1]));
    assert_eq!(config["methods"][3]["layers_to_transform"], serde_json::json!([2]));
    assert_eq!(config["methods"][0]["config"]["leave_out"], serde_json::json!([1, 2]));
}

#[test]
fn the_size_that_follows_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = recipe(dir.path(), "bert", &["name = \"adaptformer\"\ntrained_share = 0.03"]);
    let output = engraft(&["plan", &file, "--no-trial"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains("`trained_share` 0.03 makes `size`"), "{said}");
}

#[test]
fn a_share_that_cannot_be_had_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let of = |method: &str| refused(&["train", &recipe(dir.path(), "bert", &[method]), "--out", "never"]);
    for (method, expected) in [
        ("name = \"bitfit\"\ntrained_share = 0.01", "has no size that `trained_share` could set"),
        (
            "name = \"lora\"\nrank = 4\ntrained_share = 0.01",
            "`trained_share` sets `rank`, which is given too",
        ),
        ("name = \"prefix\"\ntrained_share = 1e-7", "can be had"),
        ("name = \"lora\"\ntrained_share = 1.5", "must be less than 1, found 1.5"),
    ] {
        let said = of(method);
        assert!(said.contains(expected) && said.contains("r.toml:"), "{method}: {said}");
    }
}

/// What lies in some layers alone is found there again: AdaMix once it is averaged, S4 with groups that are left as they are.
#[test]
fn a_run_with_layers_left_out_is_evaluated_as_it_was_trained() {
    for method in [
        "name = \"adamix\"\nlayers = [1]",
        "name = \"s4\"\nbudget = 0.05\ngrouping = \"uniform\"\nstrategies = [\"-\", \"L\", \"-\", \"PB\"]",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (file, run) = (recipe(dir.path(), "llama", &[method]), dir.path().join("run"));
        succeeds(&["train", &file, "--out", run.to_str().unwrap()]);
        succeeds(&["eval", run.to_str().unwrap(), "--set", "data.eval_fraction=0.5"]);
    }
}
