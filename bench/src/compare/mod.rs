//! `engraft-bench compare`: methods of all classes at equal budgets, on three data sets, over several seeds.
//!
//! MiniLM, the classifier trained in all. The learning rate of a method at a budget is the one with the lowest loss on held-out
//! training rows of TREC, of three and of further ones where the best is the last; it then holds for all data sets. The classifier
//! has a rate of its own, the same for all: 77 classes want a fast one, which would tear the rest of a model apart. A run is one
//! epoch of batches of 16 and is scored once, on the test part, after its last step. Small batches leave most of a second core idle, so that several runs go side by side with one
//! thread each: a run's bits do not depend on it. Every result is put into the JSON file as it comes, and a command that finds
//! results there goes on after them, so that hours of runs need not be taken at once.

mod data;
mod methods;
mod table;

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use data::Data;
use methods::{BOUNDS, BUDGETS, Entry, LINEAR_PROBE, METHODS};

#[derive(clap::Args)]
pub struct Args {
    /// The folder that holds trec, sst2 and banking77
    #[arg(long, default_value = "../shared/data")]
    data: PathBuf,
    /// Where recipes and runs are put
    #[arg(long, default_value = "target/bench/compare")]
    folder: PathBuf,
    /// The program; the one beside this program if left out
    #[arg(long)]
    engraft: Option<PathBuf>,
    /// Seeds 0 to this number, exclusive
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Only methods whose name holds this text
    #[arg(long)]
    only: Option<String>,
    /// Runs at once, of one thread each; as many as there are cores if left out
    #[arg(long)]
    jobs: Option<usize>,
    /// Print the tables of what is there and run nothing
    #[arg(long)]
    print: bool,
    /// Where results are kept
    #[arg(long, default_value = "bench/results/compare.json")]
    json: PathBuf,
}

/// The learning rate of the classifier, whatever the method: what is chosen for each method is then its own. Of 1e-2, 3e-2 and
/// 1e-1 the one that served LoRA best on held-out rows of BANKING77.
const HEAD_RATE: f64 = 3e-2;

/// Learning rates of a method at most.
const MOST_RATES: usize = 6;

/// What a finished run is known by, and its result.
#[derive(Serialize, Deserialize, Clone, PartialEq)]
struct Outcome {
    data: String,
    method: String,
    budget: String,
    seed: u64,
    learning_rate: f64,
    /// Scored on held-out training rows, to choose the learning rate by, and not on the test part.
    held_out: bool,
    /// Trained numbers, the classifier apart.
    trained: u64,
    accuracy: f64,
    loss: f64,
}

/// A method at a budget.
struct Entrant {
    entry: &'static Entry,
    budget: &'static str,
    settings: &'static str,
}

/// One run.
struct Run<'a> {
    entrant: &'a Entrant,
    data: &'a Data,
    seed: u64,
    rate: f64,
    held_out: bool,
}

impl Run<'_> {
    /// Whether `outcome` is of this run.
    fn gave(&self, outcome: &Outcome) -> bool {
        outcome.data == self.data.name
            && outcome.method == self.entrant.entry.name
            && outcome.budget == self.entrant.budget
            && outcome.seed == self.seed
            && outcome.held_out == self.held_out
            && (!self.held_out || (outcome.learning_rate / self.rate - 1.0).abs() < 1e-9)
    }
}

struct Compare<'a> {
    args: &'a Args,
    engraft: PathBuf,
    model: PathBuf,
    folder: PathBuf,
    outcomes: Mutex<Vec<Outcome>>,
}

/// Runs what is not in the file yet, and prints the tables.
pub fn run(args: &Args) -> Result<()> {
    let outcomes: Vec<Outcome> = match std::fs::read_to_string(&args.json) {
        Ok(text) => {
            serde_json::from_str(&text).with_context(|| format!("cannot read {}", args.json.display()))?
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", args.json.display())),
    };
    let compare = Compare {
        args,
        engraft: match &args.engraft {
            Some(path) => path.clone(),
            None => std::env::current_exe()?.with_file_name("engraft"),
        },
        model: Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/all-minilm-l6-v2").canonicalize()?,
        folder: args.folder.clone(),
        outcomes: Mutex::new(outcomes),
    };
    if !args.print {
        compare.all()?;
    }
    table::print(&compare.outcomes());
    Ok(())
}

fn entrants(only: Option<&str>) -> Vec<Entrant> {
    let mut all = Vec::new();
    for (at, budget) in BUDGETS.iter().enumerate() {
        for entry in BOUNDS.iter().chain(METHODS) {
            if let Some(settings) = entry.settings[at]
                && only.is_none_or(|text| entry.name.contains(text))
            {
                all.push(Entrant { entry, budget, settings });
            }
        }
    }
    all
}

impl Compare<'_> {
    /// All learning rates first, then seed after seed, so that what is there compares at any time.
    fn all(&self) -> Result<()> {
        let sets = data::prepare(&self.args.data, &self.folder.join("data"))?;
        let entrants = entrants(self.args.only.as_deref());
        loop {
            let run = |entrant, rate| Run { entrant, data: &sets[0], seed: 0, rate, held_out: true };
            let untried = |entrant| self.untried(entrant).into_iter().map(move |rate| run(entrant, rate));
            let choosing: Vec<Run<'_>> = entrants.iter().flat_map(untried).collect();
            if choosing.is_empty() {
                break;
            }
            self.side_by_side(choosing)?;
        }
        let rates = entrants.iter().map(|entrant| self.best_rate(entrant)).collect::<Result<Vec<_>>>()?;
        let mut runs = Vec::new();
        for seed in 0..self.args.seeds {
            for (entrant, &rate) in entrants.iter().zip(&rates) {
                runs.extend(sets.iter().map(|data| Run { entrant, data, seed, rate, held_out: false }));
            }
        }
        self.side_by_side(runs)
    }

    /// Learning rates that are still to be tried: the middle one, a third and three times of it, then further ones on the side where
    /// the best so far is the last.
    fn untried(&self, entrant: &Entrant) -> Vec<f64> {
        let mut tried = self.tried(entrant);
        let smaller = entrant.entry.settings[0].is_some() && entrant.budget != BUDGETS[0];
        // Fewer numbers have further to go each.
        let middle = entrant.entry.learning_rate * if smaller { 3.0 } else { 1.0 };
        let first = [middle / 3.0, middle, 3.0 * middle];
        let is = |rate: f64| move |o: &Outcome| (o.learning_rate / rate - 1.0).abs() < 1e-9;
        let left: Vec<f64> = first.into_iter().filter(|rate| !tried.iter().any(is(*rate))).collect();
        if !left.is_empty() || tried.len() >= MOST_RATES {
            return left;
        }
        tried.sort_by(|a, b| a.learning_rate.total_cmp(&b.learning_rate));
        let best = (0..tried.len()).min_by(|a, b| tried[*a].loss.total_cmp(&tried[*b].loss));
        match best {
            Some(0) => vec![tried[0].learning_rate / 3.0],
            Some(last) if last + 1 == tried.len() => vec![3.0 * tried[last].learning_rate],
            _ => Vec::new(),
        }
    }

    /// What learning rates gave so far on held-out rows.
    fn tried(&self, entrant: &Entrant) -> Vec<Outcome> {
        let of = |o: &&Outcome| o.held_out && o.method == entrant.entry.name && o.budget == entrant.budget;
        self.outcomes().iter().filter(of).cloned().collect()
    }

    /// The tried learning rate with the lowest loss on held-out rows.
    fn best_rate(&self, entrant: &Entrant) -> Result<f64> {
        self.tried(entrant)
            .iter()
            // Of a run that diverged.
            .filter(|o| o.loss < f64::MAX)
            .min_by(|a, b| a.loss.total_cmp(&b.loss))
            .map(|o| o.learning_rate)
            .with_context(|| format!("{}: no learning rate gave a finite loss", entrant.entry.name))
    }

    /// Takes the runs whose results are not there yet, in their order; the first error ends it once the others are through.
    fn side_by_side(&self, runs: Vec<Run<'_>>) -> Result<()> {
        let left: Vec<Run<'_>> =
            runs.into_iter().filter(|run| !self.outcomes().iter().any(|o| run.gave(o))).collect();
        let (count, next) = (left.len(), AtomicUsize::new(0));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let work = |job: usize| -> Result<()> {
            let folder = self.folder.join(job.to_string());
            std::fs::create_dir_all(&folder)?;
            let turns = std::iter::from_fn(|| Some(next.fetch_add(1, Relaxed)).filter(|at| *at < count));
            for at in turns {
                let run = &left[at];
                let begun = Instant::now();
                let outcome = self.once(run, &folder).inspect_err(|_| next.store(count, Relaxed))?;
                eprintln!(
                    "{} of {count}: {} {} {} seed {} rate {:.0e}: accuracy {:.3}, loss {:.3}, {:.0} s",
                    at + 1,
                    outcome.data,
                    outcome.method,
                    outcome.budget,
                    outcome.seed,
                    outcome.learning_rate,
                    outcome.accuracy,
                    outcome.loss,
                    begun.elapsed().as_secs_f64()
                );
                self.keep(outcome)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let jobs: Vec<_> =
                (0..self.args.jobs.unwrap_or(cores)).map(|job| scope.spawn(move || work(job))).collect();
            jobs.into_iter().try_for_each(|job| job.join().unwrap_or_else(|panic| resume_unwind(panic)))
        })
    }

    /// Trains and scores once, in `folder`.
    fn once(&self, run: &Run<'_>, folder: &Path) -> Result<Outcome> {
        let Run { entrant, data, seed, rate, held_out } = *run;
        let recipe = folder.join("recipe.toml");
        std::fs::write(&recipe, self.recipe(entrant, data, seed, rate)?)?;
        let out = folder.join("run");
        if out.exists() {
            std::fs::remove_dir_all(&out)?;
        }
        let recipe = recipe.display().to_string();
        let plan = self.answer(&["plan", &recipe, "--no-trial", "--json"])?;
        // A run that diverges has no adapter; its loss is endless, and another learning rate is chosen.
        let trained = self.call(&["train", &recipe, "--out", &out.display().to_string(), "-q"]);
        let scores = match trained {
            Ok(_) => self.score(&out, if held_out { &data.held_out } else { &data.test })?,
            Err(error) if held_out && format!("{error:#}").contains("finite") => Value::Null,
            Err(error) => return Err(error),
        };
        let number = |key: &str| scores["metrics"][key].as_f64();
        let head = (384 + 1) * data.labels as u64;
        Ok(Outcome {
            data: data.name.to_owned(),
            method: entrant.entry.name.to_owned(),
            budget: entrant.budget.to_owned(),
            seed,
            learning_rate: rate,
            held_out,
            trained: plan["trained"].as_u64().context("plan says no trained numbers")? - head,
            accuracy: number("accuracy").unwrap_or(0.0),
            loss: number("loss").unwrap_or(f64::MAX),
        })
    }

    fn recipe(&self, entrant: &Entrant, data: &Data, seed: u64, rate: f64) -> Result<String> {
        // A probe is the classifier alone: the rate tried is its rate.
        let head_rate = if entrant.entry.name == LINEAR_PROBE { rate } else { HEAD_RATE };
        Ok(format!(
            "model = {:?}\ntask = \"sequence-classification\"\n[method]\n{}\ntrain_also = [\"classifier\"]\n[data]\nformat = \"csv\"\npath = {:?}\ncolumns = {{ text = \"text\", label = \"label\" }}\nmax_length = 64\n[train]\nepochs = 1\nbatch_size = 16\nlearning_rate = {rate}\nhead_learning_rate = {head_rate}\nwarmup_ratio = 0.06\nseed = {seed}\n",
            self.model.display().to_string(),
            entrant.settings,
            data.train.canonicalize()?.display().to_string(),
        ))
    }

    fn score(&self, run: &Path, rows: &Path) -> Result<Value> {
        let (model, rows) = (self.model.display().to_string(), rows.display().to_string());
        let adapter = run.join("adapter").display().to_string();
        let mut words = vec!["eval", "--model", &model, "--adapter", &adapter, "--data", &rows];
        words.extend(["--format", "csv", "--task", "sequence-classification", "--batch-size", "64"]);
        words.extend([
            "--set",
            "data.columns.text=text",
            "--set",
            "data.columns.label=label",
            "--json",
            "-q",
        ]);
        self.answer(&words)
    }

    fn answer(&self, words: &[&str]) -> Result<Value> {
        let text = self.call(words)?;
        serde_json::from_str(&text).with_context(|| format!("engraft {}: not JSON: {text}", words[0]))
    }

    fn call(&self, words: &[&str]) -> Result<String> {
        let output = Command::new(&self.engraft)
            .args(words)
            .env("RAYON_NUM_THREADS", "1")
            .output()
            .with_context(|| format!("cannot run {}", self.engraft.display()))?;
        let (text, error) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "engraft {} failed: {error}", words.join(" "));
        Ok(text.into_owned())
    }

    /// Results survive an interrupt: written aside, then renamed.
    fn keep(&self, outcome: Outcome) -> Result<()> {
        let mut outcomes = self.outcomes();
        outcomes.push(outcome);
        let aside = self.args.json.with_extension("json.new");
        let lines = outcomes.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
        std::fs::write(&aside, format!("[\n{}\n]\n", lines.join(",\n")))
            .and_then(|()| std::fs::rename(&aside, &self.args.json))
            .with_context(|| format!("cannot write {}", self.args.json.display()))
    }

    fn outcomes(&self) -> MutexGuard<'_, Vec<Outcome>> {
        self.outcomes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
