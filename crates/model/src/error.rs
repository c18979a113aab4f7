//! What can be wrong with a model directory; everything of a kind is reported together.

use std::fmt;
use std::path::PathBuf;

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The files cannot be read.
    #[error(transparent)]
    Store(#[from] engraft_store::Error),
    /// The model could not be put together, or a forward failed.
    #[error(transparent)]
    Nn(#[from] engraft_nn::Error),
    /// `config.json` does not describe a model that can be built; one line a problem.
    #[error("{}: {}", path.display(), problems.join("\n  "))]
    Config {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        problems: Vec<String>,
    },
    /// `config.json` names an architecture or class that does not exist here.
    #[error("{}: {message}", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// What was found, and what can be read.
        message: String,
    },
    /// The architecture has no head for the task that was asked for.
    #[error("the task {task} is not one of {architecture} models; theirs are {}", offered.join(", "))]
    Task {
        /// What was asked for.
        task: &'static str,
        /// `model_type` of the model.
        architecture: &'static str,
        /// Its tasks.
        offered: Vec<&'static str>,
    },
    /// The tensors of the files are not those that `config.json` asks for.
    #[error("{0}")]
    Tensors(Mismatch),
}

impl From<engraft_tensor::Error> for Error {
    fn from(e: engraft_tensor::Error) -> Self {
        Error::Nn(e.into())
    }
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A tensor that is not as expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MismatchRow {
    /// Its name in the files.
    pub tensor: String,
    /// The shape that `config.json` asks for, or "nothing".
    pub expected: String,
    /// What the files hold, or "absent".
    pub found: String,
}

/// All tensors that do not fit, and what was checked besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The model directory.
    pub dir: PathBuf,
    /// Number of tensors in the files.
    pub total: usize,
    /// The tensors that do not fit, in the order of the model.
    pub rows: Vec<MismatchRow>,
    /// Facts that explain them.
    pub notes: Vec<String>,
    /// What to do.
    pub help: String,
}

/// Rows shown before only a count follows.
const SHOWN: usize = 10;

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, total) = (self.rows.len(), self.total);
        let (noun, verb) = if count == 1 { ("tensor", "does") } else { ("tensors", "do") };
        writeln!(
            f,
            "{count} {noun} in {} ({total} in all) {verb} not fit its config.json",
            self.dir.display()
        )?;
        let shown = &self.rows[..count.min(SHOWN)];
        let wide = |cell: fn(&MismatchRow) -> &str, title: &str| {
            shown.iter().map(|r| cell(r).chars().count()).max().unwrap_or(0).max(title.len())
        };
        let (a, b) = (wide(|r| &r.tensor, "tensor"), wide(|r| &r.expected, "expected"));
        write!(f, "  {:a$}  {:b$}  found", "tensor", "expected")?;
        for row in shown {
            write!(f, "\n  {:a$}  {:b$}  {}", row.tensor, row.expected, row.found)?;
        }
        if count > SHOWN {
            write!(f, "\n  … and {} more", count - SHOWN)?;
        }
        for note in &self.notes {
            write!(f, "\n  = note: {note}")?;
        }
        write!(f, "\n  = help: {}", self.help)
    }
}
