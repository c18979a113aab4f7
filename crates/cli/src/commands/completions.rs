//! `engraft completions`: shell completions and manual pages, both generated from the arguments.

use std::path::PathBuf;

use clap::CommandFactory;

use crate::Cli;
use crate::context::Context;
use crate::failure::{BeforeWork, Failure, Outcome};

/// For what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Target {
    Bash,
    Zsh,
    Fish,
    Elvish,
    Powershell,
    Man,
}

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft completions bash > ~/.local/share/bash-completion/completions/engraft
  engraft completions zsh > ~/.zfunc/_engraft
  engraft completions man --out ~/.local/share/man/man1")]
pub struct Args {
    /// A shell, or `man` for manual pages
    #[arg(value_enum, value_name = "SHELL")]
    target: Target,
    /// Directory for the manual pages, one a command; without it the first page is printed
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Prints completions, or prints or writes manual pages.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    use clap_complete::Shell;
    let shell = match args.target {
        Target::Bash => Shell::Bash,
        Target::Zsh => Shell::Zsh,
        Target::Fish => Shell::Fish,
        Target::Elvish => Shell::Elvish,
        Target::Powershell => Shell::PowerShell,
        Target::Man => return manual(args, cx),
    };
    if args.out.is_some() {
        return Err(Failure::before_work("`--out` goes with `man`; completions are printed: redirect them"));
    }
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut visible(), "engraft", &mut text);
    cx.ui.stream(&String::from_utf8_lossy(&text));
    Ok(())
}

/// The program's arguments without hidden commands, which the shells' completions would list.
fn visible() -> clap::Command {
    let whole = Cli::command();
    let shown: Vec<clap::Command> =
        whole.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect();
    clap::Command::new("engraft")
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_subcommand(true)
        .args(whole.get_arguments().cloned().collect::<Vec<_>>())
        .subcommands(shown)
}

fn manual(args: &Args, cx: &Context) -> Outcome {
    let Some(dir) = &args.out else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command()).render(&mut page)?;
        cx.ui.stream(&String::from_utf8_lossy(&page));
        return Ok(());
    };
    std::fs::create_dir_all(dir).map_err(|e| engraft_store::Error::io("create", dir, e)).before_work()?;
    clap_mangen::generate_to(Cli::command(), dir)
        .map_err(|e| engraft_store::Error::io("write manual pages to", dir, e))?;
    cx.ui.say(&format!("manual pages written to {}", dir.display()));
    Ok(())
}
