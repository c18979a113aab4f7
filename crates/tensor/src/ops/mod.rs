//! Operations on tensors, one idea a file: shape check, kernel, gradient, test.
//!
//! `elementwise`, `reduce`, `shape`, `gather`, `top_k`, `matmul`, `dense`, `fourier`, `hadamard` and `softmax` are the primitives
//! from which any method can be composed; `linear`, `blocks`, `low_rank`, `lstm`, `sparse`, `norm`, `rope`, `attention`, `gated`, `loss`,
//! `soft_top_k` and `dropout` are fused and are tested against their composition. `compressed` is a product that keeps less of its
//! input than its gradient needs.

mod attention;
mod blocks;
mod carrying;
mod compressed;
mod dense;
mod dropout;
mod elementwise;
mod fourier;
mod gated;
mod gather;
mod hadamard;
mod linear;
mod loss;
mod low_rank;
mod lstm;
mod matmul;
mod norm;
mod reduce;
mod rope;
mod shape;
mod soft_top_k;
mod softmax;
mod sparse;
mod top_k;

pub use attention::{Attention, RelativeBias, Spans, attention};
pub use elementwise::{Binary, Unary};
pub use fourier::Frequencies;
pub use gated::silu_mul;
pub use gather::embed;
pub use linear::frozen_linear;
pub use loss::cross_entropy;
pub use lstm::lstm;
pub use matmul::Product;
pub use norm::{Norm, layer_norm, rms_norm};
pub use rope::rope;
pub use shape::cat;
pub use soft_top_k::Anneal;
pub use sparse::Pattern;
