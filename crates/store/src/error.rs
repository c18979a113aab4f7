//! The one error of this crate: what was expected, what was found, where, and what to do next.

use std::io;
use std::path::{Path, PathBuf};

/// Short form of a result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong between a name and its bytes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused an operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The operation in the user's words, such as `read` or `sync`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file goes beyond a limit of [`crate::Limits`].
    #[error("{}: {what} is {found}, above the limit {limit} = {max}; if the file is trusted, raise it with --limit {limit}=N", path.display())]
    Limit {
        /// The file.
        path: PathBuf,
        /// What was measured, such as `header size in bytes`.
        what: &'static str,
        /// The limit's name.
        limit: &'static str,
        /// The limit.
        max: u64,
        /// The value met.
        found: u64,
    },
    /// Text that is not the JSON that was expected.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong.
        message: String,
    },
    /// A file that breaks the rules of its format.
    #[error("{}: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was expected and found, with the tensor's name where one is concerned.
        message: String,
    },
    /// Something needed is not there.
    #[error("{}: {message}", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// What was looked for and what to do.
        message: String,
    },
    /// A caller asked for something this crate does not do, such as reading a string tensor as numbers.
    #[error("{0}")]
    Request(String),
    /// Another process works in the same run directory.
    #[error("{} is in use by {holder}; nothing was changed: wait for it, or choose another --out", path.display())]
    Locked {
        /// The run directory.
        path: PathBuf,
        /// The holder as it described itself.
        holder: String,
    },
    /// The file system has too little room for a write whose size is known.
    #[error("{}: {need} bytes are needed and {free} are free; free some space and try again, nothing was overwritten", path.display())]
    Space {
        /// The directory written to.
        path: PathBuf,
        /// Bytes needed, with the margin.
        need: u64,
        /// Bytes free.
        free: u64,
    },
    /// No checkpoint passes verification.
    #[error("{}: no valid checkpoint{}", path.display(), list(skipped))]
    NoCheckpoint {
        /// The `checkpoints` directory.
        path: PathBuf,
        /// Each candidate and why it was refused.
        skipped: Vec<String>,
    },
    /// A model that is neither here nor obtainable.
    #[error("{0}")]
    Hub(String),
}

fn list(skipped: &[String]) -> String {
    if skipped.is_empty() {
        return " (the directory holds none)".into();
    }
    skipped.iter().map(|s| format!("\n  {s}")).collect()
}

impl Error {
    /// Wraps an I/O error with what was done to which path.
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    pub(crate) fn malformed(path: &Path, message: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_owned(), message: message.into() }
    }

    pub(crate) fn missing(path: &Path, message: impl Into<String>) -> Self {
        Self::Missing { path: path.to_owned(), message: message.into() }
    }

    /// True when the cause is a full disk or quota.
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::Space { .. } => true,
            Self::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
            ),
            _ => false,
        }
    }
}
