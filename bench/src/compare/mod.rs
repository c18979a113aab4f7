//! `engraft-bench compare`: methods of all classes at equal budgets, on three data sets, over several seeds.
//!
//! MiniLM, the classifier trained in all. The learning rate of a method at a budget is the one of three with the lowest loss on
//! held-out training rows of TREC; it then holds for all data sets. A run is one epoch of batches of 16 and is scored once, on the
//! test part, after its last step. Every result is put into the JSON file as it comes, and a command that finds results there goes on
//! after them, so that hours of runs need not be taken at once.

mod data;
mod methods;
mod table;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use data::Data;
use methods::{BOUNDS, BUDGETS, Entry, METHODS};

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
    /// Print the tables of what is there and run nothing
    #[arg(long)]
    print: bool,
    /// Where results are kept
    #[arg(long, default_value = "bench/results/compare.json")]
    json: PathBuf,
}

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

struct Compare<'a> {
    args: &'a Args,
    engraft: PathBuf,
    model: PathBuf,
    folder: PathBuf,
    outcomes: Vec<Outcome>,
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
    let mut compare = Compare {
        args,
        engraft: match &args.engraft {
            Some(path) => path.clone(),
            None => std::env::current_exe()?.with_file_name("engraft"),
        },
        model: Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/all-minilm-l6-v2").canonicalize()?,
        folder: args.folder.clone(),
        outcomes,
    };
    if !args.print {
        compare.all()?;
    }
    table::print(&compare.outcomes);
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
    fn all(&mut self) -> Result<()> {
        let sets = data::prepare(&self.args.data, &self.folder.join("data"))?;
        let entrants = entrants(self.args.only.as_deref());
        let mut rates = Vec::new();
        for entrant in &entrants {
            let middle = entrant.entry.learning_rate;
            for rate in [middle / 3.0, middle, 3.0 * middle] {
                self.once(entrant, &sets[0], 0, rate, true)?;
            }
            rates.push(self.best_rate(entrant)?);
        }
        for seed in 0..self.args.seeds {
            for (entrant, rate) in entrants.iter().zip(&rates) {
                for data in &sets {
                    self.once(entrant, data, seed, *rate, false)?;
                }
            }
        }
        Ok(())
    }

    /// The tried learning rate with the lowest loss on held-out rows.
    fn best_rate(&self, entrant: &Entrant) -> Result<f64> {
        self.outcomes
            .iter()
            .filter(|o| o.held_out && o.method == entrant.entry.name && o.budget == entrant.budget)
            .filter(|o| o.loss.is_finite())
            .min_by(|a, b| a.loss.total_cmp(&b.loss))
            .map(|o| o.learning_rate)
            .with_context(|| format!("{}: no learning rate gave a finite loss", entrant.entry.name))
    }

    /// Trains and scores once, unless the result is there.
    fn once(&mut self, entrant: &Entrant, data: &Data, seed: u64, rate: f64, held_out: bool) -> Result<()> {
        let known = |o: &Outcome| {
            o.data == data.name
                && o.method == entrant.entry.name
                && o.budget == entrant.budget
                && o.seed == seed
                && o.held_out == held_out
                && (!held_out || (o.learning_rate / rate - 1.0).abs() < 1e-9)
        };
        if self.outcomes.iter().any(known) {
            return Ok(());
        }
        let begun = Instant::now();
        let recipe = self.folder.join("recipe.toml");
        std::fs::write(&recipe, self.recipe(entrant, data, seed, rate)?)?;
        let run = self.folder.join("run");
        if run.exists() {
            std::fs::remove_dir_all(&run)?;
        }
        let recipe = recipe.display().to_string();
        let plan = self.answer(&["plan", &recipe, "--no-trial", "--json"])?;
        // A run that diverges has no adapter; its loss is endless, and another learning rate is chosen.
        let trained = self.call(&["train", &recipe, "--out", &run.display().to_string(), "-q"]);
        let scores = match trained {
            Ok(_) => self.score(&run, if held_out { &data.held_out } else { &data.test })?,
            Err(error) if held_out && format!("{error:#}").contains("finite") => Value::Null,
            Err(error) => return Err(error),
        };
        let number = |key: &str| scores["metrics"][key].as_f64();
        let head = (384 + 1) * data.labels as u64;
        self.outcomes.push(Outcome {
            data: data.name.to_owned(),
            method: entrant.entry.name.to_owned(),
            budget: entrant.budget.to_owned(),
            seed,
            learning_rate: rate,
            held_out,
            trained: plan["trained"].as_u64().context("plan says no trained numbers")? - head,
            accuracy: number("accuracy").unwrap_or(0.0),
            loss: number("loss").unwrap_or(f64::MAX),
        });
        let last = self.outcomes.last().context("an outcome")?;
        eprintln!(
            "{} {} {} seed {seed} rate {rate:.0e}: accuracy {:.3}, loss {:.3}, {:.0} s",
            last.data,
            last.method,
            last.budget,
            last.accuracy,
            last.loss,
            begun.elapsed().as_secs_f64()
        );
        self.keep()
    }

    fn recipe(&self, entrant: &Entrant, data: &Data, seed: u64, rate: f64) -> Result<String> {
        Ok(format!(
            "model = {:?}\ntask = \"sequence-classification\"\n[method]\n{}\ntrain_also = [\"classifier\"]\n[data]\nformat = \"csv\"\npath = {:?}\ncolumns = {{ text = \"text\", label = \"label\" }}\nmax_length = 64\n[train]\nepochs = 1\nbatch_size = 16\nlearning_rate = {rate}\nwarmup_ratio = 0.06\nseed = {seed}\n",
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
            .output()
            .with_context(|| format!("cannot run {}", self.engraft.display()))?;
        let (text, error) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "engraft {} failed: {error}", words.join(" "));
        Ok(text.into_owned())
    }

    /// Results survive an interrupt: written aside, then renamed.
    fn keep(&self) -> Result<()> {
        let aside = self.args.json.with_extension("json.new");
        let lines = self.outcomes.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
        std::fs::write(&aside, format!("[\n{}\n]\n", lines.join(",\n")))
            .and_then(|()| std::fs::rename(&aside, &self.args.json))
            .with_context(|| format!("cannot write {}", self.args.json.display()))
    }
}
