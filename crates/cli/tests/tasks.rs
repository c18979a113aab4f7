//! Several tasks in one adapter: each row is trained, scored and answered under its own.

#[path = "common/worded.rs"]
mod worded;

use std::fs;
use std::path::{Path, PathBuf};
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

/// A recipe of two tasks that answer the same prompts, each in a way of its own.
fn recipe(dir: &Path, model: &Path) -> PathBuf {
    for (file, answer) in [("first", "t7 t7"), ("second", "t9 t9")] {
        let row = |i: u32| {
            let prompt = format!("t{} t{}", 10 + i, 20 + i);
            format!("{}\n", json!({ "prompt": prompt, "completion": answer }))
        };
        fs::write(dir.join(file).with_extension("jsonl"), (0..6).map(row).collect::<String>()).unwrap();
    }
    let data = |name: &str, file: &str| {
        format!(
            "[[data.tasks]]\nname = \"{name}\"\nformat = \"jsonl\"\npath = \"{file}\"\neval_path = \"{file}\"\n\
             template = \"plain\"\n"
        )
    };
    let text = format!(
        "model = {:?}\n[method]\nname = \"poly\"\ntasks = 2\nskills = 4\nrank = 8\ntargets = \"all-linear\"\n[data]\n\
         format = \"jsonl\"\n{}{}[train]\nsteps = 120\nbatch_size = 4\nlearning_rate = 0.02\nseed = 1\n",
        model.to_str().unwrap(),
        data("first", "first.jsonl"),
        data("second task", "second.jsonl"),
    );
    let file = dir.join("recipe.toml");
    fs::write(&file, text).unwrap();
    file
}

#[test]
fn tasks_that_the_method_was_not_told_of_are_refused_and_spare_ones_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = recipe(dir.path(), &model(dir.path(), "llama"));
    let text = fs::read_to_string(&file).unwrap().replace("steps = 120", "steps = 1");
    let run = dir.path().join("run");
    let (file, run) = (file.to_str().unwrap(), run.to_str().unwrap());
    fs::write(file, text.replace("tasks = 2", "tasks = 1")).unwrap();
    let refused = engraft(&["train", file, "--out", run]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{error}");
    assert!(error.contains("`tasks` is 1, and the data have rows of 2 tasks"), "{error}");
    assert!(!Path::new(run).exists());
    fs::write(file, text.replace("tasks = 2", "tasks = 3")).unwrap();
    let trained = engraft(&["train", file, "--out", run]);
    let said = String::from_utf8_lossy(&trained.stderr).into_owned();
    assert!(trained.status.success() && said.contains("`method.tasks` is 3, and the data have 2"), "{said}");
    // A saved adapter that knows fewer tasks than what it is scored on is refused before any work, too.
    let third = fs::read_to_string(file).unwrap();
    let second = third.find("[[data.tasks]]\nname = \"second task\"").unwrap();
    let block = third[second..third.find("[train]").unwrap()].to_owned();
    let blocks: String = (2..4).map(|i| block.replace("second task", &format!("task {i}"))).collect();
    fs::write(dir.path().join("four.toml"), third.replace("[train]", &format!("{blocks}[train]"))).unwrap();
    let four = dir.path().join("four.toml");
    let adapter = format!("{run}/adapter");
    let refused = engraft(&["eval", four.to_str().unwrap(), "--adapter", &adapter]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{error}");
    assert!(error.contains("there is no task `task 2`; the adapter knows `first`, `second task`"), "{error}");
    // One that has no names says how many.
    fs::remove_file(format!("{adapter}/task_names.json")).unwrap();
    let refused = engraft(&["eval", four.to_str().unwrap(), "--adapter", &adapter]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{error}");
    assert!(error.contains("the data have rows of 4 tasks"), "{error}");
}

#[test]
fn rows_are_answered_and_scored_under_their_tasks() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "llama");
    let (file, model) = (recipe(dir.path(), &model), model.to_str().unwrap());
    let (run, saved) = (dir.path().join("run"), dir.path().join("answers.jsonl"));
    let (run, saved) = (run.to_str().unwrap(), saved.to_str().unwrap());
    let trained = engraft(&["train", file.to_str().unwrap(), "--out", run]);
    let shown = String::from_utf8_lossy(&trained.stderr).into_owned();
    assert!(trained.status.success(), "{shown}");
    assert!(shown.contains("by task  first") && shown.contains("second_task"), "{shown}");

    let found = result(&["eval", run, "--json", "--generate", "--max-tokens", "2", "--save", saved]);
    let metric = |name: &str| found["metrics"][name].as_f64().unwrap_or_else(|| panic!("no {name}: {found}"));
    for name in ["loss", "accuracy", "exact_match", "bleu"] {
        let mean = (metric(&format!("first.{name}")) + metric(&format!("second_task.{name}"))) / 2.0;
        assert!((mean - metric(&format!("mean_{name}"))).abs() < 1e-9, "{name}");
    }
    assert!(engraft(&["eval", run, "--fail-if", "second_task.loss < 1000"]).status.code() == Some(3));

    // Prompts of both tasks are questions of their own, and `generate` answers as the evaluation did.
    let lines = fs::read_to_string(saved).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 12);
    let adapter = format!("{run}/adapter");
    let begun = ["generate", "--model", model, "--adapter", &adapter, "--max-tokens", "2"];
    let text = |task: usize, i: usize| {
        let (line, number) = (&lines[6 * task + i], task.to_string());
        let more = ["--json", "--task", &number, "--prompt", line["prompt"].as_str().unwrap()];
        let text = result(&[&begun[..], &more[..]].concat())["text"].as_str().unwrap().to_owned();
        assert_eq!(Some(text.as_str()), line["text"].as_str(), "row {i} of task {task}");
        text
    };
    assert!((0..2).any(|i| text(0, i) != text(1, i)), "tasks answer alike");
    by_names(&file, run, &found, &begun);
    let refused = engraft(&[&begun[..], &["--prompt", "t5", "--task", "2"]].concat());
    assert_eq!(refused.status.code(), Some(2));
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(error.contains("task 2") && error.contains("knows 2 tasks"), "{error}");
}

/// Tasks keep the numbers that training gave their names: in data of another order, and where one is chosen by its name.
fn by_names(file: &Path, run: &str, scored: &Value, generate: &[&str]) {
    let adapter = format!("{run}/adapter");
    let names = fs::read_to_string(format!("{adapter}/task_names.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&names).unwrap(), json!(["first", "second task"]));
    let text = fs::read_to_string(file).unwrap();
    let (first, second) = (text.find("[[data.tasks]]").unwrap(), text.rfind("[[data.tasks]]").unwrap());
    let (before, end) = (&text[..first], text.find("[train]").unwrap());
    let turned = [before, &text[second..end], &text[first..second], &text[end..]].concat();
    let other = file.with_file_name("turned.toml");
    fs::write(&other, &turned).unwrap();
    let eval = |more: &[&str]| {
        let args = ["eval", other.to_str().unwrap(), "--adapter", &adapter, "--json"];
        engraft(&[&args[..], more].concat())
    };
    let output = eval(&[]);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    for name in ["first.loss", "second_task.loss"] {
        let of = |found: &Value| found["metrics"][name].as_f64().unwrap();
        assert!((of(&found) - of(scored)).abs() < 1e-9, "{name}");
    }
    let written = |more: &[&str]| {
        let args = [generate, &["--json", "--prompt", "t12 t22"], more].concat();
        result(&args)["text"].as_str().unwrap().to_owned()
    };
    let second = written(&["--task", "1"]);
    assert_eq!(written(&["--task", "second task"]), second);
    assert_eq!(written(&["--choose", "task=second task"]), second);
    fs::write(&other, turned.replace("name = \"first\"", "name = \"frist\"")).unwrap();
    let generate = |more: &[&str]| engraft(&[generate, &["--prompt", "t5"], more].concat());
    for refused in [eval(&[]), generate(&["--task", "frist"]), generate(&["--choose", "task=frist"])] {
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{error}");
        assert!(error.contains("no task `frist`; the adapter knows `first`, `second task`"), "{error}");
        assert!(!error.contains("does not fit"), "{error}");
    }
}

/// A label that training has not seen is the one mistake that is told: the adapter's head is not measured by a guessed one.
#[test]
fn an_unknown_label_is_one_mistake() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "bert_encoder");
    let rows = |labels: [&str; 3]| {
        let row = |(i, label): (usize, &str)| format!("t{} t{},{label}\n", 10 + i, 20 + i);
        format!("text,label\n{}", labels.into_iter().enumerate().map(row).collect::<String>())
    };
    fs::write(dir.path().join("train.csv"), rows(["a", "b", "c"])).unwrap();
    fs::write(dir.path().join("eval.csv"), rows(["a", "b", "unheard"])).unwrap();
    let recipe = format!(
        "model = {:?}\ntask = \"sequence-classification\"\n[method]\nname = \"lora\"\n[data]\nformat = \"csv\"\n\
         path = \"train.csv\"\n[train]\nsteps = 1\nbatch_size = 2\n",
        model.to_str().unwrap()
    );
    let (file, run) = (dir.path().join("recipe.toml"), dir.path().join("run"));
    fs::write(&file, recipe).unwrap();
    let trained = engraft(&["train", file.to_str().unwrap(), "--out", run.to_str().unwrap()]);
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
    let (adapter, eval) = (run.join("adapter"), dir.path().join("eval.csv"));
    let mut args = vec!["eval", "--model", model.to_str().unwrap(), "--adapter", adapter.to_str().unwrap()];
    args.extend(["--task", "sequence-classification", "--data", eval.to_str().unwrap()]);
    let refused = engraft(&args);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{error}");
    assert!(error.contains("there is no label `unheard`") && error.contains("1 error in"), "{error}");
    assert!(!error.contains("classifier.weight"), "{error}");
}
