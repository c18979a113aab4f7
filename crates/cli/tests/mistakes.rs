//! Mistakes and failures on the repository's own model: what is said, and the way out.

#[path = "common/offline.rs"]
mod offline;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use offline::engraft;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// What a command says that ends before any work.
fn refused(dir: &Path, args: &[&str]) -> String {
    let output = engraft(dir, args);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
    assert!(output.stdout.is_empty(), "{args:?}");
    text
}

/// A recipe on the small model and the help-desk data, with more lines for the method.
fn recipe(method: &str) -> String {
    let root = root();
    format!(
        "model = {:?}\n\n[method]\nname = \"lora\"\ntargets = [\"query\"]\n{method}\n\n[data]\nformat = \"csv\"\npath = {:?}\n\n[train]\nsteps = 2\n",
        root.join("models/all-minilm-l6-v2"),
        root.join("data/helpdesk/test.csv"),
    )
}

#[test]
fn a_mistyped_path_is_no_hub_id() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("models/qwen3-0.6b")).unwrap();
    let cases = [
        ("models/qwen3-0.6", "no such directory in models; did you mean models/qwen3-0.6b?"),
        ("./qwen", "no such directory; the nearest that exists is ."),
        ("./model/qwen3-0.6b", "no such directory in .; did you mean ./models/qwen3-0.6b?"),
    ];
    fs::write(dir.path().join("r.toml"), recipe("").replace(root().to_str().unwrap(), "")).unwrap();
    for (path, expected) in cases {
        let set = format!("model={path}");
        for args in [&["inspect", path][..], &["train", "r.toml", "--set", &set]] {
            let text = refused(dir.path(), args);
            assert!(text.contains(expected) && !text.contains("HF_HUB_OFFLINE"), "{args:?}: {text}");
        }
    }
    // Without a slash it may be either; what is near is named.
    let text = refused(dir.path(), &["inspect", "model"]);
    assert!(text.contains("did you mean models?") && text.contains("HF_HUB_OFFLINE"), "{text}");
    // An id goes to the Hub, be it that a recipe elsewhere has a directory of its owner's name.
    assert!(refused(dir.path(), &["inspect", "owner/name"]).contains("HF_HUB_OFFLINE"));
}

#[test]
fn an_adapter_that_gives_no_numbers_is_told() {
    let (golden, dir) = (root().join("tests/golden"), tempfile::tempdir().unwrap());
    let (model, adapter) = (golden.join("models/llama"), golden.join("cases/llama__lora/adapter"));
    let inputs = golden.join("inputs/llama/inputs.safetensors");
    let told = |config: String, tensors: &[u8]| {
        fs::write(dir.path().join("adapter_config.json"), config).unwrap();
        fs::write(dir.path().join("adapter_model.safetensors"), tensors).unwrap();
        let words = [
            "--model",
            model.to_str().unwrap(),
            "--inputs",
            inputs.to_str().unwrap(),
            "--adapter",
            ".",
            "--out",
            "l",
        ];
        let output = engraft(dir.path(), &[&["logits"], &words[..]].concat());
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let config = fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let tensors = fs::read(adapter.join("adapter_model.safetensors")).unwrap();
    assert!(!told(config.clone(), &tensors).contains("no number"));
    let mut broken = tensors.clone();
    let last = broken.len() - 4;
    broken[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    let text = told(config.clone(), &broken);
    assert!(text.contains(".weight` holds NaN"), "{text}");
    let mut large: serde_json::Value = serde_json::from_str(&config).unwrap();
    large["lora_alpha"] = 1e308.into();
    let text = told(large.to_string(), &tensors);
    assert!(text.contains("`lora_alpha` is 1e308"), "{text}");
}

#[test]
fn too_few_rows_for_two_levels_are_said_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("few.csv"), "text,intent\nhello there,a\nmy password,b\n").unwrap();
    for method in ["autolora", "bilora"] {
        let text = recipe("").replace("\"lora\"", &format!("{method:?}"));
        let path = format!("{:?}", root().join("data/helpdesk/test.csv"));
        fs::write(dir.path().join("r.toml"), text.replace(&path, "\"few.csv\"")).unwrap();
        let said = refused(dir.path(), &["train", "r.toml", "--out", "run"]);
        assert!(said.contains("give at least 4 rows") && said.contains("r.toml:"), "{said}");
        assert!(!dir.path().join("run").exists());
    }
}

#[test]
fn sizes_that_do_not_divide_are_said_with_some_that_do() {
    let dir = tempfile::tempdir().unwrap();
    for (method, key) in [("vblora", "vector_length"), ("c3a", "block_size")] {
        let text = recipe("").replace("\"lora\"", &format!("{method:?}"));
        fs::write(dir.path().join("r.toml"), text).unwrap();
        let said = refused(dir.path(), &["train", "r.toml"]);
        assert!(said.contains(&format!("`{key}` that divides both, such as 192 or 384")), "{said}");
    }
}

#[test]
fn names_and_patterns_of_a_method_are_shown_at_their_lines() {
    let dir = tempfile::tempdir().unwrap();
    let said = |method: &str| {
        fs::write(dir.path().join("r.toml"), recipe(method)).unwrap();
        refused(dir.path(), &["train", "r.toml"])
    };
    let text = said("train_also = [\"pooler\", \"clasifier\"]");
    assert!(text.contains("r.toml:6:25") && text.contains("did you mean `classifier`?"), "{text}");
    let text = said("rank_pattern = { query = 4, \"layer.9.attention.self.query\" = 2 }");
    assert!(text.contains("r.toml:6:29") && text.contains("matches nothing"), "{text}");
    assert!(text.contains("such as `bert.encoder.layer.0.attention.self.query`"), "{text}");
    let text = said("\n[method.alpha_pattern]\nquery = 8\n\"(\" = 2\n\"self.query\" = -1");
    assert!(text.contains("r.toml:9:1") && text.contains("r.toml:10:1"), "{text}");
    assert!(text.contains("is not a valid pattern") && text.contains("expected a number above 0"), "{text}");
}

#[test]
fn a_directory_that_is_taken_is_refused_before_anything_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    // A model that is not there would be the next complaint.
    fs::write(dir.path().join("r.toml"), recipe("").replace("all-minilm-l6-v2", "absent")).unwrap();
    fs::create_dir(dir.path().join("taken")).unwrap();
    fs::write(dir.path().join("taken/notes.txt"), "mine").unwrap();
    let said = |args: &[&str]| refused(dir.path(), &[&["train", "r.toml"], args].concat());
    let text = said(&["--out", "taken"]);
    assert!(text.contains("taken: expected an empty directory") && text.contains("another --out"), "{text}");
    assert!(said(&["--out", "taken/notes.txt/run"]).contains("expected a directory"));
    assert!(said(&["--out", "taken", "--resume"]).contains("holds no run to resume"));
    // Where nothing can be made, whoever asks.
    assert!(said(&["--out", "/proc/run"]).contains("cannot write to /proc"));
    fs::write(dir.path().join("taken/plan.toml"), "").unwrap();
    assert!(said(&["--out", "taken"]).contains("go on with it by --resume"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing was written");
}

#[test]
fn a_run_that_can_no_longer_write_says_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let text = recipe("").replace("steps = 2\n", "steps = 100000\nbatch_size = 1\ncheckpoint_every = 1\n");
    fs::write(dir.path().join("r.toml"), text).unwrap();
    let mut run = Command::new(env!("CARGO_BIN_EXE_engraft"))
        .current_dir(dir.path())
        .args(["train", "r.toml", "--out", "o", "--color", "never"])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let events = dir.path().join("o/events.jsonl");
    let begun = || fs::read_to_string(&events).is_ok_and(|text| text.contains("\"checkpoint\""));
    while !begun() {
        assert!(run.try_wait().unwrap().is_none(), "it ended before its first checkpoint");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    fs::rename(dir.path().join("o/checkpoints"), dir.path().join("gone")).unwrap();
    let output = run.wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("\nerror: ") && text.contains("o/checkpoints"), "{text}");
    assert!(text.ends_with("\nresume  engraft train r.toml --out o --resume\n"), "{text}");
}

#[test]
fn a_missing_format_is_guessed_from_the_name_of_the_data() {
    let dir = tempfile::tempdir().unwrap();
    let said = |path: &str| {
        let text = format!("model = \"m\"\n[method]\nname = \"lora\"\n[data]\npath = \"{path}\"\n");
        fs::write(dir.path().join("r.toml"), text).unwrap();
        let text = refused(dir.path(), &["train", "r.toml"]);
        assert!(text.contains("`data.format` is missing"), "{path}: {text}");
        text
    };
    let cases = [
        ("train.csv", "csv"),
        ("a/train.TSV.gz", "tsv"),
        ("chat.jsonl", "jsonl"),
        ("book.txt", "text"),
        ("x.npy", "npy"),
        ("batches.safetensors", "tensors"),
        ("train-images-idx3-ubyte.gz", "idx"),
        ("flowers/train/", "images"),
        ("flowers", "images"),
    ];
    for (path, format) in cases {
        let text = said(path);
        assert!(text.contains(&format!("add `format = \"{format}\"`")), "{path}: {text}");
    }
    let text = said("data.parquet");
    assert!(text.contains("one of csv, tsv, jsonl") && !text.contains("add `format = \"csv\"`"), "{text}");
}

#[test]
fn a_merged_model_is_not_scored_on_classes_that_it_does_not_know() {
    let dir = tempfile::tempdir().unwrap();
    let work = |args: &[&str]| {
        let output = engraft(dir.path(), args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    fs::write(dir.path().join("r.toml"), recipe("")).unwrap();
    work(&["train", "r.toml", "--out", "o"]);
    let base = root().join("models/all-minilm-l6-v2");
    work(&["merge", "--model", base.to_str().unwrap(), "--adapter", "o/adapter", "--out", "merged"]);
    let rows = fs::read_to_string(root().join("data/helpdesk/test.csv")).unwrap();
    let mut lines = rows.lines();
    let (header, row) = (lines.next().unwrap(), lines.next().unwrap());
    let (text, label) = row.rsplit_once(',').unwrap();
    fs::write(dir.path().join("known.csv"), format!("{header}\n{text},{label}\n")).unwrap();
    fs::write(dir.path().join("other.csv"), format!("{header}\n{text},{label}x\n")).unwrap();
    work(&["eval", "--model", "merged", "--data", "known.csv"]);
    let said = refused(dir.path(), &["eval", "--model", "merged", "--data", "other.csv"]);
    assert!(said.contains(&format!("there is no label `{label}x`; did you mean `{label}`?")), "{said}");
}

#[test]
fn a_rate_of_the_head_wants_a_head_that_is_trained() {
    let dir = tempfile::tempdir().unwrap();
    let golden = root().join("tests/golden");
    let (model, data) =
        (golden.join("models/llama"), golden.join("trajectories/llama__lora_plus_dora/batches.safetensors"));
    let text = format!(
        "model = {model:?}\n[method]\nname = \"lora\"\n[data]\nformat = \"tensors\"\npath = {data:?}\n[train]\nsteps = 1\nhead_learning_rate = 1e-2\n",
    );
    fs::write(dir.path().join("r.toml"), &text).unwrap();
    let said = refused(dir.path(), &["train", "r.toml"]);
    assert!(said.contains("r.toml:9:") && said.contains("nothing of it is"), "{said}");
    assert!(said.contains("add `train_also = [\"lm_head\"]`"), "{said}");
    let text = text.replace("\"lora\"", "\"lora\"\ntrain_also = [\"lm_head\"]");
    fs::write(dir.path().join("r.toml"), &text).unwrap();
    assert!(engraft(dir.path(), &["plan", "r.toml", "--no-trial"]).status.success());
}

#[test]
fn regression_is_said_not_to_be_there() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("scores.csv"), "text,label\ngood,4.5\nbad,1\n").unwrap();
    let text = recipe("").replace(root().join("data/helpdesk/test.csv").to_str().unwrap(), "scores.csv");
    fs::write(dir.path().join("r.toml"), format!("task = \"sequence-classification\"\n{text}")).unwrap();
    let said = refused(dir.path(), &["train", "r.toml"]);
    assert!(said.contains("scores such as 4.5: regression is not trained yet"), "{said}");
    // A model whose head gives one number.
    fs::create_dir(dir.path().join("one")).unwrap();
    let base = root().join("models/all-minilm-l6-v2");
    for name in ["model.safetensors", "tokenizer.json"] {
        std::os::unix::fs::symlink(base.join(name), dir.path().join("one").join(name)).unwrap();
    }
    let config = fs::read_to_string(base.join("config.json")).unwrap();
    for more in
        ["\"num_labels\": 1", "\"id2label\": {\"0\": \"LABEL_0\"}", "\"problem_type\": \"regression\""]
    {
        let config = config.replace("BertModel", "BertForSequenceClassification");
        fs::write(dir.path().join("one/config.json"), config.replacen('{', &format!("{{{more},"), 1))
            .unwrap();
        let said = refused(dir.path(), &["train", "r.toml", "--set", "model=one"]);
        assert!(said.contains("regression") && said.contains("not trained yet"), "{more}: {said}");
    }
}
