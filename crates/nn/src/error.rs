//! The error type of the contract.

/// What can go wrong between models and methods.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] engraft_tensor::Error),
    /// Something failed at a named site.
    #[error("{path}: {message}")]
    Site {
        /// Path of the site.
        path: String,
        /// What was expected and found.
        message: String,
    },
    /// Targets match nothing, or not everything they name.
    #[error(transparent)]
    Targets(#[from] crate::TargetError),
    /// A file does not fit the model or adapter; one line a mismatch.
    #[error("{}", .0.join("\n"))]
    Mismatch(Vec<String>),
    /// What was asked for is not possible with this model or method.
    #[error("{0}")]
    Unsupported(String),
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
