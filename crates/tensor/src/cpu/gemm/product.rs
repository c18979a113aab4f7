//! The loops around the tile, and how a product is shared among threads.
//!
//! A product `c[rows, n] = init + a[rows, k] · B[k, n]` is cut into chunks (a range of rows × a range of panels of B). A chunk
//! goes through k in runs; for each run it packs its rows of `a` (they stay in the second-level cache), then takes one
//! panel of B after another (first-level cache) past all its rows. Chunks write disjoint parts of `c`, and cutting does not
//! change any element's order of sums, so that the result does not depend on the number of threads.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::isa::{Task, dispatch};
use super::lanes::Lanes;
use super::pack::{Layout, Precision, Words, round_row, transposed_panel};
use super::tile::{Init, Kernel, MR, Plain, RUN_WORDS, Run, tile, widen};

/// Rows of a forward chunk: 240 packed rows of 1 KiB take half of a second-level cache of 512 KiB.
const FORWARD_ROWS: usize = 240;

/// Rows of a backward chunk: more, because every chunk transposes its weights anew.
const BACKWARD_ROWS: usize = 960;

/// The same with the tiles of AMX, whose runs of k are longer (see `amx.rs`): a MiB, half of a second-level cache.
const TILED_FORWARD_ROWS: usize = 256;
const TILED_BACKWARD_ROWS: usize = 512;

/// Rows of a block of these tiles.
const TILED_UNIT: usize = 32;

/// Products of fewer multiplications than this run on the calling thread: waking another one costs more.
const SERIAL_MACS: usize = 1 << 17;

/// Chunks made for each thread, so that a thread which is held up does not hold up the others.
const CHUNKS_A_THREAD: usize = 4;

/// The same with the tiles of AMX, beside which packing the left side once more weighs more.
const TILED_CHUNKS_A_THREAD: usize = 2;

/// Up to so many rows are multiplied by `few.rs`; more of them share a widening of bf16 weights.
const FEW_ROWS: usize = 2 * MR;

/// Columns of a chunk at least, so that packing the left side stays a small part of the work.
const CHUNK_COLUMNS: usize = 128;

/// Which way the packed weights are multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// `a[rows, in] · Wᵀ`
    Forward,
    /// `a[rows, out] · W`
    Backward,
}

/// What the sums start from.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    Zero,
    /// `[n]`, the same for every row.
    Bias(&'a [f32]),
    /// What `c` holds.
    Result,
}

/// One product with packed weights.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub layout: &'a Layout,
    pub words: &'a [u32],
    pub direction: Direction,
    pub start: Start<'a>,
    /// Left side: row r is at `a[r · a_stride ..][.. k]`.
    pub a: &'a [f32],
    pub a_stride: usize,
    pub rows: usize,
    /// Elements from one row of the result to the next.
    pub c_stride: usize,
}

/// The result, written by several threads in disjoint parts.
#[derive(Clone, Copy)]
pub(super) struct Target(pub *mut u32);
// SAFETY: each chunk writes only its own rows and columns, see `Product::compute`.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Product<'_> {
    /// Length of the sums.
    pub fn k(&self) -> usize {
        if self.direction == Direction::Forward { self.layout.inn } else { self.layout.out }
    }

    /// Columns of the result.
    pub fn n(&self) -> usize {
        if self.direction == Direction::Forward { self.layout.out } else { self.layout.inn }
    }

    /// Computes the product into `c`, where row r is at `c[r · c_stride ..][.. n]`.
    ///
    /// # Panics
    /// When a slice is shorter than the shapes need: a programmer's error.
    pub fn compute(&self, c: &mut [f32]) {
        let (k, n) = (self.k(), self.n());
        if self.rows == 0 || n == 0 {
            return;
        }
        assert!(self.a.len() >= (self.rows - 1) * self.a_stride + k, "the left side is too short");
        assert!(c.len() >= (self.rows - 1) * self.c_stride + n, "the result is too short");
        if let Start::Bias(bias) = self.start {
            assert_eq!(bias.len(), n, "the bias must have one value for each column");
        }
        if k == 0 {
            return self.start_only(c);
        }
        let target = Target(c.as_mut_ptr().cast());
        let macs = self.rows.saturating_mul(n).saturating_mul(k);
        let threads = if macs < SERIAL_MACS { 1 } else { rayon::current_num_threads() };
        let (row_step, panel_step) = self.chunk_size(threads);
        let panels = n.div_ceil(self.layout.width());
        let across = panels.div_ceil(panel_step);
        let chunks = self.rows.div_ceil(row_step) * across;
        let compute_chunk = |i: usize| {
            let (row, panel) = (i / across * row_step, i % across * panel_step);
            dispatch(
                self.layout.isa,
                Chunk {
                    product: self,
                    rows: row..(row + row_step).min(self.rows),
                    panels: panel..(panel + panel_step).min(panels),
                    target,
                },
            );
        };
        if threads == 1 || chunks == 1 {
            (0..chunks).for_each(compute_chunk);
        } else {
            (0..chunks).into_par_iter().with_max_len(1).for_each(compute_chunk);
        }
    }

    /// Rows and panels of a chunk.
    fn chunk_size(&self, threads: usize) -> (usize, usize) {
        let (row_max, unit) = match (self.direction, self.layout.is_tiled()) {
            (Direction::Forward, false) => (FORWARD_ROWS, MR),
            (Direction::Backward, false) => (BACKWARD_ROWS, MR),
            (Direction::Forward, true) => (TILED_FORWARD_ROWS, TILED_UNIT),
            (Direction::Backward, true) => (TILED_BACKWARD_ROWS, TILED_UNIT),
        };
        let down = self.rows.div_ceil(row_max);
        let row_step = self.rows.div_ceil(down).next_multiple_of(unit);
        let panels = self.n().div_ceil(self.layout.width());
        if threads == 1 {
            return (row_step, panels);
        }
        let chunks_a_thread = if self.layout.is_tiled() { TILED_CHUNKS_A_THREAD } else { CHUNKS_A_THREAD };
        let across = (threads * chunks_a_thread).div_ceil(down);
        let panels_min = CHUNK_COLUMNS.div_ceil(self.layout.width());
        (row_step, panels.div_ceil(across).max(panels_min))
    }

    /// What the sums of a tile at `c`, of columns from `column` on, start from.
    pub fn init(&self, c: *const u32, column: usize) -> Init {
        match self.start {
            Start::Zero => Init { at: std::ptr::null(), row_stride: 0 },
            Start::Bias(bias) => Init { at: bias[column..].as_ptr().cast(), row_stride: 0 },
            Start::Result => Init { at: c, row_stride: self.c_stride },
        }
    }

    /// The product of nothing: sums of no terms.
    fn start_only(&self, c: &mut [f32]) {
        let n = self.n();
        for r in 0..self.rows {
            let row = &mut c[r * self.c_stride..][..n];
            match self.start {
                Start::Zero => row.fill(0.0),
                Start::Bias(bias) => row.copy_from_slice(bias),
                Start::Result => {}
            }
        }
    }
}

/// Packed pieces of one thread.
#[derive(Default)]
pub(super) struct Scratch {
    /// The left side of a chunk for one run of k, `[rows / MR, RUN_WORDS, MR]`; of few rows for all of it.
    pub left: Words,
    /// A transposed panel for one run of k, `[steps, NR]`; a row of the left side of few rows as pairs.
    pub panel: Words,
    /// A panel for one run of k, widened from bf16 to f32, `[k, NR]`.
    wide: Words,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A part of a product for one thread.
pub(super) struct Chunk<'a> {
    pub product: &'a Product<'a>,
    pub rows: Range<usize>,
    pub panels: Range<usize>,
    pub target: Target,
}

impl Task for Chunk<'_> {
    #[inline(always)]
    unsafe fn run<L: Lanes, const NV: usize>(self) {
        // Taken out and put back, because a closure given to `with` would not be compiled for these instructions.
        let mut scratch = SCRATCH.take();
        // SAFETY: the caller's promise about the processor.
        unsafe {
            let few = self.product.direction == Direction::Forward && self.rows.len() <= FEW_ROWS;
            match self.product.layout.precision {
                #[cfg(target_arch = "x86_64")]
                Precision::Bf16 if self.product.layout.is_tiled() => self.tiles::<L, NV>(&mut scratch),
                Precision::F32 if few => self.few::<Plain<L>, NV>(&mut scratch),
                Precision::Bf16 if few => self.few::<L::Bf16, NV>(&mut scratch),
                Precision::F32 => self.runs::<Plain<L>, NV>(&mut scratch),
                Precision::Bf16 => self.runs::<L::Bf16, NV>(&mut scratch),
            }
        }
        SCRATCH.set(scratch);
    }
}

impl Chunk<'_> {
    /// All runs of k for this chunk.
    ///
    /// # Safety
    /// The processor has the kernel's instructions.
    #[inline(always)]
    unsafe fn runs<K: Kernel, const NV: usize>(&self, scratch: &mut Scratch) {
        let product = self.product;
        let layout = product.layout;
        let width = K::L::WIDTH * NV;
        let run_k = RUN_WORDS / K::LEFT_WORDS * K::STEP_K;
        scratch.left.reserve(self.rows.len().next_multiple_of(MR) * RUN_WORDS);
        if product.direction == Direction::Backward {
            scratch.panel.reserve(run_k / K::STEP_K * width);
        }
        let widens = K::WIDENS && self.rows.len() > FEW_ROWS;
        if widens {
            scratch.wide.reserve(run_k * width);
        }
        let (left, transposed) = (scratch.left.as_mut_slice(), scratch.panel.as_mut_slice());
        let wide = scratch.wide.as_mut_slice().as_mut_ptr();
        for k0 in (0..product.k()).step_by(run_k) {
            let k = run_k.min(product.k() - k0);
            let steps = k.div_ceil(K::STEP_K);
            self.pack_left::<K>(k0, k, left);
            for panel in self.panels.clone() {
                let mut ahead: &[u32] = &[];
                let weights = if product.direction == Direction::Forward {
                    let at = |panel| panel * layout.panel_words() + k0 / K::STEP_K * width;
                    if panel + 1 < self.panels.end {
                        ahead = &product.words[at(panel + 1)..][..steps * width];
                    }
                    product.words[at(panel)..].as_ptr()
                } else {
                    // SAFETY: `run_k` is a multiple of every panel width, and `transposed` holds a whole run.
                    unsafe {
                        let into = transposed.as_mut_ptr();
                        transposed_panel::<K::L, NV>(layout, product.words, panel, k0, k, into);
                    }
                    transposed.as_ptr()
                };
                // SAFETY: the caller's promise; `left` and `weights` hold this run, and `wide` has room for it.
                unsafe {
                    if widens {
                        widen::<K::L, NV>(weights, steps, wide);
                        self.panel::<Plain<K::L>, NV>(panel, k0, steps * K::STEP_K, left, wide, ahead);
                    } else {
                        self.panel::<K, NV>(panel, k0, steps, left, weights, ahead);
                    }
                }
            }
        }
    }

    /// Packs this chunk's rows of the left side for the run `k0 .. k0 + k`.
    #[inline(always)]
    fn pack_left<K: Kernel>(&self, k0: usize, k: usize, left: &mut [u32]) {
        let product = self.product;
        let words = k.div_ceil(K::STEP_K) * K::LEFT_WORDS;
        let mut packed = [[0u32; RUN_WORDS]; MR];
        for (tile, first) in left.chunks_exact_mut(RUN_WORDS * MR).zip(self.rows.clone().step_by(MR)) {
            for (r, packed) in (first..self.rows.end).zip(&mut packed) {
                let row = &product.a[r * product.a_stride + k0..][..k];
                if K::LEFT_WORDS < K::STEP_K {
                    round_row(row, packed);
                    continue;
                }
                for (word, value) in packed.iter_mut().zip(row) {
                    *word = product.layout.precision.round(*value).to_bits();
                }
                // An odd k leaves half a step, which must not read what an earlier run left there.
                packed[k..k.next_multiple_of(K::STEP_K)].fill(0);
            }
            for (w, place) in tile.as_chunks_mut::<MR>().0.iter_mut().enumerate().take(words) {
                *place = std::array::from_fn(|i| packed[i][w]);
            }
        }
    }

    /// All rows of this chunk times one panel. Each tile also asks for the next tile's place in the result, and for its share
    /// of `ahead`, the weights that come next and lie far away.
    ///
    /// # Safety
    /// The processor has the kernel's instructions; `weights` is good for `[steps, NR]`, `left` for all rows.
    #[inline(always)]
    unsafe fn panel<K: Kernel, const NV: usize>(
        &self,
        panel: usize,
        k0: usize,
        steps: usize,
        left: &[u32],
        weights: *const u32,
        ahead: &[u32],
    ) {
        let product = self.product;
        let width = K::L::WIDTH * NV;
        let column = panel * width;
        let columns = width.min(product.n() - column);
        let mut edge = [0u32; MR * 64];
        let share = ahead.len().div_ceil(16 * self.rows.len().div_ceil(MR)) * 16;
        for i in (0..self.rows.len()).step_by(MR) {
            let rows = MR.min(self.rows.len() - i);
            // SAFETY: the chunk's rows and this panel's columns lie inside `c` and belong to this thread alone; a panel
            // narrower than NR is computed in `edge`, which holds MR rows of any NR.
            unsafe {
                let c = self.target.0.add((self.rows.start + i) * product.c_stride + column);
                let init = match k0 {
                    0 => product.init(c, column),
                    _ => Init { at: c, row_stride: product.c_stride },
                };
                for word in (i / MR * share..((i / MR + 1) * share).min(ahead.len())).step_by(16) {
                    K::L::prefetch(&ahead[word]);
                }
                prefetch_rows::<K::L>(c, product.c_stride, MR..2 * MR, width);
                let a = left[i * RUN_WORDS..].as_ptr();
                let run = Run { a, b: weights, b_stride: 0, steps, init, c, c_stride: product.c_stride };
                if columns == width {
                    tile::<K, NV>(rows, &run);
                } else {
                    tile::<K, NV>(rows, &in_edge(rows, columns, width, &run, &mut edge));
                    out_of_edge(rows, columns, width, &run, &edge);
                }
            }
        }
    }
}

/// Asks for `rows` of `width` words each, `stride` apart from `c` on; they need not exist.
///
/// # Safety
/// The processor has the lanes' instructions.
#[inline(always)]
pub(super) unsafe fn prefetch_rows<L: Lanes>(c: *const u32, stride: usize, rows: Range<usize>, width: usize) {
    for row in rows {
        let at = c.wrapping_add(row * stride);
        for word in (0..width).step_by(16).chain([width - 1]) {
            // SAFETY: the caller's promise.
            unsafe { L::prefetch(at.wrapping_add(word)) };
        }
    }
}

/// A run for a tile of which only the first `columns` exist, computed in `edge` `[rows, width]`; [`out_of_edge`] puts the result in
/// its place.
///
/// # Safety
/// `init` of `run` is good for `rows` rows of `columns`, `edge` for `[rows, width]`.
#[inline(always)]
pub(super) unsafe fn in_edge(rows: usize, columns: usize, width: usize, run: &Run, edge: &mut [u32]) -> Run {
    let at = edge.as_mut_ptr();
    let mut init = run.init;
    if !init.at.is_null() {
        for i in 0..rows {
            // SAFETY: the caller's promise, and `edge` holds `[rows, width]`.
            unsafe {
                let from = init.at.add(i * init.row_stride);
                std::ptr::copy_nonoverlapping(from, at.add(i * width), columns);
            }
        }
        init = Init { at, row_stride: width };
    }
    Run { init, c: at, c_stride: width, ..*run }
}

/// See [`in_edge`].
///
/// # Safety
/// `c` of `run` is good for `rows` rows of `columns`, `edge` for `[rows, width]`.
#[inline(always)]
pub(super) unsafe fn out_of_edge(rows: usize, columns: usize, width: usize, run: &Run, edge: &[u32]) {
    for i in 0..rows {
        // SAFETY: the caller's promise, and `edge` holds `[rows, width]`.
        unsafe {
            let from = edge.as_ptr().add(i * width);
            std::ptr::copy_nonoverlapping(from, run.c.add(i * run.c_stride), columns);
        }
    }
}
