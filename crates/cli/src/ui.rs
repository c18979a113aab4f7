//! The terminal: results on standard output, everything else on standard error.

use std::borrow::Cow;
use std::io::{ErrorKind, IsTerminal, Write};

use indicatif::ProgressBar;
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
    utf8: bool,
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
        Ui {
            color: wants_color(choice, environment, terminal),
            width,
            terminal,
            quiet,
            verbose,
            utf8: environment.utf8,
        }
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

    /// A bar for work of a length that is told later; hidden where nobody watches.
    pub fn bar(&self) -> ProgressBar {
        if self.is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() }
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
        let _ = std::io::stderr().lock().write_all(self.signs(text).as_bytes());
    }

    /// A part of the result in words on standard output, at once.
    pub fn print(&self, text: &str) {
        self.stream(&self.signs(text));
    }

    /// The text with signs that the locale can show.
    fn signs<'a>(&self, text: &'a str) -> Cow<'a, str> {
        if self.utf8 || text.is_ascii() { Cow::Borrowed(text) } else { Cow::Owned(ascii_signs(text)) }
    }

    /// A part of the result on standard output as it is: text of a model, or of a file for a program.
    pub fn stream(&self, text: &str) {
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
        self.stream(&format!("{}\n", Value::Object(object)));
    }
}

/// The program's own signs in ASCII. Letters of data and names stay what they are.
fn ascii_signs(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '→' => out.push_str("->"),
            '←' => out.push_str("<-"),
            '…' => out.push_str("..."),
            '‖' => out.push_str("||"),
            '×' => out.push('x'),
            '≥' => out.push_str(">="),
            '≤' => out.push_str("<="),
            '─' | '━' | '–' | '−' => out.push('-'),
            '│' | '┃' => out.push('|'),
            '·' => out.push('.'),
            '‘' | '’' => out.push('\''),
            '“' | '”' => out.push('"'),
            '▼' => out.push('v'),
            '▲' => out.push('^'),
            '′' => out.push('\''),
            '\u{2500}'..='\u{257f}' => out.push('+'),
            other => out.push(other),
        }
    }
    out
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
    fn signs_have_ascii_forms_and_letters_stay() {
        assert_eq!(
            ascii_signs("loss 5.1 → 3.2 …  q_proj ×24  ┌─┐ é"),
            "loss 5.1 -> 3.2 ...  q_proj x24  +-+ é"
        );
    }

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
