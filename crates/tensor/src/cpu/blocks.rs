//! Products with block-diagonal matrices, read and written where the blocks' columns lie in wider rows.

use rayon::prelude::*;

/// Rows that one task takes.
const ROWS: usize = 128;

/// A matrix that tasks write in disjoint parts.
#[derive(Clone, Copy)]
struct Parts(*mut f32);
// SAFETY: the tasks of this file write disjoint elements.
unsafe impl Send for Parts {}
// SAFETY: as above.
unsafe impl Sync for Parts {}

/// A part of a matrix: where it begins and the distances between its rows and between its columns.
#[derive(Clone, Copy)]
struct View {
    at: usize,
    row: usize,
    column: usize,
}

/// y `[rows, count·n]` = x `[rows, count·n]` times the blocks r `[count, n, n]` on a diagonal, or times their transposes.
pub fn block_product(x: &[f32], r: &[f32], n: usize, transposed: bool, y: &mut [f32]) {
    if r.is_empty() || x.is_empty() {
        return;
    }
    let (count, width) = (r.len() / (n * n), r.len() / n);
    let rows = x.len() / width;
    assert!(r.len() == count * n * n && x.len() == rows * width && y.len() == x.len());
    let (row, column) = if transposed { (1, n) } else { (n, 1) };
    let target = Parts(y.as_mut_ptr());
    (0..rows.div_ceil(ROWS) * count).into_par_iter().with_max_len(1).for_each(|task| {
        let (first, block) = (task / count * ROWS, task % count);
        let piece = View { at: first * width + block * n, row: width, column: 1 };
        let right = View { at: block * n * n, row, column };
        // SAFETY: rows `first`.. and columns `block`·n.. of x and y, which the assertion sized, are this task's alone.
        unsafe { multiply((ROWS.min(rows - first), n, n), (x, piece), (r, right), (target, piece)) };
    });
}

/// dr `[count, n, n]` of the blocks: of each, xᵀ·dy of its columns.
pub fn block_gradient(x: &[f32], dy: &[f32], n: usize, dr: &mut [f32]) {
    if dr.is_empty() {
        return;
    }
    let (count, width) = (dr.len() / (n * n), dr.len() / n);
    let rows = x.len() / width;
    assert!(dr.len() == count * n * n && x.len() == rows * width && dy.len() == x.len());
    let target = Parts(dr.as_mut_ptr());
    (0..count).into_par_iter().with_max_len(1).for_each(|block| {
        let left = View { at: block * n, row: 1, column: width };
        let right = View { at: block * n, row: width, column: 1 };
        let into = View { at: block * n * n, row: n, column: 1 };
        // SAFETY: the columns of a block lie in rows of x and dy, which the assertion sized; its matrix is this task's alone.
        unsafe { multiply((n, rows, n), (x, left), (dy, right), (target, into)) };
    });
}

/// The part `of` y = the part of a `[m, k]` times the part of b `[k, n]`.
///
/// # Safety
/// The views with these sizes lie inside a, b and y, and nothing else reads or writes that part of y.
unsafe fn multiply(
    (m, k, n): (usize, usize, usize),
    (a, of_a): (&[f32], View),
    (b, of_b): (&[f32], View),
    (y, of_y): (Parts, View),
) {
    // SAFETY: as the caller promises.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.0.add(of_y.at),
            of_y.column as isize,
            of_y.row as isize,
            false,
            a.as_ptr().add(of_a.at),
            of_a.column as isize,
            of_a.row as isize,
            b.as_ptr().add(of_b.at),
            of_b.column as isize,
            of_b.row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
