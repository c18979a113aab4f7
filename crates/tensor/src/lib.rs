//! Tensors, the tape and the kernels: the only crate that knows devices.
