//! `engraft convert`: a LoRA with the names of `loralib` computes what `peft`'s does.

#[path = "common/program.rs"]
mod program;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engraft_store::{Entry, Limits, Weights, write_safetensors};

use program::{refused, succeeds};

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(path)
}

/// The adapter of a case under `loralib`'s names.
fn loralib(case: &str, to: &Path) {
    let weights =
        Weights::open_file(&golden(case).join("adapter/adapter_model.safetensors"), &Limits::default())
            .unwrap();
    let named: Vec<(String, Vec<usize>, Vec<f32>)> = weights
        .iter()
        .map(|(name, raw)| {
            let name = name.trim_start_matches("base_model.model.");
            let name = if name.contains(".lora_") { name.trim_end_matches(".weight") } else { name };
            (name.to_owned(), raw.shape.clone(), raw.to_f32().unwrap())
        })
        .collect();
    let entries: Vec<Entry> =
        named.iter().map(|(name, shape, values)| Entry::f32(name.clone(), shape, values)).collect();
    write_safetensors(to, &entries, &BTreeMap::new()).unwrap();
}

/// Two files hold the same logits, to 2e-4 of the largest.
fn close(found: &Path, expected: &Path) {
    let read = |path: &Path| {
        Weights::open_file(path, &Limits::default()).unwrap().get("logits").unwrap().to_f32().unwrap()
    };
    let (found, expected) = (read(found), read(expected));
    let largest = expected.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    let off = found.iter().zip(&expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(found.len() == expected.len() && off < 2e-4 * largest, "off by {off}");
}

#[test]
fn names_of_loralib_become_peft_s() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out, logits) = (
        dir.path().join("lora.safetensors"),
        dir.path().join("adapter"),
        dir.path().join("logits.safetensors"),
    );
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (case, model) = (golden("cases/roberta__lora"), text(&golden("models/roberta")));
    loralib("cases/roberta__lora", &file);
    let (file, out) = (text(&file), text(&out));
    assert!(succeeds(&["inspect", &file]).contains("in the form of loralib"));
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(case.join("adapter/adapter_config.json")).unwrap()).unwrap();
    let alpha = config["lora_alpha"].to_string();
    let convert = ["convert", &file, "--model", &model, "--out", &out];
    assert!(refused(&convert).contains("--alpha"));
    succeeds(&[&convert[..], &["--alpha", &alpha]].concat());
    let inputs = text(&golden("inputs/roberta/inputs.safetensors"));
    let to = text(&logits);
    succeeds(&["logits", "--model", &model, "--adapter", &out, "--inputs", &inputs, "--out", &to]);
    close(&logits, &case.join("logits.safetensors"));
    assert!(refused(&[&convert[..], &["--alpha", &alpha]].concat()).contains("not an empty directory"));
}

#[test]
fn the_weights_of_peft_need_only_their_alpha() {
    let dir = tempfile::tempdir().unwrap();
    let case = golden("cases/roberta__lora/adapter");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (file, model) = (text(&case.join("adapter_model.safetensors")), text(&golden("models/roberta")));
    let out = dir.path().join("deep/out");
    let to = text(&out);
    let convert = ["convert", &file, "--model", &model, "--out", &to];
    assert!(refused(&convert).contains("--alpha"));
    succeeds(&[&convert[..], &["--alpha", "8"]].concat());
    let read = |file: PathBuf| {
        let weights = Weights::open_file(&file, &Limits::default()).unwrap();
        weights.iter().map(|(name, raw)| (name.to_owned(), raw.to_f32().unwrap())).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(read(out.join("adapter_model.safetensors")), read(case.join("adapter_model.safetensors")));
}

#[test]
fn the_first_ranks_of_a_dylora_become_a_lora() {
    let dir = tempfile::tempdir().unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (adapter, model) = (text(&golden("cases/llama__dylora/adapter")), text(&golden("models/llama")));
    let lora = text(&dir.path().join("lora"));
    fn words<'a>(adapter: &'a str, model: &'a str, out: &'a str, rank: &'a str) -> [&'a str; 8] {
        ["convert", adapter, "--model", model, "--out", out, "--rank", rank]
    }
    assert!(refused(&words(&adapter, &model, &lora, "5")).contains("ranks 1 to 4, not 5"));
    let other = text(&golden("cases/llama__lora/adapter"));
    assert!(refused(&words(&other, &model, &lora, "2")).contains("only the ranks of a DyLoRA"));
    succeeds(&words(&adapter, &model, &lora, "2"));
    let inputs = text(&golden("inputs/llama/inputs.safetensors"));
    let logits = |adapter: &str, to: &str, chosen: &[&str]| {
        let to = dir.path().join(to);
        let words =
            ["logits", "--model", &model, "--adapter", adapter, "--inputs", &inputs, "--out", &text(&to)];
        succeeds(&[&words, chosen].concat());
        to
    };
    let chosen = logits(&adapter, "chosen.safetensors", &["--choose", "eval_rank=2"]);
    close(&logits(&lora, "lora.safetensors", &[]), &chosen);
}

#[test]
fn a_start_that_was_taken_off_is_joined_to_the_factors() {
    let dir = tempfile::tempdir().unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    for (model, case) in [
        ("llama", "llama__lora_pissa_patterns"),
        ("llama", "llama__lora_olora"),
        ("llama", "llama__lora_pissa_embed"),
        ("llama", "llama__lora_parameters_pissa"),
        ("gpt2", "gpt2__lora_pissa"),
        ("roberta", "roberta__lora_olora"),
    ] {
        let (adapter, own) =
            (text(&golden("cases").join(case).join("adapter")), golden("models").join(model));
        let (plain, both, model_dir) =
            (text(&dir.path().join(case)), text(&dir.path().join(format!("{case}-both"))), text(&own));
        assert!(
            refused(&["combine", &adapter, &adapter, "--out", &both]).contains("engraft convert"),
            "{case}"
        );
        succeeds(&["convert", &adapter, "--model", &model_dir, "--out", &plain]);
        let inputs = text(&golden("inputs").join(model).join("inputs.safetensors"));
        let logits = |adapter: &str| {
            let to = dir.path().join("logits.safetensors");
            succeeds(&[
                "logits",
                "--model",
                &model_dir,
                "--adapter",
                adapter,
                "--inputs",
                &inputs,
                "--out",
                &text(&to),
            ]);
            to
        };
        close(&logits(&plain), &golden("cases").join(case).join("logits.safetensors"));
        // Halves of one and the same are that one.
        let half = format!("{plain}=0.5");
        succeeds(&["combine", &half, &half, "--out", &both]);
        close(&logits(&both), &golden("cases").join(case).join("logits.safetensors"));
        assert!(
            refused(&["convert", &plain, "--model", &model_dir, "--out", &format!("{both}-2")])
                .contains("fits its base as it is")
        );
    }
}

#[test]
fn the_published_checkpoint_is_recognised() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/data/models/roberta-base-lora-mnli/adapter_loralib.safetensors");
    if !file.is_file() {
        println!("skipped: ../shared/data/models/roberta-base-lora-mnli is not there");
        return;
    }
    let said = succeeds(&["inspect", file.to_str().unwrap()]);
    assert!(said.contains("loralib") && said.contains("24") && said.contains("trained whole"), "{said}");
    let diffusion =
        file.parent().unwrap().with_file_name("sd15-lora-rank4").join("analog_svd_rank4.safetensors");
    let said = succeeds(&["inspect", diffusion.to_str().unwrap()]);
    assert!(said.contains("cloneofsimo") && said.contains("192"), "{said}");
}
