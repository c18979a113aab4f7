//! `engraft-bench step`: training steps of the engine beside `peft`, on the same weights and examples.
//!
//! Engine and peers are processes that answer "take n steps" with seconds. They take turns round by round, so that a machine
//! that slows down does so for all; compared are medians, and the ratio of each pair of neighbours.

mod card;
mod engine;
mod table;
mod work;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

pub use card::On;
pub use engine::answer;
pub use table::{Line, Rate};

use crate::peer::Peer;
use work::Work;

#[derive(clap::Args)]
pub struct Args {
    /// The Python that has the peers (bench/requirements.txt)
    #[arg(long, default_value = "python3")]
    pub python: PathBuf,
    /// The folder of models and data beside this repository
    #[arg(long, default_value = "../shared/data")]
    pub shared: PathBuf,
    /// Where models with random weights and the examples are put
    #[arg(long, default_value = "target/bench")]
    pub folder: PathBuf,
    /// The works to measure, all if left out: llama, long, checkpointed, minilm, uneven, vocabulary
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<String>,
    /// Rounds, each of some steps of the engine and of every peer
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Steps of a round
    #[arg(long, default_value_t = 2)]
    pub steps: usize,
    /// Types of the engine's computation
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    pub dtypes: Vec<String>,
    /// Peers: f32, bf16, compiled (bf16 under torch.compile), or none
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16,compiled")]
    pub peers: Vec<String>,
    /// What to compute on: cpu, or cuda with works of its own (8b-512, 8b-2048, 8b-8192, 1b-1, 1b-32)
    #[arg(long, default_value = "cpu")]
    pub device: On,
    /// Also tells where a step's time goes on a card, call by call
    #[arg(long)]
    pub profile: bool,
    /// Threads of everyone
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Write the results here too
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// Measures the works and prints the table.
pub fn run(args: &Args) -> Result<Vec<Line>> {
    let works = args.device.works();
    let unknown = args.only.iter().find(|name| !works.iter().any(|work| work.name == name.as_str()));
    if let Some(name) = unknown {
        let known: Vec<&str> = works.iter().map(|work| work.name).collect();
        bail!("there is no work `{name}`; there are {}", known.join(", "));
    }
    let peak = match args.device {
        On::Cpu => table::peak(args.threads)?,
        On::Cuda => card::peak()?,
    };
    table::head(args.device, args.threads, peak);
    let mut lines = Vec::new();
    for work in works.iter().filter(|work| args.only.is_empty() || args.only.contains(&work.name.into())) {
        let line = measure(args, work, peak).with_context(|| format!("work {}", work.name))?;
        line.print();
        lines.push(line);
    }
    if let Some(path) = &args.json {
        let all = json!({ "device": engraft_tensor::device::name(), "threads": args.threads, "peak_gflops": { "f32": peak.0, "bf16": peak.1 }, "works": lines });
        std::fs::write(path, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(lines)
}

fn measure(args: &Args, work: &Work, peak: (f64, f64)) -> Result<Line> {
    let folder = args.folder.join(work.name);
    std::fs::create_dir_all(&folder)?;
    let folder = folder.canonicalize()?;
    let model = work.model(&args.shared, &folder)?;
    let threads = args.threads.to_string();
    let mut racers = Vec::new();
    for dtype in &args.dtypes {
        let recipe = folder.join(format!("{dtype}.toml"));
        std::fs::write(&recipe, work.recipe(&model, &folder, &args.shared, dtype)?)?;
        let examples = folder.join("examples.json");
        let this = std::env::current_exe()?;
        let words = [
            "engine".as_ref(),
            recipe.as_os_str(),
            examples.as_os_str(),
            threads.as_ref(),
            args.device.name().as_ref(),
        ];
        let (engine, hello) = Peer::spawn(&this, &words)?;
        racers.push(Racer::new(format!("engraft {dtype}"), engine, hello));
    }
    for kind in args.peers.iter().filter(|kind| *kind != "none") {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/step.py");
        let settings = work.peer(&model, &folder, kind, args.threads, args.device).to_string();
        match Peer::spawn(&args.python, &[script.as_os_str(), settings.as_ref()]) {
            Ok((peer, hello)) => racers.push(Racer::new(format!("peft {kind}"), peer, hello)),
            Err(error) => println!("{}: no peer {kind}: {error:#}", work.name),
        }
    }
    // The first round warms caches and pools, and compiles.
    for round in 0..=args.rounds {
        for racer in &mut racers {
            racer.go(if round == 0 { 1 } else { args.steps }, round > 0)?;
        }
    }
    if args.profile {
        racers[0].profile()?;
    }
    let operations = work.operations(&racers[0].hello)?;
    let rates = racers.iter().map(|racer| racer.rate(operations, peak)).collect();
    Ok(Line { work: work.name, what: work.what, operations_per_token: operations, rates })
}

/// One process in the race.
struct Racer {
    name: String,
    process: Peer,
    hello: Value,
    /// Useful tokens a second of each round.
    rates: Vec<f64>,
    peak_bytes: f64,
}

impl Racer {
    fn new(name: String, process: Peer, hello: Value) -> Racer {
        Racer { name, process, hello, rates: Vec::new(), peak_bytes: 0.0 }
    }

    fn go(&mut self, steps: usize, counts: bool) -> Result<()> {
        let answer = self.process.ask(&json!({ "steps": steps }))?;
        let number = |key: &str| answer[key].as_f64().with_context(|| format!("{}: no {key}", self.name));
        let rate = number("tokens")? / number("seconds")?;
        self.peak_bytes = number("peak_bytes")?;
        if counts {
            self.rates.push(rate);
        }
        Ok(())
    }

    /// Prints what one step calls, and how long each takes by itself.
    fn profile(&mut self) -> Result<()> {
        let answer = self.process.ask(&json!({ "steps": 1, "profile": true }))?;
        let calls: Vec<(String, usize, f64)> = serde_json::from_value(answer["calls"].clone())?;
        let total: f64 = calls.iter().map(|call| call.2).sum();
        println!("{}: one step, {:.1} ms in calls", self.name, 1e3 * total);
        for (name, count, seconds) in calls.iter().take(45) {
            println!("{:8.2} ms {count:5} {name}", 1e3 * seconds);
        }
        Ok(())
    }

    fn rate(&self, operations: f64, (f32_peak, bf16_peak): (f64, f64)) -> Rate {
        let tokens_per_second = crate::median(&mut self.rates.clone());
        let peak = if self.name.ends_with("f32") { f32_peak } else { bf16_peak };
        Rate {
            name: self.name.clone(),
            tokens_per_second,
            rounds: self.rates.clone(),
            share_of_peak: tokens_per_second * operations / (peak * 1e9),
            peak_bytes: self.peak_bytes,
            load_seconds: self.hello["seconds"].as_f64().unwrap_or(f64::NAN),
        }
    }
}
