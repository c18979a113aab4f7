//! Storage of a tensor: on the CPU vectors from the pool, on a card its memory. Whole numbers come from the host and are
//! copied to the card when a kernel first wants them.

use std::sync::OnceLock;

use super::card;
use crate::cuda::{Arg, Cuda, DeviceMemory};
use crate::memory::{self, Block};
use crate::tensor::DType;

/// A contiguous buffer of one element type.
pub(crate) enum Buffer {
    F32(Pooled),
    /// f32 on the card.
    Card(CardFloats),
    I64(Indices<i64>),
    I32(Indices<i32>),
}

/// The first `len` elements of a block that returns to the pool.
pub(crate) struct Pooled {
    block: Block,
    len: usize,
}

/// f32 on the card. Kernels whose results go into products alone write them in bf16; they are widened where f32 is wanted
/// after all.
pub(crate) struct CardFloats {
    /// Taken when it is first written to or read.
    f32: OnceLock<DeviceMemory>,
    /// The same in bf16, made when a product first wants it: several products read one input.
    bf16: OnceLock<DeviceMemory>,
    len: usize,
}

impl CardFloats {
    fn arg(&self) -> Arg {
        let memory = self.f32.get_or_init(|| {
            let card = card().expect("a card's memory is used on it");
            let memory = card.take(4 * self.len);
            if let Some(short) = self.bf16.get() {
                card.widen(short.arg(), memory.arg(), self.len);
            }
            memory
        });
        memory.arg()
    }
}

/// Whole numbers, on the host, on the card or both.
pub(crate) struct Indices<T> {
    len: usize,
    host: OnceLock<Vec<T>>,
    card: OnceLock<DeviceMemory>,
}

impl<T: bytemuck::Pod> Indices<T> {
    /// `len` numbers that a kernel will write.
    pub(crate) fn output(len: usize) -> Self {
        Indices { len, host: OnceLock::new(), card: OnceLock::new() }
    }

    /// The numbers on the host: those that a card has made are waited for.
    fn host(&self) -> &[T] {
        self.host.get_or_init(|| {
            let mut values = vec![T::zeroed(); self.len];
            if let (Some(memory), Some(card)) = (self.card.get(), card()) {
                card.read(memory.arg(), &mut values);
            }
            values
        })
    }

    fn host_mut(&mut self) -> &mut [T] {
        self.host();
        self.host.get_mut().expect("was just made")
    }

    fn arg(&self) -> Arg {
        let memory = self.card.get_or_init(|| {
            let card = card().expect("kernels of a card run on it");
            match self.host.get() {
                Some(values) => card.upload(values),
                None => card.take(self.len * size_of::<T>()),
            }
        });
        memory.arg()
    }
}

impl<T> From<Vec<T>> for Indices<T> {
    fn from(values: Vec<T>) -> Self {
        Indices { len: values.len(), host: OnceLock::from(values), card: OnceLock::new() }
    }
}

impl From<Vec<f32>> for Buffer {
    fn from(values: Vec<f32>) -> Self {
        if let Some(card) = card() {
            let f32 = OnceLock::from(card.upload(&values));
            return Buffer::Card(CardFloats { f32, bf16: OnceLock::new(), len: values.len() });
        }
        let mut block = memory::take(values.len());
        block.as_mut_slice()[..values.len()].copy_from_slice(&values);
        Buffer::F32(Pooled { block, len: values.len() })
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
        match card() {
            Some(_) => Buffer::Card(CardFloats { f32: OnceLock::new(), bf16: OnceLock::new(), len }),
            None => Buffer::F32(Pooled { block: memory::take(len), len }),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Buffer::F32(b) => b.len,
            Buffer::Card(b) => b.len,
            Buffer::I64(b) => b.len,
            Buffer::I32(b) => b.len,
        }
    }

    pub(crate) fn dtype(&self) -> DType {
        match self {
            Buffer::F32(_) | Buffer::Card(_) => DType::F32,
            Buffer::I64(_) => DType::I64,
            Buffer::I32(_) => DType::I32,
        }
    }

    /// Its memory on the card, for kernels.
    pub(crate) fn arg(&self) -> Arg {
        match self {
            Buffer::Card(b) => b.arg(),
            Buffer::I64(b) => b.arg(),
            Buffer::I32(b) => b.arg(),
            Buffer::F32(_) => {
                panic!("kernel of the card wants its memory, has the host's: made before the card was chosen")
            }
        }
    }

    /// Its memory in bf16, of f32 on the card.
    pub(crate) fn bf16(&self, card: &Cuda) -> Arg {
        match self {
            Buffer::Card(b) => b.bf16.get_or_init(|| card.to_bf16(b.arg(), b.len)).arg(),
            other => panic!("kernel of the card wants F32 of its memory, has {:?}", other.dtype()),
        }
    }

    /// To be called before contents change: what was made from them no longer holds.
    pub(crate) fn changes(&mut self) -> &mut Buffer {
        if let Buffer::Card(b) = self {
            b.arg();
            b.bf16.take();
        }
        self
    }

    /// From now on the contents, of f32 on the card, are those of `bf16`, as many numbers.
    pub(crate) fn hold_bf16(&mut self, bf16: DeviceMemory) {
        if let Buffer::Card(b) = self {
            b.f32.take();
            b.bf16 = OnceLock::from(bf16);
        }
    }

    /// A copy of elements `range` of f32 on the host.
    pub(crate) fn read(&self, range: std::ops::Range<usize>) -> Vec<f32> {
        match self {
            Buffer::Card(b) => {
                let mut values = vec![0.0; range.len()];
                if let Some(card) = card() {
                    card.read(b.arg().offset(4 * range.start), &mut values);
                }
                values
            }
            other => other.as_f32()[range].to_vec(),
        }
    }

    pub(crate) fn as_f32(&self) -> &[f32] {
        match self {
            Buffer::F32(b) => &b.block.as_slice()[..b.len],
            other => {
                panic!("kernel wants F32 of the host, has {:?}: the operation did not check", other.dtype())
            }
        }
    }

    pub(crate) fn as_f32_mut(&mut self) -> &mut [f32] {
        match self {
            Buffer::F32(b) => &mut b.block.as_mut_slice()[..b.len],
            other => {
                panic!("kernel wants F32 of the host, has {:?}: the operation did not check", other.dtype())
            }
        }
    }

    pub(crate) fn as_i64(&self) -> &[i64] {
        match self {
            Buffer::I64(b) => b.host(),
            other => panic!("kernel wants I64, has {:?}: the operation did not check", other.dtype()),
        }
    }

    pub(crate) fn as_i64_mut(&mut self) -> &mut [i64] {
        match self {
            Buffer::I64(b) => b.host_mut(),
            other => panic!("kernel wants I64, has {:?}: the operation did not check", other.dtype()),
        }
    }

    pub(crate) fn as_i32(&self) -> &[i32] {
        match self {
            Buffer::I32(b) => b.host(),
            other => panic!("kernel wants I32, has {:?}: the operation did not check", other.dtype()),
        }
    }
}
