//! Rows of a matrix straight from a mapped file, converted to f32 as they are read.

use std::ops::Range;

use engraft_store::RawTensor;
use engraft_tensor::frozen::RowSource;

use crate::{Error, Result};

/// A floating-point tensor of a file, whatever its shape there, as [rows, columns].
pub struct FileRows {
    tensor: RawTensor,
    shape: (usize, usize),
}

/// The transpose of a matrix of a file. It is held whole, because a block of its rows lies all over the file.
pub struct TransposedRows {
    /// [in, out]
    values: Vec<f32>,
    shape: (usize, usize),
}

impl FileRows {
    /// `tensor` must be [rows, columns] in f32, f16 or bf16.
    pub fn new(name: &str, tensor: &RawTensor) -> Result<FileRows> {
        let [rows, columns] = tensor.shape[..] else {
            return Err(Error::Mismatch(vec![format!(
                "{name}: expected a matrix, found {:?}",
                tensor.shape
            )]));
        };
        // Reading nothing shows whether the element type can be read at all.
        tensor.rows_f32(0..0, &mut []).map_err(|e| Error::Mismatch(vec![format!("{name}: {e}")]))?;
        Ok(FileRows { tensor: tensor.clone(), shape: (rows, columns) })
    }

    /// A tensor with the elements of `shape`, such as a convolution's kernels: one a row.
    pub fn flattened(name: &str, tensor: &RawTensor, shape: (usize, usize)) -> Result<FileRows> {
        let flat = tensor.reshaped(&[shape.0, shape.1]);
        Self::new(name, &flat.map_err(|e| Error::Mismatch(vec![format!("{name}: {e}")]))?)
    }
}

impl TransposedRows {
    /// The transpose of `tensor` [in, out].
    pub fn new(name: &str, tensor: &RawTensor) -> Result<TransposedRows> {
        let source = FileRows::new(name, tensor)?;
        let (rows, columns) = source.shape;
        let mut values = vec![0.0; rows * columns];
        source.rows(0..rows, &mut values);
        Ok(TransposedRows { values, shape: (columns, rows) })
    }
}

impl RowSource for TransposedRows {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let (stride, width) = self.shape;
        for (row, out) in rows.zip(out.chunks_exact_mut(width.max(1))) {
            out.iter_mut().zip(self.values.iter().skip(row).step_by(stride)).for_each(|(out, v)| *out = *v);
        }
    }
}

impl RowSource for FileRows {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn rows(&self, rows: Range<usize>, out: &mut [f32]) {
        self.tensor.rows_f32(rows, out).expect("type and shape were checked when the source was made");
    }
}
