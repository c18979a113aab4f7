//! The `engraft` program: arguments in, one command, an exit code out.
//!
//! Results go to standard output, everything else to standard error. This is the only crate that prints and the only
//! one that reads the environment.

mod answers;
mod beam;
mod commands;
mod context;
mod device;
mod engine;
mod environment;
mod failure;
mod gate;
mod generation;
mod machine;
mod merge;
mod probe;
mod progress;
mod recipes;
mod sampling;
mod stop;
mod stops;
mod ui;

use std::process::ExitCode;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser};
use engraft_store::Limits;

use crate::commands::Command;
use crate::context::Context;
use crate::environment::Environment;
use crate::failure::{BeforeWork, Failure, Outcome};
use crate::ui::{ColorChoice, Ui};

const EXAMPLES: &str = "\
Examples:
  engraft init --demo --model models/all-minilm-l6-v2
  engraft train demo/recipe.toml
  engraft train recipe.toml --set train.learning_rate=2e-4 --out runs/a
  engraft generate --model DIR --adapter runs/a/adapter --prompt 'Once upon a time'

Exit codes:
  0 success, 1 failed while running, 2 bad arguments, recipe or files before any work,
  3 a gate was not met, 130 or 143 interrupted

Environment:
  HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, ENGRAFT_THREADS, NO_COLOR, FORCE_COLOR";

/// Fine-tunes a frozen foundation model by small adapters, and evaluates, merges and runs them
#[derive(Parser)]
#[command(name = "engraft", bin_name = "engraft", version, after_help = EXAMPLES, disable_help_subcommand = true)]
#[command(arg_required_else_help = true, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Args)]
struct Global {
    /// Colour of messages
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN", help_heading = "Terminal")]
    color: ColorChoice,
    /// Prints the result alone
    #[arg(long, short, global = true, conflicts_with = "verbose", help_heading = "Terminal")]
    quiet: bool,
    /// Gives reasons (-v) and timings (-vv)
    #[arg(long, short, global = true, action = ArgAction::Count, help_heading = "Terminal")]
    verbose: u8,
    /// Raises a limit on what a file may ask for; the error that names the limit says when
    #[arg(long, global = true, value_name = "NAME=N", help_heading = "Terminal")]
    limit: Vec<String>,
    /// What to compute on: cpu, cuda or cuda:N; ENGRAFT_DEVICE and then cpu where left out
    #[arg(long, global = true, value_name = "DEVICE", help_heading = "Machine")]
    device: Option<device::Choice>,
}

fn main() -> ExitCode {
    stop::survive_file_limit();
    quiet_fenced_panics();
    let environment = Environment::read();
    let command = Cli::command().color(clap_color(&environment));
    let cli = match command.try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are results; a mistake goes to standard error with exit code 2.
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    let global = &cli.global;
    let ui = Ui::new(global.color, global.quiet, global.verbose, &environment);
    let outcome = limits(&global.limit).and_then(|limits| {
        if let Some(found) = &environment.bad_threads {
            let message = format!("ENGRAFT_THREADS: expected a number of threads from 1 on, found `{found}`");
            return Err(Failure::before_work(message));
        }
        if let Some(threads) = environment.threads {
            set_threads(threads);
        }
        device::choose(global.device, &environment)?;
        cli.command.run(&Context { ui: ui.clone(), limits, environment })
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.show(&ui);
            ExitCode::from(failure.code)
        }
    }
}

/// A panic inside a library that becomes an error is told by that error alone.
fn quiet_fenced_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !engraft_data::is_fenced() {
            usual(panic);
        }
    }));
}

/// The colour of help and of mistakes in the arguments, which are shown before the arguments are known.
fn clap_color(environment: &Environment) -> clap::ColorChoice {
    let mut words = std::env::args_os().skip_while(|word| word != "--color").skip(1);
    let given = words
        .next()
        .or_else(|| std::env::args_os().find(|word| word.to_string_lossy().starts_with("--color=")));
    let given = given.map(|word| word.to_string_lossy().replace("--color=", ""));
    match given.as_deref() {
        Some("always") => clap::ColorChoice::Always,
        Some("never") => clap::ColorChoice::Never,
        _ if environment.no_color || environment.dumb_terminal => clap::ColorChoice::Never,
        _ if environment.force_color => clap::ColorChoice::Always,
        _ => clap::ColorChoice::Auto,
    }
}

/// Makes the processor's work use `count` threads. The first call counts: `ENGRAFT_THREADS` before `train.threads`.
pub fn set_threads(count: usize) {
    // An error says that the pool exists already, which is the rule above.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(count).build_global();
}

/// The limits with those of `--limit` changed.
fn limits(given: &[String]) -> Outcome<Limits> {
    let mut limits = Limits::default();
    for text in given {
        let pair =
            text.split_once('=').and_then(|(name, value)| Some((name.trim(), value.trim().parse().ok()?)));
        let Some((name, value)) = pair else {
            let message =
                format!("`--limit {text}`: expected NAME=N with a whole number N, such as tensors=200000");
            return Err(Failure::before_work(message));
        };
        limits.set(name, value).before_work()?;
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn examples_are_not_wrapped() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for line in help.lines().filter(|line| line.starts_with("  ")) {
                assert!(line.chars().count() <= 80, "{line}");
            }
        }
    }

    #[test]
    fn limits_are_checked() {
        assert_eq!(limits(&["dims=9".into()]).unwrap().dims, 9);
        for bad in ["dims", "dims=x", "nothing=1", "dims=-1"] {
            assert_eq!(limits(&[bad.into()]).unwrap_err().code, failure::code::BEFORE_WORK, "{bad}");
        }
    }
}
