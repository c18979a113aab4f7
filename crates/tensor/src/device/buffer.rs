//! Storage of a tensor. The CPU's is a vector from the pool; another device adds a variant.

use crate::memory::{self, Block};
use crate::tensor::DType;

/// A contiguous buffer of one element type.
pub(crate) enum Buffer {
    F32(Pooled),
    I64(Vec<i64>),
    I32(Vec<i32>),
}

/// The first `len` elements of a block that returns to the pool.
pub(crate) struct Pooled {
    block: Block,
    len: usize,
}

impl From<Vec<f32>> for Pooled {
    fn from(values: Vec<f32>) -> Self {
        let mut block = memory::take(values.len());
        block.as_mut_slice()[..values.len()].copy_from_slice(&values);
        Pooled { block, len: values.len() }
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        memory::give(std::mem::take(&mut self.block));
    }
}

impl Buffer {
    /// `len` floats of arbitrary content, to be overwritten.
    pub(crate) fn f32(len: usize) -> Self {
        Buffer::F32(Pooled { block: memory::take(len), len })
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Buffer::F32(b) => b.len,
            Buffer::I64(b) => b.len(),
            Buffer::I32(b) => b.len(),
        }
    }

    pub(crate) fn dtype(&self) -> DType {
        match self {
            Buffer::F32(_) => DType::F32,
            Buffer::I64(_) => DType::I64,
            Buffer::I32(_) => DType::I32,
        }
    }

    pub(crate) fn as_f32(&self) -> &[f32] {
        match self {
            Buffer::F32(b) => &b.block.as_slice()[..b.len],
            other => panic!("kernel wants F32, has {:?}: the operation did not check", other.dtype()),
        }
    }

    pub(crate) fn as_f32_mut(&mut self) -> &mut [f32] {
        match self {
            Buffer::F32(b) => &mut b.block.as_mut_slice()[..b.len],
            other => panic!("kernel wants F32, has {:?}: the operation did not check", other.dtype()),
        }
    }

    pub(crate) fn as_i64(&self) -> &[i64] {
        match self {
            Buffer::I64(b) => b,
            other => panic!("kernel wants I64, has {:?}: the operation did not check", other.dtype()),
        }
    }

    pub(crate) fn as_i64_mut(&mut self) -> &mut [i64] {
        match self {
            Buffer::I64(b) => b,
            other => panic!("kernel wants I64, has {:?}: the operation did not check", other.dtype()),
        }
    }

    pub(crate) fn as_i32(&self) -> &[i32] {
        match self {
            Buffer::I32(b) => b,
            other => panic!("kernel wants I32, has {:?}: the operation did not check", other.dtype()),
        }
    }
}
