//! Launches of `kernels/sparse.cu`: products with sparse matrices.

use super::compile::Source;
use super::driver::{Arg, Cuda};
use crate::device::Buffer;
use crate::ops::Pattern;
use crate::tensor::Tensor;

/// Tokens that a warp takes.
const TOKENS: usize = 128;
/// What is turned over is filled up to a multiple of these tokens.
const TILE: usize = 32;
/// The most tokens that are turned over at once, as the kernels have it.
const AT_ONCE: usize = 1024;
/// The most numbers that are turned over at once, where that is not less than `TOKENS`.
const TURNED: usize = 1 << 22;
/// Up to this many tokens are taken as they lie.
const FEW: usize = 32;
/// Rows of S that a block takes.
const ROWS: usize = 32;

impl Cuda {
    pub(super) fn sparse_forward(&self, s: &Pattern, values: &Tensor, x: &Tensor, y: &mut Buffer) {
        if !s.is_empty() {
            self.add_sparse_product(s.by_row(self), s.shape(), s.part_on_card(values.arg()), x, y);
        }
    }

    pub(super) fn sparse_backward(&self, s: &Pattern, values: &Tensor, dy: &Tensor, dx: &mut Buffer) {
        let (out, inn) = s.shape();
        if !s.is_empty() {
            self.add_sparse_product(s.by_column(self), (inn, out), s.part_on_card(values.arg()), dy, dx);
        }
    }

    /// y += x·Sᵀ with S [out, in] of these entries.
    fn add_sparse_product(
        &self,
        [starts, columns, order]: [Arg; 3],
        (out, inn): (usize, usize),
        values: Arg,
        x: &Tensor,
        y: &mut Buffer,
    ) {
        let rows = x.len() / inn;
        let width = Arg::I64(out as i64);
        if rows <= FEW {
            let [rows_arg, inn] = [rows, inn].map(|n| Arg::I64(n as i64));
            let args = [starts, columns, order, values, x.arg(), rows_arg, inn, width, y.arg()];
            return self.launch_over(Source::Sparse, "sparse_product_few", rows * out, &args);
        }
        for (first, count) in pieces(rows, inn) {
            let stride = count.next_multiple_of(TILE);
            let turned = self.turned(x, (first, count), inn);
            let [tokens, stride_arg] = [count, stride].map(|n| Arg::I64(n as i64));
            let target = y.arg().offset(4 * first * out);
            let args = [starts, columns, order, values, turned.arg(), tokens, stride_arg, width, target];
            let grid = [out.div_ceil(ROWS), stride.div_ceil(TOKENS), 1];
            self.launch(Source::Sparse, "sparse_product", grid, [256, 1, 1], 0, &args);
        }
    }

    pub(super) fn sparse_entries(&self, s: &Pattern, x: &Tensor, dy: &Tensor, dv: &mut Buffer) {
        let (out, inn) = s.shape();
        if s.is_empty() {
            return;
        }
        let [starts, columns, _] = s.by_row(self);
        for (first, count) in pieces(x.len() / inn, inn.max(out)) {
            let turned = [self.turned(x, (first, count), inn), self.turned(dy, (first, count), out)];
            let [rows, number, stride] =
                [out, s.len(), count.next_multiple_of(TILE)].map(|n| Arg::I64(n as i64));
            let [x, dy] = turned.each_ref().map(Buffer::arg);
            let args = [starts, columns, rows, number, x, dy, stride, s.part_on_card(dv.arg())];
            // Four warps of 32 entries.
            self.launch(
                Source::Sparse,
                "sparse_entries",
                [s.len().div_ceil(128), 1, 1],
                [128, 1, 1],
                0,
                &args,
            );
        }
    }

    pub(super) fn sparse_scatter(&self, s: &Pattern, values: &Tensor, w: &mut Buffer) {
        self.over_entries("sparse_scatter", s, s.part_on_card(values.arg()), w.arg());
    }

    pub(super) fn sparse_gather(&self, s: &Pattern, w: &Tensor, dv: &mut Buffer) {
        self.over_entries("sparse_gather", s, w.arg(), s.part_on_card(dv.arg()));
    }

    fn over_entries(&self, kernel: &'static str, s: &Pattern, from: Arg, to: Arg) {
        let (out, inn) = s.shape();
        let [starts, columns, _] = s.by_row(self);
        let [out, inn, count] = [out, inn, s.len()].map(|n| Arg::I64(n as i64));
        let args = [starts, columns, out, inn, count, from, to];
        self.launch_over(Source::Sparse, kernel, s.len(), &args);
    }

    /// Rows `first..first + count` of x [.., width] as [width, count], filled up with zeros to a multiple of `TILE`.
    fn turned(&self, x: &Tensor, (first, count): (usize, usize), width: usize) -> Buffer {
        let stride = count.next_multiple_of(TILE);
        let turned = Buffer::f32(width * stride);
        let [tokens, across, along] = [count, width, stride].map(|n| Arg::I64(n as i64));
        let args = [x.arg().offset(4 * first * width), tokens, across, along, turned.arg()];
        let grid = [width.div_ceil(TILE), stride / TILE, 1];
        self.launch(Source::Sparse, "sparse_turn", grid, [32, 8, 1], 0, &args);
        turned
    }
}

/// Parts of `rows` rows of up to `width` numbers that are turned over one after another: where each begins and its length.
fn pieces(rows: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    let step = (TURNED / width / TOKENS * TOKENS).clamp(TOKENS, AT_ONCE);
    (0..rows).step_by(step).map(move |first| (first, step.min(rows - first)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_all_rows() {
        for (rows, width) in [(0, 3), (1, 3), (1024, 4096), (3000, 4096), (300, 1 << 17)] {
            let mut next = 0;
            for (first, count) in pieces(rows, width) {
                assert!(first == next && count > 0 && count <= AT_ONCE);
                next += count;
            }
            assert_eq!(next, rows);
        }
    }
}
