//! `logits --beside`: rows of one batch with adapters of different classes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use engraft_store::{Dtype, Entry, Limits, Weights, write_safetensors};

/// X-LoRA looks at the rows of a first pass, where those of the prompt before it are not.
const CASES: [&str; 6] =
    ["llama__lora", "llama__prompt", "llama__xlora", "llama__prefix", "llama__double_seq_bn", "llama__ia3"];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn adapter(case: &str) -> String {
    golden().join("cases").join(case).join("adapter").to_str().unwrap().to_owned()
}

fn open(path: &Path) -> Weights {
    Weights::open_file(path, &Limits::default()).unwrap()
}

fn numbers(name: &str, shape: &[usize], values: &[i64]) -> Entry<'static> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Entry::new(name, Dtype::I64, shape, bytes)
}

/// The inputs of the model with `adapter_ids` beside them.
fn inputs(dir: &Path, ids: &[i64]) -> PathBuf {
    let given = open(&golden().join("inputs/llama/inputs.safetensors"));
    let read = |name: &str| {
        let raw = given.get(name).unwrap();
        numbers(name, &raw.shape, &raw.to_i64().unwrap())
    };
    let path = dir.join("inputs.safetensors");
    let entries = [read("input_ids"), read("attention_mask"), numbers("adapter_ids", &[ids.len()], ids)];
    write_safetensors(&path, &entries, &Default::default()).unwrap();
    path
}

fn logits(inputs: &Path, out: &Path, more: &[String]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engraft"));
    command.arg("logits").arg("--model").arg(golden().join("models/llama"));
    command.arg("--inputs").arg(inputs).arg("--out").arg(out).args(more).output().unwrap()
}

/// --adapter and --beside for these.
fn named(cases: &[&str]) -> Vec<String> {
    let flag = |i: usize| if i == 0 { "--adapter" } else { "--beside" };
    cases.iter().enumerate().flat_map(|(i, case)| [flag(i).to_owned(), adapter(case)]).collect()
}

#[test]
fn each_row_has_the_logits_that_it_has_alone() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    let rows = open(&golden().join("inputs/llama/inputs.safetensors")).get("input_ids").unwrap().shape[0];
    let run = |ids: &[i64], cases: &[&str]| {
        let output = logits(&inputs(dir.path(), ids), &out, &named(cases));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        open(&out).get("logits").unwrap().to_f32().unwrap()
    };
    for turn in 0..CASES.len() as i64 + 1 {
        let of_row = |row: usize| (row as i64 + turn) % (CASES.len() as i64 + 1) - 1;
        let ids: Vec<i64> = (0..rows).map(of_row).collect();
        let mixed = run(&ids, &CASES);
        let each = mixed.len() / rows;
        for (row, id) in ids.iter().enumerate() {
            let alone = match usize::try_from(*id) {
                Ok(number) => run(&vec![0; rows], &CASES[number..=number]),
                Err(_) => run(&vec![-1; rows], &[]),
            };
            let own = row * each..(row + 1) * each;
            let size = alone[own.clone()].iter().fold(0.0f32, |m, v| m.max(v.abs()));
            for (found, expected) in mixed[own.clone()].iter().zip(&alone[own]) {
                assert!((found - expected).abs() <= 2e-5 * size, "row {row} of {id}: {found} for {expected}");
            }
        }
    }
}

#[test]
fn rows_that_name_no_adapter_that_is_there_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("o");
    let rows = open(&golden().join("inputs/llama/inputs.safetensors")).get("input_ids").unwrap().shape[0];
    let refused = |ids: &[i64], cases: &[&str], expected: &str| {
        let output = logits(&inputs(dir.path(), ids), &out, &named(cases));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && said.contains(expected), "{said}");
        assert!(!out.exists());
    };
    refused(&vec![2; rows], &CASES[..2], "row 0 (from 0) asks for adapter 2, and 2 are given");
    refused(&vec![-2; rows], &CASES[..2], "expected -1 for the base alone, or an adapter from 0, found -2");
    refused(&[0], &CASES[..2], "expected one number for each of the");
    let plain = logits(&golden().join("inputs/llama/inputs.safetensors"), &out, &named(&CASES[..2]));
    let said = String::from_utf8_lossy(&plain.stderr).into_owned();
    assert!(plain.status.code() == Some(2) && said.contains("expected a tensor `adapter_ids`"), "{said}");
}
