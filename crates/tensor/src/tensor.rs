//! [`Tensor`]: shape, element type, shared storage and, where a gradient is wanted, a place on the tape.

use std::borrow::Cow;
use std::cell::Cell;
use std::sync::Arc;

use crate::cuda::{Arg, Cuda};
use crate::device::{Buffer, card, device};
use crate::error::{Error, Result, shape_error};
use crate::tape::{Edge, Node};

/// Sizes of the dimensions, slowest first.
pub type Shape = Vec<usize>;

/// Element types. Activations and trainable tensors are `F32`; integers are ids, labels and positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 64-bit signed integer: token ids, labels, row indices.
    I64,
    /// 32-bit signed integer: positions.
    I32,
}

/// A contiguous array on a device. Cloning shares the storage; contents never change once computed.
#[derive(Clone)]
pub struct Tensor {
    shape: Shape,
    buffer: Arc<Buffer>,
    offset: usize,
    node: Option<Arc<Node>>,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Tensor({:?} {:?}{})",
            self.dtype(),
            self.shape,
            if self.node.is_some() { ", on tape" } else { "" }
        )
    }
}

thread_local! {
    static HOST_READS_FORBIDDEN: Cell<usize> = const { Cell::new(0) };
}

/// While the returned guard lives, reading tensor contents on this thread is [`Error::HostRead`].
///
/// A device runs behind the host; one read in the middle of a step would make the host wait. The trainer holds this
/// guard from a step's start to its logged loss, so such a read cannot slip in.
#[must_use]
pub fn forbid_host_reads() -> HostReadGuard {
    HOST_READS_FORBIDDEN.with(|n| n.set(n.get() + 1));
    HostReadGuard(std::marker::PhantomData)
}

/// See [`forbid_host_reads`].
pub struct HostReadGuard(std::marker::PhantomData<*const ()>);

impl Drop for HostReadGuard {
    fn drop(&mut self) {
        HOST_READS_FORBIDDEN.with(|n| n.set(n.get() - 1));
    }
}

/// Runs `f` as if no guard of [`forbid_host_reads`] lived on this thread: for what is read once and kept over many steps, as the
/// parts of a matrix that steps do not change.
pub fn read_once<T>(f: impl FnOnce() -> T) -> T {
    with_host_reads_forbidden(0, f)
}

/// How many guards of [`forbid_host_reads`] live on this thread.
pub(crate) fn host_reads_forbidden() -> usize {
    HOST_READS_FORBIDDEN.with(Cell::get)
}

/// Runs `f` as if `guards` lived on this thread in place of those that do.
pub(crate) fn with_host_reads_forbidden<T>(guards: usize, f: impl FnOnce() -> T) -> T {
    struct Restore(usize);
    impl Drop for Restore {
        fn drop(&mut self) {
            HOST_READS_FORBIDDEN.with(|n| n.set(self.0));
        }
    }
    let _restore = Restore(HOST_READS_FORBIDDEN.with(|n| n.replace(guards)));
    f()
}

impl Tensor {
    /// A tensor of `shape` around a finished buffer.
    pub(crate) fn new(shape: impl Into<Shape>, buffer: Buffer) -> Self {
        let shape = shape.into();
        debug_assert_eq!(shape.iter().product::<usize>(), buffer.len());
        Tensor { shape, buffer: Arc::new(buffer), offset: 0, node: None }
    }

    /// `data` as a tensor of `shape`.
    pub fn from_vec(data: Vec<f32>, shape: impl Into<Shape>) -> Result<Self> {
        Self::from_buffer(data.into(), shape.into())
    }

    /// Token ids, labels or row indices as a tensor of `shape`.
    pub fn from_i64(data: Vec<i64>, shape: impl Into<Shape>) -> Result<Self> {
        Self::from_buffer(Buffer::I64(data.into()), shape.into())
    }

    /// Positions as a tensor of `shape`.
    pub fn from_i32(data: Vec<i32>, shape: impl Into<Shape>) -> Result<Self> {
        Self::from_buffer(Buffer::I32(data.into()), shape.into())
    }

    fn from_buffer(buffer: Buffer, shape: Shape) -> Result<Self> {
        if shape.iter().product::<usize>() != buffer.len() {
            return shape_error("tensor", format!("{shape:?}"), format!("{} elements", buffer.len()));
        }
        Ok(Self::new(shape, buffer))
    }

    /// All elements `value`.
    pub fn full(value: f32, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        let mut buffer = Buffer::f32(shape.iter().product());
        device().fill(value, &mut buffer);
        Self::new(shape, buffer)
    }

    /// All elements zero.
    pub fn zeros(shape: impl Into<Shape>) -> Self {
        Self::full(0.0, shape)
    }

    /// One element, shape `[]`.
    pub fn scalar(value: f32) -> Self {
        Self::full(value, [])
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.buffer.dtype()
    }

    /// Size of dimension `dim`; dimensions beyond the rank are 1.
    pub fn dim(&self, dim: usize) -> usize {
        self.shape.get(dim).copied().unwrap_or(1)
    }

    /// Size of the last dimension (1 for a scalar).
    pub fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// Whether backward reaches this tensor.
    pub fn needs_grad(&self) -> bool {
        self.node.is_some()
    }

    /// The same values, off the tape.
    pub fn detach(&self) -> Tensor {
        Tensor { node: None, ..self.clone() }
    }

    /// Copies the contents to the host. [`Error::HostRead`] inside a step.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        if HOST_READS_FORBIDDEN.with(Cell::get) > 0 {
            return Err(Error::HostRead);
        }
        if self.dtype() != DType::F32 {
            return Err(Error::DType { op: "to_vec", expected: "F32", found: self.dtype() });
        }
        let values = self.host_f32().into_owned();
        match card().and_then(|card| card.failure()) {
            Some(message) => Err(Error::Device(message)),
            None => Ok(values),
        }
    }

    /// Whole numbers that came from the host (ids), where they lie.
    pub fn ids(&self) -> Result<&[i64]> {
        match self.dtype() {
            DType::I64 => Ok(self.i64()),
            found => Err(Error::DType { op: "ids", expected: "I64", found }),
        }
    }

    /// The elements as little-endian bytes, of any type. [`Error::HostRead`] inside a step.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        if HOST_READS_FORBIDDEN.with(Cell::get) > 0 {
            return Err(Error::HostRead);
        }
        Ok(match self.dtype() {
            DType::F32 => self.to_vec()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::I64 => self.i64().iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::I32 => self.i32().iter().flat_map(|v| v.to_le_bytes()).collect(),
        })
    }

    /// Whole numbers of either type as `I64`; those that came from the host are read where they lie.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        match self.dtype() {
            DType::I64 => Ok(self.i64().to_vec()),
            DType::I32 => Ok(self.i32().iter().map(|&v| i64::from(v)).collect()),
            found => Err(Error::DType { op: "to_i64", expected: "I64 or I32", found }),
        }
    }

    /// The only element of a scalar, read on the host. [`Error::HostRead`] inside a step.
    pub fn item(&self) -> Result<f32> {
        if self.len() != 1 {
            return shape_error("item", "one element", format!("{:?}", self.shape));
        }
        Ok(self.to_vec()?[0])
    }

    /// The same elements under another shape; shares the storage.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        if shape.iter().product::<usize>() != self.len() {
            return shape_error("reshape", format!("{} elements", self.len()), format!("{shape:?}"));
        }
        let out = Tensor { shape, buffer: self.buffer.clone(), offset: self.offset, node: None };
        let (edge, before) = (self.edge(), self.shape.clone());
        Ok(out.on_tape("reshape", &[self], move |dy, sink| sink.add(&edge, dy.reshape(before)?)))
    }

    /// Rows `start..end` of the first dimension; shares the storage.
    pub fn rows_between(&self, start: usize, end: usize) -> Result<Tensor> {
        let total = self.dim(0);
        if self.shape.is_empty() || start > end || end > total {
            return shape_error("rows_between", format!("0..{total}"), format!("{start}..{end}"));
        }
        let row: usize = self.shape[1..].iter().product();
        let mut shape = self.shape.clone();
        shape[0] = end - start;
        let out =
            Tensor { shape, buffer: self.buffer.clone(), offset: self.offset + start * row, node: None };
        let (edge, whole) = (self.edge(), self.shape.clone());
        Ok(out.on_tape("rows_between", &[self], move |dy, sink| {
            let mut buffer = Buffer::f32(whole.iter().product());
            device().fill(0.0, &mut buffer);
            device().copy_block(&dy, &mut buffer, start * row);
            sink.add(&edge, Tensor::new(whole, buffer))
        }))
    }

    pub(crate) fn edge(&self) -> Edge {
        Edge(self.node.clone())
    }

    pub(crate) fn with_node(mut self, node: Option<Arc<Node>>) -> Self {
        self.node = node;
        self
    }

    /// The memory of the card from the first element on, for its kernels.
    pub(crate) fn arg(&self) -> Arg {
        let bytes = match self.dtype() {
            DType::F32 | DType::I32 => 4,
            DType::I64 => 8,
        };
        self.buffer.arg().offset(bytes * self.offset)
    }

    /// The same in bf16.
    pub(crate) fn bf16(&self, card: &Cuda) -> Arg {
        self.buffer.bf16(card).offset(2 * self.offset)
    }

    /// The elements on the host: where they lie, or a copy of the card's.
    pub(crate) fn host_f32(&self) -> Cow<'_, [f32]> {
        match &*self.buffer {
            Buffer::Card(_) => Cow::Owned(self.buffer.read(self.offset..self.offset + self.len())),
            _ => Cow::Borrowed(self.f32()),
        }
    }

    /// The elements, for kernels.
    pub(crate) fn f32(&self) -> &[f32] {
        &self.buffer.as_f32()[self.offset..self.offset + self.len()]
    }

    /// The elements, for kernels.
    pub(crate) fn i64(&self) -> &[i64] {
        &self.buffer.as_i64()[self.offset..self.offset + self.len()]
    }

    /// The elements, for kernels.
    pub(crate) fn i32(&self) -> &[i32] {
        &self.buffer.as_i32()[self.offset..self.offset + self.len()]
    }

    /// The buffer, if nobody else holds it and it is whole: an accumulator may then be added to in place.
    pub(crate) fn sole_buffer(&mut self) -> Option<&mut Buffer> {
        let whole = self.offset == 0 && self.len() == self.buffer.len();
        if whole { Arc::get_mut(&mut self.buffer).map(Buffer::changes) } else { None }
    }

    /// An error unless the element type is `F32`.
    pub(crate) fn expect_f32(&self, op: &'static str) -> Result<()> {
        match self.dtype() {
            DType::F32 => Ok(()),
            found => Err(Error::DType { op, expected: "F32", found }),
        }
    }
}
