//! The house rules that a machine can check. A rule that is broken names the place and what to do.

use std::path::{Path, PathBuf};

use crate::root;

/// Crates each crate may depend on.
const MAY_USE: [(&str, &[&str]); 10] = [
    ("words", &[]),
    ("tensor", &[]),
    ("store", &["words"]),
    ("recipe", &["words"]),
    ("report", &[]),
    ("data", &["words"]),
    ("nn", &["tensor", "store"]),
    ("model", &["tensor", "store", "nn"]),
    ("method", &["tensor", "nn"]),
    ("train", &["tensor", "store", "nn", "model", "method", "data", "recipe", "report", "words"]),
];

/// Files longer than the budget, with the reason.
const LONG: [(&str, usize, &str); 1] =
    [("crates/model/src/bert.rs", 550, "BERT and RoBERTa with five heads; their difference is a few lines")];
const LINES_MAX: usize = 500;
/// Lines of a function.
const FUNCTION_MAX: usize = 70;

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
}

/// Every source file (not the tests beside `src`) with its path from the root and its text.
pub(crate) fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(root().join("crates")).unwrap().flatten() {
        rust_files(&entry.path().join("src"), &mut files);
    }
    rust_files(&root().join("bench/src"), &mut files);
    rust_files(&root().join("xtask/src"), &mut files);
    let name = |path: &Path| path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
    let mut sources: Vec<_> = files.iter().map(|p| (name(p), std::fs::read_to_string(p).unwrap())).collect();
    sources.sort();
    assert!(sources.len() > 100, "the sources were not found");
    sources
}

/// The text before a file's own tests.
pub(crate) fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or(text)
}

#[test]
fn dependencies_point_downwards() {
    for (name, allowed) in MAY_USE {
        let text = std::fs::read_to_string(root().join(format!("crates/{name}/Cargo.toml"))).unwrap();
        let manifest: toml::Table = text.parse().unwrap();
        let used = manifest["dependencies"].as_table().unwrap().keys();
        for other in used.filter_map(|key| key.strip_prefix("engraft-")) {
            assert!(allowed.contains(&other), "engraft-{name} must not depend on engraft-{other}");
        }
    }
}

#[test]
fn only_the_program_prints_and_reads_the_environment() {
    let free = |path: &str| ["crates/cli/", "bench/", "xtask/"].iter().any(|dir| path.starts_with(dir));
    let test_only = |path: &str| path.ends_with("tests.rs") || path.ends_with("testing.rs");
    for (path, text) in sources().iter().filter(|(path, _)| !free(path) && !test_only(path)) {
        let text = without_tests(text);
        for word in ["println!", "eprintln!", "print!(", "env::var", "env::args", "dbg!"] {
            // A switch of the tests that picks the instructions they run with.
            let is_excused = path == "crates/tensor/src/cpu/simd.rs" && word == "env::var";
            assert!(is_excused || !text.contains(word), "{path} holds `{word}`: only the cli crate may");
        }
    }
}

#[test]
fn only_store_data_and_the_program_touch_files() {
    let free = |path: &str| {
        ["crates/store/", "crates/data/", "crates/cli/", "bench/", "xtask/"]
            .iter()
            .any(|dir| path.starts_with(dir))
    };
    for (path, text) in sources().iter().filter(|(path, _)| !free(path) && !path.ends_with("tests.rs")) {
        for word in ["std::fs", "File::open", "File::create"] {
            assert!(
                !without_tests(text).contains(word),
                "{path} holds `{word}`: files belong to the store crate"
            );
        }
    }
}

#[test]
fn every_method_is_registered_and_has_a_fixture() {
    let registry = std::fs::read_to_string(root().join("crates/method/src/lib.rs")).unwrap();
    let cases: Vec<String> = std::fs::read_dir(root().join("tests/golden/cases"))
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    for entry in engraft_method::METHODS {
        let name = entry.info.name;
        // Full training of modules and of the head alone share a file.
        let home =
            if ["full", "head"].contains(&name) { "&full::".to_owned() } else { format!("&{name}::ENTRY") };
        assert!(registry.contains(&home), "{name}: its file is not called after it");
        // AdapterHub calls bottleneck adapters by their places; full training has no file form in peft but its parts'.
        let known: &[&str] = match name {
            "bottleneck" => &["seq_bn", "par_bn", "double_seq_bn"],
            "full" => &["lora_save_norm", "head"],
            other => &[other],
        };
        let has = known.iter().any(|known| cases.iter().any(|case| case.contains(&format!("__{known}"))));
        assert!(has, "{name} has no case in tests/golden/cases");
    }
    let mut files = Vec::new();
    rust_files(&root().join("crates/method/src"), &mut files);
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
        let is_method = text.contains("pub static ENTRY") || text.contains("pub const ENTRY");
        assert!(
            !is_method || registry.contains(&format!("&{stem}::ENTRY")),
            "{stem} is a method and not registered"
        );
    }
}

#[test]
fn generated_pages_are_up_to_date() {
    for (name, text) in crate::docs::pages() {
        let found = std::fs::read_to_string(root().join("docs").join(name)).unwrap_or_default();
        assert!(found == text, "docs/{name} is stale: cargo run --release -p engraft-xtask -- docs");
    }
}

#[test]
fn files_keep_to_their_length() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        let most = LONG.iter().find(|(long, ..)| *long == path).map_or(LINES_MAX, |(_, most, _)| *most);
        assert!(
            lines <= most,
            "{path} has {lines} lines, more than {most}: split it, or give a reason in `LONG`"
        );
    }
    assert!(LONG.iter().all(|(_, _, reason)| !reason.is_empty()));
}

/// Name and length of every function that is formatted as rustfmt does: its last line is `}` under its first.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let Some(at) = code.find("fn ").filter(|at| code[..*at].split_whitespace().all(is_qualifier)) else {
            continue;
        };
        let end = format!("{}}}", &line[..line.len() - code.len()]);
        if let Some(length) = lines[start..].iter().position(|line| *line == end) {
            let name = code[at + 3..].split(['(', '<']).next().unwrap_or("");
            found.push((name.to_owned(), length + 1));
        }
    }
    found
}

fn is_qualifier(word: &str) -> bool {
    word.starts_with("pub") || ["const", "unsafe", "extern", "\"C\""].contains(&word)
}

#[test]
fn functions_fit_a_screen() {
    assert_eq!(
        functions("fn a() {\n    x\n}\npub(crate) const fn b(\n) {\n}\n// fn c() {\n"),
        [("a".to_owned(), 3), ("b".to_owned(), 3)]
    );
    for (path, text) in sources() {
        for (name, lines) in functions(&text) {
            assert!(
                lines <= FUNCTION_MAX,
                "{path}: `{name}` has {lines} lines, more than {FUNCTION_MAX}: split it"
            );
        }
    }
}

#[test]
fn every_file_says_what_it_is() {
    for (path, text) in sources().iter().filter(|(path, _)| !path.ends_with("tests.rs")) {
        assert!(text.starts_with("//!"), "{path} has no header: begin it with `//!` and the idea");
    }
}
