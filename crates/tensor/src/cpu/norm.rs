//! Layer norm and RMS norm over rows of `width` numbers.
//!
//! `x̂ = (x − mean)·rstd`, `y = x̂·gain + bias`, `rstd = 1/√(mean((x − mean)²) + ε)`; RMS norm has mean = 0 and no bias.
//! With `g = dy·gain`: `dx = rstd·(g − mean(g) − x̂·mean(g·x̂))` (RMS norm without the `mean(g)`),
//! `dgain = Σ_rows dy·x̂`, `dbias = Σ_rows dy`. Only mean and rstd are kept for the backward pass.

use crate::cpu::simd::{dispatch, fma, sum_pairs};
use rayon::prelude::*;

/// Rows in one parallel part; sums over rows are made part by part, then over parts in order.
const ROWS: usize = 32;

/// `y` `[rows, width]` from `x` `[rows, width]`; keeps `mean` and `rstd` `[rows]`. A missing gain is 1, a missing bias 0.
///
/// Panics when the lengths do not fit.
pub fn layer_norm(
    x: &[f32],
    gain: Option<&[f32]>,
    bias: Option<&[f32]>,
    eps: f32,
    y: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    let width = row_width(x.len(), rstd.len());
    assert!(
        y.len() == x.len() && mean.len() == rstd.len(),
        "layer_norm: y, mean or rstd has the wrong length"
    );
    let (ones, zeros) = (vec![1.0; width], vec![0.0; width]);
    let (gain, bias) = (gain.unwrap_or(&ones), bias.unwrap_or(&zeros));
    assert!(gain.len() == width && bias.len() == width, "layer_norm: gain and bias are not [{width}]");
    if width == 0 {
        return;
    }
    let stats = mean.par_chunks_mut(ROWS).zip(rstd.par_chunks_mut(ROWS));
    let parts = y.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).zip(stats);
    parts.for_each(|((y, x), (mean, rstd))| forward_part(x, gain, bias, eps, y, Some(mean), rstd));
}

/// `y = x·rstd·gain` `[rows, width]`; keeps `rstd` `[rows]`. A missing gain is 1. Panics when the lengths do not fit.
pub fn rms_norm(x: &[f32], gain: Option<&[f32]>, eps: f32, y: &mut [f32], rstd: &mut [f32]) {
    let width = row_width(x.len(), rstd.len());
    assert_eq!(y.len(), x.len(), "rms_norm: x and y differ in length");
    let (ones, zeros) = (vec![1.0; width], vec![0.0; width]);
    let gain = gain.unwrap_or(&ones);
    assert_eq!(gain.len(), width, "rms_norm: gain is not [width]");
    if width == 0 {
        return;
    }
    let parts = y.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).zip(rstd.par_chunks_mut(ROWS));
    parts.for_each(|((y, x), rstd)| forward_part(x, gain, &zeros, eps, y, None, rstd));
}

/// The gradients that a backward pass is asked for.
#[derive(Debug, Default)]
pub struct Gradients<'a> {
    /// `[rows, width]`
    pub dx: Option<&'a mut [f32]>,
    /// `[width]`
    pub dgain: Option<&'a mut [f32]>,
    /// `[width]`
    pub dbias: Option<&'a mut [f32]>,
}

/// Writes the gradients asked for, from what [`layer_norm`] was given and kept. Panics when the lengths do not fit.
pub fn layer_norm_backward(
    x: &[f32],
    dy: &[f32],
    gain: Option<&[f32]>,
    mean: &[f32],
    rstd: &[f32],
    wanted: Gradients,
) {
    assert_eq!(mean.len(), rstd.len(), "layer_norm: mean and rstd differ in length");
    backward(x, dy, gain, Some(mean), rstd, wanted);
}

/// Writes the gradients asked for, from what [`rms_norm`] was given and kept. Panics when the lengths do not fit.
pub fn rms_norm_backward(x: &[f32], dy: &[f32], gain: Option<&[f32]>, rstd: &[f32], wanted: Gradients) {
    backward(x, dy, gain, None, rstd, wanted);
}

fn row_width(length: usize, rows: usize) -> usize {
    assert!(length.is_multiple_of(rows.max(1)) && (rows > 0 || length == 0), "norm: x is not [rows, width]");
    length / rows.max(1)
}

fn backward(
    x: &[f32],
    dy: &[f32],
    gain: Option<&[f32]>,
    mean: Option<&[f32]>,
    rstd: &[f32],
    wanted: Gradients,
) {
    let width = row_width(x.len(), rstd.len());
    let ones = vec![1.0; width];
    let gain = gain.unwrap_or(&ones);
    let Gradients { dx, dgain, dbias } = wanted;
    assert!(dy.len() == x.len() && gain.len() == width, "norm: dy or gain has the wrong length");
    assert!(dx.as_ref().is_none_or(|dx| dx.len() == x.len()), "norm: dx is not [rows, width]");
    let sums_wanted = dgain.is_some() || dbias.is_some();
    let parts = rstd.len().div_ceil(ROWS);
    if width == 0 || parts == 0 {
        dgain.into_iter().chain(dbias).for_each(|sum| sum.fill(0.0));
        return;
    }
    let mut sums = vec![0.0; if sums_wanted { parts * 2 * width } else { 0 }];
    let mut places: Vec<(Option<&mut [f32]>, &mut [f32])> = match dx {
        Some(dx) => dx.chunks_mut(ROWS * width).map(|dx| (Some(dx), Default::default())).collect(),
        None => (0..parts).map(|_| Default::default()).collect(),
    };
    places.iter_mut().zip(sums.chunks_mut(2 * width)).for_each(|(place, sums)| place.1 = sums);
    places.into_par_iter().enumerate().for_each(|(part, (dx, sums))| {
        let rows = part * ROWS..rstd.len().min((part + 1) * ROWS);
        let cells = rows.start * width..rows.end * width;
        let mean = mean.map(|mean| &mean[rows.clone()]);
        backward_part(&x[cells.clone()], &dy[cells], gain, mean, &rstd[rows], dx, sums);
    });
    for (sum, half) in [(dgain, 0), (dbias, 1)] {
        if let Some(sum) = sum {
            assert_eq!(sum.len(), width, "norm: dgain or dbias is not [width]");
            sum.fill(0.0);
            for part in sums.chunks_exact(2 * width) {
                sum.iter_mut().zip(&part[half * width..]).for_each(|(sum, part)| *sum += part);
            }
        }
    }
}

/// `mean` is absent for RMS norm.
#[inline(always)]
fn forward_body<const L: usize>(
    x: &[f32],
    gain: &[f32],
    bias: &[f32],
    eps: f32,
    y: &mut [f32],
    mut mean: Option<&mut [f32]>,
    rstd: &mut [f32],
) {
    let width = gain.len();
    let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(rstd);
    for (n, ((x, y), rstd)) in rows.enumerate() {
        let mut middle = 0.0;
        if let Some(mean) = &mut mean {
            middle = sum_pairs(x, x, |x, _| x) / width as f32;
            mean[n] = middle;
        }
        let spread = sum_pairs(x, x, |x, _| (x - middle) * (x - middle)) / width as f32;
        *rstd = 1.0 / (spread + eps).sqrt();
        for (((y, &x), &gain), &bias) in y.iter_mut().zip(x).zip(gain).zip(bias) {
            *y = fma::<L>((x - middle) * *rstd, gain, bias);
        }
    }
}

/// `sums` is `[2, width]`, dgain before dbias, or empty when neither is wanted.
#[inline(always)]
fn backward_body<const L: usize>(
    x: &[f32],
    dy: &[f32],
    gain: &[f32],
    mean: Option<&[f32]>,
    rstd: &[f32],
    mut dx: Option<&mut [f32]>,
    sums: &mut [f32],
) {
    let width = gain.len();
    let (dgain, dbias) = sums.split_at_mut(sums.len() / 2);
    let mut product = vec![0.0; width]; // g·x̂
    for (n, ((x, dy), &rstd)) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(rstd).enumerate() {
        let middle = mean.map_or(0.0, |mean| mean[n]);
        for (((dgain, dbias), &x), &dy) in dgain.iter_mut().zip(&mut *dbias).zip(x).zip(dy) {
            *dgain = fma::<L>(dy, (x - middle) * rstd, *dgain);
            *dbias += dy;
        }
        let Some(dx) = &mut dx else { continue };
        for (((p, &x), &dy), &gain) in product.iter_mut().zip(x).zip(dy).zip(gain) {
            *p = dy * gain * ((x - middle) * rstd);
        }
        let along = sum_pairs(&product, &product, |p, _| p) / width as f32;
        let level =
            if mean.is_some() { sum_pairs(dy, gain, |dy, gain| dy * gain) / width as f32 } else { 0.0 };
        let row = &mut dx[n * width..][..width];
        for (((dx, &x), &dy), &gain) in row.iter_mut().zip(x).zip(dy).zip(gain) {
            let unit = (x - middle) * rstd;
            *dx = rstd * fma::<L>(unit, -along, dy * gain - level);
        }
    }
}

dispatch! {
    fn forward_part(x: &[f32], gain: &[f32], bias: &[f32], eps: f32, y: &mut [f32], mean: Option<&mut [f32]>,
        rstd: &mut [f32]) = forward_body;
    fn backward_part(x: &[f32], dy: &[f32], gain: &[f32], mean: Option<&[f32]>, rstd: &[f32],
        dx: Option<&mut [f32]>, sums: &mut [f32]) = backward_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::random::Key;

    fn random(stream: u64, length: usize) -> Vec<f32> {
        let mut x = vec![0.0; length];
        Key { seed: 2, stream }.fill_normal(&mut x);
        x
    }

    /// y in f64, `centred` for layer norm.
    fn reference(x: &[f64], gain: &[f32], bias: &[f32], eps: f32, centred: bool) -> Vec<f64> {
        let width = gain.len();
        let row = |x: &[f64]| {
            let mean = if centred { x.iter().sum::<f64>() / width as f64 } else { 0.0 };
            let spread = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let rstd = 1.0 / (spread + eps as f64).sqrt();
            let y = |(i, x): (usize, &f64)| (x - mean) * rstd * gain[i] as f64 + bias[i] as f64;
            x.iter().enumerate().map(y).collect::<Vec<_>>()
        };
        x.chunks(width).flat_map(row).collect()
    }

    fn check(rows: usize, width: usize, centred: bool) {
        let x: Vec<f32> = random(1, rows * width).iter().map(|x| x * 2.0 + 3.0).collect();
        let (gain, mut bias, dy) = (random(2, width), random(3, width), random(4, rows * width));
        let eps = 1e-5;
        let (mut y, mut mean, mut rstd) = (vec![0.0; x.len()], vec![0.0; rows], vec![0.0; rows]);
        let (mut dx, mut dgain, mut dbias) = (vec![9.0; x.len()], vec![9.0; width], vec![9.0; width]);
        let wanted = Gradients { dx: Some(&mut dx), dgain: Some(&mut dgain), dbias: Some(&mut dbias) };
        if centred {
            layer_norm(&x, Some(&gain), Some(&bias), eps, &mut y, &mut mean, &mut rstd);
            layer_norm_backward(&x, &dy, Some(&gain), &mean, &rstd, wanted);
        } else {
            bias.fill(0.0);
            rms_norm(&x, Some(&gain), eps, &mut y, &mut rstd);
            rms_norm_backward(&x, &dy, Some(&gain), &rstd, wanted);
        }
        let wide: Vec<f64> = x.iter().map(|&x| x as f64).collect();
        let truth = reference(&wide, &gain, &bias, eps, centred);
        for (y, truth) in y.iter().zip(&truth) {
            assert!(
                (*y as f64 - truth).abs() < 3e-6 * (1.0 + truth.abs()),
                "{rows}×{width}: {y}, expected {truth}"
            );
        }
        // Finite differences of Σ y·dy in f64: one row of dx each, and the sums by their definition.
        let plain = reference(&wide, &vec![1.0; width], &vec![0.0; width], eps, centred);
        for i in 0..width {
            let column = |f: &dyn Fn(usize) -> f64| (i..x.len()).step_by(width).map(f).sum::<f64>();
            let expected = column(&|at| plain[at] * dy[at] as f64);
            assert!((dgain[i] as f64 - expected).abs() < 1e-5 * (rows as f64), "dgain[{i}]");
            assert!(
                (dbias[i] as f64 - column(&|at| dy[at] as f64)).abs() < 1e-5 * (rows as f64),
                "dbias[{i}]"
            );
        }
        for at in (0..x.len()).step_by(1 + x.len() / 50) {
            let row = at / width * width..(at / width + 1) * width;
            let total = |h: f64| {
                let mut x = wide[row.clone()].to_vec();
                x[at - row.start] += h;
                let y = reference(&x, &gain, &bias, eps, centred);
                y.iter().zip(&dy[row.clone()]).map(|(y, &dy)| y * dy as f64).sum::<f64>()
            };
            let slope = (total(1e-5) - total(-1e-5)) / 2e-5;
            assert!(
                (dx[at] as f64 - slope).abs() < 2e-5 * (1.0 + slope.abs()),
                "dx[{at}] {}, expected {slope}",
                dx[at]
            );
        }
    }

    #[test]
    fn values_and_gradients_equal_the_definition() {
        for (rows, width) in [(1, 8), (3, 2), (5, 17), (33, 48), (100, 384), (2, 4096)] {
            check(rows, width, true);
            check(rows, width, false);
        }
    }

    #[test]
    fn one_gradient_alone_equals_all_together() {
        let (x, dy, gain) = (random(5, 40 * 24), random(6, 40 * 24), random(7, 24));
        let (mut y, mut rstd) = (vec![0.0; x.len()], vec![0.0; 40]);
        rms_norm(&x, Some(&gain), 1e-6, &mut y, &mut rstd);
        let (mut dx, mut dgain) = (vec![0.0; x.len()], vec![0.0; 24]);
        let both = Gradients { dx: Some(&mut dx), dgain: Some(&mut dgain), dbias: None };
        rms_norm_backward(&x, &dy, Some(&gain), &rstd, both);
        let (mut dx_alone, mut dgain_alone) = (vec![0.0; x.len()], vec![0.0; 24]);
        rms_norm_backward(
            &x,
            &dy,
            Some(&gain),
            &rstd,
            Gradients { dx: Some(&mut dx_alone), ..Default::default() },
        );
        let alone = Gradients { dgain: Some(&mut dgain_alone), ..Default::default() };
        rms_norm_backward(&x, &dy, Some(&gain), &rstd, alone);
        assert_eq!((dx, dgain), (dx_alone, dgain_alone));
    }

    #[test]
    fn a_missing_gain_is_one_and_no_rows_are_fine() {
        let x = random(8, 3 * 20);
        let (mut y, mut z, mut mean, mut rstd) = (vec![0.0; 60], vec![0.0; 60], [0.0; 3], [0.0; 3]);
        layer_norm(&x, None, None, 1e-5, &mut y, &mut mean, &mut rstd);
        layer_norm(&x, Some(&[1.0; 20]), Some(&[0.0; 20]), 1e-5, &mut z, &mut mean, &mut rstd);
        assert_eq!(y, z);
        layer_norm(&[], None, None, 1e-5, &mut [], &mut [], &mut []);
    }
}
