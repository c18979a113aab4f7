//! The project's own bench: times the engine beside its peers, in one run on one machine.

mod matmul;
mod peer;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "engraft-bench", about = "Times the engine beside its peers, in one run")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Products with a frozen matrix, beside PyTorch's F.linear
    Matmul(matmul::Args),
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Matmul(args) => matmul::run(&args),
    }
}
