//! Frozen weights: the storage format behind a matrix, chosen when a model is loaded and seen by nobody else.

mod file;
mod nf4;

use std::sync::{Arc, OnceLock};

use engraft_tensor::frozen::{FrozenMatrix, FrozenTable, Precision, RowSource};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Tensor, no_grad, ops};

use crate::{Base, Result};

pub use file::{FileRows, TransposedRows};
pub use nf4::Nf4;

/// How the base is kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// Packed in the compute precision.
    Dense,
    /// 4-bit NormalFloat, blocks of `block` elements (Dettmers et al. 2023, arXiv:2305.14314).
    Nf4 {
        /// Elements a scale.
        block: usize,
        /// Whether the scales are quantized too.
        double: bool,
    },
}

/// A frozen matrix [out, in] or table [rows, width].
pub struct Weight {
    form: Form,
    transposed: bool,
    bytes: usize,
    row_squares: OnceLock<Tensor>,
}

enum Form {
    /// Multiplied by.
    Matrix(Arc<FrozenMatrix>),
    /// Looked up, and, when tied to a head, multiplied by.
    Table(FrozenTable),
    /// Matrices whose rows follow one another.
    Joined(Vec<Arc<Weight>>),
}

impl Weight {
    /// A matrix read from `rows`, kept as `storage` says and multiplied in `precision`.
    pub fn matrix(rows: &dyn RowSource, storage: Storage, precision: Precision) -> Result<Weight> {
        let (form, bytes) = match storage {
            Storage::Dense => {
                let matrix = FrozenMatrix::pack(rows, precision);
                let bytes = matrix.bytes();
                (matrix, bytes)
            }
            Storage::Nf4 { block, double } => {
                let quantized = Nf4::quantize(rows, block, double)?;
                let bytes = quantized.bytes();
                (FrozenMatrix::stream(Arc::new(quantized), precision), bytes)
            }
        };
        Ok(Weight {
            form: Form::Matrix(Arc::new(form)),
            transposed: false,
            bytes,
            row_squares: OnceLock::new(),
        })
    }

    /// A table that is looked up in `rows` as they are; `head` also packs it to multiply by (tied embeddings).
    pub fn table(rows: Arc<dyn RowSource + Send>, head: Option<Precision>) -> Weight {
        let matrix = head.map(|precision| Arc::new(FrozenMatrix::pack(rows.as_ref(), precision)));
        let bytes = matrix.as_ref().map_or(0, |m| m.bytes());
        let form = Form::Table(FrozenTable::new(rows, matrix));
        Weight { form, transposed: false, bytes, row_squares: OnceLock::new() }
    }

    /// The rows of `parts` [out, in] one after another; nothing is copied.
    pub fn joined(parts: Vec<Arc<Weight>>) -> Weight {
        Weight { form: Form::Joined(parts), transposed: false, bytes: 0, row_squares: OnceLock::new() }
    }

    /// Marks the file's copy as stored [in, out].
    pub fn stored_transposed(self) -> Weight {
        Weight { transposed: true, ..self }
    }

    /// Whether the model's file stores it as [in, out].
    pub fn transposed(&self) -> bool {
        self.transposed
    }

    /// Bytes this weight takes in memory beside the mapped file.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// x [tokens, in] → x·Wᵀ + bias.
    pub fn multiply(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match &self.form {
            Form::Matrix(m) => Ok(ops::frozen_linear(x, m, bias)?),
            Form::Table(table) => match table.matrix() {
                Some(m) => Ok(ops::frozen_linear(x, m, bias)?),
                None => with_bias(x.matmul_t(&self.dense()?)?, bias),
            },
            Form::Joined(parts) => {
                let parts = parts.iter().map(|p| p.multiply(x, None)).collect::<Result<Vec<_>>>()?;
                with_bias(ops::cat(&parts.iter().collect::<Vec<_>>(), 1)?, bias)
            }
        }
    }
}

impl Base for Weight {
    fn shape(&self) -> (usize, usize) {
        match &self.form {
            Form::Matrix(m) => m.shape(),
            Form::Table(table) => table.shape(),
            Form::Joined(parts) => {
                let shapes = parts.iter().map(|p| p.shape());
                shapes.reduce(|(out, inn), (more, _)| (out + more, inn)).unwrap_or((0, 0))
            }
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.multiply(x, None)
    }

    fn lookup(&self, ids: &Tensor) -> Result<Tensor> {
        match &self.form {
            Form::Table(table) => Ok(ops::embed(table, ids)?),
            Form::Matrix(_) | Form::Joined(_) => Ok(self.dense()?.gather(ids)?),
        }
    }

    fn dense(&self) -> Result<Tensor> {
        match &self.form {
            Form::Matrix(m) => Ok(m.dense()?),
            Form::Table(table) => {
                let (n, width) = table.shape();
                let mut values = vec![0.0; n * width];
                table.source().rows(0..n, &mut values);
                Ok(Tensor::from_vec(values, [n, width])?)
            }
            Form::Joined(parts) => {
                let parts = parts.iter().map(|p| p.dense()).collect::<Result<Vec<_>>>()?;
                Ok(ops::cat(&parts.iter().collect::<Vec<_>>(), 0)?)
            }
        }
    }

    fn row_squares(&self) -> Result<Option<Tensor>> {
        if let Some(kept) = self.row_squares.get() {
            return Ok(Some(kept.clone()));
        }
        let (out, _) = Base::shape(self);
        let squares = no_grad(|| -> Result<Tensor> {
            Ok(Base::dense(self)?.unary(Unary::Square)?.sum_to(&[out, 1])?.reshape([out])?)
        })?;
        Ok(Some(self.row_squares.get_or_init(|| squares).clone()))
    }
}

/// y, or y + bias.
fn with_bias(y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    Ok(match bias {
        Some(b) => y.add(b)?,
        None => y,
    })
}
