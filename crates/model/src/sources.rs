//! Weights that no file holds: those of a dry run, and those of a new head.

use std::ops::Range;

use engraft_tensor::frozen::RowSource;

/// Stands for a weight while nothing is read.
pub(crate) struct Absent(pub (usize, usize));

impl RowSource for Absent {
    fn shape(&self) -> (usize, usize) {
        self.0
    }
    fn rows(&self, _: Range<usize>, out: &mut [f32]) {
        out.fill(0.0);
    }
}

/// New values as a source of rows.
pub(crate) struct Fresh {
    /// [out, in], row by row.
    pub values: Vec<f32>,
    /// (out, in).
    pub shape: (usize, usize),
}

impl RowSource for Fresh {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }
    fn rows(&self, rows: Range<usize>, out: &mut [f32]) {
        out.copy_from_slice(&self.values[rows.start * self.shape.1..rows.end * self.shape.1]);
    }
}
