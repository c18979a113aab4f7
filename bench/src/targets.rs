//! `engraft-bench targets`: every kind of work of the engine beside its peers in one run, and what is to be reached on it.
//!
//! The targets were set for a processor with bf16 instructions (AVX-512-BF16): where there are none, `peft` in bf16 is slow, f32 is
//! bounded by the same peak as the engine, and the table says what this machine gives.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Value, json};

use crate::step::{Line, Rate};
use crate::{generation, step, together};

#[derive(clap::Args)]
pub struct Args {
    /// The Python that has the peers (bench/requirements.txt)
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// The folder of models and data beside this repository
    #[arg(long, default_value = "../shared/data")]
    shared: PathBuf,
    /// Where models with random weights and recipes are put
    #[arg(long, default_value = "target/bench")]
    folder: PathBuf,
    /// The works to measure, all if left out: those of `step`, adapters, generation
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Rounds of everyone in turn
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Types of the engine's computation
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    dtypes: Vec<String>,
    /// Peers: f32, bf16, compiled (bf16 under torch.compile, training only), or none
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16,compiled")]
    peers: Vec<String>,
    /// Threads of everyone
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Write the results here too
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What a step of a work is to reach beside a peer.
struct Target {
    work: &'static str,
    /// The peer's type; the faster one where there is none.
    peer: Option<&'static str>,
    /// Useful tokens a second over the peer's.
    speed: Option<f64>,
    /// Peak memory over the peer's, at most.
    memory: Option<f64>,
}

const fn target(
    work: &'static str,
    peer: Option<&'static str>,
    speed: Option<f64>,
    memory: Option<f64>,
) -> Target {
    Target { work, peer, speed, memory }
}

const TARGETS: &[Target] = &[
    target("llama", Some("bf16"), Some(2.4), Some(0.5)),
    target("llama", Some("compiled"), Some(1.75), None),
    target("llama", Some("f32"), Some(4.7), None),
    target("long", None, Some(2.0), Some(0.5)),
    target("checkpointed", None, Some(2.0), Some(0.5)),
    target("minilm", None, Some(7.0), None),
    target("uneven", None, Some(4.0), None),
    target("vocabulary", None, None, Some(0.35)),
];
/// Share of the measured peak in a step of the first work.
const STEP_SHARE: f64 = 0.75;
/// Seconds from the start to the first step.
const START: f64 = 0.5;
/// Time of the runs in sequence over that of the adapters together, and memory over that of one run.
const TOGETHER: (f64, f64) = (1.0, 1.3);
/// Share of the memory's bandwidth for one text, and tokens a second over those of the faster peer.
const WRITING: (f64, f64) = (0.9, 1.2);

/// A measured number beside its target.
#[derive(Serialize)]
struct Reached {
    work: String,
    what: String,
    reached: f64,
    target: f64,
    /// Whether more is better.
    more: bool,
}

impl Reached {
    fn holds(&self) -> bool {
        if self.more { self.reached >= self.target } else { self.reached <= self.target }
    }

    fn print(&self) {
        println!(
            "| {} | {} | {:.2} | {} {:.2} | {} |",
            self.work,
            self.what,
            self.reached,
            if self.more { "≥" } else { "≤" },
            self.target,
            if self.holds() { "yes" } else { "no" }
        );
    }
}

/// Measures all works and prints what was reached.
pub fn run(args: &Args) -> Result<()> {
    let steps = wanted_steps(args)?;
    let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|only| only == name);
    let mut reached = Vec::new();
    let mut lines = Vec::new();
    if args.only.is_empty() || !steps.is_empty() {
        lines = step::run(&step::Args {
            python: args.python.clone(),
            shared: args.shared.clone(),
            folder: args.folder.clone(),
            only: steps,
            rounds: args.rounds,
            steps: 1,
            dtypes: args.dtypes.clone(),
            peers: args.peers.clone(),
            device: step::On::Cpu,
            profile: false,
            threads: args.threads,
            json: None,
        })?;
        reached.extend(lines.iter().flat_map(of_step));
    }
    let mut adapters = None;
    if wanted("adapters") {
        let found = together::measure(&args.folder.join("together"), args.rounds, args.threads)?;
        reached.extend(of_together(&found));
        adapters = Some(found);
    }
    let mut written = Vec::new();
    if wanted("generation") {
        written = generation::run(&generation::Args {
            python: args.python.clone(),
            folder: args.folder.join("generation"),
            shapes: vec!["small".into(), "middle".into()],
            sequences: vec![1, 8],
            dtypes: args.dtypes.clone(),
            peers: args.peers.iter().filter(|peer| *peer != "compiled").cloned().collect(),
            rounds: args.rounds,
            tokens: 32,
            threads: args.threads,
            json: None,
        })?;
        reached.extend(of_generation(&written)?);
    }
    println!("\n| work | | reached | target | holds |\n| --- | --- | ---: | ---: | --- |");
    reached.iter().for_each(Reached::print);
    if let Some(path) = &args.json {
        let all = json!({ "threads": args.threads, "targets": reached, "steps": lines, "adapters": adapters, "generation": written });
        std::fs::write(path, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The works of `step` among those that are asked for.
fn wanted_steps(args: &Args) -> Result<Vec<String>> {
    let others = ["adapters", "generation"];
    let steps: Vec<String> =
        args.only.iter().filter(|only| !others.contains(&only.as_str())).cloned().collect();
    if let Some(unknown) = steps.iter().find(|name| !TARGETS.iter().any(|target| target.work == **name)) {
        let mut known: Vec<&str> = TARGETS.iter().map(|target| target.work).collect();
        known.dedup();
        bail!("there is no work `{unknown}`; there are {}, {}", known.join(", "), others.join(", "));
    }
    Ok(steps)
}

fn of_step(line: &Line) -> Vec<Reached> {
    let Some(best) = line.best() else { return Vec::new() };
    let say =
        |what: String, reached, target, more| Reached { work: line.work.into(), what, reached, target, more };
    let mut all = Vec::new();
    for target in TARGETS.iter().filter(|target| target.work == line.work) {
        let Some(peer) = peer(line, target.peer) else { continue };
        if let Some(speed) = target.speed {
            all.push(say(format!("useful tokens/s over {}", peer.name), best.over(peer), speed, true));
        }
        if let Some(memory) = target.memory {
            let ratio = best.peak_bytes / peer.peak_bytes;
            all.push(say(format!("memory over {}", peer.name), ratio, memory, false));
        }
    }
    if line.work == TARGETS[0].work {
        all.push(say(format!("share of the peak, {}", best.name), best.share_of_peak, STEP_SHARE, true));
    }
    all.push(say("seconds to the first step".into(), best.load_seconds, START, false));
    all
}

/// The peer of a type, or the faster of all.
fn peer<'a>(line: &'a Line, dtype: Option<&str>) -> Option<&'a Rate> {
    let mut peers = line.rates.iter().filter(|rate| rate.name.starts_with("peft"));
    match dtype {
        Some(dtype) => peers.find(|rate| rate.name.ends_with(&format!(" {dtype}"))),
        None => peers.max_by(|a, b| a.tokens_per_second.total_cmp(&b.tokens_per_second)),
    }
}

fn of_together(found: &together::Together) -> [Reached; 3] {
    let say = |what: &str, reached, target, more| Reached {
        work: "adapters".into(),
        what: what.into(),
        reached,
        target,
        more,
    };
    [
        say("time of 8 runs in sequence over 8 together", found.time_ratio(), TOGETHER.0, true),
        say("memory of 8 together over one", found.memory_ratio(), TOGETHER.1, false),
        say("adapters with the bits of their run alone", found.equal as f64, found.adapters() as f64, true),
    ]
}

fn of_generation(lines: &[Value]) -> Result<Vec<Reached>> {
    let mut all: Vec<Reached> = Vec::new();
    let works = lines.chunk_by(|a, b| a["model"] == b["model"] && a["texts"] == b["texts"]);
    for work in works {
        let name = |line: &Value| line["name"].as_str().unwrap_or_default().to_owned();
        let number = |line: &Value, key: &str| line[key].as_f64().with_context(|| format!("no {key}"));
        let rate = |line: &&Value| number(line, "tokens_per_second").unwrap_or(0.0);
        let fastest = |of: &str| {
            let all = work.iter().filter(|line| name(line).starts_with(of));
            all.max_by(|a, b| rate(a).total_cmp(&rate(b)))
        };
        let what = format!(
            "generation, {}, {} texts",
            work[0]["model"].as_str().unwrap_or_default(),
            work[0]["texts"]
        );
        let say = |text: String, reached, target| Reached {
            work: what.clone(),
            what: text,
            reached,
            target,
            more: true,
        };
        if let Some(engine) = fastest("engraft").filter(|line| line["texts"] == 1) {
            let share = number(engine, "share_of_bandwidth")?;
            all.push(say(format!("share of the memory's bandwidth, {}", name(engine)), share, WRITING.0));
        }
        if let Some(peer) = fastest("transformers") {
            let over = number(peer, "best_over_this")?;
            all.push(say(format!("tokens/s over {}", name(peer)), over, WRITING.1));
        }
    }
    Ok(all)
}
