//! The three worked errors of the design, byte for byte, through the program.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

use engraft_store::{Dtype, Entry, write_safetensors};

/// The program in `dir`, without anything of the surroundings that changes its words.
fn engraft(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engraft"));
    command
        .current_dir(dir)
        .args(args)
        .env_remove("FORCE_COLOR")
        .env("HF_HUB_OFFLINE", "1")
        .env("NO_COLOR", "1");
    command.output().unwrap()
}

fn error_of(dir: &Path, args: &[&str]) -> String {
    let output = engraft(dir, args);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(output.stdout.is_empty());
    text
}

#[test]
fn three_mistakes() {
    let recipe = r#"model = "models/bert-base-uncased"

[method]
name = "lora"
rnak = 8

[data]
format = "csv"
path = "train.csv"
shuffle = true
max_length = 256

[train]
epochs = 3
steps = 500
learning_rate = "2e-4"
"#;
    let expected = r#"error: unknown key `method.rnak`
 --> recipe.toml:5:1
  |
5 | rnak = 8
  | ^^^^ did you mean `rank`?

error: `train.epochs` and `train.steps` cannot both be set
  --> recipe.toml:15:1
   |
14 | epochs = 3
   | ------ first length
15 | steps = 500
   | ^^^^^ second length
   |
   = help: delete one

error: `train.learning_rate` must be a number, found a string
  --> recipe.toml:16:17
   |
16 | learning_rate = "2e-4"
   |                 ^^^^^^ write `2e-4` without quotes

3 errors in recipe.toml; nothing was loaded or written
"#;
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("recipe.toml"), recipe).unwrap();
    assert_eq!(error_of(dir.path(), &["train", "recipe.toml"]), expected);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was written");
}

/// A BERT of the usual twelve layers, four numbers wide: with a tagger, 73 linear weights.
fn tiny_bert(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let config = r#"{"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 4, "num_hidden_layers": 12,
        "num_attention_heads": 2, "intermediate_size": 4, "vocab_size": 10, "max_position_embeddings": 8,
        "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0}"#;
    fs::write(dir.join("config.json"), config).unwrap();
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("embeddings.word_embeddings.weight".into(), vec![10, 4]),
        ("embeddings.position_embeddings.weight".into(), vec![8, 4]),
        ("embeddings.token_type_embeddings.weight".into(), vec![2, 4]),
    ];
    let mut norms = vec!["embeddings.LayerNorm".to_owned()];
    let mut linears = vec!["pooler.dense".to_owned()];
    for layer in 0..12 {
        let at = |name: &str| format!("encoder.layer.{layer}.{name}");
        for name in ["self.query", "self.key", "self.value", "output.dense"] {
            linears.push(at(&format!("attention.{name}")));
        }
        linears.extend([at("intermediate.dense"), at("output.dense")]);
        norms.extend([at("attention.output.LayerNorm"), at("output.LayerNorm")]);
    }
    shapes.extend(linears.iter().map(|name| (format!("{name}.weight"), vec![4, 4])));
    shapes.extend(norms.iter().map(|name| (format!("{name}.weight"), vec![4])));
    shapes.extend(linears.iter().chain(&norms).map(|name| (format!("{name}.bias"), vec![4])));
    let zeros = [0.0f32; 64];
    let entry = |(name, shape): &(String, Vec<usize>)| {
        let size = shape.iter().product();
        Entry::f32(name.clone(), shape, &zeros[..size])
    };
    let entries: Vec<Entry> = shapes.iter().map(entry).collect();
    write_safetensors(&dir.join("model.safetensors"), &entries, &BTreeMap::new()).unwrap();
}

#[test]
fn targets_that_match_nothing() {
    let recipe = r#"model = "models/bert-base-uncased"
task = "token-classification"

[method]
name = "lora"
rank = 8
targets = ["q_proj", "v_proj"]

[data]
format = "tensors"
path = "data.safetensors"
"#;
    let expected = r#"error: `method.targets` matches nothing in models/bert-base-uncased
 --> recipe.toml:7:12
  |
7 | targets = ["q_proj", "v_proj"]
  |            ^^^^^^^^  ^^^^^^^^ 0 of 73 linear weights
  |
  = note: in this model role q is `query` (12), role v is `value` (12)
  = help: write `targets = ["query", "value"]`, or `roles = ["q", "v"]` for any model
"#;
    let dir = tempfile::tempdir().unwrap();
    tiny_bert(&dir.path().join("models/bert-base-uncased"));
    fs::write(dir.path().join("recipe.toml"), recipe).unwrap();
    let bytes = |values: &[i64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let entries = [
        Entry::new("input_ids", Dtype::I64, &[2, 3], bytes(&[1, 2, 3, 4, 5, 6])),
        Entry::new("labels", Dtype::I64, &[2, 3], bytes(&[0, 1, 1, 0, 0, 1])),
    ];
    write_safetensors(&dir.path().join("data.safetensors"), &entries, &BTreeMap::new()).unwrap();
    let closing = "\n1 error in recipe.toml; nothing was loaded or written\n";
    assert_eq!(error_of(dir.path(), &["train", "recipe.toml"]), format!("{expected}{closing}"));
}

/// A model of the shapes of Qwen2.5-0.5B whose table and norm do not fit; the bytes are a hole in the file.
fn misfitting_qwen(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let config = r#"{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
        "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": true, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "hidden_act": "silu", "use_sliding_window": false}"#;
    fs::write(dir.join("config.json"), config).unwrap();
    let vocab: Vec<String> = (0..151_665).map(|i| format!("\"t{i}\":{i}")).collect();
    let tokenizer = format!(
        r#"{{"version":"1.0","added_tokens":[],"model":{{"type":"WordLevel","unk_token":"t0","vocab":{{{}}}}}}}"#,
        vocab.join(",")
    );
    fs::write(dir.join("tokenizer.json"), tokenizer).unwrap();
    let mut shapes: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens.weight".into(), vec![151_665, 896])];
    for layer in 0..24 {
        let mut add = |name: &str, shape: &[usize]| {
            shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()))
        };
        for (name, out) in [("q", 896), ("k", 128), ("v", 128)] {
            add(&format!("self_attn.{name}_proj.weight"), &[out, 896]);
            add(&format!("self_attn.{name}_proj.bias"), &[out]);
        }
        add("self_attn.o_proj.weight", &[896, 896]);
        add("mlp.gate_proj.weight", &[4864, 896]);
        add("mlp.up_proj.weight", &[4864, 896]);
        add("mlp.down_proj.weight", &[896, 4864]);
        add("input_layernorm.weight", &[896]);
        add("post_attention_layernorm.weight", &[896]);
    }
    let (mut header, mut at) = (serde_json::Map::new(), 0usize);
    for (name, shape) in shapes {
        let end = at + shape.iter().product::<usize>() * 2;
        header
            .insert(name, serde_json::json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + at) as u64).unwrap();
}

#[test]
fn tensors_that_do_not_fit() {
    let expected = r#"error: 2 of 290 tensors in models/qwen2.5-0.5b do not fit its config.json
  tensor                     expected        found
  model.embed_tokens.weight  [151936, 896]   [151665, 896]
  model.norm.weight          [896]           absent
  = note: `vocab_size` is 151936; tokenizer.json has 151665 entries, as the tensor has
  = help: take weights and config.json from one revision, or set `vocab_size = 151665`;
          `engraft inspect models/qwen2.5-0.5b` lists all tensors
"#;
    let dir = tempfile::tempdir().unwrap();
    misfitting_qwen(&dir.path().join("models/qwen2.5-0.5b"));
    let args = ["generate", "--model", "models/qwen2.5-0.5b", "--prompt", "x"];
    assert_eq!(error_of(dir.path(), &args), expected);
}
