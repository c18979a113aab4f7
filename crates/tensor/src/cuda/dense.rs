//! Launches of `kernels/dense.cu`: products with block-diagonal matrices, inverses and orthonormal bases.

use super::compile::Source;
use super::driver::{Arg, Cuda, Dims};
use crate::device::Buffer;
use crate::tensor::Tensor;

/// Shared memory that a block may use for its matrix.
const SHARED: usize = 96 << 10;
/// Blocks of a launch that keep a card busy; products with fewer are cut along their sums.
const BUSY: usize = 512;
/// The fewest numbers that a piece of a sum has.
const PIECE: usize = 128;
/// Numbers that a buffer needs for an f64.
const F64: usize = 2;

/// One of the products of a launch: y [m, n] = a [m, k]·b [k, n], and how often.
#[derive(Clone, Copy)]
struct Size {
    m: usize,
    k: usize,
    n: usize,
    count: usize,
}

/// Distances in memory.
struct Strides {
    /// Between rows, between columns and between blocks.
    a: [usize; 3],
    b: [usize; 3],
    /// Between rows and between blocks.
    y: [usize; 2],
}

/// Kernel, and rows and columns of its tile, for blocks of n columns.
fn tile(n: usize) -> (&'static str, usize, usize) {
    match n {
        0..=16 => ("blocks_16", 256, 16),
        17..=32 => ("blocks_32", 128, 32),
        _ => ("blocks_64", 64, 64),
    }
}

/// Tiles of all products.
fn tiles(size: Size) -> usize {
    let (_, rows, columns) = tile(size.n);
    size.m.div_ceil(rows) * size.count * size.n.div_ceil(columns)
}

/// In how many pieces the sums of these products are cut.
fn pieces(size: Size) -> usize {
    (BUSY / tiles(size).max(1)).clamp(1, size.k.div_ceil(PIECE).max(1))
}

impl Cuda {
    pub(super) fn block_product(&self, x: &Tensor, r: &Tensor, n: usize, transposed: bool, y: &mut Buffer) {
        if r.is_empty() || x.is_empty() {
            return;
        }
        let (count, width) = (r.len() / (n * n), r.len() / n);
        let (row, column) = if transposed { (1, n) } else { (n, 1) };
        let strides = Strides { a: [width, 1, n], b: [row, column, n * n], y: [width, n] };
        let size = Size { m: x.len() / width, k: n, n, count };
        self.multiply_blocks(size, strides, (x.arg(), r.arg()), (y.arg(), 1));
    }

    pub(super) fn block_gradient(&self, x: &Tensor, dy: &Tensor, n: usize, dr: &mut Buffer) {
        if dr.len() == 0 {
            return;
        }
        let (count, width) = (dr.len() / (n * n), dr.len() / n);
        let strides = Strides { a: [1, width, n], b: [width, 1, n], y: [n, n * n] };
        let size = Size { m: n, k: x.len() / width, n, count };
        let pieces = pieces(size);
        if pieces == 1 {
            return self.multiply_blocks(size, strides, (x.arg(), dy.arg()), (dr.arg(), 1));
        }
        let parts = Buffer::f32(pieces * dr.len());
        self.multiply_blocks(size, strides, (x.arg(), dy.arg()), (parts.arg(), pieces));
        let [number, length] = [pieces, dr.len()].map(|n| Arg::I64(n as i64));
        let args = [parts.arg(), number, length, dr.arg()];
        self.launch_over(Source::Dense, "sum_pieces", dr.len(), &args);
    }

    /// y of each product, or [pieces, ..] of the parts of its sums.
    fn multiply_blocks(&self, size: Size, by: Strides, (a, b): (Arg, Arg), (y, pieces): (Arg, usize)) {
        let Size { m, k, n, count } = size;
        let piece = k.div_ceil(pieces);
        let sizes = Dims::of(&[m, k, n, count, piece, count * m * n]);
        let ([a0, a1, a2], [b0, b1, b2], [y0, y1]) = (by.a, by.b, by.y);
        let strides = Dims::of(&[a0, a1, a2, b0, b1, b2, y0, y1]);
        let args = [Arg::Dims(sizes), Arg::Dims(strides), a, b, y];
        self.launch(Source::Dense, tile(n).0, [tiles(size), pieces, 1], [256, 1, 1], 0, &args);
    }

    pub(super) fn inverse(&self, a: &Tensor, y: &mut Buffer) {
        let n = a.width();
        let count = a.len() / (n * n).max(1);
        // A column and the order of the rows are always in shared memory, the matrix where it fits.
        let beside = 8 * (n + n.div_ceil(2));
        let inside = beside + 8 * n * n <= SHARED;
        let scratch = (!inside).then(|| Buffer::f32(F64 * a.len()));
        let room = scratch.as_ref().map_or(Arg::NULL, Buffer::arg);
        let shared = if inside { beside + 8 * n * n } else { beside };
        let threads = if n <= 32 { 128 } else { 512 };
        let args = [a.arg(), Arg::I32(n as i32), room, y.arg()];
        self.launch(Source::Dense, "inverse", [count, 1, 1], [threads, 1, 1], shared, &args);
    }

    pub(super) fn qr(&self, a: &Tensor, q: &mut Buffer, r: &mut Buffer) {
        let (m, n) = (a.dim(0), a.dim(1));
        let [columns, room] = [(); 2].map(|()| Buffer::f32(F64 * m * n));
        let taus = Buffer::f32(F64 * n);
        let [rows, width] = [m, n].map(|n| Arg::I64(n as i64));
        let args = [a.arg(), rows, width, columns.arg(), taus.arg(), r.arg()];
        self.launch(Source::Dense, "qr_factor", [n.min(1), 1, 1], [1024, 1, 1], 0, &args);
        let args = [columns.arg(), taus.arg(), rows, width, room.arg(), q.arg()];
        self.launch(Source::Dense, "qr_expand", [n, 1, 1], [256, 1, 1], 0, &args);
    }

    pub(super) fn qr_backward(&self, q: &Tensor, r: &Tensor, dq: &Tensor, da: &mut Buffer) {
        let (m, n) = (q.dim(0), q.dim(1));
        let s = Buffer::f32(F64 * n * n);
        let [rows, width] = [m, n].map(|n| Arg::I64(n as i64));
        // A warp an element, and then a warp a row.
        let args = [q.arg(), dq.arg(), rows, width, s.arg()];
        self.launch(Source::Dense, "qr_gram", [(n * n).div_ceil(8), 1, 1], [256, 1, 1], 0, &args);
        let warps = (SHARED / 8 / n.max(1)).clamp(1, 8);
        let args = [q.arg(), r.arg(), dq.arg(), s.arg(), rows, width, da.arg()];
        let (grid, block) = ([m.div_ceil(warps) * n.min(1), 1, 1], [32 * warps as u32, 1, 1]);
        self.launch(Source::Dense, "qr_rows", grid, block, 8 * warps * n, &args);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_cut_where_there_are_few_tiles() {
        assert_eq!(pieces(Size { m: 64, k: 4096, n: 64, count: 512 }), 1);
        assert_eq!(pieces(Size { m: 64, k: 4096, n: 64, count: 64 }), 8);
        assert_eq!(pieces(Size { m: 8, k: 100, n: 8, count: 1 }), 1);
        assert_eq!(pieces(Size { m: 8, k: 0, n: 8, count: 1 }), 1);
    }
}
