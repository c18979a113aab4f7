//! Eight adapters trained together on one base, beside the eight runs in sequence: each with data, rank and learning rate of its own.
//!
//! Both sides take the same steps, in turn, round by round: one process that holds all adapters, and eight that hold one each.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;

use crate::base::{Llama, write_llama, write_tokens};
use crate::median;
use crate::peer::Peer;

const SHAPE: Llama =
    Llama { width: 768, inner: 2048, layers: 12, heads: 12, kv_heads: 12, vocabulary: 32_000 };
const RANKS: [usize; 8] = [4, 8, 8, 16, 16, 16, 32, 64];

/// What came out.
#[derive(Serialize)]
pub struct Together {
    /// Time of the runs in sequence over that of the adapters together, of each round.
    pub time_ratios: Vec<f64>,
    pub peak_bytes: f64,
    /// Of the largest of the runs alone.
    pub peak_bytes_alone: f64,
    /// Adapters whose losses had the same bits as alone, in all rounds.
    pub equal: usize,
}

impl Together {
    pub fn time_ratio(&self) -> f64 {
        median(&mut self.time_ratios.clone())
    }

    pub fn memory_ratio(&self) -> f64 {
        self.peak_bytes / self.peak_bytes_alone
    }

    pub fn adapters(&self) -> usize {
        RANKS.len()
    }
}

/// Measures both sides; models and recipes are put into `folder`.
pub fn measure(folder: &Path, rounds: usize, threads: usize) -> Result<Together> {
    let recipes = recipes(folder)?;
    let mut all = Side::start(&recipes, threads)?;
    let mut alone =
        recipes.chunks(1).map(|recipe| Side::start(recipe, threads)).collect::<Result<Vec<_>>>()?;
    let mut together =
        Together { time_ratios: Vec::new(), peak_bytes: 0.0, peak_bytes_alone: 0.0, equal: RANKS.len() };
    let mut equal = [true; RANKS.len()];
    // The first round warms caches and pools.
    for round in 0..=rounds {
        let one = all.step()?;
        let others = alone.iter_mut().map(Side::step).collect::<Result<Vec<_>>>()?;
        for (at, other) in others.iter().enumerate() {
            equal[at] &= one.losses[at].to_bits() == other.losses[0].to_bits();
        }
        together.peak_bytes = one.peak_bytes;
        together.peak_bytes_alone = others.iter().map(|taken| taken.peak_bytes).fold(0.0, f64::max);
        if round > 0 {
            together.time_ratios.push(others.iter().map(|taken| taken.seconds).sum::<f64>() / one.seconds);
        }
    }
    together.equal = equal.iter().filter(|equal| **equal).count();
    Ok(together)
}

/// A process that trains one or several adapters.
struct Side(Peer);

/// A step of all adapters of a side.
struct Taken {
    seconds: f64,
    peak_bytes: f64,
    losses: Vec<f64>,
}

impl Side {
    fn start(recipes: &[PathBuf], threads: usize) -> Result<Side> {
        let threads = threads.to_string();
        let words = ["grower".as_ref(), threads.as_ref()].into_iter();
        let words: Vec<_> = words.chain(recipes.iter().map(|path| path.as_os_str())).collect();
        Ok(Side(Peer::spawn(&std::env::current_exe()?, &words)?.0))
    }

    fn step(&mut self) -> Result<Taken> {
        let answer = self.0.ask(&json!({ "steps": 1 }))?;
        let number = |key: &str| answer[key].as_f64().with_context(|| format!("no {key}"));
        let losses = answer["losses"].as_array().context("no losses")?;
        Ok(Taken {
            seconds: number("seconds")?,
            peak_bytes: number("peak_bytes")?,
            losses: losses
                .iter()
                .map(|loss| loss.as_f64().context("a loss is no number"))
                .collect::<Result<_>>()?,
        })
    }
}

fn recipes(folder: &Path) -> Result<Vec<PathBuf>> {
    let model = folder.join("model");
    std::fs::create_dir_all(folder)?;
    write_llama(&model, &SHAPE, 256)?;
    let model = model.canonicalize()?;
    let write = |(at, rank): (usize, &usize)| -> Result<PathBuf> {
        let tokens = folder.join(format!("tokens-{at}.safetensors"));
        // Each has data of its own length, so that no two have the same rows.
        write_tokens(&tokens, 4, 256 - 8 * at, SHAPE.vocabulary)?;
        let recipe = folder.join(format!("{at}.toml"));
        let rate = 1e-4 * (at + 1) as f64;
        let text = format!(
            "model = {:?}\ntask = \"causal-lm\"\n[method]\nname = \"lora\"\nrank = {rank}\nalpha = {rank}\ntargets = \"all-linear\"\n\
             [data]\nformat = \"tensors\"\npath = {:?}\n[train]\nepochs = 1000\nbatch_size = 1\nlearning_rate = {rate}\nseed = {at}\n",
            model.display().to_string(),
            tokens.canonicalize()?.display().to_string()
        );
        std::fs::write(&recipe, text)?;
        Ok(recipe)
    };
    RANKS.iter().enumerate().map(write).collect()
}
