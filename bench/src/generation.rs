//! `engraft-bench generation`: tokens written a second, beside `transformers` and beside what the memory can deliver.
//!
//! At one text every weight is read once a token, so the memory's bandwidth is the bound: the share of it is that of the bytes of
//! the weights, and of the keys and values that a token looks at. Processes take turns round by round, and the bandwidth is measured
//! anew in each, since neighbours on a machine share it; compared are medians, and the ratio of each pair of neighbours.

use std::io::{BufRead, stdin};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use engraft_nn::Kind;
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::base::{Llama, write_llama, write_tokens};
use crate::median;
use crate::open::open;
use crate::peer::{Peer, say};
use crate::reader::Reader;

#[derive(clap::Args)]
pub struct Args {
    /// The Python that has the peers (bench/requirements.txt)
    #[arg(long, default_value = "python3")]
    pub python: PathBuf,
    /// Where models of random weights and recipes are put
    #[arg(long, default_value = "target/bench/generation")]
    pub folder: PathBuf,
    /// The shapes to measure: small (23 M), middle (137 M), large (1.1 B)
    #[arg(long, value_delimiter = ',', default_value = "small,middle")]
    pub shapes: Vec<String>,
    /// Texts written at once
    #[arg(long, value_delimiter = ',', default_value = "1,8")]
    pub sequences: Vec<usize>,
    /// Types of the engine's computation
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    pub dtypes: Vec<String>,
    /// Peers: f32, bf16, or none
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    pub peers: Vec<String>,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Tokens a round
    #[arg(long, default_value_t = 32)]
    pub tokens: usize,
    /// Threads of everyone
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Write the results here too
    #[arg(long)]
    pub json: Option<PathBuf>,
}

const SHAPES: &[(&str, Llama)] = &[
    ("small", Llama { width: 384, inner: 1536, layers: 6, heads: 12, kv_heads: 12, vocabulary: 16_000 }),
    ("middle", Llama { width: 768, inner: 2048, layers: 12, heads: 12, kv_heads: 12, vocabulary: 32_000 }),
    ("large", Llama { width: 2048, inner: 5632, layers: 22, heads: 32, kv_heads: 4, vocabulary: 32_000 }),
];

/// Tokens of the text that is gone on with, and the most that are written before it begins anew.
const READ: usize = 64;
const WRITTEN: usize = 128;

struct Racer {
    name: String,
    process: Peer,
    rates: Vec<f64>,
    /// Bytes that one step must read.
    bytes: f64,
}

/// Measures every shape and number of texts.
pub fn run(args: &Args) -> Result<Vec<Value>> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads).build()?;
    println!("| model | texts | | tokens/s | memory, GB/s | share of it | engraft's best over it |");
    println!("| --- | ---: | --- | ---: | ---: | ---: | ---: |");
    let mut lines = Vec::new();
    for (name, shape) in SHAPES.iter().filter(|(name, _)| args.shapes.iter().any(|s| s == name)) {
        for &sequences in &args.sequences {
            lines.extend(measure(args, &pool, name, shape, sequences)?);
        }
    }
    if let Some(path) = &args.json {
        let all = json!({ "threads": args.threads, "works": lines });
        std::fs::write(path, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(lines)
}

/// Bytes a second that all threads read together, the best of three: much more than the caches hold.
fn bandwidth() -> f64 {
    let words = vec![1u64; 1 << 26];
    let once = || {
        let started = Instant::now();
        let sum: u64 = words.par_chunks(1 << 16).map(|part| part.iter().fold(0, |a, b| a ^ b)).sum();
        std::hint::black_box(sum);
        8.0 * words.len() as f64 / started.elapsed().as_secs_f64()
    };
    (0..3).map(|_| once()).fold(0.0, f64::max)
}

fn measure(
    args: &Args,
    pool: &rayon::ThreadPool,
    name: &str,
    shape: &Llama,
    sequences: usize,
) -> Result<Vec<Value>> {
    let folder = args.folder.join(name);
    std::fs::create_dir_all(&folder)?;
    let folder = folder.canonicalize()?;
    let (model, tokens) = (folder.join("model"), folder.join("tokens.safetensors"));
    write_llama(&model, shape, 2048)?;
    write_tokens(&tokens, 2, 16, shape.vocabulary)?;
    let mut racers = Vec::new();
    for dtype in &args.dtypes {
        let recipe = folder.join(format!("{dtype}.toml"));
        let (model, tokens) = (model.display().to_string(), tokens.display().to_string());
        std::fs::write(
            &recipe,
            format!(
                "model = {model:?}\ntask = \"causal-lm\"\n[method]\nname = \"ia3\"\n[data]\nformat = \"tensors\"\npath = {tokens:?}\n[train]\nsteps = 1\ndtype = \"{dtype}\"\n"
            ),
        )?;
        let (count, threads) = (sequences.to_string(), args.threads.to_string());
        let words = ["writer".as_ref(), recipe.as_os_str(), count.as_ref(), threads.as_ref()];
        let (process, hello) = Peer::spawn(&std::env::current_exe()?, &words)?;
        let weights = hello["weights"].as_f64().context("the engine did not say its weights")?;
        let seen = hello["seen"].as_f64().context("the engine did not say what a token sees")?;
        let size = if dtype == "bf16" { 2.0 } else { 4.0 };
        let bytes = size * weights + 4.0 * seen * sequences as f64;
        racers.push(Racer { name: format!("engraft {dtype}"), process, rates: Vec::new(), bytes });
    }
    for kind in args.peers.iter().filter(|kind| *kind != "none") {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/generation.py");
        let settings = json!({ "model": model, "sequences": sequences, "dtype": kind, "read": READ,
            "written": WRITTEN, "threads": args.threads });
        match Peer::spawn(&args.python, &[script.as_os_str(), settings.to_string().as_ref()]) {
            Ok((process, _)) => {
                let bytes =
                    racers.iter().find(|r| r.name.ends_with(kind.as_str())).map_or(f64::NAN, |r| r.bytes);
                racers.push(Racer {
                    name: format!("transformers {kind}"),
                    process,
                    rates: Vec::new(),
                    bytes,
                });
            }
            Err(error) => println!("{name}: no peer {kind}: {error:#}"),
        }
    }
    let mut bandwidths = Vec::new();
    // The first round warms caches and pools.
    for round in 0..=args.rounds {
        if round > 0 {
            bandwidths.push(pool.install(bandwidth));
        }
        for racer in &mut racers {
            let answer = racer.process.ask(&json!({ "tokens": args.tokens }))?;
            let seconds =
                answer["seconds"].as_f64().with_context(|| format!("{}: no seconds", racer.name))?;
            if round > 0 {
                racer.rates.push((args.tokens * sequences) as f64 / seconds);
            }
        }
    }
    Ok(table(name, sequences, &bandwidths, &racers))
}

fn table(name: &str, sequences: usize, bandwidths: &[f64], racers: &[Racer]) -> Vec<Value> {
    let rate = |racer: &Racer| median(&mut racer.rates.clone());
    let engines = racers.iter().filter(|racer| racer.name.starts_with("engraft"));
    let bandwidth = median(&mut bandwidths.to_vec());
    let best = engines.max_by(|a, b| rate(a).total_cmp(&rate(b)));
    let line = |racer: &Racer| {
        let rate = rate(racer);
        let shares =
            racer.rates.iter().zip(bandwidths).map(|(rate, all)| rate / sequences as f64 * racer.bytes / all);
        let share = median(&mut shares.collect::<Vec<_>>());
        let ratio = best.map_or(f64::NAN, |best| {
            median(&mut best.rates.iter().zip(&racer.rates).map(|(a, b)| a / b).collect::<Vec<_>>())
        });
        println!(
            "| {name} | {sequences} | {} | {rate:.1} | {:.1} | {:.0} % | {ratio:.2} |",
            racer.name,
            bandwidth / 1e9,
            100.0 * share
        );
        json!({ "model": name, "texts": sequences, "name": racer.name, "tokens_per_second": rate,
            "rounds": racer.rates, "bytes_a_second": bandwidth, "share_of_bandwidth": share, "best_over_this": ratio })
    };
    racers.iter().map(line).collect()
}

/// Answers lines like `{"tokens": 16}` with the seconds that these took, until the input ends.
pub fn answer(recipe: &Path, sequences: usize, threads: usize) -> Result<()> {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    let reader = Reader::base(open(recipe, &Default::default())?);
    let sites = reader.session.model.sites().iter();
    let weights: usize =
        sites.map(|site| if let Kind::Linear { out, inn, .. } = site.kind { out * inn } else { 0 }).sum();
    let info = reader.session.model.info();
    let seen = 2 * info.layers * info.kv_heads * info.head_dim * (READ + WRITTEN / 2);
    say(&json!({ "weights": weights, "seen": seen }))?;
    let begin = || -> Result<_> {
        let cache = reader.cache(sequences, READ + WRITTEN);
        reader.feed(&reader.texts(sequences, 0, READ)?, &cache)?;
        Ok(cache)
    };
    let (mut cache, mut written) = (begin()?, 0);
    for line in stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let tokens = request["tokens"].as_u64().context("expected tokens")? as usize;
        if written + tokens > WRITTEN {
            (cache, written) = (begin()?, 0);
        }
        let started = Instant::now();
        for i in 0..tokens {
            reader.feed(&reader.texts(sequences, READ + written + i, 1)?, &cache)?;
        }
        written += tokens;
        say(&json!({ "seconds": started.elapsed().as_secs_f64() }))?;
    }
    Ok(())
}
