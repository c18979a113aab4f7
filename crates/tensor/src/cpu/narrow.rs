//! Products of which one dimension is small, as low-rank factors make them: thousands of rows, a width in the thousands, and a
//! rank between.
//!
//! - `y[m, n] (+)= a[m, k]·b[k, n]`: x·Aᵀ and dy·B (n small), h·Bᵀ and dh·A (k small). b is packed once, in strips of columns that a
//!   block of sums takes; a and y are read and written where they lie, block of rows after block of rows.
//! - `y[m, n] (+)= aᵀ·b`, a `[k, m]`, b `[k, n]`: dA = dhᵀ·x (m small) and dB = dyᵀ·h (n small). The wide side is read in place, some
//!   rows at a time; where it is the left one, the transpose of y is computed and put in its place.
//!
//! Such a product reads a matrix once and does little with each number, so that nothing wide is copied, and what comes next is
//! asked for ahead: rows lie too far apart for the processor to see where the next ones begin. Each sum is taken in an order that
//! depends on k alone: neither the threads nor the other rows change its bits.

#[cfg(test)]
mod tests;

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::lanes::{Lanes, Portable};
use super::gemm::pack::transpose;
#[cfg(target_arch = "x86_64")]
use super::gemm::x86::{Avx2, Avx512};
use super::simd::{dispatch, fma};
use super::tile::{Left, Out, Right};
use crate::ops::Product;

/// The small dimension at most: beyond, a general product that packs both sides is as fast.
const NARROW: usize = 64;

/// The same for the rows of aᵀ·b.
const NARROW_LEFT: usize = 32;

/// Columns of a strip at most: two vectors of AVX-512.
const STRIP: usize = 32;

/// Rows that a task takes.
const ROWS: usize = 96;

/// Rows of a product over rows that are taken at once.
const DEEP: usize = 32;

/// Steps of k between two rounds of asking ahead: a cache line of a row.
const ROUND: usize = 16;

/// What sums are multiplied by where they are added to what is there: exact in one operation.
static ONE: f32 = 1.0;

/// A result that tasks write in disjoint parts.
#[derive(Clone, Copy)]
struct Parts(*mut f32);
// SAFETY: the tasks of this file write disjoint rows or columns.
unsafe impl Send for Parts {}
// SAFETY: as above.
unsafe impl Sync for Parts {}

impl Parts {
    /// The element `at` places on.
    ///
    /// # Safety
    /// It lies in the result.
    unsafe fn at(self, at: usize) -> *mut f32 {
        // SAFETY: the caller's.
        unsafe { self.0.add(at) }
    }
}

/// Computes `p` where it has such a shape, and returns whether it has.
pub(crate) fn narrow(p: Product, a: &[f32], b: &[f32], y: &mut [f32]) -> bool {
    let Product { batch, m, k, n, transpose_a, transpose_b, .. } = p;
    if batch != 1 || m * n * k == 0 {
        return false;
    }
    assert!(a.len() >= m * k && b.len() >= k * n && y.len() >= m * n);
    match transpose_a {
        false if k.min(n) <= NARROW => by_rows(p, a, b, y),
        true if !transpose_b && (n <= NARROW || m <= NARROW_LEFT) => over_rows(p, a, b, y),
        _ => return false,
    }
    true
}

/// Columns from `first` on of a matrix of `n`, and how many a strip of them takes: the last ones fill a smaller one.
fn strips(n: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
    (0..n).step_by(STRIP).map(move |first| {
        let columns = first..n.min(first + STRIP);
        let width = match columns.len() {
            0..=8 => 8,
            9..=16 => 16,
            _ => STRIP,
        };
        (columns, width)
    })
}

/// op(b), times the scale, as strips `[k, width]` one after another, zeros beyond n.
#[inline(always)]
fn pack_body<const LANES: usize>(p: Product, b: &[f32], packed: &mut [f32]) {
    let Product { k, n, transpose_b, scale, .. } = p;
    let mut rest = packed;
    for (columns, width) in strips(n) {
        let strip;
        (strip, rest) = rest.split_at_mut(width * k);
        if transpose_b {
            let (from, into) = (b[columns.start * k..].as_ptr().cast(), strip.as_mut_ptr().cast());
            let rows = columns.len();
            // SAFETY: these columns are rows of b `[n, k]`; the strip is `[k, width]`, width a multiple of the lanes.
            unsafe {
                match LANES {
                    #[cfg(target_arch = "x86_64")]
                    16 if width >= 16 => transpose::<Avx512>(from, k, rows, width, k, into, width),
                    #[cfg(target_arch = "x86_64")]
                    8 | 16 => transpose::<Avx2>(from, k, rows, width, k, into, width),
                    _ => transpose::<Portable<4>>(from, k, rows, width, k, into, width),
                }
            }
        } else {
            for (to, from) in strip.chunks_exact_mut(width).zip(b.chunks_exact(n)) {
                to[..columns.len()].copy_from_slice(&from[columns.clone()]);
                to[columns.len()..].fill(0.0);
            }
        }
        if scale != 1.0 {
            strip.iter_mut().for_each(|v| *v *= scale);
        }
    }
}

/// y (+)= a·op(b), cut by rows.
fn by_rows(p: Product, a: &[f32], b: &[f32], y: &mut [f32]) {
    let Product { m, k, n, accumulate, .. } = p;
    let mut packed = vec![0.0; strips(n).map(|(_, width)| width * k).sum()];
    pack_strips(p, b, &mut packed);
    let y = &mut y[..m * n];
    y.par_chunks_mut(ROWS * n).zip(a.par_chunks(ROWS * k)).with_max_len(1).for_each(|(y, a)| {
        rows_times_strips(&a[..y.len() / n * k], k, &packed, accumulate, y);
    });
}

/// y `[rows, n]` (+)= a `[rows, k]` · strips.
#[inline(always)]
fn rows_body<const LANES: usize>(a: &[f32], k: usize, packed: &[f32], add: bool, y: &mut [f32]) {
    let (rows, high) = (a.len() / k, high::<LANES>());
    let n = y.len() / rows;
    for first in (0..rows).step_by(high) {
        let count = high.min(rows - first);
        let mut at = 0;
        for (columns, width) in strips(n) {
            let left = Left { data: a[first * k..].as_ptr(), row: k, col: 1 };
            let right = Right { data: packed[at..].as_ptr(), stride: width };
            let ahead = Ahead { left: columns.start == 0, right: false, out: true };
            // SAFETY: `count` rows of a and y, these columns of y and a strip of them.
            unsafe {
                let out = Out { data: y[first * n + columns.start..].as_mut_ptr(), stride: n, add };
                sums::<LANES>((count, columns.len(), width), k, left, right, out, ahead);
            }
            at += width * k;
        }
    }
}

dispatch! {
    fn pack_strips(p: Product, b: &[f32], packed: &mut [f32]) = pack_body;
    fn rows_times_strips(a: &[f32], k: usize, packed: &[f32], add: bool, y: &mut [f32]) = rows_body;
    fn columns_over_rows(narrow: &[f32], high: usize, wide: &[f32], width: usize, columns: Range<usize>, out: Out) = columns_body;
}

/// y (+)= aᵀ·b, cut by columns of the wide one, at any place: each sum lies in one task.
fn over_rows(p: Product, a: &[f32], b: &[f32], y: &mut [f32]) {
    let Product { m, n, k, scale, accumulate, .. } = p;
    let flipped = n <= NARROW && n < m;
    let (narrow, high, wide, width) = if flipped { (b, n, a, m) } else { (a, m, b, n) };
    let scaled: Vec<f32>;
    let (mut narrow, wide) = (&narrow[..k * high], &wide[..k * width]);
    if scale != 1.0 {
        scaled = narrow.iter().map(|v| scale * v).collect();
        narrow = &scaled;
    }
    let target = Parts(y.as_mut_ptr());
    let step = width.div_ceil(rayon::current_num_threads()).next_multiple_of(STRIP);
    (0..width.div_ceil(step)).into_par_iter().with_max_len(1).for_each(|task| {
        let columns = task * step..width.min((task + 1) * step);
        if !flipped {
            // SAFETY: these columns of y are this task's alone.
            let data = unsafe { target.at(columns.start) };
            let out = Out { data, stride: n, add: accumulate };
            return columns_over_rows(narrow, high, wide, width, columns, out);
        }
        let across = columns.len();
        let mut part = vec![0.0; high * across];
        let out = Out { data: part.as_mut_ptr(), stride: across, add: false };
        columns_over_rows(narrow, high, wide, width, columns.clone(), out);
        for (c, row) in columns.enumerate() {
            // SAFETY: these rows of y are this task's alone.
            let row = unsafe { std::slice::from_raw_parts_mut(target.at(row * n), n) };
            for (r, y) in row.iter_mut().enumerate() {
                let sum = part[r * across + c];
                *y = if accumulate { *y + sum } else { sum };
            }
        }
    });
}

/// `columns` of out `[high, width]` (+)= narrowᵀ · wide, narrow `[k, high]`, wide `[k, width]`; out begins at the first of them.
#[inline(always)]
fn columns_body<const LANES: usize>(
    narrow: &[f32],
    count: usize,
    wide: &[f32],
    width: usize,
    columns: Range<usize>,
    out: Out,
) {
    for (block, (narrow, wide)) in narrow.chunks(DEEP * count).zip(wide.chunks(DEEP * width)).enumerate() {
        let k = narrow.len() / count;
        for (part, _) in strips(columns.len()) {
            for first in (0..count).step_by(high::<LANES>()) {
                let left = Left { data: narrow[first..].as_ptr(), row: 1, col: count };
                let right = Right { data: wide[columns.start + part.start..].as_ptr(), stride: width };
                let ahead = Ahead { left: false, right: first == 0, out: false };
                let rows = high::<LANES>().min(count - first);
                // SAFETY: k rows of both, these columns of wide; the caller's out holds them.
                unsafe {
                    let data = out.data.add(first * out.stride + part.start);
                    let out = Out { data, add: out.add || block > 0, ..out };
                    sums::<LANES>((rows, part.len(), part.len()), k, left, right, out, ahead);
                }
            }
        }
    }
}

/// What is asked for while a block is computed: the rows of the left side or of the result that come after its own, or the
/// right side [`DEEP`] rows on.
#[derive(Clone, Copy)]
struct Ahead {
    left: bool,
    right: bool,
    out: bool,
}

/// Rows that a block takes at most.
const fn high<const LANES: usize>() -> usize {
    if LANES == 16 { 8 } else { 6 }
}

/// `c[rows, columns] (+)= a[rows, k]·b[k, width]`, at most [`high`] rows and [`STRIP`] columns; what b has beyond the columns is
/// left out of c.
///
/// # Safety
/// The matrices lie where their pointers and strides say, and c overlaps neither a nor b.
#[inline(always)]
unsafe fn sums<const LANES: usize>(
    (rows, columns, width): (usize, usize, usize),
    k: usize,
    a: Left,
    b: Right,
    c: Out,
    ahead: Ahead,
) {
    let mut done = 0;
    while done < columns {
        let (wanted, there) = (columns - done, width - done);
        // SAFETY: `there` columns of b, and as many of c as are wanted.
        unsafe {
            let b = Right { data: b.data.add(done), ..b };
            let c = Out { data: c.data.add(done), ..c };
            done += match LANES {
                #[cfg(target_arch = "x86_64")]
                16 if there >= 32 && wanted > 16 => all_rows::<Avx512, 8, 2>(rows, wanted, k, a, b, c, ahead),
                #[cfg(target_arch = "x86_64")]
                16 if there >= 16 && wanted > 8 => all_rows::<Avx512, 8, 1>(rows, wanted, k, a, b, c, ahead),
                #[cfg(target_arch = "x86_64")]
                8 if there >= 16 && wanted > 8 => all_rows::<Avx2, 6, 2>(rows, wanted, k, a, b, c, ahead),
                #[cfg(target_arch = "x86_64")]
                8 | 16 if there >= 8 => all_rows::<Avx2, 6, 1>(rows, wanted, k, a, b, c, ahead),
                4 if there >= 8 => all_rows::<Portable<4>, 4, 2>(rows, wanted, k, a, b, c, ahead),
                _ => {
                    single_column::<LANES>(rows, k, a, b, c);
                    1
                }
            };
        }
    }
}

/// All `rows` of `NV` vectors of columns, `MR` at once where there are as many; returns these columns, of which c has `wanted` or more.
///
/// # Safety
/// As [`sums`]; the processor has the lanes' instructions.
#[inline(always)]
unsafe fn all_rows<L: Lanes, const MR: usize, const NV: usize>(
    rows: usize,
    wanted: usize,
    k: usize,
    a: Left,
    b: Right,
    c: Out,
    ahead: Ahead,
) -> usize {
    let width = NV * L::WIDTH;
    let mut beside = [0.0f32; 8 * STRIP];
    let whole = wanted >= width;
    let to = if whole { c } else { Out { data: beside.as_mut_ptr(), stride: width, add: false } };
    let mut i = 0;
    // SAFETY: i + the rows of a block <= rows <= 8; `beside` holds as many of STRIP columns.
    unsafe {
        let from = |i: usize| {
            (Left { data: a.data.add(i * a.row), ..a }, Out { data: to.data.add(i * to.stride), ..to })
        };
        while i + MR <= rows {
            let (a, to) = from(i);
            block::<L, MR, NV>(k, a, b, to, ahead);
            i += MR;
        }
        while i + 2 <= rows {
            let (a, to) = from(i);
            block::<L, 2, NV>(k, a, b, to, ahead);
            i += 2;
        }
        if i < rows {
            let (a, to) = from(i);
            block::<L, 1, NV>(k, a, b, to, ahead);
        }
        if !whole {
            for (i, sums) in beside.chunks_exact(width).take(rows).enumerate() {
                for (j, &sum) in sums.iter().take(wanted).enumerate() {
                    let y = &mut *c.data.add(i * c.stride + j);
                    *y = if c.add { *y + sum } else { sum };
                }
            }
        }
    }
    width
}

/// `MR` rows of `NV` vectors of columns, each sum in one lane.
///
/// # Safety
/// As [`all_rows`]; what is asked for ahead need not exist.
#[inline(always)]
unsafe fn block<L: Lanes, const MR: usize, const NV: usize>(
    k: usize,
    a: Left,
    b: Right,
    c: Out,
    ahead: Ahead,
) {
    let ask = |at: *const f32, v: usize| {
        // SAFETY: the processor has the lanes' instructions, and places that are asked for need not exist.
        unsafe { L::prefetch(at.wrapping_add(v * L::WIDTH).cast()) }
    };
    // SAFETY: p < k, i < MR; the rows and columns are the caller's, and c overlaps nothing that is read.
    unsafe {
        if ahead.out {
            (MR..2 * MR).for_each(|i| (0..NV).for_each(|v| ask(c.data.wrapping_add(i * c.stride), v)));
        }
        let mut sums = [[L::zero(); NV]; MR];
        for round in (0..k).step_by(ROUND) {
            let steps = round..k.min(round + ROUND);
            if ahead.left {
                (MR..2 * MR).for_each(|i| ask(a.data.wrapping_add(i * a.row + round), 0));
            }
            if ahead.right {
                let next = |p: usize| b.data.wrapping_add((p + DEEP) * b.stride);
                steps.clone().for_each(|p| (0..NV).for_each(|v| ask(next(p), v)));
            }
            for p in steps {
                let row = b.data.add(p * b.stride).cast::<u32>();
                let row: [L::V; NV] = std::array::from_fn(|v| L::load(row.add(v * L::WIDTH)));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = L::splat(a.data.add(i * a.row + p * a.col).cast());
                    for (sum, &row) in sums.iter_mut().zip(&row) {
                        *sum = L::fma(*sum, x, row);
                    }
                }
            }
        }
        let one = L::splat((&raw const ONE).cast());
        for (i, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                let at = c.data.add(i * c.stride + v * L::WIDTH).cast::<u32>();
                L::store(at, if c.add { L::fma(L::load(at), sum, one) } else { sum });
            }
        }
    }
}

/// One column, sum by sum.
///
/// # Safety
/// As [`sums`].
#[inline(always)]
unsafe fn single_column<const LANES: usize>(rows: usize, k: usize, a: Left, b: Right, c: Out) {
    for i in 0..rows {
        // SAFETY: i < rows and p < k, inside the caller's matrices.
        unsafe {
            let x = |p: usize| *a.data.add(i * a.row + p * a.col);
            let sum = (0..k).fold(0.0, |sum, p| fma::<LANES>(x(p), *b.data.add(p * b.stride), sum));
            let y = &mut *c.data.add(i * c.stride);
            *y = if c.add { *y + sum } else { sum };
        }
    }
}
