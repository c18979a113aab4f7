//! Tiny models that read and write words.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// A tiny model of the fixtures with a tokenizer whose words are `t0`, `t1`, …
pub fn model(dir: &Path, name: &str) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name);
    let model = dir.join(name);
    fs::create_dir_all(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), model.join(file)).unwrap();
    }
    let config: Value = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    let words = config["vocab_size"].as_u64().unwrap();
    let vocabulary: serde_json::Map<String, Value> =
        (0..words).map(|i| (format!("t{i}"), i.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "pre_tokenizer": { "type": "Whitespace" }, "added_tokens": [],
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "t0" },
    });
    fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(model.join("tokenizer_config.json"), r#"{"eos_token":"t2"}"#).unwrap();
    model
}
