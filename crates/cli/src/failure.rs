//! What a command ends with when it does not succeed: a message and an exit code.
//!
//! 1 failed while running, 2 bad arguments, recipe or files before any work, 3 a gate not met, 130 and 143 interrupted.

use std::error::Error;

use engraft_data::Tokenizer;
use engraft_model::Mismatch;
use engraft_recipe::{Problem, Problems};

use crate::ui::Ui;

/// The exit codes, as `experience.md` of the design and every `--help` promise them.
pub mod code {
    /// Failed while running.
    pub const RUNNING: u8 = 1;
    /// Bad arguments, recipe or files, before any work.
    pub const BEFORE_WORK: u8 = 2;
    /// A gate of `--fail-if` was not met.
    pub const GATE: u8 = 3;
    /// Ended by an interrupt from the keyboard.
    pub const INTERRUPTED: u8 = 130;
    /// Ended by a request to terminate.
    pub const TERMINATED: u8 = 143;
}

/// Why a command did not succeed.
#[derive(Debug)]
pub struct Failure {
    /// The process's exit code.
    pub code: u8,
    message: Message,
}

#[derive(Debug)]
enum Message {
    Text(String),
    Problem(Box<Problem>),
    Problems(Box<Problems>),
    /// Everything was said already.
    Said,
}

/// What a command gives.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// Bad arguments or files, found before any work.
    pub fn before_work(message: impl Into<String>) -> Failure {
        Failure { code: code::BEFORE_WORK, message: Message::Text(message.into()) }
    }

    /// Something that went wrong while running.
    pub fn running(message: impl Into<String>) -> Failure {
        Failure { code: code::RUNNING, message: Message::Text(message.into()) }
    }

    /// One mistake with rows, notes and help, found before any work.
    pub fn problem(problem: Problem) -> Failure {
        Failure { code: code::BEFORE_WORK, message: Message::Problem(Box::new(problem)) }
    }

    /// All mistakes of a recipe.
    pub fn problems(problems: Problems) -> Failure {
        Failure { code: code::BEFORE_WORK, message: Message::Problems(Box::new(problems)) }
    }

    /// An exit code after everything was said.
    pub fn said(code: u8) -> Failure {
        Failure { code, message: Message::Said }
    }

    /// The same with a last line: how to go on.
    pub fn ending(mut self, line: &str) -> Failure {
        if let Message::Text(text) = &mut self.message {
            text.push('\n');
            text.push_str(line);
        }
        self
    }

    /// Its words, where it has any.
    pub fn text(&self) -> String {
        match &self.message {
            Message::Text(text) => text.clone(),
            Message::Problem(problem) => problem.title.clone(),
            Message::Problems(problems) => problems.to_string(),
            Message::Said => String::new(),
        }
    }

    /// The same, saying first which of several runs it is about.
    pub fn of(mut self, name: &str) -> Failure {
        if let Message::Text(text) = &mut self.message {
            text.insert_str(0, &format!("{name}: "));
        }
        self
    }

    /// Shows the message on standard error.
    pub fn show(&self, ui: &Ui) {
        match &self.message {
            Message::Text(text) => ui.error(text),
            Message::Problem(problem) => ui.raw(&problem.render(ui.width(), ui.color())),
            Message::Problems(problems) => ui.raw(&problems.render(ui.width(), ui.color())),
            Message::Said => {}
        }
    }
}

/// The error's words and those of its causes that it does not repeat.
fn words(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = inner.source();
    }
    text
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Failure {
        let error: &dyn Error = &error;
        // Errors that were made to be shown with their place or their rows, however deep they lie.
        let mut inner = Some(error);
        while let Some(found) = inner {
            if let Some(problems) = found.downcast_ref::<Problems>() {
                return Failure::problems(problems.clone());
            }
            if let Some(engraft_model::Error::Tensors(mismatch)) = found.downcast_ref() {
                return Failure::problem(mismatch_problem(mismatch));
            }
            inner = match found.downcast_ref() {
                Some(engraft_train::Error::Recipe(problems)) => Some(problems),
                Some(engraft_train::Error::Load(error)) => Some(error),
                _ => found.source(),
            };
        }
        Failure::running(words(error))
    }
}

/// Tensors that do not fit, as rows.
fn mismatch_problem(mismatch: &Mismatch) -> Problem {
    let (count, dir) = (mismatch.rows.len(), mismatch.dir.display());
    // Those that should be there count too.
    let total = mismatch.total + mismatch.rows.iter().filter(|row| row.found == "absent").count();
    let title = format!("{count} of {total} tensors in {dir} do not fit its config.json");
    let row = |r: &engraft_model::MismatchRow| [r.tensor.clone(), r.expected.clone(), r.found.clone()];
    let rows = mismatch.rows.iter().map(row).collect();
    let problem = Problem::new(title).grid(["tensor", "expected", "found"], rows);
    let problem =
        mismatch.notes.iter().fold(problem, |problem, note| problem.note(by_tokenizer(note, mismatch)));
    let help = mismatch.help.trim_end_matches(" in config.json");
    problem.help(format!("{help};\n`engraft inspect {dir}` lists all tensors"))
}

/// A note on the size of the vocabulary, with the tokenizer as a witness where it agrees with the tensor.
fn by_tokenizer(note: &str, mismatch: &Mismatch) -> String {
    let agrees = |rows: &str| {
        let entries = Tokenizer::open(&mismatch.dir).ok().map(|tokenizer| tokenizer.vocabulary());
        entries.is_some_and(|entries| rows == entries.to_string())
    };
    let parts = note.split_once("; ").and_then(|(config, tensor)| {
        let rows = tensor.strip_suffix(" rows")?.rsplit(' ').next()?;
        Some((config, rows))
    });
    match parts {
        Some((config, rows)) if agrees(rows) => {
            format!("{config}; tokenizer.json has {rows} entries, as the tensor has")
        }
        _ => note.to_owned(),
    }
}

/// Marks a failure as found before any work.
pub trait BeforeWork<T> {
    /// The same with exit code 2.
    fn before_work(self) -> Outcome<T>;
}

impl<T, E: Into<Failure>> BeforeWork<T> for Result<T, E> {
    fn before_work(self) -> Outcome<T> {
        self.map_err(|error| Failure { code: code::BEFORE_WORK, ..error.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_its_causes_once() {
        #[derive(Debug)]
        struct Outer(std::io::Error);
        impl std::fmt::Display for Outer {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("outer")
            }
        }
        impl Error for Outer {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(&self.0)
            }
        }
        let failure = Failure::from(Outer(std::io::Error::other("inner")));
        assert!(matches!(&failure.message, Message::Text(text) if text == "outer: inner"));
        assert_eq!(failure.code, code::RUNNING);
        let early: Outcome = Err(failure).before_work();
        assert_eq!(early.unwrap_err().code, code::BEFORE_WORK);
    }
}
