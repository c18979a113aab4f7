//! Products with a sparse matrix S [out, in], given by the columns of each row's entries.
//!
//! Rows of x are turned over in small blocks, so that an entry of S meets one vector of them where they lie in cache. Sums
//! run in the order of the entries and of the rows, whatever the number of threads.

use rayon::prelude::*;

use crate::cpu::simd::{dispatch, fma, sum_pairs};

/// Rows of x in a block of a product.
const BLOCK: usize = 16;
/// Rows of x in a block of the values' gradient, whose entries are products of whole columns.
const GROUP: usize = 64;
/// Entries of S that a task of the values' gradient handles.
const ENTRIES: usize = 1 << 12;

/// Where the entries of S are: row r has those numbered `starts[r]..starts[r + 1]`, `columns` says in which column each is.
#[derive(Clone, Copy)]
pub struct Places<'a> {
    /// One more than there are rows.
    pub starts: &'a [usize],
    /// One a entry, ascending in a row.
    pub columns: &'a [u32],
    /// Number of columns of S.
    pub inn: usize,
}

impl Places<'_> {
    fn out(&self) -> usize {
        self.starts.len() - 1
    }

    fn row(&self, row: usize) -> std::ops::Range<usize> {
        self.starts[row]..self.starts[row + 1]
    }
}

/// Rows of x [rows, width] as columns [width][N], zero where there are fewer than N.
#[inline(always)]
fn turned<const N: usize>(x: &[f32], width: usize) -> Vec<[f32; N]> {
    let mut columns = vec![[0.0; N]; width];
    for (lane, row) in x.chunks_exact(width).enumerate() {
        for (column, &v) in columns.iter_mut().zip(row) {
            column[lane] = v;
        }
    }
    columns
}

/// y += x·Sᵀ; x [rows, in], y [rows, out].
pub fn add_product(s: Places<'_>, values: &[f32], x: &[f32], y: &mut [f32]) {
    let (out, inn) = (s.out(), s.inn);
    if out * inn > 0 {
        let blocks = y.par_chunks_mut(BLOCK * out).zip(x.par_chunks(BLOCK * inn));
        blocks.for_each(|(y, x)| block_product(s, values, x, y));
    }
}

#[inline(always)]
fn block_product_body<const LANES: usize>(s: Places<'_>, values: &[f32], x: &[f32], y: &mut [f32]) {
    let x = turned::<BLOCK>(x, s.inn);
    for row in 0..s.out() {
        let entries = s.row(row);
        if entries.is_empty() {
            continue;
        }
        let mut sum = [0.0f32; BLOCK];
        for (&column, &value) in s.columns[entries.clone()].iter().zip(&values[entries]) {
            let x = &x[column as usize];
            for lane in 0..BLOCK {
                sum[lane] = fma::<LANES>(value, x[lane], sum[lane]);
            }
        }
        for (y, sum) in y.chunks_exact_mut(s.out()).zip(sum) {
            y[row] += sum;
        }
    }
}

dispatch! { fn block_product(s: Places<'_>, values: &[f32], x: &[f32], y: &mut [f32]) = block_product_body; }

/// dx += dy·S; dy [rows, out], dx [rows, in].
pub fn add_product_back(s: Places<'_>, values: &[f32], dy: &[f32], dx: &mut [f32]) {
    let (out, inn) = (s.out(), s.inn);
    if out * inn > 0 {
        let blocks = dx.par_chunks_mut(BLOCK * inn).zip(dy.par_chunks(BLOCK * out));
        blocks.for_each(|(dx, dy)| block_back(s, values, dy, dx));
    }
}

#[inline(always)]
fn block_back_body<const LANES: usize>(s: Places<'_>, values: &[f32], dy: &[f32], dx: &mut [f32]) {
    let dy = turned::<BLOCK>(dy, s.out());
    let mut sums = vec![[0.0f32; BLOCK]; s.inn];
    for (row, dy) in dy.iter().enumerate() {
        let entries = s.row(row);
        for (&column, &value) in s.columns[entries.clone()].iter().zip(&values[entries]) {
            let sum = &mut sums[column as usize];
            for lane in 0..BLOCK {
                sum[lane] = fma::<LANES>(value, dy[lane], sum[lane]);
            }
        }
    }
    for (lane, dx) in dx.chunks_exact_mut(s.inn).enumerate() {
        for (dx, sum) in dx.iter_mut().zip(&sums) {
            *dx += sum[lane];
        }
    }
}

dispatch! { fn block_back(s: Places<'_>, values: &[f32], dy: &[f32], dx: &mut [f32]) = block_back_body; }

/// dv += the entries of dyᵀ·x at the places of S, which is never formed elsewhere.
pub fn add_entries(s: Places<'_>, x: &[f32], dy: &[f32], dv: &mut [f32]) {
    let (out, inn) = (s.out(), s.inn);
    if out * inn == 0 {
        return;
    }
    for (x, dy) in x.chunks(GROUP * inn).zip(dy.chunks(GROUP * out)) {
        let (x, dy) = (turned::<GROUP>(x, inn), turned::<GROUP>(dy, out));
        let tasks = dv.par_chunks_mut(ENTRIES).enumerate();
        tasks.for_each(|(task, dv)| group_entries(s, task * ENTRIES, &x, &dy, dv));
    }
}

#[inline(always)]
fn group_entries_body<const LANES: usize>(
    s: Places<'_>,
    first: usize,
    x: &[[f32; GROUP]],
    dy: &[[f32; GROUP]],
    dv: &mut [f32],
) {
    let end = first + dv.len();
    let mut row = s.starts.partition_point(|&start| start <= first) - 1;
    let mut entry = first;
    while entry < end {
        let stop = s.starts[row + 1].min(end);
        for number in entry..stop {
            let x = &x[s.columns[number] as usize];
            dv[number - first] += sum_pairs(x, &dy[row], |a, b| a * b);
        }
        entry = stop;
        row += 1;
    }
}

dispatch! {
    fn group_entries(s: Places<'_>, first: usize, x: &[[f32; GROUP]], dy: &[[f32; GROUP]], dv: &mut [f32]) = group_entries_body;
}

/// w += S; w [out, in].
pub fn scatter(s: Places<'_>, values: &[f32], w: &mut [f32]) {
    for (row, w) in w.chunks_exact_mut(s.inn.max(1)).enumerate() {
        let entries = s.row(row);
        for (&column, &value) in s.columns[entries.clone()].iter().zip(&values[entries]) {
            w[column as usize] += value;
        }
    }
}

/// dv += w at the places of S.
pub fn gather(s: Places<'_>, w: &[f32], dv: &mut [f32]) {
    for (row, w) in w.chunks_exact(s.inn.max(1)).enumerate() {
        let entries = s.row(row);
        for (&column, dv) in s.columns[entries.clone()].iter().zip(&mut dv[entries]) {
            *dv += w[column as usize];
        }
    }
}
