//! Frozen weights: multiplied by, looked up in, never differentiated, never changed.

use std::ops::Range;
use std::sync::Arc;

use crate::cpu::gemm::{PackedMatrix, streamed_backward, streamed_forward};
pub use crate::cpu::gemm::{Precision, RowSource};
use crate::error::Result;
use crate::tensor::Tensor;

/// A frozen matrix W [out, in] behind `x·Wᵀ` and `dy·W`.
pub struct FrozenMatrix(Form);

enum Form {
    /// Panels in the compute precision, made once.
    Packed(PackedMatrix),
    /// Kept in a compact storage format; panels are made while multiplying.
    Streamed(Arc<dyn RowSource + Send>, Precision),
}

impl FrozenMatrix {
    /// Packs the rows of `source` into panels of `precision`, block by block.
    pub fn pack(source: &dyn RowSource, precision: Precision) -> Self {
        let (out, inn) = source.shape();
        let mut rows = |range: Range<usize>, block: &mut [f32]| source.rows(range, block);
        FrozenMatrix(Form::Packed(PackedMatrix::pack(out, inn, precision, &mut rows)))
    }

    /// Keeps `source` as it is and expands it block by block in every product.
    pub fn stream(source: Arc<dyn RowSource + Send>, precision: Precision) -> Self {
        FrozenMatrix(Form::Streamed(source, precision))
    }

    /// Packs a tensor [out, in].
    pub fn from_dense(w: &Tensor, precision: Precision) -> Result<Self> {
        w.expect_f32("frozen matrix")?;
        if w.shape().len() != 2 {
            return crate::error::shape_error("frozen matrix", "[out, in]", format!("{:?}", w.shape()));
        }
        Ok(Self::pack(&DenseRows(w), precision))
    }

    /// (out, in).
    pub fn shape(&self) -> (usize, usize) {
        match &self.0 {
            Form::Packed(p) => (p.out_features(), p.in_features()),
            Form::Streamed(s, _) => s.shape(),
        }
    }

    /// Bytes of memory that the panels take (0 where they are made while multiplying).
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Form::Packed(p) => p.bytes(),
            Form::Streamed(..) => 0,
        }
    }

    /// The matrix as it is multiplied by, [out, in]: after rounding or quantization.
    pub fn dense(&self) -> Result<Tensor> {
        let (out, inn) = self.shape();
        let mut values = vec![0.0; out * inn];
        match &self.0 {
            Form::Packed(p) => p.unpack(0..out, &mut values),
            Form::Streamed(s, _) => s.rows(0..out, &mut values),
        }
        Tensor::from_vec(values, [out, inn])
    }

    pub(crate) fn forward(&self, x: &[f32], rows: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        match &self.0 {
            Form::Packed(p) => p.forward(x, rows, bias, y),
            Form::Streamed(s, precision) => streamed_forward(s.as_ref(), *precision, x, rows, bias, y),
        }
    }

    pub(crate) fn backward(&self, dy: &[f32], rows: usize, accumulate: bool, dx: &mut [f32]) {
        match &self.0 {
            Form::Packed(p) => p.backward(dy, rows, accumulate, dx),
            Form::Streamed(s, precision) => {
                streamed_backward(s.as_ref(), *precision, dy, rows, accumulate, dx);
            }
        }
    }
}

/// A tensor [out, in] as a source of rows.
struct DenseRows<'a>(&'a Tensor);

impl RowSource for DenseRows<'_> {
    fn shape(&self) -> (usize, usize) {
        (self.0.dim(0), self.0.dim(1))
    }

    fn rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let width = self.0.dim(1);
        out.copy_from_slice(&self.0.f32()[rows.start * width..rows.end * width]);
    }
}
