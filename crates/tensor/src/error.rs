//! The one error type of the crate.

/// What can go wrong in a tensor operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Shapes do not fit the operation.
    #[error("{op}: expected {expected}, found {found}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The shapes it takes.
        expected: String,
        /// The shapes it was given.
        found: String,
    },
    /// An element type does not fit the operation.
    #[error("{op}: expected {expected}, found {found:?}")]
    DType {
        /// The operation.
        op: &'static str,
        /// The type it takes.
        expected: &'static str,
        /// The type it was given.
        found: crate::DType,
    },
    /// An index or label lies outside its range.
    #[error("{op}: {message}")]
    Value {
        /// The operation.
        op: &'static str,
        /// What was expected and found.
        message: String,
    },
    /// Tensor contents were read by the host where that would stall a device.
    #[error(
        "tensor contents were read on the host inside a step; keep the value on the device until the step is logged"
    )]
    HostRead,
    /// A device could not be opened, or something that it was asked for failed.
    #[error("device: {0}")]
    Device(String),
    /// A gradient was asked of something that has none.
    #[error("backward: {0}")]
    Backward(String),
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A shape error, built the same way everywhere.
pub(crate) fn shape_error<T>(
    op: &'static str,
    expected: impl Into<String>,
    found: impl Into<String>,
) -> Result<T> {
    Err(Error::Shape { op, expected: expected.into(), found: found.into() })
}
