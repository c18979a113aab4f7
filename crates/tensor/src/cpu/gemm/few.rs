//! Products of few rows, as where a text is written token by token: bound by reading the weights once.
//!
//! The left side of all k is packed first and stays in a cache. Then the weights go by from one end of a panel to the other, in the
//! order in which they lie in memory, so that the processor fetches ahead by itself; several panels go by side by side where one
//! would leave the multipliers waiting for each other. Sums are taken in the same order as everywhere, with the same bits.

use std::ops::Range;

use super::lanes::Lanes;
use super::pack::round_row;
use super::product::{Chunk, Scratch, in_edge, out_of_edge};
use super::tile::{Kernel, MR, Run, low_tile, panels_beside};

impl Chunk<'_> {
    /// All of this chunk.
    ///
    /// # Safety
    /// The processor has the kernel's instructions.
    #[inline(always)]
    pub(super) unsafe fn few<K: Kernel, const NV: usize>(&self, scratch: &mut Scratch) {
        let (count, layout) = (self.rows.len(), self.product.layout);
        let words = layout.steps() * K::LEFT_WORDS;
        let high = count.div_ceil(count.div_ceil(MR));
        let tiles = || (0..count).step_by(high).map(|i| i..(i + high).min(count));
        scratch.left.reserve(words * count);
        scratch.panel.reserve(layout.steps());
        let (left, pairs) = (scratch.left.as_mut_slice(), scratch.panel.as_mut_slice());
        for rows in tiles() {
            let left = &mut left[rows.start * words..][..rows.len() * words];
            self.pack_rows::<K>(rows, left, pairs);
        }
        let whole = self.panels.end.min(self.product.layout.out / layout.width());
        let mut panel = self.panels.start;
        while panel < self.panels.end {
            let beside = panels_beside(high, NV);
            let panels = if panel + beside <= whole { beside } else { 1 };
            for rows in tiles() {
                // SAFETY: the caller's promise; the left side of these rows holds all words.
                unsafe { self.few_rows::<K, NV>(panel, panels, rows.clone(), &left[rows.start * words..]) };
            }
            panel += panels;
        }
    }

    /// The left side of `rows` (of the chunk), `[words, rows]`; `pairs` has room for one row.
    #[inline(always)]
    fn pack_rows<K: Kernel>(&self, rows: Range<usize>, left: &mut [u32], pairs: &mut [u32]) {
        let (product, high) = (self.product, rows.len());
        let k = product.layout.inn;
        for (i, r) in rows.enumerate() {
            let row = &product.a[(self.rows.start + r) * product.a_stride..][..k];
            let places = left[i..].iter_mut().step_by(high);
            if K::LEFT_WORDS < K::STEP_K {
                round_row(row, pairs);
                places.zip(&*pairs).for_each(|(place, pair)| *place = *pair);
            } else {
                // An odd k leaves half a step.
                let values = row.iter().map(|&value| product.layout.precision.round(value).to_bits());
                places.zip(values.chain([0])).for_each(|(place, value)| *place = value);
            }
        }
    }

    /// `rows` of the chunk times `panels` panels from `panel` on.
    ///
    /// # Safety
    /// The processor has the kernel's instructions; `left` is good for all words of the rows.
    #[inline(always)]
    unsafe fn few_rows<K: Kernel, const NV: usize>(
        &self,
        panel: usize,
        panels: usize,
        rows: Range<usize>,
        left: &[u32],
    ) {
        let (product, layout, width) = (self.product, self.product.layout, K::L::WIDTH * NV);
        let column = panel * width;
        let columns = (panels * width).min(layout.out - column);
        // SAFETY: the chunk's rows and these panels' columns lie inside `c` and belong to this thread alone; a panel narrower
        // than NR is computed in `edge`, which holds MR rows of any NR.
        unsafe {
            let c = self.target.0.add((self.rows.start + rows.start) * product.c_stride + column);
            let run = Run {
                a: left.as_ptr(),
                b: product.words[panel * layout.panel_words()..].as_ptr(),
                b_stride: layout.panel_words(),
                steps: layout.steps(),
                init: product.init(c, column),
                c,
                c_stride: product.c_stride,
            };
            if columns == panels * width {
                low_tile::<K, NV>(rows.len(), panels, &run);
            } else {
                let mut edge = [0u32; MR * 64];
                let inside = in_edge(rows.len(), columns, width, &run, &mut edge);
                low_tile::<K, NV>(rows.len(), panels, &inside);
                out_of_edge(rows.len(), columns, width, &run, &edge);
            }
        }
    }
}
