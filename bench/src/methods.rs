//! `engraft-bench methods`: what a training step of each method costs beside LoRA's, in seconds and in memory.
//!
//! MiniLM on the help desk's rows, both of this repository; every method on all linear layers, of about the size of LoRA of rank
//! 8 where a setting sets the size. Processes take turns round by round; a ratio is that of medians.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use crate::median;
use crate::peer::Peer;

#[derive(clap::Args)]
pub struct Args {
    /// Where recipes are put
    #[arg(long, default_value = "target/bench/methods")]
    folder: PathBuf,
    /// Rounds, each of some steps of every method
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Steps of a round
    #[arg(long, default_value_t = 4)]
    steps: usize,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Write the results here too
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Names in the table and settings of recipes.
const METHODS: &[(&str, &str)] = &[
    ("lora", "name = \"lora\"\nrank = 8"),
    ("lora, DoRA", "name = \"lora\"\nrank = 8\ndora = true"),
    ("lora, A frozen", "name = \"lora\"\nrank = 8\nfreeze_a = true"),
    ("adalora", "name = \"adalora\"\ninit_rank = 8\ntarget_rank = 4"),
    ("sora", "name = \"sora\"\nrank = 8"),
    ("vera", "name = \"vera\"\nrank = 256"),
    ("ia3", "name = \"ia3\""),
    ("oft", "name = \"oft\"\nblock_size = 32"),
    ("hra", "name = \"hra\"\nrank = 8"),
    ("boft", "name = \"boft\"\nblock_size = 8"),
    ("loha", "name = \"loha\"\nrank = 4"),
    ("lokr", "name = \"lokr\"\nrank = 8"),
    ("krona", "name = \"krona\""),
    ("miss", "name = \"miss\"\nrank = 8"),
    ("c3a", "name = \"c3a\"\nblock_size = 128"),
    ("fourierft", "name = \"fourierft\"\nn_frequency = 1000"),
    ("randlora", "name = \"randlora\"\nrank = 32"),
    ("hira", "name = \"hira\"\nrank = 8"),
    ("shira", "name = \"shira\"\nrank = 8"),
    ("random_mask", "name = \"random_mask\"\ndensity = 0.03"),
    ("full", "name = \"full\""),
];

/// One method's process and what it took.
struct Racer {
    name: &'static str,
    process: Peer,
    seconds: Vec<f64>,
    peak_bytes: f64,
    trained: u64,
}

/// Measures every method and prints the table.
pub fn run(args: &Args) -> Result<()> {
    std::fs::create_dir_all(&args.folder)?;
    let folder = args.folder.canonicalize()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let mut racers = METHODS
        .iter()
        .map(|(name, settings)| start(name, settings, &folder, &root, args.threads))
        .collect::<Result<Vec<_>>>()?;
    // The first round warms caches and pools.
    for round in 0..=args.rounds {
        for racer in &mut racers {
            let steps = if round == 0 { 1 } else { args.steps };
            let answer = racer.process.ask(&json!({ "steps": steps }))?;
            let number =
                |key: &str| answer[key].as_f64().with_context(|| format!("{}: no {key}", racer.name));
            let seconds = number("seconds")? / steps as f64;
            racer.peak_bytes = number("peak_bytes")?;
            if round > 0 {
                racer.seconds.push(seconds);
            }
        }
    }
    table(args, &mut racers)
}

fn start(name: &'static str, settings: &str, folder: &Path, root: &Path, threads: usize) -> Result<Racer> {
    let recipe = folder.join(format!("{}.toml", name.replace([' ', ','], "_")));
    let targets = if ["ia3", "full"].contains(&name) { "" } else { "targets = \"all-linear\"\n" };
    std::fs::write(
        &recipe,
        format!(
            "model = {:?}\ntask = \"sequence-classification\"\n[method]\n{settings}\n{targets}[data]\nformat = \"csv\"\npath = {:?}\ncolumns = {{ text = \"text\", label = \"intent\" }}\n[train]\nsteps = 1000\nbatch_size = 32\ndtype = \"f32\"\n",
            root.join("models/all-minilm-l6-v2").display().to_string(),
            root.join("data/helpdesk/train.csv").display().to_string(),
        ),
    )?;
    let (examples, threads) = (folder.join("examples.json"), threads.to_string());
    let this = std::env::current_exe()?;
    let words = ["engine".as_ref(), recipe.as_os_str(), examples.as_os_str(), threads.as_ref()];
    let (process, hello) = Peer::spawn(&this, &words).with_context(|| format!("method {name}"))?;
    let trained = hello["trained"].as_u64().unwrap_or(0);
    Ok(Racer { name, process, seconds: Vec::new(), peak_bytes: 0.0, trained })
}

fn table(args: &Args, racers: &mut [Racer]) -> Result<()> {
    let base = racers.first_mut().map_or(f64::NAN, |racer| median(&mut racer.seconds));
    let memory = racers.first().map_or(f64::NAN, |racer| racer.peak_bytes);
    println!(
        "| method | trained | ms a step | time / LoRA's | memory / LoRA's |\n| --- | --- | --- | --- | --- |"
    );
    let mut lines = Vec::new();
    for racer in racers {
        let seconds = median(&mut racer.seconds);
        let (time, space) = (seconds / base, racer.peak_bytes / memory);
        println!("| {} | {} | {:.0} | {time:.2} | {space:.2} |", racer.name, racer.trained, 1e3 * seconds);
        lines.push(json!({ "method": racer.name, "trained": racer.trained, "seconds": seconds,
            "rounds": racer.seconds, "peak_bytes": racer.peak_bytes, "time_to_lora": time, "memory_to_lora": space }));
    }
    if let Some(path) = &args.json {
        let all =
            json!({ "threads": args.threads, "rounds": args.rounds, "steps": args.steps, "methods": lines });
        std::fs::write(path, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
