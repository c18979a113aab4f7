//! The frozen matrix: a weight W `[out, in]` packed once, and its two products
//!
//! - forward `y[rows, out] = x[rows, in] · Wᵀ (+ bias)`,
//! - backward `dx[rows, in] (+)= dy[rows, out] · W`,
//!
//! in f32 or bf16 with f32 sums. W is stored once, for the forward product; the backward product transposes it block by
//! block, at a cost shared by all rows. A general matrix product packs both sides at each call: a frozen weight need not.
//!
//! The same input gives the same bits for any number of threads, and a row's result does not depend on the other rows
//! of the call. The structure (tiles in registers, panels in the first cache, rows in the second) follows K. Goto and R. van
//! de Geijn, "Anatomy of high-performance matrix multiplication" (2008), without the packing of weights.

#[cfg(target_arch = "x86_64")]
mod amx;
mod few;
mod isa;
pub(super) mod lanes;
pub(super) mod pack;
mod peak;
mod product;
mod stream;
#[cfg(test)]
mod tests;
mod tile;
#[cfg(target_arch = "x86_64")]
pub(super) mod x86;

use std::ops::Range;

use rayon::prelude::*;

pub use isa::{Isa, choose_isa, isa};
pub use pack::Precision;
pub use peak::peak_flops;
pub use stream::{FourBit, FourBitScales, RowSource, streamed_backward, streamed_forward};

use isa::dispatch;
use pack::{Layout, PackPanel, Words};
use product::{Direction, Product, Start};

/// Weights asked for at a time while packing, in elements (4 MiB).
const BLOCK_ELEMENTS: usize = 1 << 20;

/// A frozen matrix `[out, in]`, packed for one set of instructions.
pub struct PackedMatrix {
    layout: Layout,
    words: Words,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PackedMatrix").field(&self.layout).finish()
    }
}

impl PackedMatrix {
    /// Packs the matrix that `rows` gives: it is asked for blocks of rows, in order, and writes them as `[rows, in]`, so that
    /// a model is never twice in memory.
    ///
    /// # Panics
    /// When `out · in` words exceed the address space.
    pub fn pack(
        out: usize,
        inn: usize,
        precision: Precision,
        rows: &mut dyn FnMut(Range<usize>, &mut [f32]),
    ) -> Self {
        Self::pack_for(isa(), out, inn, precision, rows)
    }

    /// [`PackedMatrix::pack`] for given instructions instead of the process's own.
    ///
    /// # Panics
    /// Also when this machine lacks the instructions (see [`Isa::is_available`]).
    pub fn pack_for(
        isa: Isa,
        out: usize,
        inn: usize,
        precision: Precision,
        rows: &mut dyn FnMut(Range<usize>, &mut [f32]),
    ) -> Self {
        assert!(
            isa.is_available(),
            "this machine has no {}; choose one of {:?}",
            isa.name(),
            Isa::available()
        );
        let mut packed = Self::zeroed(Layout { out, inn, precision, isa });
        let width = packed.layout.width();
        let block = (BLOCK_ELEMENTS / inn.max(1) / width).max(1) * width;
        let mut dense = vec![0.0; block.min(out) * inn];
        for start in (0..out).step_by(block) {
            let range = start..(start + block).min(out);
            let dense = &mut dense[..range.len() * inn];
            rows(range.clone(), dense);
            packed.pack_block(start / width, dense);
        }
        packed
    }

    /// A matrix of zeros.
    fn zeroed(layout: Layout) -> Self {
        let words = layout.checked_words().unwrap_or_else(|| {
            let Layout { out, inn, .. } = layout;
            panic!(
                "a matrix of {out} x {inn} does not fit the address space; check the shape in the weight file"
            )
        });
        PackedMatrix { layout, words: Words::zeroed(words) }
    }

    /// Packs whole panels, from `panel` on, out of `dense` `[rows, in]`.
    fn pack_block(&mut self, panel: usize, dense: &[f32]) {
        let layout = self.layout;
        let panel_words = layout.panel_words();
        if panel_words == 0 {
            return;
        }
        let words = &mut self.words.as_mut_slice()[panel * panel_words..];
        words
            .par_chunks_exact_mut(panel_words)
            .zip(dense.par_chunks(layout.width() * layout.inn))
            .for_each_init(Words::default, |pairs, (panel, rows)| {
                dispatch(layout.isa, PackPanel { layout, rows, pairs, panel });
            });
    }

    /// Rows of W: the width of `y`.
    pub fn out_features(&self) -> usize {
        self.layout.out
    }

    /// Columns of W: the width of `x`.
    pub fn in_features(&self) -> usize {
        self.layout.inn
    }

    /// The precision that W is stored and multiplied in.
    pub fn precision(&self) -> Precision {
        self.layout.precision
    }

    /// The instructions that W is packed for.
    pub fn isa(&self) -> Isa {
        self.layout.isa
    }

    /// Memory of the packed weights, in bytes.
    pub fn bytes(&self) -> usize {
        self.words.as_slice().len() * 4
    }

    /// `y = x · Wᵀ (+ bias)`: `x` `[rows, in]`, `bias` `[out]`, `y` `[rows, out]`, which is overwritten.
    ///
    /// # Panics
    /// When a slice does not have its shape.
    pub fn forward(&self, x: &[f32], rows: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        let Layout { out, inn, .. } = self.layout;
        check_shape("x", x.len(), rows, inn);
        check_shape("y", y.len(), rows, out);
        let start = bias.map_or(Start::Zero, Start::Bias);
        self.product(Direction::Forward, start, x, inn, rows, out).compute(y);
    }

    /// `dx = dy · W`, or `dx += dy · W` with `accumulate`: `dy` `[rows, out]`, `dx` `[rows, in]`.
    ///
    /// # Panics
    /// When a slice does not have its shape.
    pub fn backward(&self, dy: &[f32], rows: usize, accumulate: bool, dx: &mut [f32]) {
        let Layout { out, inn, .. } = self.layout;
        check_shape("dy", dy.len(), rows, out);
        check_shape("dx", dx.len(), rows, inn);
        let start = if accumulate { Start::Result } else { Start::Zero };
        self.product(Direction::Backward, start, dy, out, rows, inn).compute(dx);
    }

    fn product<'a>(
        &'a self,
        direction: Direction,
        start: Start<'a>,
        a: &'a [f32],
        a_stride: usize,
        rows: usize,
        c_stride: usize,
    ) -> Product<'a> {
        let words = self.words.as_slice();
        Product { layout: &self.layout, words, direction, start, a, a_stride, rows, c_stride }
    }

    /// Writes `rows` of W, as they are after rounding to the precision, to `dense` `[rows, in]`.
    ///
    /// # Panics
    /// When `rows` are not rows of W or `dense` does not have its shape.
    pub fn unpack(&self, rows: Range<usize>, dense: &mut [f32]) {
        let Layout { out, inn, precision, .. } = self.layout;
        assert!(rows.end <= out, "rows {rows:?} are asked of a matrix that has {out}");
        check_shape("dense", dense.len(), rows.len(), inn);
        if inn == 0 {
            return;
        }
        let (width, words) = (self.layout.width(), self.words.as_slice());
        for (row, dense) in rows.zip(dense.chunks_exact_mut(inn)) {
            let panel = &words[row / width * self.layout.panel_words()..][..self.layout.panel_words()];
            let column = panel.iter().skip(row % width).step_by(width);
            match precision {
                Precision::F32 => dense.iter_mut().zip(column).for_each(|(d, w)| *d = f32::from_bits(*w)),
                Precision::Bf16 => dense.chunks_mut(2).zip(column).for_each(|(two, w)| {
                    two[0] = f32::from_bits(w << 16);
                    if let Some(odd) = two.get_mut(1) {
                        *odd = f32::from_bits(w & 0xffff_0000);
                    }
                }),
            }
        }
    }
}

fn check_shape(name: &str, len: usize, rows: usize, width: usize) {
    assert!(
        rows.checked_mul(width) == Some(len),
        "{name} must be [{rows}, {width}] and has {len} elements; pass a slice of exactly that shape"
    );
}
