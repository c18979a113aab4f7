//! Cross-entropy of logits against class labels: `lossₙ = log Σ_c exp(x_nc) − x_n,label`.
//!
//! The row's largest logit is taken out first. Sums run in sixteen f32 lanes over 1024 classes and in f64 across those,
//! so that a vocabulary of 250,000 loses nothing. `dx_nc = scaleₙ·(exp(x_nc − lseₙ) − [c = label])`.

use crate::cpu::math::exp;
use crate::cpu::simd::{dispatch, sum16};
use rayon::prelude::*;

/// The label of a row that does not count.
pub const IGNORED: i64 = -100;

/// A label that names no class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("label {label} of row {row} names no class: expected 0 to {}, or -100 to leave the row out", .classes - 1)]
pub struct LabelError {
    /// The row of the label.
    pub row: usize,
    /// The label found.
    pub label: i64,
    /// The number of classes.
    pub classes: usize,
}

/// Per-row losses of `logits` `[rows, classes]`; also the rows' log-sum-exp, which [`backward`] needs.
///
/// `loss` and `lse` are `[rows]`; a row with label −100 has loss 0. Fails before any work when a label names no class.
/// Panics when the lengths differ.
pub fn forward(
    logits: &[f32],
    labels: &[i64],
    classes: usize,
    loss: &mut [f32],
    lse: &mut [f32],
) -> Result<(), LabelError> {
    check(logits, labels, classes)?;
    assert!(
        loss.len() == labels.len() && lse.len() == labels.len(),
        "cross_entropy: loss and lse are not [rows]"
    );
    if labels.is_empty() {
        return Ok(());
    }
    let given = logits.par_chunks(classes).zip(labels);
    loss.par_iter_mut().zip(lse).zip(given).for_each(|((loss, lse), (row, &label))| {
        (*loss, *lse) = (0.0, 0.0);
        if label != IGNORED {
            let (top, log_sum) = log_sum(row);
            *lse = (f64::from(top) + log_sum) as f32;
            *loss = (f64::from(top) - f64::from(row[label as usize]) + log_sum) as f32;
        }
    });
    Ok(())
}

/// The gradient of `Σₙ scaleₙ·lossₙ` in the place of the logits `[rows, classes]`, from `lse` and `scale` `[rows]`.
///
/// Rows with label −100 get zeros. Fails before any work when a label names no class. Panics when the lengths differ.
pub fn backward(
    logits: &mut [f32],
    labels: &[i64],
    classes: usize,
    lse: &[f32],
    scale: &[f32],
) -> Result<(), LabelError> {
    check(logits, labels, classes)?;
    logits.par_chunks_mut(classes).zip(rows(labels, lse, scale)).for_each(|(x, row)| gradient_row(x, row));
    Ok(())
}

fn check(logits: &[f32], labels: &[i64], classes: usize) -> Result<(), LabelError> {
    assert!(classes > 0, "cross_entropy: no classes");
    assert_eq!(logits.len(), labels.len() * classes, "cross_entropy: logits are not [rows, classes]");
    let known = |label: i64| label == IGNORED || usize::try_from(label).is_ok_and(|label| label < classes);
    match labels.iter().position(|&label| !known(label)) {
        Some(row) => Err(LabelError { row, label: labels[row], classes }),
        None => Ok(()),
    }
}

/// What the gradient of one row needs.
#[derive(Clone, Copy)]
struct Row {
    label: i64,
    lse: f32,
    scale: f32,
}

fn rows<'a>(
    labels: &'a [i64],
    lse: &'a [f32],
    scale: &'a [f32],
) -> impl IndexedParallelIterator<Item = Row> + 'a {
    let fits = lse.len() == labels.len() && scale.len() == labels.len();
    assert!(fits, "cross_entropy: lse and scale are not [rows]");
    let given = labels.par_iter().zip(lse).zip(scale);
    given.map(|((&label, &lse), &scale)| Row { label, lse, scale })
}

fn gradient_row(x: &mut [f32], row: Row) {
    if row.label == IGNORED {
        return x.fill(0.0);
    }
    probabilities(x, row.lse, row.scale);
    x[row.label as usize] -= row.scale;
}

#[inline(always)]
fn log_sum_body<const L: usize>(row: &[f32]) -> (f32, f64) {
    let mut tops = [f32::NEG_INFINITY; 16];
    let sixteens = row.chunks_exact(16);
    let tail = sixteens.remainder();
    for x in sixteens {
        for i in 0..16 {
            tops[i] = if x[i] > tops[i] { x[i] } else { tops[i] };
        }
    }
    let top = tops.into_iter().chain(tail.iter().copied()).fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0f64;
    for block in row.chunks(1024) {
        let mut lanes = [0.0f32; 16];
        let sixteens = block.chunks_exact(16);
        let tail: f32 = sixteens.remainder().iter().map(|&x| exp::<L>(x - top)).sum();
        for x in sixteens {
            for i in 0..16 {
                lanes[i] += exp::<L>(x[i] - top);
            }
        }
        sum += f64::from(sum16(lanes) + tail);
    }
    (top, sum.ln())
}

#[inline(always)]
fn probabilities_body<const L: usize>(x: &mut [f32], lse: f32, scale: f32) {
    for x in x {
        *x = scale * exp::<L>(*x - lse);
    }
}

dispatch! {
    /// The row's largest logit, and the logarithm of the sum of what is left.
    fn log_sum(row: &[f32]) -> (f32, f64) = log_sum_body;
    fn probabilities(x: &mut [f32], lse: f32, scale: f32) = probabilities_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::random::Key;

    fn logits(rows: usize, classes: usize) -> Vec<f32> {
        let mut x = vec![0.0; rows * classes];
        Key { seed: 1, stream: classes as u64 }.fill_normal(&mut x);
        x.iter_mut().for_each(|x| *x *= 4.0);
        x
    }

    fn loss64(row: &[f32], label: i64) -> f64 {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let sum: f64 = row.iter().map(|&x| (x as f64 - top).exp()).sum();
        top + sum.ln() - row[label as usize] as f64
    }

    #[test]
    fn losses_and_gradients_equal_the_definition() {
        for (rows, classes) in [(1, 1), (5, 2), (7, 15), (6, 16), (9, 77), (3, 1025), (2, 151_936)] {
            let x = logits(rows, classes);
            let labels: Vec<i64> =
                (0..rows).map(|n| if n % 3 == 2 { IGNORED } else { (n * 31 % classes) as i64 }).collect();
            let scale: Vec<f32> = (0..rows).map(|n| 0.5 + n as f32).collect();
            let (mut loss, mut lse) = (vec![9.0; rows], vec![9.0; rows]);
            forward(&x, &labels, classes, &mut loss, &mut lse).unwrap();
            let mut dx = x.clone();
            backward(&mut dx, &labels, classes, &lse, &scale).unwrap();
            for n in 0..rows {
                let (row, dx) = (&x[n * classes..][..classes], &dx[n * classes..][..classes]);
                if labels[n] == IGNORED {
                    assert!(loss[n] == 0.0 && dx.iter().all(|&dx| dx == 0.0));
                    continue;
                }
                let truth = loss64(row, labels[n]);
                assert!((loss[n] as f64 - truth).abs() <= 2e-7 * truth.abs() + 1e-7, "{} {truth}", loss[n]);
                let log_sum = truth + row[labels[n] as usize] as f64;
                for c in 0..classes {
                    let hot = if c as i64 == labels[n] { 1.0 } else { 0.0 };
                    let expected = scale[n] as f64 * ((row[c] as f64 - log_sum).exp() - hot);
                    assert!((dx[c] as f64 - expected).abs() < 2e-6 * scale[n] as f64, "{} {expected}", dx[c]);
                }
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let (x, labels) = (logits(2, 19), [4, 18]);
        let (mut loss, mut lse, mut dx) = ([0.0; 2], [0.0; 2], x.clone());
        forward(&x, &labels, 19, &mut loss, &mut lse).unwrap();
        backward(&mut dx, &labels, 19, &lse, &[1.0, 3.0]).unwrap();
        let total = |x: &[f32]| loss64(&x[..19], 4) + 3.0 * loss64(&x[19..], 18);
        for i in 0..38 {
            let (mut up, mut down) = (x.clone(), x.clone());
            up[i] += 1e-2;
            down[i] -= 1e-2;
            let slope = (total(&up) - total(&down)) / (up[i] - down[i]) as f64;
            assert!((slope - dx[i] as f64).abs() < 1e-4, "element {i}: {}, expected {slope}", dx[i]);
        }
    }

    #[test]
    fn large_logits_stay_finite_and_nan_shows() {
        let (mut loss, mut lse) = ([0.0; 3], [0.0; 3]);
        let x = [3e38, -3e38, 0.0, 1e4, 9999.0, -1e30, f32::NAN, 0.0, 1.0];
        forward(&x, &[0, 1, 1], 3, &mut loss, &mut lse).unwrap();
        assert_eq!(loss[0], 0.0);
        assert!((loss[1] - 1.313_261_7).abs() < 1e-6);
        assert!(loss[2].is_nan());
    }

    #[test]
    fn a_label_outside_the_classes_is_an_error() {
        let (mut loss, mut lse) = ([0.0; 2], [0.0; 2]);
        for label in [3, -1, i64::MAX, i64::MIN] {
            let error = forward(&[0.0; 6], &[IGNORED, label], 3, &mut loss, &mut lse).unwrap_err();
            assert_eq!(error, LabelError { row: 1, label, classes: 3 });
            assert_eq!(backward(&mut [0.0; 6], &[IGNORED, label], 3, &[0.0; 2], &[0.0; 2]), Err(error));
            let words = format!(
                "label {label} of row 1 names no class: expected 0 to 2, or -100 to leave the row out"
            );
            assert_eq!(error.to_string(), words);
        }
    }
}
