//! The works: a model, data, settings.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::On;
use crate::base::{Llama, write_llama, write_tokens};

/// What is measured.
pub struct Work {
    pub name: &'static str,
    pub what: &'static str,
    base: Base,
    batch: usize,
    checkpointed: bool,
    /// Short rows share one of `max_length`; the peer pads.
    packed: bool,
}

enum Base {
    /// Random weights, rows of as many random tokens.
    Random { shape: Llama, length: usize },
    /// Random weights with the vocabulary of GPT-2, on gsm8k.
    Questions(Llama),
    /// MiniLM on BANKING77.
    MiniLm,
}

const LLAMA: Llama =
    Llama { width: 768, inner: 2048, layers: 12, heads: 12, kv_heads: 12, vocabulary: 32_000 };

/// Every work.
pub static WORKS: &[Work] = &[
    Work {
        name: "llama",
        what: "Llama of 137 M, LoRA 16 on all linears, 4 x 256 tokens",
        base: Base::Random { shape: LLAMA, length: 256 },
        batch: 4,
        checkpointed: false,
        packed: false,
    },
    Work {
        name: "long",
        what: "the same, 1 x 2,048 tokens",
        base: Base::Random { shape: LLAMA, length: 2048 },
        batch: 1,
        checkpointed: false,
        packed: false,
    },
    Work {
        name: "checkpointed",
        what: "the same, 1 x 2,048 tokens, checkpointing",
        base: Base::Random { shape: LLAMA, length: 2048 },
        batch: 1,
        checkpointed: true,
        packed: false,
    },
    Work {
        name: "minilm",
        what: "MiniLM, LoRA 16 on all linears, BANKING77, batch 32",
        base: Base::MiniLm,
        batch: 32,
        checkpointed: false,
        packed: false,
    },
    Work {
        name: "uneven",
        what: "Llama of 137 M with GPT-2's words, gsm8k, batch 8 padded or packed",
        base: Base::Questions(Llama { vocabulary: 50_257, ..LLAMA }),
        batch: 8,
        checkpointed: false,
        packed: true,
    },
    Work {
        name: "vocabulary",
        what: "two layers, vocabulary 128,000, 4 x 1,024 tokens",
        base: Base::Random { shape: Llama { layers: 2, vocabulary: 128_000, ..LLAMA }, length: 1024 },
        batch: 4,
        checkpointed: false,
        packed: false,
    },
];

/// Llama 3 of 8 B in width and heads, and a few of its 32 layers: a step's time is a sum over layers.
const EIGHT: Llama =
    Llama { width: 4096, inner: 14_336, layers: 4, heads: 32, kv_heads: 8, vocabulary: 128_256 };

/// Llama 3.2 of 1 B.
const ONE: Llama =
    Llama { width: 2048, inner: 8192, layers: 16, heads: 32, kv_heads: 8, vocabulary: 128_256 };

/// Works for a card.
pub static CARD_WORKS: &[Work] = &[
    of_random("8b-512", "4 layers of Llama 3 8B, LoRA 16 on all linears, 8 x 512 tokens", EIGHT, 512, 8),
    of_random("8b-2048", "the same, 4 x 2,048 tokens", EIGHT, 2048, 4),
    of_random("8b-8192", "the same, 1 x 8,192 tokens", EIGHT, 8192, 1),
    of_random("1b-1", "Llama 3.2 1B, LoRA 16 on all linears, 1 x 512 tokens", ONE, 512, 1),
    of_random("1b-32", "the same, 32 x 512 tokens", ONE, 512, 32),
];

const fn of_random(
    name: &'static str,
    what: &'static str,
    shape: Llama,
    length: usize,
    batch: usize,
) -> Work {
    Work { name, what, base: Base::Random { shape, length }, batch, checkpointed: false, packed: false }
}

impl Work {
    /// The model's directory, made where it is not there yet.
    pub fn model(&self, shared: &Path, folder: &Path) -> Result<PathBuf> {
        let dir = folder.join("model");
        match &self.base {
            Base::MiniLm => {
                let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/all-minilm-l6-v2");
                return dir.canonicalize().context("models/all-minilm-l6-v2");
            }
            Base::Random { shape, length } => {
                write_llama(&dir, shape, *length)?;
                write_tokens(
                    &folder.join("tokens.safetensors"),
                    16.max(self.batch),
                    *length,
                    shape.vocabulary,
                )?;
            }
            Base::Questions(shape) => {
                write_llama(&dir, shape, 2048)?;
                let tokenizer = shared.join("tokenizers/gpt2/tokenizer.json");
                std::fs::copy(&tokenizer, dir.join("tokenizer.json"))
                    .with_context(|| format!("{} is needed", tokenizer.display()))?;
                std::fs::write(dir.join("tokenizer_config.json"), r#"{"eos_token":"<|endoftext|>"}"#)?;
            }
        }
        Ok(dir)
    }

    /// The engine's recipe.
    pub fn recipe(&self, model: &Path, folder: &Path, shared: &Path, dtype: &str) -> Result<String> {
        let (task, head, data) = match &self.base {
            Base::MiniLm => {
                let path =
                    shared.join("banking77/train.csv").canonicalize().context("banking77/train.csv")?;
                let data = format!(
                    "format = \"csv\"\npath = {}\ncolumns = {{ text = \"text\", label = \"category\" }}\nmax_length = 64\n",
                    quoted(&path)
                );
                ("sequence-classification", "train_also = [\"classifier\"]\n", data)
            }
            Base::Random { .. } => {
                let path = folder.join("tokens.safetensors");
                ("causal-lm", "", format!("format = \"tensors\"\npath = {}\n", quoted(&path)))
            }
            Base::Questions(_) => {
                let path = unpacked(&shared.join("gsm8k/train.jsonl.gz"), &folder.join("gsm8k.jsonl"))?;
                let columns = "columns = { prompt = \"question\", completion = \"answer\" }";
                let data =
                    format!("format = \"jsonl\"\npath = {}\n{columns}\nmax_length = 512\n", quoted(&path));
                ("causal-lm", "", data)
            }
        };
        let packing = if self.packed { "packing = true\n" } else { "" };
        // A packed row of 512 tokens holds three or four questions.
        let batch = if self.packed { self.batch.div_ceil(4) } else { self.batch };
        Ok(format!(
            "model = {}\ntask = \"{task}\"\n[method]\nname = \"lora\"\nrank = 16\nalpha = 32\ntargets = \"all-linear\"\n{head}\
             [data]\n{data}{packing}shuffle = false\n[train]\nepochs = 1000\nbatch_size = {batch}\nlearning_rate = 1e-4\n\
             dtype = \"{dtype}\"\ngradient_checkpointing = {}\n",
            quoted(model),
            self.checkpointed
        ))
    }

    /// What the peer is told.
    pub fn peer(&self, model: &Path, folder: &Path, kind: &str, threads: usize, on: On) -> Value {
        json!({
            "model": model, "examples": folder.join("examples.json"), "batch": self.batch, "threads": threads,
            "classifies": matches!(self.base, Base::MiniLm), "checkpointing": self.checkpointed,
            "dtype": if kind == "f32" { "f32" } else { "bf16" }, "compile": kind == "compiled",
            "device": on.name(),
        })
    }

    /// Floating-point operations a token: two products with every matrix that has a patch or lies above one (forward, and
    /// backward to its input), attention, the head on labelled tokens. Low-rank factors are left out.
    pub fn operations(&self, hello: &Value) -> Result<f64> {
        let number = |key: &str| hello[key].as_f64().with_context(|| format!("the engine did not say {key}"));
        let (blocks, head, length) =
            (number("block_weights")?, number("head_weights")?, number("mean_length")?);
        let (width, layers, labelled) = (number("width")?, number("layers")?, number("labelled_share")?);
        // Scores and their product with the values, each 2·length·width; backward does twice that.
        let causal = if matches!(self.base, Base::MiniLm) { 1.0 } else { 0.5 };
        let attention = 3.0 * 4.0 * length * width * layers * causal;
        let recomputed = if self.checkpointed { 1.5 } else { 1.0 };
        Ok(recomputed * 4.0 * blocks + 4.0 * head * labelled + attention)
    }
}

fn quoted(path: &Path) -> String {
    Value::from(path.to_string_lossy()).to_string()
}

/// The unpacked form of a gzip file.
fn unpacked(from: &Path, to: &Path) -> Result<PathBuf> {
    if !to.exists() {
        let out = std::process::Command::new("gzip").arg("-dc").arg(from).output().context("gzip")?;
        ensure!(
            out.status.success(),
            "gzip -dc {}: {}",
            from.display(),
            String::from_utf8_lossy(&out.stderr)
        );
        std::fs::write(to, out.stdout)?;
    }
    Ok(to.to_owned())
}
