//! Rows of a matrix straight from a mapped file, converted to f32 as they are read.

use std::ops::Range;

use engraft_store::RawTensor;
use engraft_tensor::frozen::RowSource;

use crate::{Error, Result};

/// A 2-D floating-point tensor of a file, or its transpose.
pub struct FileRows {
    tensor: RawTensor,
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
}

impl RowSource for FileRows {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn rows(&self, rows: Range<usize>, out: &mut [f32]) {
        self.tensor.rows_f32(rows, out).expect("type and shape were checked when the source was made");
    }
}
