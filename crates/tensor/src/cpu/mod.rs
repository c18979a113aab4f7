//! CPU kernels over plain slices: contiguous, row-major, shapes named in each function.
//!
//! Each kernel splits its work into parts that depend on shapes alone, so its bits do not depend on the thread count.

pub mod adamw;
pub mod attention;
pub mod blocks;
pub mod cross_entropy;
pub mod dense;
pub mod dropout;
pub mod fourier;
pub mod gamma;
pub mod gemm;
pub mod hadamard;
pub mod math;
mod narrow;
pub mod norm;
pub mod primitives;
pub mod random;
pub mod rope;
pub mod simd;
pub mod soft_top_k;
pub mod sparse;
mod tile;
