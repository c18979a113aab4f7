//! `engraft report`: one self-contained HTML file with the course of a run.

use std::path::{Path, PathBuf};

use engraft_report::{Events, RunData};
use engraft_store::json::read_capped;

use crate::context::Context;
use crate::failure::{BeforeWork, Failure, Outcome};

/// The material that a finished run leaves for its report.
const RUN_DATA: &str = "run_data.json";
/// Bytes of `events.jsonl` that are read: some ten million steps.
const EVENTS_MAX: u64 = 4 << 30;

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
    let data = run_data(&args.run, cx).before_work()?;
    let page = engraft_report::report(&data)?;
    let out = args.out.clone().unwrap_or_else(|| args.run.join("report.html"));
    engraft_store::write_atomic(&out, page.as_bytes())?;
    cx.ui.print(&format!("{}\n", out.display()));
    Ok(())
}

/// What is known of the run in `dir`: what the run left for its report, and its events as they are now.
fn run_data(dir: &Path, cx: &Context) -> Outcome<RunData> {
    let events = dir.join("events.jsonl");
    if !events.is_file() {
        let message = format!("{}: expected a run directory with events.jsonl", dir.display());
        return Err(Failure::before_work(message));
    }
    let bytes = read_capped(&events, "event_line", EVENTS_MAX)?;
    let events = Events::parse(&String::from_utf8_lossy(&bytes))?;
    let path = dir.join(RUN_DATA);
    let mut data = if path.is_file() {
        let value =
            engraft_store::read_json(&path, "config_json", cx.limits.config_json, cx.limits.json_depth)?;
        serde_json::from_value(value).map_err(|e| Failure::before_work(format!("{}: {e}", path.display())))?
    } else {
        RunData::default()
    };
    if data.name.is_empty() {
        let full = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        data.name = full.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    }
    data.events = Some(events);
    Ok(data)
}
