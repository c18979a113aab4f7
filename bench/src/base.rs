//! Models with random weights, and random tokens.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

/// Sizes of a Llama.
#[derive(Clone, Copy)]
pub struct Llama {
    pub width: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub vocabulary: usize,
}

impl Llama {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (w, kv) = (self.width, self.width / self.heads * self.kv_heads);
        let mut all = vec![
            ("model.embed_tokens.weight".to_owned(), vec![self.vocabulary, w]),
            ("model.norm.weight".to_owned(), vec![w]),
            ("lm_head.weight".to_owned(), vec![self.vocabulary, w]),
        ];
        for i in 0..self.layers {
            let matrices = [
                ("self_attn.q_proj", vec![w, w]),
                ("self_attn.k_proj", vec![kv, w]),
                ("self_attn.v_proj", vec![kv, w]),
                ("self_attn.o_proj", vec![w, w]),
                ("mlp.gate_proj", vec![self.inner, w]),
                ("mlp.up_proj", vec![self.inner, w]),
                ("mlp.down_proj", vec![w, self.inner]),
                ("input_layernorm", vec![w]),
                ("post_attention_layernorm", vec![w]),
            ];
            all.extend(matrices.map(|(name, shape)| (format!("model.layers.{i}.{name}.weight"), shape)));
        }
        all
    }
}

/// Different numbers in a tensor: an odd count, so that no two rows are alike.
const BLOCK: usize = (1 << 20) + 7;

/// Writes a model in bf16, as most are published, unless it is there.
pub fn write_llama(dir: &Path, shape: &Llama, positions: usize) -> Result<()> {
    if dir.join("model.safetensors").exists() {
        return Ok(());
    }
    std::fs::create_dir_all(dir)?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.width,
        "intermediate_size": shape.inner, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary, "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false, "hidden_act": "silu",
        "torch_dtype": "bfloat16", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    });
    std::fs::write(dir.join("config.json"), config.to_string())?;
    let mut values = Values(1);
    let tensors = shape.tensors().into_iter().map(|(name, shape)| {
        let count: usize = shape.iter().product();
        let bf16 = |x: f32| ((x.to_bits() + 0x8000) >> 16) as u16;
        let scale = if shape.len() == 2 { 0.04 } else { 0.0 };
        let one = if shape.len() == 1 { 1.0 } else { 0.0 };
        // A block of numbers over and over: gigabytes of them would take longer than the bench.
        let block: Vec<u8> =
            (0..count.min(BLOCK)).flat_map(|_| bf16(one + scale * values.next()).to_le_bytes()).collect();
        let mut bytes = Vec::with_capacity(2 * count);
        while bytes.len() < 2 * count {
            bytes.extend_from_slice(&block[..block.len().min(2 * count - bytes.len())]);
        }
        (name, "BF16", shape, bytes)
    });
    let path = dir.join("model.part");
    write_safetensors(&path, tensors.collect())?;
    Ok(std::fs::rename(path, dir.join("model.safetensors"))?)
}

/// Writes rows of random tokens that are their own labels, unless they are there.
pub fn write_tokens(path: &Path, rows: usize, length: usize, vocabulary: usize) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let mut values = Values(2);
    let count = rows * length;
    let ids: Vec<i64> =
        (0..count).map(|_| 3 + ((values.next() + 1.0) / 2.0 * (vocabulary - 4) as f32) as i64).collect();
    let bytes = |ids: &[i64]| ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
    let shape = vec![rows, length];
    let mask = bytes(&vec![1; count]);
    let all = [("input_ids", bytes(&ids)), ("attention_mask", mask), ("labels", bytes(&ids))];
    write_safetensors(path, all.into_iter().map(|(n, b)| (n.to_owned(), "I64", shape.clone(), b)).collect())
}

fn write_safetensors(path: &Path, tensors: Vec<(String, &str, Vec<usize>, Vec<u8>)>) -> Result<()> {
    let (mut header, mut at) = (Map::new(), 0);
    for (name, dtype, shape, bytes) in &tensors {
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, at + bytes.len()] });
        header.insert(name.clone(), entry);
        at += bytes.len();
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = std::io::BufWriter::new(
        std::fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?,
    );
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    tensors.iter().try_for_each(|(_, _, _, bytes)| file.write_all(bytes))?;
    Ok(file.flush()?)
}

/// Numbers in [-1, 1), the same in every run (xorshift).
struct Values(u64);

impl Values {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / f32::from_bits(0x4b00_0000) - 1.0
    }
}
