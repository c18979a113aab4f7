//! `engraft report`: one self-contained HTML file with the course of a run.

use std::path::PathBuf;

use crate::context::Context;
use crate::failure::{BeforeWork, Failure, Outcome};

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft report runs/quickstart
  engraft report runs/a --out a.html")]
pub struct Args {
    /// A run directory
    run: PathBuf,
    /// The HTML file; report.html in the run directory if left out
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Writes the report.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    if !args.run.join("events.jsonl").is_file() {
        let message = format!("{}: expected a run directory with events.jsonl", args.run.display());
        return Err(Failure::before_work(message));
    }
    let data = engraft_train::run_data(&args.run).before_work()?;
    let page = engraft_report::report(&data)?;
    let out = args.out.clone().unwrap_or_else(|| args.run.join("report.html"));
    engraft_store::write_atomic(&out, page.as_bytes())?;
    cx.ui.print(&format!("{}\n", out.display()));
    Ok(())
}
