//! What can be wrong with the material of a report.

/// Why a report could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A line of `events.jsonl` is damaged.
    #[error(
        "events.jsonl, line {line}: {problem}; the lines before it are whole: cut the file there, or resume the run"
    )]
    Event {
        /// Line number, from 1.
        line: usize,
        /// What was expected and what was found.
        problem: String,
    },
    /// The page could not be filled: a fault of this crate, not of the run.
    #[error("the report's page could not be filled, a fault of the program and not of the run: {0}")]
    Page(#[from] minijinja::Error),
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
