//! What a user meets at the program's door: help, exit codes, streams, the small commands.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn engraft(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engraft"));
    command
        .current_dir(dir)
        .args(args)
        .env("NO_COLOR", "1")
        .env("HF_HUB_OFFLINE", "1")
        .env_remove("FORCE_COLOR");
    command.env("HF_HOME", dir.join("hf")).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

const COMMANDS: [&str; 13] = [
    "train",
    "plan",
    "eval",
    "generate",
    "merge",
    "logits",
    "init",
    "methods",
    "inspect",
    "report",
    "doctor",
    "schema",
    "completions",
];

#[test]
fn every_command_has_help_with_examples() {
    let dir = tempfile::tempdir().unwrap();
    let whole = text(&engraft(dir.path(), &["--help"]).stdout);
    for command in COMMANDS {
        assert!(whole.contains(&format!("\n  {command} ")), "{command} is not listed");
        let output = engraft(dir.path(), &[command, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{command}");
        let help = text(&output.stdout);
        assert!(help.contains("Examples:\n  engraft "), "{command}: {help}");
        assert!(help.lines().all(|line| line.chars().count() <= 120), "{command}");
    }
}

#[test]
fn mistakes_before_any_work_have_exit_code_2_and_say_nothing_on_standard_output() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [&[&str]; 9] = [
        &["train"],
        &["nothing"],
        &["train", "absent.toml"],
        &["methods", "lorra"],
        &["inspect", "absent"],
        &["report", "."],
        &["logits", "--model", ".", "--inputs", "absent", "--out", "o"],
        &["schema", "--limit", "dims"],
        &["eval", "absent.toml", "--fail-if", "accuracy"],
    ];
    for args in cases {
        let output = engraft(dir.path(), args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
    let entries = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(entries, 0, "nothing was written");
}

#[test]
fn json_is_one_object_with_its_schema_number() {
    let dir = tempfile::tempdir().unwrap();
    for args in [&["methods", "--json"][..], &["doctor", "--json"], &["methods", "lora", "--json"]] {
        let value: Value = serde_json::from_slice(&engraft(dir.path(), args).stdout).unwrap();
        assert_eq!(value["schema"], 1, "{args:?}");
    }
    let schema: Value = serde_json::from_slice(&engraft(dir.path(), &["schema"]).stdout).unwrap();
    assert!(schema["properties"]["method"].is_object());
}

#[test]
fn a_method_of_elsewhere_is_found() {
    let dir = tempfile::tempdir().unwrap();
    for (name, expected) in [
        ("DoRA", "it is `name = \"lora\"` with `dora = true`; `engraft methods lora` tells more"),
        ("pissa", "`init = \"pissa\"`"),
        ("ties", "`engraft combine --rule ties` on saved adapters; `engraft combine --help` tells more"),
        ("bone", "`name = \"miss\"`"),
        ("qlora", "with `quantize = \"nf4\"` in `[base]`"),
    ] {
        let output = engraft(dir.path(), &["methods", name]);
        assert_eq!(output.status.code(), Some(2), "{name}");
        assert!(text(&output.stderr).contains(expected), "{name}: {}", text(&output.stderr));
    }
    let page = |name: &str| text(&engraft(dir.path(), &["methods", name]).stdout);
    assert!(page("fish").contains("targets  every linear layer but the head"), "{}", page("fish"));
    assert!(page("dylora").contains("also where the adapter is used (--choose)"), "{}", page("dylora"));
}

#[test]
fn colour_is_asked_for_or_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let coloured = |args: &[&str]| text(&engraft(dir.path(), args).stderr).contains('\u{1b}');
    assert!(!coloured(&["methods", "lorra"]));
    assert!(coloured(&["methods", "lorra", "--color", "always"]));
}

#[test]
fn the_demonstration_is_written_once() {
    let dir = tempfile::tempdir().unwrap();
    let first = engraft(dir.path(), &["init", "--demo"]);
    assert_eq!(first.status.code(), Some(0), "{}", text(&first.stderr));
    assert_eq!(text(&first.stdout), "demo/recipe.toml\n");
    let rows = fs::read_to_string(dir.path().join("demo/train.csv")).unwrap();
    assert!(rows.starts_with("text,intent\n"));
    assert_eq!(engraft(dir.path(), &["init", "--demo"]).status.code(), Some(2));
}

/// What the help shows goes without a network where the repository is: its example is run as it stands, but for training.
#[test]
fn the_example_of_the_demonstration_needs_no_network() {
    let dir = tempfile::tempdir().unwrap();
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").canonicalize().unwrap();
    std::os::unix::fs::symlink(models, dir.path().join("models")).unwrap();
    for help in [&["--help"][..], &["init", "--help"]] {
        let help = text(&engraft(dir.path(), help).stdout);
        let mut lines = help.lines().skip_while(|line| !line.contains("init --demo"));
        let (init, train) = (lines.next().unwrap(), lines.next().unwrap());
        assert_eq!(train, "  engraft train demo/recipe.toml");
        let words: Vec<&str> = init.split_whitespace().skip(1).collect();
        assert_eq!(engraft(dir.path(), &words).status.code(), Some(0), "{init}");
        let plan = engraft(dir.path(), &["plan", "demo/recipe.toml", "--no-trial"]);
        assert_eq!(plan.status.code(), Some(0), "{}", text(&plan.stderr));
        fs::remove_dir_all(dir.path().join("demo")).unwrap();
    }
}

#[test]
fn completions_and_manual_pages_are_made() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let completions = text(&engraft(dir.path(), &["completions", shell]).stdout);
        assert!(completions.contains("fail-if") && !completions.contains("template-worker"), "{shell}");
    }
    assert_eq!(engraft(dir.path(), &["completions", "man", "--out", "man"]).status.code(), Some(0));
    assert!(dir.path().join("man/engraft-train.1").is_file());
}
