//! `engraft logits` and `engraft merge` on models that read pictures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use engraft_store::{Entry, Limits, Weights, write_safetensors};

fn engraft(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engraft"));
    command.args(args).env("NO_COLOR", "1").env("HF_HUB_OFFLINE", "1").output().unwrap()
}

fn golden(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(path).display().to_string()
}

fn values(path: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let file = Weights::open_file(path, &Limits::default()).unwrap();
    let tensor = file.get(name).unwrap_or_else(|| panic!("{name}"));
    (tensor.shape.clone(), tensor.to_f32().unwrap())
}

/// The largest difference of two files' logits over the largest expected.
fn apart(found: &Path, expected: &str) -> f32 {
    let (found, expected) = (values(found, "logits"), values(Path::new(expected), "logits"));
    assert_eq!(found.0, expected.0);
    let largest = expected.1.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    found.1.iter().zip(&expected.1).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

fn succeeds(args: &[&str]) {
    let output = engraft(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn logits_and_merged_logits_are_those_of_the_reference() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    let shown = out.to_str().unwrap();
    for (model, suffix) in [("vit_oblong", ""), ("deit_teacher", ""), ("dinov2", "_size")] {
        let inputs = golden(&format!("inputs/{model}/inputs{suffix}.safetensors"));
        succeeds(&[
            "logits",
            "--model",
            &golden(&format!("models/{model}")),
            "--inputs",
            &inputs,
            "--out",
            shown,
        ]);
        assert!(apart(&out, &golden(&format!("inputs/{model}/base_logits{suffix}.safetensors"))) < 1e-5);
    }
    for case in ["vit__lora_patches", "vit__ia3_older", "dinov2_swiglu__lora", "dinov2_swiglu__lora_older"] {
        let model = case.split("__").next().unwrap();
        let merged = dir.path().join(case);
        let (base, adapter) = (golden(&format!("models/{model}")), golden(&format!("cases/{case}/adapter")));
        succeeds(&["merge", "--model", &base, "--adapter", &adapter, "--out", merged.to_str().unwrap()]);
        let names = |dir: &Path| -> Vec<String> {
            let file = Weights::open(dir, &Limits::default()).unwrap();
            file.names().map(str::to_owned).collect()
        };
        assert_eq!(names(&merged), names(Path::new(&base)), "{case}");
        let inputs = golden(&format!("inputs/{model}/inputs.safetensors"));
        succeeds(&["logits", "--model", merged.to_str().unwrap(), "--inputs", &inputs, "--out", shown]);
        assert!(apart(&out, &golden(&format!("cases/{case}/merged_logits.safetensors"))) < 2e-4, "{case}");
    }
}

/// A file of one tensor.
fn file(dir: &Path, name: &str, shape: &[usize], value: f32) -> PathBuf {
    let path = dir.join(format!("{name}-{}.safetensors", shape.len()));
    let mut values = vec![0.5; shape.iter().product()];
    values[7] = value;
    write_safetensors(&path, &[Entry::f32(name, shape, &values)], &BTreeMap::new()).unwrap();
    path
}

#[test]
fn pictures_that_do_not_fit_are_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let check = |model: &str, input: &Path, parts: &[&str]| {
        let out = dir.path().join("out.safetensors");
        let model = golden(&format!("models/{model}"));
        let args = [
            "logits",
            "--model",
            &model,
            "--inputs",
            input.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ];
        let output = engraft(&args);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(parts.iter().all(|part| text.contains(part)), "{parts:?} in {text}");
        assert!(!out.exists());
    };
    let pixels = |shape: &[usize], value| file(dir.path(), "pixel_values", shape, value);
    check("vit", &pixels(&[2, 1, 12, 12], 0.0), &["expected 3 channels", "[2, 1, 12, 12]"]);
    check("vit", &pixels(&[2, 3, 12, 16], 0.0), &["12 × 12", "12 × 16"]);
    check("dinov2", &pixels(&[2, 3, 2, 16], 0.0), &["at least 4 × 4"]);
    check("vit", &pixels(&[2, 3, 144], 0.0), &["[pictures, channels, height, width]", "[2, 3, 144]"]);
    check(
        "vit",
        &pixels(&[1, 3, 12, 12], f32::NAN),
        &["finite", "NaN in picture 0, channel 0, row 0, column 7"],
    );
    check("bert", &pixels(&[1, 3, 12, 12], 0.0), &["expected a tensor `input_ids`", "found `pixel_values`"]);
    let tokens = golden("inputs/bert/inputs.safetensors");
    check("vit", Path::new(&tokens), &["expected a tensor `pixel_values`", "found `input_ids`"]);
}
