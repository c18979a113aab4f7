//! Small matrix products in place, `c (+)= a·b`, for tiles that lie in the first cache.
//!
//! A block of rows by two vectors of columns is held in registers while the inner dimension runs. Nothing is packed or
//! allocated, so a product of 12 × 12 × 32 costs its arithmetic; `a` may be read transposed, `b` and `c` by rows.

use crate::cpu::gemm::lanes::{Lanes, Portable};
#[cfg(target_arch = "x86_64")]
use crate::cpu::gemm::x86::{Avx2, Avx512};
use crate::cpu::simd::fma;

/// What sums are multiplied by where they are added to what is there: exact in one operation.
static ONE: f32 = 1.0;

/// The left matrix: element (i, p) at `i·row + p·col`.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub data: *const f32,
    pub row: usize,
    pub col: usize,
}

/// The right matrix: row p starts at `p·stride`, its elements lie side by side.
#[derive(Clone, Copy)]
pub(crate) struct Right {
    pub data: *const f32,
    pub stride: usize,
}

/// The product: row i starts at `i·stride`.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    pub data: *mut f32,
    pub stride: usize,
    /// Whether to add to what is there.
    pub add: bool,
}

/// `c[m, n] (+)= a[m, k]·b[k, n]`.
///
/// # Safety
/// The matrices lie where their pointers and strides say, and c overlaps neither a nor b.
#[inline(always)]
pub(crate) unsafe fn product<const LANES: usize>(m: usize, n: usize, k: usize, a: Left, b: Right, c: Out) {
    // SAFETY: the caller's; `LANES` is the level's that runs this, and every part stays inside m, n and k.
    unsafe {
        let done = match LANES {
            #[cfg(target_arch = "x86_64")]
            16 => {
                let done = columns::<Avx512, 8, 2>(0, m, n, k, a, b, c);
                let done = columns::<Avx512, 8, 1>(done, m, n, k, a, b, c);
                columns::<Avx2, 6, 1>(done, m, n, k, a, b, c)
            }
            #[cfg(target_arch = "x86_64")]
            8 => {
                let done = columns::<Avx2, 6, 2>(0, m, n, k, a, b, c);
                columns::<Avx2, 6, 1>(done, m, n, k, a, b, c)
            }
            _ => columns::<Portable<8>, 6, 1>(0, m, n, k, a, b, c),
        };
        single_columns::<LANES>(done, m, n, k, a, b, c);
    }
}

/// All rows of the columns from `from` on that come in whole groups of `NV` vectors, `MR` rows at once where there are as
/// many; returns the first column left.
///
/// # Safety
/// As [`product`]; the processor has the lanes' instructions.
#[inline(always)]
unsafe fn columns<L: Lanes, const MR: usize, const NV: usize>(
    from: usize,
    m: usize,
    n: usize,
    k: usize,
    a: Left,
    b: Right,
    c: Out,
) -> usize {
    let mut j = from;
    while j + NV * L::WIDTH <= n {
        let mut i = 0;
        // SAFETY: i + rows <= m and j + NV·WIDTH <= n, inside the caller's matrices.
        unsafe {
            let b = Right { data: b.data.add(j), ..b };
            let rows_from = |i: usize| {
                (Left { data: a.data.add(i * a.row), ..a }, Out { data: c.data.add(i * c.stride + j), ..c })
            };
            while i + MR <= m {
                let (a, c) = rows_from(i);
                block::<L, MR, NV>(k, a, b, c);
                i += MR;
            }
            while i + 2 <= m {
                let (a, c) = rows_from(i);
                block::<L, 2, NV>(k, a, b, c);
                i += 2;
            }
            if i < m {
                let (a, c) = rows_from(i);
                block::<L, 1, NV>(k, a, b, c);
            }
        }
        j += NV * L::WIDTH;
    }
    j
}

/// `MR` rows of `NV` vectors of columns. Each sum runs through k in order in one lane, so its bits do not depend on the lanes'
/// number. The vectors are named: arrays of as many numbers the compiler leaves in memory and adds up one by one.
///
/// # Safety
/// As [`columns`], for m = MR and n = NV·WIDTH.
#[inline(always)]
unsafe fn block<L: Lanes, const MR: usize, const NV: usize>(k: usize, a: Left, b: Right, c: Out) {
    // SAFETY: p < k, i < MR; the rows and columns are the caller's, and c overlaps nothing that is read.
    unsafe {
        let mut sums = [[L::zero(); NV]; MR];
        for p in 0..k {
            let row = b.data.add(p * b.stride).cast::<u32>();
            let row: [L::V; NV] = std::array::from_fn(|v| L::load(row.add(v * L::WIDTH)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = L::splat(a.data.add(i * a.row + p * a.col).cast());
                for (sum, &row) in sums.iter_mut().zip(&row) {
                    *sum = L::fma(*sum, x, row);
                }
            }
        }
        let one = L::splat((&raw const ONE).cast());
        for (i, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                let c_at = c.data.add(i * c.stride + v * L::WIDTH).cast::<u32>();
                L::store(c_at, if c.add { L::fma(L::load(c_at), sum, one) } else { sum });
            }
        }
    }
}

/// The columns from `from` on, one by one.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn single_columns<const LANES: usize>(
    from: usize,
    m: usize,
    n: usize,
    k: usize,
    a: Left,
    b: Right,
    c: Out,
) {
    for j in from..n {
        for i in 0..m {
            // SAFETY: i < m, j < n and p < k, inside the caller's matrices.
            unsafe {
                let x = |p: usize| *a.data.add(i * a.row + p * a.col);
                let sum = (0..k).fold(0.0, |sum, p| fma::<LANES>(x(p), *b.data.add(p * b.stride + j), sum));
                let c_at = &mut *c.data.add(i * c.stride + j);
                *c_at = if c.add { *c_at + sum } else { sum };
            }
        }
    }
}

/// Copies `count` rows of `dim` numbers, `stride` apart, behind one another: heads lie far apart in memory, often a power
/// of two, where a tile read in place would push itself out of the cache.
///
/// # Safety
/// `rows` holds `count` rows of `dim` at that stride.
#[inline(always)]
pub(crate) unsafe fn gather(rows: *const f32, stride: usize, count: usize, dim: usize, out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(dim).take(count).enumerate() {
        // SAFETY: the caller's, i < count.
        out.copy_from_slice(unsafe { std::slice::from_raw_parts(rows.add(i * stride), dim) });
    }
}

/// Writes `rows` `[count, dim]` (row stride `stride`) transposed: `out` `[dim, width]`, zeros from column `count` on.
///
/// # Safety
/// `rows` holds `count` rows of `dim` at that stride.
#[inline(always)]
pub(crate) unsafe fn transpose(
    rows: *const f32,
    stride: usize,
    count: usize,
    dim: usize,
    width: usize,
    out: &mut [f32],
) {
    assert!(count <= width && out.len() >= dim * width);
    let mut j = 0;
    while j + 8 <= count {
        for d in 0..dim {
            // SAFETY: j + 8 <= count <= width and d < dim; out was measured above.
            unsafe {
                let column: [f32; 8] = std::array::from_fn(|i| *rows.add((j + i) * stride + d));
                out.as_mut_ptr().add(d * width + j).cast::<[f32; 8]>().write(column);
            }
        }
        j += 8;
    }
    for d in 0..dim {
        for j in j..width {
            // SAFETY: read only below count.
            out[d * width + j] = if j < count { unsafe { *rows.add(j * stride + d) } } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::random::Key;
    use crate::cpu::simd::dispatch;

    #[inline(always)]
    fn body<const L: usize>(shape: (usize, usize, usize), a: Left, b: Right, c: Out) {
        // SAFETY: the test's matrices have these shapes.
        unsafe { product::<L>(shape.0, shape.1, shape.2, a, b, c) }
    }
    dispatch! { fn run(shape: (usize, usize, usize), a: Left, b: Right, c: Out) = body; }

    #[test]
    fn products_of_every_remainder_equal_the_definition() {
        let mut random = vec![0.0; 4000];
        Key { seed: 1, stream: 1 }.fill_normal(&mut random);
        for m in [1, 2, 3, 5, 6, 7, 13] {
            for n in [1, 7, 8, 15, 16, 31, 32, 59] {
                for (k, transposed) in [(0, false), (1, true), (9, false), (9, true)] {
                    let (stride, gap) = (n + 3, 0.5);
                    let (row, col) = if transposed { (1, m) } else { (k + 2, 1) };
                    let (a, b) = (&random[..1000], &random[1000..]);
                    let mut c = vec![gap; m * stride];
                    let left = Left { data: a.as_ptr(), row, col };
                    let right = Right { data: b.as_ptr(), stride };
                    run((m, n, k), left, right, Out { data: c.as_mut_ptr(), stride, add: true });
                    for i in 0..m {
                        for j in 0..stride {
                            let dot: f32 = (0..k).map(|p| a[i * row + p * col] * b[p * stride + j]).sum();
                            let expected = if j < n { gap + dot } else { gap };
                            assert!((c[i * stride + j] - expected).abs() < 1e-4, "{m}×{n}×{k} at ({i}, {j})");
                        }
                    }
                }
            }
        }
    }
}
