//! The project's own bench: times the engine beside its peers, in one run on one machine.

mod base;
mod compare;
mod generation;
mod growth;
mod inference;
mod matmul;
mod methods;
mod open;
mod peer;
mod reader;
mod step;
mod targets;
mod together;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "engraft-bench", about = "Times the engine beside its peers, in one run")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Every kind of work beside its peers and its target
    Targets(targets::Args),
    /// Products with a frozen matrix, beside PyTorch's F.linear
    Matmul(matmul::Args),
    /// Training steps, beside peft
    Step(step::Args),
    /// Training steps of every method, beside LoRA's
    Methods(methods::Args),
    /// Accuracy of methods of all classes at equal budgets
    Compare(compare::Args),
    /// Reading and writing with every kind of adapter, beside the base alone
    Inference(inference::Args),
    /// Tokens written a second, beside transformers and the memory's bandwidth
    Generation(generation::Args),
    /// How a training step's time grows with its settings
    Growth(growth::Args),
    /// The engine's side of `growth`
    #[command(hide = true)]
    Grower { threads: usize, recipes: Vec<PathBuf> },
    /// The engine's side of `generation`
    #[command(hide = true)]
    Writer { recipe: PathBuf, sequences: usize, threads: usize },
    /// The engine's side of `step` and `methods`
    #[command(hide = true)]
    Engine {
        recipe: PathBuf,
        examples: PathBuf,
        threads: usize,
        #[arg(default_value = "cpu")]
        device: step::On,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Targets(args) => targets::run(&args),
        Command::Matmul(args) => matmul::run(&args),
        Command::Step(args) => step::run(&args).map(drop),
        Command::Methods(args) => methods::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Inference(args) => inference::run(&args),
        Command::Generation(args) => generation::run(&args).map(drop),
        Command::Growth(args) => growth::run(&args),
        Command::Grower { threads, recipes } => growth::answer(threads, &recipes),
        Command::Writer { recipe, sequences, threads } => generation::answer(&recipe, sequences, threads),
        Command::Engine { recipe, examples, threads, device } => {
            step::answer(&recipe, &examples, threads, device)
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
