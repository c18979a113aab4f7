//! Frozen weights: multiplied by, looked up in, never differentiated, never changed.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

pub use crate::cpu::gemm::{FourBit, FourBitScales, Precision, RowSource};
use crate::cpu::gemm::{PackedMatrix, streamed_backward, streamed_forward};
use crate::cuda::Matrix;
use crate::device::card;
use crate::error::Result;
use crate::tensor::Tensor;

/// A frozen matrix W [out, in] behind `x·Wᵀ` and `dy·W`.
pub struct FrozenMatrix(Form);

enum Form {
    /// Panels in the compute precision, made once.
    Packed(PackedMatrix),
    /// Kept in a compact storage format; panels are made while multiplying.
    Streamed(Arc<dyn RowSource + Send>, Precision),
    /// In the memory of the card that the process computes on.
    Card(Matrix),
}

impl FrozenMatrix {
    /// Packs the rows of `source` into panels of `precision`, block by block.
    pub fn pack(source: &dyn RowSource, precision: Precision) -> Self {
        if let Some(card) = card() {
            return FrozenMatrix(Form::Card(Matrix::dense(card, source, precision)));
        }
        let (out, inn) = source.shape();
        let mut rows = |range: Range<usize>, block: &mut [f32]| source.rows(range, block);
        FrozenMatrix(Form::Packed(PackedMatrix::pack(out, inn, precision, &mut rows)))
    }

    /// Keeps `source` as it is and expands it block by block in every product. A card takes over what is four bits wide, and
    /// anything else in `precision`.
    pub fn stream(source: Arc<dyn RowSource + Send>, precision: Precision) -> Self {
        if let Some(card) = card() {
            let matrix = match source.four_bit() {
                Some(codes) => Matrix::four_bit(card, source.shape(), &codes, precision),
                None => Matrix::dense(card, source.as_ref(), precision),
            };
            return FrozenMatrix(Form::Card(matrix));
        }
        FrozenMatrix(Form::Streamed(source, precision))
    }

    /// Packs a tensor [out, in].
    pub fn from_dense(w: &Tensor, precision: Precision) -> Result<Self> {
        w.expect_f32("frozen matrix")?;
        if w.shape().len() != 2 {
            return crate::error::shape_error("frozen matrix", "[out, in]", format!("{:?}", w.shape()));
        }
        Ok(Self::pack(&DenseRows { values: w.host_f32(), width: w.dim(1) }, precision))
    }

    /// (out, in).
    pub fn shape(&self) -> (usize, usize) {
        match &self.0 {
            Form::Packed(p) => (p.out_features(), p.in_features()),
            Form::Streamed(s, _) => s.shape(),
            Form::Card(m) => m.shape(),
        }
    }

    /// Bytes of memory that the panels take (0 where they are made while multiplying), or that it takes on a card.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Form::Packed(p) => p.bytes(),
            Form::Streamed(..) => 0,
            Form::Card(m) => m.bytes(),
        }
    }

    /// The matrix as it is multiplied by, [out, in]: after rounding or quantization.
    pub fn dense(&self) -> Result<Tensor> {
        let (out, inn) = self.shape();
        let mut values = vec![0.0; out * inn];
        match &self.0 {
            Form::Packed(p) => p.unpack(0..out, &mut values),
            Form::Streamed(s, _) => s.rows(0..out, &mut values),
            Form::Card(m) => {
                let card = card().expect("holds the matrix");
                return Ok(Tensor::new([out, inn], m.to_f32(card)));
            }
        }
        Tensor::from_vec(values, [out, inn])
    }

    /// The matrix on the card.
    pub(crate) fn on_card(&self) -> &Matrix {
        match &self.0 {
            Form::Card(matrix) => matrix,
            _ => panic!(
                "kernel of the card wants its memory, has the host's: packed before the card was chosen"
            ),
        }
    }

    pub(crate) fn forward(&self, x: &[f32], rows: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        match &self.0 {
            Form::Packed(p) => p.forward(x, rows, bias, y),
            Form::Streamed(s, precision) => streamed_forward(s.as_ref(), *precision, x, rows, bias, y),
            Form::Card(_) => unreachable!("kernels of the processor have its matrices"),
        }
    }

    pub(crate) fn backward(&self, dy: &[f32], rows: usize, accumulate: bool, dx: &mut [f32]) {
        match &self.0 {
            Form::Packed(p) => p.backward(dy, rows, accumulate, dx),
            Form::Streamed(s, precision) => {
                streamed_backward(s.as_ref(), *precision, dy, rows, accumulate, dx);
            }
            Form::Card(_) => unreachable!("kernels of the processor have its matrices"),
        }
    }
}

/// A frozen table [rows, width] that is looked up. It stays where its source has it; a card takes a copy when it is first
/// looked up there.
pub struct FrozenTable {
    source: Arc<dyn RowSource + Send>,
    matrix: Option<Arc<FrozenMatrix>>,
    on_card: OnceLock<FrozenMatrix>,
}

impl FrozenTable {
    /// The rows of `source`; `matrix` is the same table where it is multiplied by too (a tied head).
    pub fn new(source: Arc<dyn RowSource + Send>, matrix: Option<Arc<FrozenMatrix>>) -> Self {
        FrozenTable { source, matrix, on_card: OnceLock::new() }
    }

    /// (rows, width).
    pub fn shape(&self) -> (usize, usize) {
        self.source.shape()
    }

    /// What it reads.
    pub fn source(&self) -> &dyn RowSource {
        self.source.as_ref()
    }

    /// What it is multiplied by.
    pub fn matrix(&self) -> Option<&Arc<FrozenMatrix>> {
        self.matrix.as_ref()
    }

    /// The table in the card's memory, in `precision`: the matrix where there is one.
    pub(crate) fn on_card(&self, precision: Precision) -> &Matrix {
        let shared = self.matrix.as_ref().map(|matrix| matrix.on_card());
        let shared = shared.filter(|matrix| matrix.precision() == precision);
        shared.unwrap_or_else(|| {
            self.on_card.get_or_init(|| FrozenMatrix::pack(self.source.as_ref(), precision)).on_card()
        })
    }
}

/// A tensor [out, in] as a source of rows.
struct DenseRows<'a> {
    values: Cow<'a, [f32]>,
    width: usize,
}

impl RowSource for DenseRows<'_> {
    fn shape(&self) -> (usize, usize) {
        (self.values.len().checked_div(self.width).unwrap_or(0), self.width)
    }

    fn rows(&self, rows: Range<usize>, out: &mut [f32]) {
        out.copy_from_slice(&self.values[rows.start * self.width..rows.end * self.width]);
    }
}
