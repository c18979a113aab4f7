//! `engraft plan`: what a run would take, before it runs.

use std::path::{Path, PathBuf};

use engraft_model::Packed;
use engraft_report::human;
use engraft_train::{Estimate, Smaller, Trial, estimate, smaller, trial};
use serde_json::json;

use super::train::open_to_train;
use crate::context::Context;
use crate::failure::Outcome;
use crate::machine;
use crate::recipes::{default_out, file_of, read};

/// Steps that are tried to tell the time.
const TRIAL_STEPS: u64 = 3;

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft plan recipe.toml
  engraft plan recipe.toml --set train.batch_size=64 --no-trial
  engraft plan recipe.toml --json | jq .memory.total_bytes")]
pub struct Args {
    /// A recipe, `-` for standard input, or a run directory to take its plan
    recipe: PathBuf,
    /// Sets a value of the recipe, such as train.epochs=1; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Takes no trial steps, and so says nothing of time
    #[arg(long)]
    no_trial: bool,
    /// Prints the resolved plan instead: every value with where it comes from
    #[arg(long, conflicts_with = "json")]
    resolved: bool,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// Prints the estimate.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    let recipe = read(&file_of(&args.recipe), &args.set)?;
    let session = open_to_train(&recipe, &Packed::default(), cx)?;
    if args.resolved {
        cx.ui.stream(&session.plan.to_toml());
        return Ok(());
    }
    session.notes.iter().for_each(|note| cx.ui.note(note));
    let sizes = estimate(&session);
    let out = default_out(&args.recipe);
    let above = out.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("."));
    let room = Room { memory: machine::room(), disk: machine::free_bytes(above) };
    // A step that does not fit would take the machine with it.
    let too_large = room.memory.is_some_and(|memory| sizes.total_bytes() > memory);
    let tried = if args.no_trial || too_large { None } else { Some(trial(&session, TRIAL_STEPS)?) };
    let available = if too_large { room.memory.unwrap_or(0) } else { 0 };
    let smaller = smaller(&session, &sizes, available);
    if args.json {
        cx.ui.json(json!({
            "sites": sizes.sites, "trained": sizes.trained, "base_parameters": sizes.base_parameters,
            "memory": {
                "base_bytes": sizes.base_bytes, "adapter_bytes": sizes.adapter_bytes,
                "activation_bytes": sizes.activation_bytes, "total_bytes": sizes.total_bytes(),
                "available_bytes": room.memory, "measured_bytes": tried.as_ref().and_then(|t| t.peak_bytes),
                "largest_batch_tokens": sizes.largest_batch_tokens,
            },
            "checkpoint_bytes": sizes.checkpoint_bytes, "steps": sizes.steps,
            "disk": { "begin_bytes": sizes.begin_bytes, "free_bytes": room.disk },
            "seconds": tried.as_ref().map(|t| t.run_seconds), "notes": session.notes,
        }));
    } else {
        cx.ui.print(&text(&sizes, tried.as_ref(), &room, &smaller));
    }
    Ok(())
}

/// Bytes that are there, where that can be told.
struct Room {
    memory: Option<u64>,
    /// Where the run would be written if nothing else is said.
    disk: Option<u64>,
}

fn text(sizes: &Estimate, tried: Option<&Trial>, room: &Room, smaller: &[Smaller]) -> String {
    let count = sizes.sites.values().sum::<usize>();
    let listed: Vec<String> = sizes.sites.iter().map(|(name, n)| format!("{name} ×{n}")).collect();
    let mut text = format!("sites   {count}: {}\n", listed.join(", "));
    let whole = sizes.base_parameters.max(1);
    let share = human::percent(sizes.trained as f64 / whole as f64);
    text.push_str(&format!("trained {} of {} ({share})\n", sizes.trained, sizes.base_parameters));
    text.push_str(&memory(sizes, tried, room));
    let (checkpoint, begin) = (human::bytes(sizes.checkpoint_bytes), human::bytes(sizes.begin_bytes));
    let fit = match room.disk {
        Some(free) if sizes.begin_bytes <= free => format!(", {} are: fits", human::bytes(free)),
        Some(free) => format!(", {} are: too little", human::bytes(free)),
        None => String::new(),
    };
    text.push_str(&format!("disk    {checkpoint} a checkpoint; {begin} must be free to begin{fit}\n"));
    match tried {
        Some(tried) => {
            let time = human::duration(tried.run_seconds);
            text.push_str(&format!(
                "time    {} steps, {time} without evaluation (from {TRIAL_STEPS} trial steps)\n",
                sizes.steps
            ));
        }
        None => text.push_str(&format!("time    {} steps\n", sizes.steps)),
    }
    for option in smaller {
        let total = human::bytes(option.total_bytes);
        text.push_str(&format!("smaller --set {} takes {total}\n", option.settings.join(" --set ")));
    }
    text
}

/// The parts that memory is counted in.
pub fn parts(sizes: &Estimate) -> String {
    format!(
        "base {} + adapter, optimizer {} + activations {}",
        human::bytes(sizes.base_bytes),
        human::bytes(sizes.adapter_bytes),
        human::bytes(sizes.activation_bytes)
    )
}

/// The parts as they are counted, and what a step of the largest batch has taken.
fn memory(sizes: &Estimate, tried: Option<&Trial>, room: &Room) -> String {
    let measured = tried.and_then(|tried| tried.peak_bytes);
    let total = measured.unwrap_or(sizes.total_bytes());
    let fit = match room.memory {
        Some(room) if total <= room => format!(" of {}: fits", human::bytes(room)),
        Some(room) => format!(" of {}: too large", human::bytes(room)),
        None => String::new(),
    };
    let parts = parts(sizes);
    let tokens = sizes.largest_batch_tokens;
    match measured {
        Some(_) => format!(
            "memory  {}{fit}, measured in a step of the largest batch ({tokens} tokens)\n        counted as {parts}\n",
            human::bytes(total)
        ),
        None => format!("memory  {parts} = {}{fit}\n", human::bytes(total)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_say_parts_and_whole() {
        let sizes = Estimate {
            sites: [("q_proj".to_owned(), 24), ("v_proj".to_owned(), 24)].into(),
            trained: 540_672,
            base_parameters: 494_032_768,
            base_bytes: 1 << 30,
            adapter_bytes: 1 << 20,
            activation_bytes: 1 << 30,
            checkpoint_bytes: 1 << 20,
            begin_bytes: 82 << 20,
            steps: 903,
            largest_batch_tokens: 100,
        };
        let room = Room { memory: Some(1 << 30), disk: Some(1 << 30) };
        let smaller = [Smaller { settings: vec!["a=1".into(), "b=2".into()], total_bytes: 1 << 20 }];
        let shown = text(&sizes, None, &room, &smaller);
        assert!(
            shown.starts_with("sites   48: q_proj ×24, v_proj ×24\ntrained 540672 of 494032768 (0.11%)\n"),
            "{shown}"
        );
        assert!(
            shown.contains("too large") && shown.contains("smaller --set a=1 --set b=2 takes 1 MiB\n"),
            "{shown}"
        );
        let disk = "disk    1 MiB a checkpoint; 82 MiB must be free to begin, 1 GiB are: fits\n";
        assert!(shown.contains(disk), "{shown}");
        let full = text(&sizes, None, &Room { memory: None, disk: Some(1 << 20) }, &[]);
        assert!(full.contains("to begin, 1 MiB are: too little"), "{full}");
        let tried = Trial { step_seconds: 1.0, run_seconds: 9.0, peak_bytes: Some(3 << 20) };
        let measured = text(&sizes, Some(&tried), &room, &[]);
        let line = "memory  3 MiB of 1 GiB: fits, measured in a step of the largest batch (100 tokens)\n";
        assert!(measured.contains(line), "{measured}");
    }
}
