//! `engraft-bench growth`: how a training step's time grows with tokens, sequence length, width, rank, adapters and cores.
//!
//! LoRA on all linear weights of a small Llama of random weights; one setting changes at a time. Beside the measured time stands what the
//! count of operations says, set equal at the largest setting: a law that the engine does not follow shows as a gap. Settings take
//! turns round by round; shown are medians, and the operating system's peak of memory.

use std::io::{BufRead, stdin};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use engraft_report::{Axis, Chart, Series};
use engraft_train::Trainer;
use serde_json::{Value, json};

use crate::base::{Llama, write_llama, write_tokens};
use crate::median;
use crate::open::open;
use crate::peer::{Peer, say};

#[derive(clap::Args)]
pub struct Args {
    /// Where models of random weights and recipes are put
    #[arg(long, default_value = "target/bench/growth")]
    folder: PathBuf,
    /// The settings to change: tokens, length, width, rank, adapters, cores
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Steps of a round
    #[arg(long, default_value_t = 2)]
    steps: usize,
    /// Threads, where their number is not what changes
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Where the plots are put, one SVG for each setting
    #[arg(long)]
    plots: Option<PathBuf>,
    /// Write the results here too
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What a step works on.
#[derive(Clone, Copy)]
struct Setting {
    rows: usize,
    length: usize,
    width: usize,
    rank: usize,
    adapters: usize,
    threads: usize,
}

const LAYERS: usize = 4;
const VOCABULARY: usize = 4096;

impl Setting {
    fn shape(&self) -> Llama {
        // Heads of 64, and a gated MLP of three widths.
        let heads = (self.width / 64).max(1);
        Llama {
            width: self.width,
            inner: 3 * self.width,
            layers: LAYERS,
            heads,
            kv_heads: heads,
            vocabulary: VOCABULARY,
        }
    }

    /// Floating-point operations of a step over the number of cores: two products with every frozen matrix, six with the factors of
    /// each, attention's scores and sums forward and twice as much backward, half of them above the diagonal.
    fn operations(&self) -> f64 {
        let (w, r) = (self.width as f64, self.rank as f64);
        let tokens = (self.rows * self.length) as f64;
        let matrices = 4.0 * w * w + 3.0 * 3.0 * w * w;
        let factors = r * (4.0 * 2.0 * w + 3.0 * 4.0 * w);
        let attention = 3.0 * 4.0 * self.length as f64 * w * 0.5;
        let head = 4.0 * w * VOCABULARY as f64;
        let token = LAYERS as f64 * (4.0 * matrices + 6.0 * factors + attention) + head;
        tokens * token * self.adapters as f64 / self.threads as f64
    }
}

/// A setting that changes, and the law it should follow.
struct Curve {
    name: &'static str,
    axis: &'static str,
    law: &'static str,
    values: &'static [usize],
    set: fn(&mut Setting, usize),
}

const CURVES: &[Curve] = &[
    Curve {
        name: "tokens",
        axis: "rows of 128 tokens",
        law: "in proportion",
        values: &[1, 2, 4, 8, 16],
        set: |s, value| (s.rows, s.length) = (value, 128),
    },
    Curve {
        name: "length",
        axis: "tokens of one row",
        law: "in proportion, and with the square where attention outweighs the matrices",
        values: &[128, 256, 512, 1024, 2048, 4096],
        set: |s, value| (s.rows, s.length) = (1, value),
    },
    Curve {
        name: "width",
        axis: "width",
        law: "with the square",
        values: &[128, 256, 384, 512, 768, 1024],
        set: |s, value| s.width = value,
    },
    Curve {
        name: "rank",
        axis: "rank",
        law: "flat, then in proportion where factors outweigh the matrices",
        values: &[1, 4, 16, 64, 256],
        set: |s, value| s.rank = value,
    },
    Curve {
        name: "adapters",
        axis: "adapters on one base",
        law: "in proportion; memory of the base once",
        values: &[1, 2, 4, 8],
        set: |s, value| s.adapters = value,
    },
    Curve {
        name: "cores",
        axis: "cores",
        law: "in inverse proportion",
        values: &[1, 2],
        set: |s, value| s.threads = value,
    },
];

/// One setting's process and times.
struct Point {
    value: usize,
    setting: Setting,
    process: Peer,
    seconds: Vec<f64>,
    peak_bytes: f64,
}

/// Measures every curve, prints it and draws it.
pub fn run(args: &Args) -> Result<()> {
    for name in &args.only {
        let known: Vec<&str> = CURVES.iter().map(|curve| curve.name).collect();
        ensure!(known.contains(&name.as_str()), "nothing is called `{name}`; there are {}", known.join(", "));
    }
    let mut all = Vec::new();
    for curve in CURVES.iter().filter(|c| args.only.is_empty() || args.only.iter().any(|o| o == c.name)) {
        let points = measure(args, curve).with_context(|| curve.name)?;
        all.push(shown(args, curve, &points)?);
    }
    if let Some(path) = &args.json {
        std::fs::write(path, format!("{:#}\n", json!({ "curves": all })))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn measure(args: &Args, curve: &Curve) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for &value in curve.values {
        let mut setting =
            Setting { rows: 4, length: 128, width: 512, rank: 16, adapters: 1, threads: args.threads };
        (curve.set)(&mut setting, value);
        let recipes = recipes(&args.folder, &setting)?;
        let threads = setting.threads.to_string();
        let words: Vec<_> = ["grower".as_ref(), threads.as_ref()]
            .into_iter()
            .chain(recipes.iter().map(|path| path.as_os_str()))
            .collect();
        let (process, _) = Peer::spawn(&std::env::current_exe()?, &words)?;
        points.push(Point { value, setting, process, seconds: Vec::new(), peak_bytes: 0.0 });
    }
    // The first round warms caches and pools.
    for round in 0..=args.rounds {
        for point in &mut points {
            let answer = point.process.ask(&json!({ "steps": args.steps }))?;
            let number = |key: &str| answer[key].as_f64().with_context(|| format!("no {key}"));
            point.peak_bytes = number("peak_bytes")?;
            if round > 0 {
                point.seconds.push(number("seconds")? / args.steps as f64);
            }
        }
    }
    Ok(points)
}

/// A recipe for each adapter, of different learning rates.
fn recipes(folder: &Path, setting: &Setting) -> Result<Vec<PathBuf>> {
    let model = folder.join(format!("width-{}", setting.width));
    let tokens = folder.join(format!("{}-tokens.safetensors", setting.length));
    std::fs::create_dir_all(&model)?;
    write_llama(&model, &setting.shape(), 4096)?;
    write_tokens(&tokens, 16, setting.length, VOCABULARY)?;
    let (model, tokens) = (model.canonicalize()?, tokens.canonicalize()?);
    let Setting { rows, rank, .. } = *setting;
    let write = |adapter: usize| -> Result<PathBuf> {
        let recipe = folder.join(format!("{}-{rank}-{adapter}.toml", setting.width));
        let rate = 1e-4 / (adapter + 1) as f64;
        let text = format!(
            "model = {:?}\ntask = \"causal-lm\"\n[method]\nname = \"lora\"\nrank = {rank}\nalpha = {rank}\ntargets = \"all-linear\"\n\
             [data]\nformat = \"tensors\"\npath = {:?}\nshuffle = false\n[train]\nepochs = 1000\nbatch_size = {rows}\nlearning_rate = {rate}\n",
            model.display().to_string(),
            tokens.display().to_string()
        );
        std::fs::write(&recipe, text)?;
        Ok(recipe)
    };
    (0..setting.adapters).map(write).collect()
}

fn shown(args: &Args, curve: &Curve, points: &[Point]) -> Result<Value> {
    let time = |point: &Point| 1e3 * median(&mut point.seconds.clone());
    let last = points.iter().max_by(|a, b| a.setting.operations().total_cmp(&b.setting.operations()));
    let a_millisecond = last.map_or(f64::NAN, |point| point.setting.operations() / time(point));
    let expected = |point: &Point| point.setting.operations() / a_millisecond;
    println!("\n{}: {}\n", curve.name, curve.law);
    println!("| {} | ms a step | by operations | MiB |\n| ---: | ---: | ---: | ---: |", curve.axis);
    let line = |point: &Point| {
        let (time, expected, memory) = (time(point), expected(point), point.peak_bytes / f64::from(1 << 20));
        println!("| {} | {time:.1} | {expected:.1} | {memory:.0} |", point.value);
        json!({ "value": point.value, "ms": time, "ms_by_operations": expected, "peak_bytes": point.peak_bytes })
    };
    let lines: Vec<Value> = points.iter().map(line).collect();
    if let Some(folder) = &args.plots {
        let of = |y: &dyn Fn(&Point) -> f64| points.iter().map(|p| (p.value as f64, y(p))).collect();
        let title = format!("A step by {}", curve.axis);
        let chart = Chart::new(&title, Axis::new(curve.axis).log(), Axis::new("time").unit("ms").log())
            .with(Series::dashed("by operations", of(&expected)))
            .with(Series::dots("measured", of(&time)));
        let path = folder.join(format!("growth-{}.svg", curve.name));
        std::fs::write(&path, chart.svg(520.0, 320.0))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(json!({ "name": curve.name, "axis": curve.axis, "law": curve.law, "points": lines }))
}

/// Answers lines like `{"steps": 2}` with the time of so many steps of every recipe, in turn on one base, until the input ends.
pub fn answer(threads: usize, recipes: &[PathBuf]) -> Result<()> {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    let packed = Default::default();
    let sessions = recipes.iter().map(|recipe| open(recipe, &packed)).collect::<Result<Vec<_>>>()?;
    let mut trainers = sessions.iter().map(Trainer::new).collect::<Result<Vec<_>, _>>()?;
    say(&json!({}))?;
    let mut number = 0;
    for line in stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let steps = request["steps"].as_u64().context("expected steps")?;
        let mut losses = vec![0.0; trainers.len()];
        let started = Instant::now();
        for _ in 0..steps {
            number += 1;
            for (trainer, loss) in trainers.iter_mut().zip(&mut losses) {
                *loss = trainer.step(number)?.event.loss;
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        say(
            &json!({ "seconds": seconds, "losses": losses, "peak_bytes": engraft_store::process::peak_memory_bytes() }),
        )?;
    }
    Ok(())
}
