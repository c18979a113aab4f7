//! `engraft eval --generate`: the answers are those of `engraft generate`, and their scores follow.

#[path = "common/worded.rs"]
mod worded;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use worded::model;

fn engraft(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_engraft")).args(args).output().unwrap()
}

fn result(args: &[&str]) -> Value {
    let output = engraft(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn error(args: &[&str]) -> String {
    let output = engraft(args);
    assert_eq!(output.status.code(), Some(2), "{args:?}");
    String::from_utf8_lossy(&output.stderr).split_whitespace().collect::<Vec<_>>().join(" ")
}

fn rows(path: &Path, rows: &[(&str, &str)]) {
    let line = |(prompt, completion): &(&str, &str)| {
        format!("{}\n", json!({ "prompt": prompt, "completion": completion }))
    };
    fs::write(path, rows.iter().map(line).collect::<String>()).unwrap();
}

#[test]
fn answers_are_those_of_generate_and_are_scored() {
    let dir = tempfile::tempdir().unwrap();
    for (name, task) in [("llama", "causal-lm"), ("gpt2", "causal-lm"), ("t5_flan", "seq2seq")] {
        let model = model(dir.path(), name);
        let model = model.to_str().unwrap();
        let (data, saved) = (dir.path().join("rows.jsonl"), dir.path().join("answers.jsonl"));
        let prompts = ["t11 t12 t13", "t40 t41 t42 t43"];
        let generated: Vec<String> = prompts
            .iter()
            .map(|prompt| {
                let found = result(&[
                    "generate",
                    "--model",
                    model,
                    "--prompt",
                    prompt,
                    "--max-tokens",
                    "6",
                    "--json",
                ]);
                found["text"].as_str().unwrap().trim().to_owned()
            })
            .collect();
        assert!(generated[0] != generated[1] && !generated[0].is_empty(), "{name}: {generated:?}");
        // The first prompt stands twice; its second answer is what the model writes.
        rows(&data, &[(prompts[0], "t9 t9"), (prompts[1], "t9 t8 t7"), (prompts[0], &generated[0])]);
        let base = ["eval", "--model", model, "--task", task, "--data", data.to_str().unwrap(), "--json"];
        let more = ["--generate", "--max-tokens", "6", "--save", saved.to_str().unwrap()];
        let found = result(&[&base[..], &more].concat());
        assert_eq!(found["metrics"]["exact_match"], 0.5, "{name}: {found}");
        assert!(found["metrics"]["rouge1"].as_f64().unwrap() >= 0.5, "{found}");
        assert!(found["metrics"]["bleu"].is_f64() && found["metrics"]["loss"].is_f64(), "{found}");
        let lines = fs::read_to_string(&saved).unwrap();
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let texts: Vec<&str> = lines.iter().map(|line| line["text"].as_str().unwrap().trim()).collect();
        assert_eq!(texts, generated, "{name}");
        assert_eq!(lines[0]["references"].as_array().unwrap().len(), 2);
        assert_eq!(lines[0]["prompt"], prompts[0]);
        // The first prompt alone.
        let found = result(&[&base[..], &["--generate", "--max-tokens", "6", "--prompts", "1"]].concat());
        assert_eq!(found["metrics"]["exact_match"], 1.0, "{name}: {found}");
        // Without the option nothing is written.
        assert!(result(&base)["metrics"]["bleu"].is_null());
    }
}

#[test]
fn what_cannot_be_answered_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "llama");
    let model = model.to_str().unwrap();
    let text = dir.path().join("text.txt");
    fs::write(&text, "t5 t6 t7 t8\n").unwrap();
    let base = ["eval", "--model", model, "--task", "causal-lm", "--data", text.to_str().unwrap()];
    let found = error(&[&base[..], &["--format", "text", "--generate"]].concat());
    assert!(found.contains("prompts and answers"), "{found}");
    let data = dir.path().join("rows.jsonl");
    rows(&data, &[("t5 t6", "t7")]);
    let base = ["eval", "--model", model, "--task", "causal-lm", "--data", data.to_str().unwrap()];
    // The model was made for 64 tokens.
    let found = error(&[&base[..], &["--generate", "--max-tokens", "63"]].concat());
    assert!(found.contains("made for 64"), "{found}");
    let found = error(&[&base[..], &["--beams", "4"]].concat());
    assert!(found.contains("--generate"), "{found}");
}
