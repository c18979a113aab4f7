//! `engraft train` with several recipes: each run is the one that it is alone.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn engraft(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_engraft")).args(args).current_dir(dir).output().unwrap()
}

fn succeeds(dir: &Path, args: &[&str]) -> String {
    let output = engraft(dir, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn refused(dir: &Path, args: &[&str]) -> String {
    let output = engraft(dir, args);
    assert_eq!(output.status.code(), Some(2), "{args:?}");
    String::from_utf8_lossy(&output.stderr).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Recipes `a`, `b` and `c` of one base, which differ in method, rank, rate, steps and seed.
fn recipes(dir: &Path) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let (model, data) =
        (golden.join("models/llama"), golden.join("trajectories/llama__lora/batches.safetensors"));
    let of = |name: &str, method: &str, train: &str| {
        let text = format!(
            "model = {:?}\n[method]\n{method}\n[data]\nformat = \"tensors\"\npath = {:?}\nshuffle = false\n[train]\nbatch_size = 2\n{train}\n",
            model.display().to_string(),
            data.display().to_string(),
        );
        fs::write(dir.join(format!("{name}.toml")), text).unwrap();
    };
    of("a", "name = \"lora\"\nrank = 2", "steps = 5\nlearning_rate = 1e-2");
    of(
        "b",
        "name = \"lora\"\nrank = 5\ntargets = \"all-linear\"",
        "steps = 3\nlearning_rate = 1e-3\nseed = 4",
    );
    of("c", "name = \"ia3\"", "steps = 4\nlearning_rate = 5e-3\ncheckpoint_every = 2");
}

fn adapter(dir: &Path, run: &str) -> Vec<u8> {
    fs::read(dir.join(run).join("adapter/adapter_model.safetensors")).unwrap()
}

#[test]
fn runs_that_go_on_together_have_the_bits_of_each_alone() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    recipes(dir);
    let said = succeeds(dir, &["train", "a.toml", "b.toml", "c.toml", "--out", "all", "--json"]);
    let said: Value = serde_json::from_str(&said).unwrap();
    let runs = said["runs"].as_array().unwrap();
    let steps = |name: &str| runs.iter().find(|run| run["name"] == name).unwrap()["step"].as_u64().unwrap();
    assert_eq!(["a", "b", "c"].map(steps), [5, 3, 4]);
    for name in ["a", "b", "c"] {
        succeeds(dir, &["train", &format!("{name}.toml"), "--out", &format!("alone/{name}")]);
        assert!(adapter(dir, &format!("all/{name}")) == adapter(dir, &format!("alone/{name}")), "{name}");
    }
    // A run directory that is there is taken up by --resume alone; one that is not begins.
    assert!(refused(dir, &["train", "a.toml", "b.toml", "--out", "all"]).contains("holds a run already"));
    fs::remove_dir_all(dir.join("all/b")).unwrap();
    succeeds(dir, &["train", "a.toml", "b.toml", "--out", "all", "--resume"]);
    assert!(adapter(dir, "all/b") == adapter(dir, "alone/b"));
}

#[test]
fn checks_and_resumes_say_which_run_they_speak_of() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    recipes(dir);
    let output = engraft(dir, &["train", "a.toml", "b.toml", "--check"]);
    let (said, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && said.contains("a  check passed") && said.contains("b  check passed"),
        "{said}"
    );
    assert!(told.contains("b  resumed at step 1"), "{told}");
    let said: Value =
        serde_json::from_str(&succeeds(dir, &["train", "a.toml", "b.toml", "--check", "--json"])).unwrap();
    assert_eq!((&said["runs"][1]["name"], &said["runs"][0]["status"]), (&"b".into(), &"check passed".into()));
    let said: Value =
        serde_json::from_str(&succeeds(dir, &["train", "a.toml", "--check", "--json"])).unwrap();
    assert_eq!(said["status"], "check passed");
    assert!(!dir.join("runs").exists());
    let said = refused(dir, &["train", "a.toml", "b.toml", "--resume"]);
    assert!(said.contains("nothing to resume") && said.contains("(a, b)"), "{said}");
    assert!(refused(dir, &["train", "a.toml", "--resume"]).contains("no run to resume"));
    succeeds(dir, &["train", "a.toml", "--out", "all/a"]);
    let output = engraft(dir, &["train", "a.toml", "c.toml", "--out", "all", "--resume"]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("note: c was not begun in all"), "{told}");
}

#[test]
fn one_that_fails_leaves_the_others_going() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    recipes(dir);
    let same = refused(dir, &["train", "a.toml", "./a.toml"]);
    assert!(same.contains("would both run in runs/a"), "{same}");
    // Weight decay at this rate multiplies the weights by −9e9 in each step.
    let text = fs::read_to_string(dir.join("b.toml")).unwrap();
    let text = text
        .replace("learning_rate = 1e-3", "learning_rate = 10\nschedule = \"constant\"\nweight_decay = 1e9");
    fs::write(dir.join("b.toml"), text.replace("steps = 3", "steps = 12")).unwrap();
    let output = engraft(dir, &["train", "a.toml", "b.toml", "--out", "all"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("b: ") && errors.contains("finite"), "{errors}");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("a  done") && dir.join("all/a/adapter/adapter_config.json").is_file(), "{said}");
}
