//! The tile: up to `MR` rows × one panel of columns of the product, accumulated in registers over a run of k.
//!
//! `c[i][j] = init[i][j] + Σ_k a[i][k] · b[k][j]`, the sum taken in the order of k by one accumulator an element. So an
//! element's bits depend neither on the tile's height nor on how k is cut into runs.
//!
//! Shapes: `a` is `[words of a run, S]` for a tile of at most S rows, so that a tile reads it from one end to the other, `b` is
//! `[steps, NV · WIDTH]` words; a step is one k in f32, two in bf16.

use std::marker::PhantomData;

use super::lanes::{DotLanes, Lanes};

/// How far ahead the weights of few rows are asked for, in words: 3 KiB, some hundred nanoseconds of reading.
const AHEAD_WORDS: usize = 16 * 48;

/// Words of the left side in the longest run of k.
pub(super) const RUN_WORDS: usize = 256;

/// Rows of the highest tile: 6 × 2 vectors of AVX2 (16 registers), 6 × 4 of AVX-512 (32 registers).
pub(super) const MR: usize = 6;

/// How one step of k is multiplied, for one precision on one kind of lanes.
pub(in crate::cpu) trait Kernel {
    /// The lanes.
    type L: Lanes;
    /// How many k a step takes: two when the weights are bf16 pairs.
    const STEP_K: usize;
    /// Words of the left side a step takes: one for each k, or one for a bf16 pair.
    const LEFT_WORDS: usize;
    /// Each step widens its weights. Where many rows share them, widening once and using [`Plain`] is faster, with the same
    /// bits.
    const WIDENS: bool = Self::LEFT_WORDS > 1;

    /// Adds step `b` (`NV · WIDTH` words) times the left words at `a` (`[LEFT_WORDS, S]`) to `acc`.
    ///
    /// # Safety
    /// The processor has the lanes' instructions; `a` and `b` are good for one step.
    unsafe fn step<const M: usize, const S: usize, const NV: usize>(
        acc: &mut [[<Self::L as Lanes>::V; NV]; M],
        a: *const u32,
        b: *const u32,
    );
}

/// f32 weights.
pub(super) struct Plain<L>(PhantomData<L>);

impl<L: Lanes> Kernel for Plain<L> {
    type L = L;
    const STEP_K: usize = 1;
    const LEFT_WORDS: usize = 1;

    #[inline(always)]
    unsafe fn step<const M: usize, const S: usize, const NV: usize>(
        acc: &mut [[L::V; NV]; M],
        a: *const u32,
        b: *const u32,
    ) {
        // SAFETY: the caller's promise: one step of `b` is NV registers, one of `a` a word in each of M rows.
        unsafe {
            let mut weights = [L::zero(); NV];
            for (j, w) in weights.iter_mut().enumerate() {
                *w = L::load(b.add(j * L::WIDTH));
            }
            add_outer::<L, M, NV>(acc, a, weights);
        }
    }
}

/// bf16 weights, widened to f32 in registers; the left side is f32 that was rounded to bf16.
pub(in crate::cpu) struct Widened<L>(PhantomData<L>);

impl<L: Lanes> Kernel for Widened<L> {
    type L = L;
    const STEP_K: usize = 2;
    const LEFT_WORDS: usize = 2;

    #[inline(always)]
    unsafe fn step<const M: usize, const S: usize, const NV: usize>(
        acc: &mut [[L::V; NV]; M],
        a: *const u32,
        b: *const u32,
    ) {
        // SAFETY: the caller's promise: one step of `b` is NV registers, one of `a` two words in each of M rows.
        unsafe {
            let mut weights = [L::zero(); NV];
            for (j, w) in weights.iter_mut().enumerate() {
                *w = L::widen_even(b.add(j * L::WIDTH));
            }
            add_outer::<L, M, NV>(acc, a, weights);
            for (j, w) in weights.iter_mut().enumerate() {
                *w = L::widen_odd(b.add(j * L::WIDTH));
            }
            add_outer::<L, M, NV>(acc, a.add(S), weights);
        }
    }
}

/// bf16 weights and bf16 left side, multiplied in pairs by one instruction.
pub(super) struct Dot<L>(PhantomData<L>);

impl<L: DotLanes> Kernel for Dot<L> {
    type L = L;
    const STEP_K: usize = 2;
    const LEFT_WORDS: usize = 1;

    #[inline(always)]
    unsafe fn step<const M: usize, const S: usize, const NV: usize>(
        acc: &mut [[L::V; NV]; M],
        a: *const u32,
        b: *const u32,
    ) {
        // SAFETY: the caller's promise: one step of `b` is NV registers, one of `a` a word in each of M rows.
        unsafe {
            let mut weights = [L::zero(); NV];
            for (j, w) in weights.iter_mut().enumerate() {
                *w = L::load(b.add(j * L::WIDTH));
            }
            for (i, row) in acc.iter_mut().enumerate() {
                let left = L::splat(a.add(i));
                for (sum, w) in row.iter_mut().zip(weights) {
                    *sum = L::dot(*sum, left, w);
                }
            }
        }
    }
}

/// `acc[i][j] += a[i] · weights[j]`.
///
/// # Safety
/// The processor has the lanes' instructions; `a` is good for a word in each of `M` rows.
#[inline(always)]
unsafe fn add_outer<L: Lanes, const M: usize, const NV: usize>(
    acc: &mut [[L::V; NV]; M],
    a: *const u32,
    weights: [L::V; NV],
) {
    // SAFETY: the caller's promise.
    unsafe {
        for (i, row) in acc.iter_mut().enumerate() {
            let left = L::splat(a.add(i));
            for (sum, w) in row.iter_mut().zip(weights) {
                *sum = L::fma(*sum, left, w);
            }
        }
    }
}

/// Where a tile starts from: nothing, or words `row_stride` apart (a bias has stride 0).
#[derive(Clone, Copy)]
pub(super) struct Init {
    /// Null for zero.
    pub at: *const u32,
    /// Words from one row to the next.
    pub row_stride: usize,
}

/// One run of k for one tile.
pub(super) struct Run {
    /// Left side, `[words of the run, S]`.
    pub a: *const u32,
    /// Weights, `[steps, panel width]`.
    pub b: *const u32,
    /// Words from one panel to the next, for a tile of several.
    pub b_stride: usize,
    /// Steps of the run.
    pub steps: usize,
    /// What the sum starts from.
    pub init: Init,
    /// The result.
    pub c: *mut u32,
    /// Words from one row of the result to the next.
    pub c_stride: usize,
}

/// Computes a tile of `rows` (1 to [`MR`]) rows.
///
/// # Safety
/// The processor has the lanes' instructions; the pointers of `run` are good for the shapes it names, `c` and `init`
/// for a whole panel's width.
#[inline(always)]
pub(super) unsafe fn tile<K: Kernel, const NV: usize>(rows: usize, run: &Run) {
    // SAFETY: the caller's promise.
    unsafe {
        match rows {
            1 => tile_of::<K, 1, MR, NV, 1, false>(run),
            2 => tile_of::<K, 2, MR, NV, 1, false>(run),
            3 => tile_of::<K, 3, MR, NV, 1, false>(run),
            4 => tile_of::<K, 4, MR, NV, 1, false>(run),
            5 => tile_of::<K, 5, MR, NV, 1, false>(run),
            _ => tile_of::<K, 6, MR, NV, 1, false>(run),
        }
    }
}

/// How many panels a tile of `rows` rows takes side by side: one sum waits for its last product, so that eight registers of sums
/// are needed to keep the multipliers busy.
pub(super) fn panels_beside(rows: usize, nv: usize) -> usize {
    match (rows, nv) {
        (1, 2) => 4,
        (1, _) | (2, 2) => 2,
        _ => 1,
    }
}

/// [`tile`] for a left side that has as many rows as the tile, of one panel or of [`panels_beside`] each other.
///
/// # Safety
/// As for [`tile`], for all the panels.
#[inline(always)]
pub(super) unsafe fn low_tile<K: Kernel, const NV: usize>(rows: usize, panels: usize, run: &Run) {
    // SAFETY: the caller's promise.
    unsafe {
        match (rows, panels) {
            (1, 4) => tile_of::<K, 1, 1, NV, 4, true>(run),
            (1, 2) => tile_of::<K, 1, 1, NV, 2, true>(run),
            (1, _) => tile_of::<K, 1, 1, NV, 1, true>(run),
            (2, 2) => tile_of::<K, 2, 2, NV, 2, true>(run),
            (2, _) => tile_of::<K, 2, 2, NV, 1, true>(run),
            (3, _) => tile_of::<K, 3, 3, NV, 1, true>(run),
            (4, _) => tile_of::<K, 4, 4, NV, 1, true>(run),
            (5, _) => tile_of::<K, 5, 5, NV, 1, true>(run),
            _ => tile_of::<K, 6, 6, NV, 1, true>(run),
        }
    }
}

/// A tile of M rows and P panels, whose left side has S rows; asks for its weights ahead if these stream from memory.
#[inline(always)]
unsafe fn tile_of<
    K: Kernel,
    const M: usize,
    const S: usize,
    const NV: usize,
    const P: usize,
    const STREAMS: bool,
>(
    run: &Run,
) {
    let width = K::L::WIDTH;
    // SAFETY: the caller's promise; a step moves `a` by its words and `b` by one panel row.
    unsafe {
        let mut acc = [[[K::L::zero(); NV]; M]; P];
        if !run.init.at.is_null() {
            for (p, acc) in acc.iter_mut().enumerate() {
                for (i, row) in acc.iter_mut().enumerate() {
                    for (j, v) in row.iter_mut().enumerate() {
                        *v = K::L::load(run.init.at.add(i * run.init.row_stride + (p * NV + j) * width));
                    }
                }
            }
        }
        let (mut a, mut b) = (run.a, run.b);
        for _ in 0..run.steps {
            for (p, acc) in acc.iter_mut().enumerate() {
                let b = b.add(p * run.b_stride);
                if STREAMS {
                    K::L::prefetch(b.wrapping_add(AHEAD_WORDS));
                }
                K::step::<M, S, NV>(acc, a, b);
            }
            a = a.add(K::LEFT_WORDS * S);
            b = b.add(NV * width);
        }
        for (p, acc) in acc.iter().enumerate() {
            for (i, row) in acc.iter().enumerate() {
                for (j, v) in row.iter().enumerate() {
                    K::L::store(run.c.add(i * run.c_stride + (p * NV + j) * width), *v);
                }
            }
        }
    }
}

/// Widens `steps` steps of bf16 weights `[steps, NR]` to f32 weights `[2 · steps, NR]` for [`Plain`].
///
/// # Safety
/// The processor has the lanes' instructions; the pointers are good for these shapes.
#[inline(always)]
pub(super) unsafe fn widen<L: Lanes, const NV: usize>(weights: *const u32, steps: usize, into: *mut u32) {
    let width = L::WIDTH * NV;
    for step in 0..steps {
        for j in 0..NV {
            // SAFETY: the caller's promise.
            unsafe {
                let from = weights.add(step * width + j * L::WIDTH);
                let to = into.add(2 * step * width + j * L::WIDTH);
                L::store(to, L::widen_even(from));
                L::store(to.add(width), L::widen_odd(from));
            }
        }
    }
}
