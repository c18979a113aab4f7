//! Small matrix products in place, `c (+)= a·b`, for tiles that lie in the first cache.
//!
//! A block of rows by two vectors of columns is held in registers while the inner dimension runs. Nothing is packed or
//! allocated, so a product of 12 × 12 × 32 costs its arithmetic; `a` may be read transposed, `b` and `c` by rows.

use crate::cpu::simd::fma;

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
    // SAFETY: the caller's; every part stays inside m, n and k.
    unsafe {
        let mut done = match LANES {
            16 => columns::<LANES, 32>(0, m, n, k, a, b, c),
            8 => columns::<LANES, 16>(0, m, n, k, a, b, c),
            _ => 0,
        };
        if LANES == 16 {
            done = columns::<LANES, 16>(done, m, n, k, a, b, c);
        }
        done = columns::<LANES, 8>(done, m, n, k, a, b, c);
        columns::<LANES, 1>(done, m, n, k, a, b, c);
    }
}

/// All rows of the columns from `from` on that come in whole groups of `COLS`; returns the first column left.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn columns<const LANES: usize, const COLS: usize>(
    from: usize,
    m: usize,
    n: usize,
    k: usize,
    a: Left,
    b: Right,
    c: Out,
) -> usize {
    let mut j = from;
    while j + COLS <= n {
        let mut i = 0;
        // SAFETY: i + rows <= m and j + COLS <= n, inside the caller's matrices.
        unsafe {
            let b = Right { data: b.data.add(j), ..b };
            let rows_from = |i: usize| {
                (Left { data: a.data.add(i * a.row), ..a }, Out { data: c.data.add(i * c.stride + j), ..c })
            };
            while i + 6 <= m {
                let (a, c) = rows_from(i);
                block::<LANES, 6, COLS>(k, a, b, c);
                i += 6;
            }
            while i + 2 <= m {
                let (a, c) = rows_from(i);
                block::<LANES, 2, COLS>(k, a, b, c);
                i += 2;
            }
            if i < m {
                let (a, c) = rows_from(i);
                block::<LANES, 1, COLS>(k, a, b, c);
            }
        }
        j += COLS;
    }
    j
}

/// # Safety
/// As [`product`], for m = ROWS and n = COLS.
#[inline(always)]
unsafe fn block<const LANES: usize, const ROWS: usize, const COLS: usize>(
    k: usize,
    a: Left,
    b: Right,
    c: Out,
) {
    let mut sums = [[0.0f32; COLS]; ROWS];
    for p in 0..k {
        // SAFETY: p < k, the rows and columns are the caller's.
        let row = unsafe { &*b.data.add(p * b.stride).cast::<[f32; COLS]>() };
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let x = unsafe { *a.data.add(i * a.row + p * a.col) };
            for j in 0..COLS {
                sums[j] = fma::<LANES>(x, row[j], sums[j]);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        // SAFETY: i < ROWS, and c overlaps nothing that is read.
        let row = unsafe { &mut *c.data.add(i * c.stride).cast::<[f32; COLS]>() };
        for j in 0..COLS {
            row[j] = if c.add { row[j] + sums[j] } else { sums[j] };
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
