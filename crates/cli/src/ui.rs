//! The terminal: results on standard output, everything else on standard error.

use std::io::{ErrorKind, IsTerminal, Write};

use serde_json::{Map, Value};

use crate::environment::Environment;

/// The `--color` option.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless `NO_COLOR` is set; also where `FORCE_COLOR` is.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// How a command speaks.
#[derive(Clone)]
pub struct Ui {
    color: bool,
    width: usize,
    terminal: bool,
    quiet: bool,
    verbose: u8,
}

const RED: &str = "\u{1b}[1;31m";
const BOLD: &str = "\u{1b}[1m";
const PLAIN: &str = "\u{1b}[0m";

impl Ui {
    /// Looks at the terminal once.
    pub fn new(choice: ColorChoice, quiet: bool, verbose: u8, environment: &Environment) -> Ui {
        let terminal = std::io::stderr().is_terminal();
        let width = match console::Term::stderr().size_checked() {
            Some((_, columns)) => columns.into(),
            None => 100,
        };
        Ui { color: wants_color(choice, environment, terminal), width, terminal, quiet, verbose }
    }

    /// Columns of the terminal, 100 where there is none.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Whether messages are coloured.
    pub fn color(&self) -> bool {
        self.color
    }

    /// Whether standard error is a terminal, so that one line may be redrawn.
    pub fn is_terminal(&self) -> bool {
        self.terminal && !self.quiet
    }

    /// Whether only the result is wanted.
    pub fn quiet(&self) -> bool {
        self.quiet
    }

    /// A line for people on standard error; left out by `-q`.
    pub fn say(&self, line: &str) {
        if !self.quiet {
            self.raw(&format!("{line}\n"));
        }
    }

    /// A line that gives reasons, shown by `-v`.
    pub fn reason(&self, line: &str) {
        if self.verbose > 0 {
            self.raw(&format!("{line}\n"));
        }
    }

    /// `note: …` on standard error, bold word.
    pub fn note(&self, text: &str) {
        let (bold, plain) = if self.color { (BOLD, PLAIN) } else { ("", "") };
        self.say(&format!("{bold}note{plain}: {text}"));
    }

    /// `error: …` on standard error, whatever `-q` says.
    pub fn error(&self, text: &str) {
        let (red, plain) = if self.color { (RED, PLAIN) } else { ("", "") };
        self.raw(&format!("{red}error{plain}: {text}\n"));
    }

    /// Text on standard error as it is. A closed standard error is nobody listening.
    pub fn raw(&self, text: &str) {
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }

    /// A part of the result on standard output, at once.
    pub fn print(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        match written {
            Ok(()) => {}
            // The reader has what it wanted (`engraft methods | head -1`).
            Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
            Err(error) => {
                self.error(&format!("cannot write the result to standard output: {error}"));
                std::process::exit(1);
            }
        }
    }

    /// A JSON object on standard output, `"schema": 1` in front.
    pub fn json(&self, value: Value) {
        let mut object = Map::new();
        object.insert("schema".into(), 1.into());
        match value {
            Value::Object(fields) => object.extend(fields),
            other => drop(object.insert("value".into(), other)),
        }
        self.print(&format!("{}\n", Value::Object(object)));
    }
}

/// `--color`, then `NO_COLOR`, then `FORCE_COLOR`, then the terminal.
fn wants_color(choice: ColorChoice, environment: &Environment, terminal: bool) -> bool {
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto if environment.no_color => false,
        ColorChoice::Auto if environment.force_color => true,
        ColorChoice::Auto => terminal && !environment.dumb_terminal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_wins_over_the_environment_and_no_color_over_force_color() {
        let both = Environment { no_color: true, force_color: true, ..Environment::default() };
        let dumb = Environment { dumb_terminal: true, ..Environment::default() };
        let force = Environment { force_color: true, ..Environment::default() };
        assert!(wants_color(ColorChoice::Always, &both, false));
        assert!(!wants_color(ColorChoice::Auto, &both, true));
        assert!(!wants_color(ColorChoice::Auto, &dumb, true));
        assert!(wants_color(ColorChoice::Auto, &force, false));
        assert!(!wants_color(ColorChoice::Never, &force, true));
    }
}
