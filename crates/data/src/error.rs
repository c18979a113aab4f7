//! What can go wrong between a file and a batch, each with where and what to do next.

use std::path::PathBuf;

use engraft_words::nearest;

/// The result of everything in this crate that reads or encodes.
pub type Result<T> = std::result::Result<T, Error>;

/// An error about text, tokenizers, templates or rows.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something is larger than the limit for its kind.
    #[error("{what} is {found} bytes, more than the limit of {limit}; {help}")]
    TooLarge {
        /// What was measured, with its place.
        what: String,
        /// Its size in bytes (or the limit plus one when reading stopped there).
        found: u64,
        /// The limit in bytes.
        limit: u64,
        /// What to do next.
        help: &'static str,
    },
    /// `tokenizer.json` or a file beside it cannot be used, or text cannot be encoded by it.
    #[error("tokenizer {}: {message}", path.display())]
    Tokenizer {
        /// The tokenizer's file.
        path: PathBuf,
        /// What was expected and found.
        message: String,
    },
    /// A chat template cannot be compiled or rendered, or does not allow what was asked of it.
    #[error("chat template: {message}")]
    Template {
        /// What was expected and found, and what to do next.
        message: String,
    },
    /// A row of a data file is not what its format says.
    #[error("{}:{line}: {message}", path.display())]
    Row {
        /// The data file.
        path: PathBuf,
        /// The line (from 1), or for a JSON list the item (from 1).
        line: usize,
        /// What was expected and found.
        message: String,
    },
    /// A column that was named does not exist.
    #[error("{}:{line}: {message}", path.display())]
    Column {
        /// The data file.
        path: PathBuf,
        /// The line (from 1), or for a JSON list the item (from 1).
        line: usize,
        /// The name that was given.
        column: String,
        /// Which there are.
        message: String,
    },
    /// Several things are wrong with one place; all of them.
    #[error("{place}: {}", listed(problems))]
    Several {
        /// The file, folder or option.
        place: String,
        /// Each as [`Error::Data`] says its one.
        problems: Vec<String>,
    },
    /// A data file, option or array as a whole cannot be used.
    #[error("{place}: {message}")]
    Data {
        /// The file or the option.
        place: String,
        /// What was expected and found, and what to do next.
        message: String,
    },
}

/// One problem behind its place; more below it, one a line (twenty at most, then a count).
fn listed(problems: &[String]) -> String {
    const SHOWN: usize = 20;
    if let [only] = problems {
        return only.clone();
    }
    let mut text = format!("{} problems", problems.len());
    problems.iter().take(SHOWN).for_each(|problem| text.push_str(&format!("\n  {problem}")));
    if problems.len() > SHOWN {
        text.push_str(&format!("\n  … and {} more", problems.len() - SHOWN));
    }
    text
}

/// Says that `asked` is not among `known`: the nearest, then those that exist (ten at most, then a count).
pub(crate) fn not_among(kind: &str, asked: &str, known: &[&str]) -> String {
    let mut message = format!("there is no {kind} `{asked}`");
    if let Some(name) = nearest(asked, known.iter().copied()) {
        message.push_str(&format!("; did you mean `{name}`?"));
    }
    let shown: Vec<String> = known.iter().take(10).map(|name| format!("`{name}`")).collect();
    let rest = known.len().saturating_sub(10);
    message
        .push_str(&format!(" (there: {}", if shown.is_empty() { "none".into() } else { shown.join(", ") }));
    if rest > 0 {
        message.push_str(&format!(" and {rest} more"));
    }
    message.push(')');
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_told_with_what_is() {
        let many: Vec<String> = (0..12).map(|i| format!("column{i}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let message = not_among("column", "colum3", &many);
        assert!(message.contains("did you mean `column3`?") && message.ends_with("and 2 more)"), "{message}");
    }
}
