//! Kernels of the primitive operations: plain loops that the compiler vectorises, with a fixed partition.

use rayon::prelude::*;

use super::simd::{Level, level};
use super::{gamma, math, narrow};
use crate::ops::{Binary, Product, Unary};

/// Elements a task handles; fixed, so that results do not depend on the number of threads.
const CHUNK: usize = 1 << 15;

/// y += x, repeated where y is longer.
pub fn accumulate(x: &[f32], y: &mut [f32]) {
    if x.is_empty() {
        return;
    }
    let add = |y: &mut [f32], x: &[f32]| y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    if x.len() == y.len() {
        return y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| add(y, x));
    }
    let rows = CHUNK.div_ceil(x.len());
    y.par_chunks_mut(rows * x.len()).for_each(|y| y.chunks_mut(x.len()).for_each(|y| add(y, x)));
}

/// Runs `f` on matching pieces of x and y.
fn map(x: &[f32], y: &mut [f32], f: impl Fn(&[f32], &mut [f32]) + Sync) {
    if y.len() <= CHUNK {
        return f(x, y);
    }
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| f(x, y));
}

fn each(x: &[f32], y: &mut [f32], f: impl Fn(f32) -> f32) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = f(x);
    }
}

/// The functions that have vectorised kernels of their own.
fn activation(f: Unary) -> Option<math::Unary> {
    Some(match f {
        Unary::Relu => math::Unary::Relu,
        Unary::Silu => math::Unary::Silu,
        Unary::Gelu => math::Unary::Gelu,
        Unary::GeluTanh => math::Unary::GeluTanh,
        Unary::QuickGelu => math::Unary::QuickGelu,
        Unary::Sigmoid => math::Unary::Sigmoid,
        Unary::Tanh => math::Unary::Tanh,
        Unary::Erf => math::Unary::Erf,
        _ => return None,
    })
}

/// y = f(x).
pub fn unary(f: Unary, x: &[f32], y: &mut [f32]) {
    if let Some(kind) = activation(f) {
        return math::forward(kind, x, y);
    }
    map(x, y, |x, y| match f {
        Unary::Scale(c) => each(x, y, |v| v * c),
        Unary::Shift(c) => each(x, y, |v| v + c),
        Unary::Exp => each(x, y, f32::exp),
        Unary::Sin => each(x, y, f32::sin),
        Unary::Cos => each(x, y, f32::cos),
        Unary::Log => each(x, y, f32::ln),
        Unary::Sqrt => each(x, y, f32::sqrt),
        Unary::Recip => each(x, y, |v| 1.0 / v),
        Unary::Square => each(x, y, |v| v * v),
        Unary::Abs => each(x, y, f32::abs),
        Unary::LnGamma => each(x, y, |v| gamma::ln_gamma(v.into()) as f32),
        Unary::Digamma => each(x, y, |v| gamma::digamma(v.into()) as f32),
        _ => unreachable!("{f:?} has a kernel of its own"),
    });
}

/// dx = dy·f′(x).
pub fn unary_backward(f: Unary, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    if let Some(kind) = activation(f) {
        return math::backward(kind, x, dy, dx);
    }
    map(x, dx, |x, dx| match f {
        Unary::Scale(c) => each(x, dx, |_| c),
        Unary::Shift(_) => each(x, dx, |_| 1.0),
        Unary::Exp => each(x, dx, f32::exp),
        Unary::Sin => each(x, dx, f32::cos),
        Unary::Cos => each(x, dx, |v| -v.sin()),
        Unary::Log => each(x, dx, |v| 1.0 / v),
        Unary::Sqrt => each(x, dx, |v| 0.5 / v.sqrt()),
        Unary::Recip => each(x, dx, |v| -1.0 / (v * v)),
        Unary::Square => each(x, dx, |v| 2.0 * v),
        Unary::Abs => each(x, dx, |v| if v == 0.0 { 0.0 } else { v.signum() }),
        Unary::LnGamma => each(x, dx, |v| gamma::digamma(v.into()) as f32),
        Unary::Digamma => each(x, dx, |v| gamma::trigamma(v.into()) as f32),
        _ => unreachable!("{f:?} has a kernel of its own"),
    });
    map(dy, dx, |dy, dx| {
        for (dx, dy) in dx.iter_mut().zip(dy) {
            *dx *= dy;
        }
    });
}

fn apply(f: Binary, a: f32, b: f32) -> f32 {
    match f {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
    }
}

/// Steps of a broadcast operand: 0 where it has size 1.
fn broadcast_strides(of: &[usize], to: &[usize]) -> Vec<usize> {
    let mut strides = vec![0; to.len()];
    let mut step = 1;
    for (d, &size) in of.iter().enumerate().rev() {
        if size != 1 {
            strides[d + to.len() - of.len()] = step;
        }
        step *= size;
    }
    strides
}

/// y = f(a, b), operands as (elements, shape), broadcast to `shape`.
pub fn binary(f: Binary, a: (&[f32], &[usize]), b: (&[f32], &[usize]), shape: &[usize], y: &mut [f32]) {
    if a.1 == shape && b.1 == shape {
        y.par_chunks_mut(CHUNK).zip(a.0.par_chunks(CHUNK).zip(b.0.par_chunks(CHUNK))).for_each(
            |(y, (a, b))| {
                for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
                    *y = apply(f, a, b);
                }
            },
        );
        return;
    }
    let Some(&inner) = shape.last() else { return y[0] = apply(f, a.0[0], b.0[0]) };
    if y.is_empty() {
        return;
    }
    let (sa, sb) = (broadcast_strides(a.1, shape), broadcast_strides(b.1, shape));
    let last = shape.len() - 1;
    y.par_chunks_mut(inner).enumerate().with_min_len(CHUNK / inner + 1).for_each(|(row, y)| {
        let (mut at_a, mut at_b, mut rest) = (0, 0, row);
        for d in (0..last).rev() {
            at_a += rest % shape[d] * sa[d];
            at_b += rest % shape[d] * sb[d];
            rest /= shape[d];
        }
        match (sa[last], sb[last]) {
            (1, 1) => {
                for ((y, &a), &b) in y.iter_mut().zip(&a.0[at_a..]).zip(&b.0[at_b..]) {
                    *y = apply(f, a, b);
                }
            }
            (step_a, step_b) => {
                for (i, y) in y.iter_mut().enumerate() {
                    *y = apply(f, a.0[at_a + i * step_a], b.0[at_b + i * step_b]);
                }
            }
        }
    });
}

/// y = x `[from]` summed to the shape `to` of the same rank, where sizes are equal or 1.
pub fn sum_to(x: &[f32], from: &[usize], to: &[usize], y: &mut [f32]) {
    y.fill(0.0);
    // Leading dimensions that vanish and a trailing block that stays: column sums.
    let split = to.iter().zip(from).take_while(|(t, f)| **t == 1 && **f != 1).count();
    if to[split..] == from[split..] {
        let width: usize = from[split..].iter().product();
        return column_sums(x, width, y);
    }
    let strides = broadcast_strides(to, from);
    let inner = from[from.len() - 1];
    for (row, x) in x.chunks_exact(inner.max(1)).enumerate() {
        let (mut at, mut rest) = (0, row);
        for d in (0..from.len() - 1).rev() {
            at += rest % from[d] * strides[d];
            rest /= from[d];
        }
        if strides[from.len() - 1] == 0 {
            y[at] += pairwise_sum(x);
        } else {
            for (y, x) in y[at..at + inner].iter_mut().zip(x) {
                *y += x;
            }
        }
    }
}

/// Rows summed in blocks whose partial sums are then added in order: the same for any number of threads.
fn column_sums(x: &[f32], width: usize, y: &mut [f32]) {
    if width == 0 {
        return;
    }
    if width == 1 {
        y[0] = pairwise_sum(x);
        return;
    }
    let rows_per_block = (CHUNK / width).max(16);
    let partial: Vec<Vec<f32>> = x
        .par_chunks(rows_per_block * width)
        .map(|block| {
            let mut sum = vec![0.0f32; width];
            for row in block.chunks_exact(width) {
                for (s, v) in sum.iter_mut().zip(row) {
                    *s += v;
                }
            }
            sum
        })
        .collect();
    for sum in partial {
        for (y, s) in y.iter_mut().zip(sum) {
            *y += s;
        }
    }
}

/// Σ x with an error that grows with the logarithm of the length.
fn pairwise_sum(x: &[f32]) -> f32 {
    if x.len() <= 128 {
        return x.iter().sum();
    }
    let (a, b) = x.split_at(x.len().next_power_of_two() / 2);
    pairwise_sum(a) + pairwise_sum(b)
}

/// Σ x².
pub fn sum_of_squares(x: &[f32]) -> f32 {
    let squares = |block: &[f32]| block.iter().map(|&v| v as f64 * v as f64).sum::<f64>();
    let partial: Vec<f64> = x.par_chunks(CHUNK).map(squares).collect();
    partial.iter().sum::<f64>() as f32
}

/// Dimensions of x in the order `order`.
pub fn permute(x: &[f32], shape: &[usize], order: &[usize], y: &mut [f32]) {
    if y.is_empty() {
        return;
    }
    let mut strides = vec![1; shape.len()];
    for d in (0..shape.len().saturating_sub(1)).rev() {
        strides[d] = strides[d + 1] * shape[d + 1];
    }
    let sizes: Vec<usize> = order.iter().map(|&d| shape[d]).collect();
    let steps: Vec<usize> = order.iter().map(|&d| strides[d]).collect();
    let Some((&inner, outer)) = sizes.split_last() else { return y.copy_from_slice(x) };
    let step = steps[outer.len()];
    y.par_chunks_mut(inner).enumerate().with_min_len(CHUNK / inner + 1).for_each(|(row, y)| {
        let (mut at, mut rest) = (0, row);
        for d in (0..outer.len()).rev() {
            at += rest % sizes[d] * steps[d];
            rest /= sizes[d];
        }
        for (i, y) in y.iter_mut().enumerate() {
            *y = x[at + i * step];
        }
    });
}

/// `y[i] = x[index[i]]` by rows.
pub fn gather_rows(x: &[f32], index: &[i64], y: &mut [f32]) {
    if y.is_empty() {
        return;
    }
    let width = y.len() / index.len();
    y.par_chunks_mut(width).zip(index).with_min_len(CHUNK / width + 1).for_each(|(y, &i)| {
        y.copy_from_slice(&x[i as usize * width..(i as usize + 1) * width]);
    });
}

/// Up to so many are kept in order as a row is read; more are taken apart from the others first.
const FEW: usize = 16;

/// The `k` largest of each row of `width`, the largest first and of equal ones the earliest, and their columns.
pub fn top_k(x: &[f32], width: usize, k: usize, y: &mut [f32], columns: &mut [i64]) {
    let rows = x.par_chunks_exact(width).zip(y.par_chunks_exact_mut(k)).zip(columns.par_chunks_exact_mut(k));
    rows.for_each(
        |((x, y), columns)| if k <= FEW { few_largest(x, y, columns) } else { many_largest(x, y, columns) },
    );
}

/// In at most width·k steps.
fn few_largest(x: &[f32], y: &mut [f32], columns: &mut [i64]) {
    let mut found = 0;
    for (column, &value) in x.iter().enumerate() {
        let place = y[..found].iter().position(|&v| value.total_cmp(&v).is_gt()).unwrap_or(found);
        if place == y.len() {
            continue;
        }
        found = (found + 1).min(y.len());
        y[place..found].rotate_right(1);
        columns[place..found].rotate_right(1);
        y[place] = value;
        columns[place] = column as i64;
    }
}

/// In width + k·log k steps.
fn many_largest(x: &[f32], y: &mut [f32], columns: &mut [i64]) {
    let mut all: Vec<(f32, i64)> = x.iter().copied().zip(0..).collect();
    let order = |a: &(f32, i64), b: &(f32, i64)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if y.len() < all.len() {
        all.select_nth_unstable_by(y.len() - 1, order);
    }
    all[..y.len()].sort_unstable_by(order);
    for ((value, column), (y, own)) in all.into_iter().zip(y.iter_mut().zip(columns)) {
        (*y, *own) = (value, column);
    }
}

/// `y[index[i]] += x[i]` by rows, in order of i.
pub fn scatter_add_rows(x: &[f32], index: &[i64], y: &mut [f32]) {
    if x.is_empty() {
        return;
    }
    let width = x.len() / index.len();
    for (x, &i) in x.chunks_exact(width).zip(index) {
        for (y, x) in y[i as usize * width..(i as usize + 1) * width].iter_mut().zip(x) {
            *y += x;
        }
    }
}

/// Rows of the result, or columns of one that has few rows, per task of a large product.
const PER_TASK: usize = 256;

/// A result that tasks write in disjoint parts.
#[derive(Clone, Copy)]
struct Parts(*mut f32);
// SAFETY: the tasks of `matmul` write disjoint rows or columns.
unsafe impl Send for Parts {}
// SAFETY: as above.
unsafe impl Sync for Parts {}

/// Batched product; large ones are cut by rows or columns of the result, in the same places for any number of threads.
pub fn matmul(p: Product, a: &[f32], b: &[f32], y: &mut [f32]) {
    // Measured with AVX-512 alone.
    if level() < Level::Avx512 || !narrow::narrow(p, a, b, y) {
        general(p, a, b, y);
    }
}

/// Any product.
pub(super) fn general(p: Product, a: &[f32], b: &[f32], y: &mut [f32]) {
    let Product { batch, m, k, n, transpose_a, transpose_b, scale, accumulate, .. } = p;
    if m * n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            y.fill(0.0);
        }
        return;
    }
    assert!(a.len() >= batch * m * k && b.len() >= batch * k * n && y.len() >= batch * m * n);
    let (a_row, a_col) = if transpose_a { (1, m) } else { (k, 1) };
    let (b_row, b_col) = if transpose_b { (1, k) } else { (n, 1) };
    let by_rows = m > PER_TASK || n <= PER_TASK;
    let tasks = if by_rows { m } else { n }.div_ceil(PER_TASK);
    let target = Parts(y.as_mut_ptr());
    let task = |number: usize| {
        let (of, first) = (number / tasks, number % tasks * PER_TASK);
        let (row, column) = if by_rows { (first, 0) } else { (0, first) };
        let (rows, columns) =
            if by_rows { (PER_TASK.min(m - row), n) } else { (m, PER_TASK.min(n - column)) };
        // The closure takes the whole of `target`, which may be shared, not the pointer in it.
        let Parts(y) = { target };
        // SAFETY: the line above the closure proves that a, b and y hold `batch` matrices; the strides of rows
        // row.. and columns column.. stay inside the one that `of` names, and no other task writes these elements.
        unsafe {
            gemm::gemm(
                rows,
                columns,
                k,
                y.add(of * m * n + row * n + column),
                1,
                n as isize,
                accumulate,
                a.as_ptr().add(of * m * k + row * a_row),
                a_col as isize,
                a_row as isize,
                b.as_ptr().add(of * k * n + column * b_col),
                b_col as isize,
                b_row as isize,
                1.0,
                scale,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    };
    (0..batch * tasks).into_par_iter().with_max_len(1).for_each(task);
}

/// Softmax of rows of `width`.
pub fn softmax(x: &[f32], width: usize, y: &mut [f32]) {
    if width == 0 {
        return;
    }
    y.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(CHUNK / width + 1).for_each(|(y, x)| {
        let largest = x.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
        let mut sum = 0.0;
        for (y, x) in y.iter_mut().zip(x) {
            *y = (x - largest).exp();
            sum += *y;
        }
        let inverse = 1.0 / sum;
        y.iter_mut().for_each(|v| *v *= inverse);
    });
}

/// dx = y·(dy − Σ y·dy) by rows of `width`.
pub fn softmax_backward(y: &[f32], dy: &[f32], width: usize, dx: &mut [f32]) {
    if width == 0 {
        return;
    }
    let rows = dx.par_chunks_mut(width).zip(y.par_chunks(width).zip(dy.par_chunks(width)));
    rows.with_min_len(CHUNK / width + 1).for_each(|(dx, (y, dy))| {
        let dot: f32 = y.iter().zip(dy).map(|(a, b)| a * b).sum();
        for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) {
            *dx = y * (dy - dot);
        }
    });
}
