//! Products with sparse matrices whose places are fixed.

use rayon::prelude::*;

use crate::ops::Places;

/// Rows that one task multiplies.
const ROWS: usize = 32;

/// y = x·Mᵀ, or x·M where `transposed`, with M holding `values` at the places; places that occur twice add up.
pub fn sparse_product(p: &Places, transposed: bool, values: &[f32], x: &[f32], y: &mut [f32]) {
    let (mut to, mut from) = ((p.out, &p.rows), (p.inn, &p.columns));
    if transposed {
        (to, from) = (from, to);
    }
    let ((out, to), (inn, from)) = (to, from);
    y.par_chunks_mut(out * ROWS).zip(x.par_chunks(inn * ROWS)).for_each(|(y, x)| {
        for (y, x) in y.chunks_exact_mut(out).zip(x.chunks_exact(inn)) {
            y.fill(0.0);
            for ((&value, &to), &from) in values.iter().zip(to).zip(from) {
                y[to as usize] += value * x[from as usize];
            }
        }
    });
}

/// dv[k] = Σₜ dy[t, rowₖ]·x[t, columnₖ].
pub fn sparse_product_backward(p: &Places, x: &[f32], dy: &[f32], dv: &mut [f32]) {
    let parts: Vec<Vec<f32>> = x
        .par_chunks(p.inn * ROWS)
        .zip(dy.par_chunks(p.out * ROWS))
        .map(|(x, dy)| {
            let mut sum = vec![0.0; p.rows.len()];
            for (x, dy) in x.chunks_exact(p.inn).zip(dy.chunks_exact(p.out)) {
                for ((sum, &row), &column) in sum.iter_mut().zip(&p.rows).zip(&p.columns) {
                    *sum += dy[row as usize] * x[column as usize];
                }
            }
            sum
        })
        .collect();
    dv.fill(0.0);
    for part in parts {
        dv.iter_mut().zip(part).for_each(|(dv, part)| *dv += part);
    }
}
