//! Tensors, the tape and the kernels: the only crate that knows devices.
//!
//! A [`Tensor`] is a non-generic handle; an operation on tensors runs at once and, only when one of its inputs needs a
//! gradient, is recorded on the tape ([`tape`]). Frozen weights ([`frozen`]) are not tensors: they are packed once, are
//! multiplied by, and never get a gradient.
//!
//! Everything a device must do is listed in one place, `device::Kernels`.

pub mod cpu;
mod cuda;
pub mod device;
mod error;
pub mod frozen;
pub mod linalg;
pub mod memory;
pub mod ops;
pub mod optim;
mod param;
mod pool;
pub mod tape;
mod tensor;
pub mod testing;

pub use error::{Error, Result};
pub use param::Param;
pub use pool::on_pool;
pub use tape::{Gradients, Terms, checkpoint, no_grad};
pub use tensor::{DType, Shape, Tensor, forbid_host_reads, read_once};
