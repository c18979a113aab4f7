//! The soft choice of k among n scores, by coordinate descent on an annealed entropy problem.
//!
//! Of maximise sᵀλ + ε·H(λ) under Σλ = k, 0 ≤ λ ≤ 1: b = −s; repeat a = ε·(ln k − ln Σ exp((s + b)/ε)), b = −max(s + a, 0),
//! ε ← max(decay·ε, least); λ = exp((s + a + b)/ε). Computed in f64: at a small ε the exponents are large.

use crate::ops::Anneal;

/// What backward needs of each iteration: a and ε, and b before it.
struct Iteration {
    eps: f64,
    a: f64,
    b: Vec<f64>,
}

/// All iterations on the scores of one segment; the last entry has the final a, ε and b.
fn iterate(s: &[f32], k: usize, anneal: &Anneal) -> Vec<Iteration> {
    let mut eps = f64::from(anneal.first.max(anneal.least));
    let mut b: Vec<f64> = s.iter().map(|&s| -f64::from(s)).collect();
    let mut all = Vec::with_capacity(anneal.iterations + 1);
    let mut a = 0.0;
    for _ in 0..anneal.iterations {
        let scaled: Vec<f64> = s.iter().zip(&b).map(|(&s, b)| (f64::from(s) + b) / eps).collect();
        let largest = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scaled.iter().map(|v| (v - largest).exp()).sum();
        a = eps * ((k as f64).ln() - largest - sum.ln());
        let next = s.iter().map(|&s| -(f64::from(s) + a).max(0.0)).collect();
        all.push(Iteration { eps, a, b: std::mem::replace(&mut b, next) });
        eps = (eps * f64::from(anneal.decay)).max(f64::from(anneal.least));
    }
    all.push(Iteration { eps, a, b });
    all
}

fn shares(s: &[f32], last: &Iteration) -> impl Iterator<Item = f64> {
    s.iter().zip(&last.b).map(|(&s, b)| ((f64::from(s) + last.a + b) / last.eps).exp())
}

/// λ of each segment (its length and k) of s.
pub fn soft_top_k(s: &[f32], segments: &[(usize, usize)], anneal: &Anneal, y: &mut [f32]) {
    let mut at = 0;
    for &(n, k) in segments {
        let own = &s[at..at + n];
        if let Some(last) = iterate(own, k, anneal).last() {
            y[at..at + n].iter_mut().zip(shares(own, last)).for_each(|(y, share)| *y = share as f32);
        }
        at += n;
    }
}

/// The gradient of the scores.
pub fn soft_top_k_backward(
    s: &[f32],
    segments: &[(usize, usize)],
    anneal: &Anneal,
    dy: &[f32],
    ds: &mut [f32],
) {
    let mut at = 0;
    for &(n, k) in segments {
        let (own, dy) = (&s[at..at + n], &dy[at..at + n]);
        let all = iterate(own, k, anneal);
        let gradient = segment_backward(own, &all, dy);
        ds[at..at + n].iter_mut().zip(gradient).for_each(|(ds, g)| *ds = g as f32);
        at += n;
    }
}

fn segment_backward(s: &[f32], all: &[Iteration], dy: &[f32]) -> Vec<f64> {
    let Some((last, iterations)) = all.split_last() else { return vec![0.0; s.len()] };
    let through = shares(s, last).zip(dy).map(|(share, &dy)| share * f64::from(dy) / last.eps);
    let mut db: Vec<f64> = through.collect();
    let mut ds = db.clone();
    let mut da: f64 = db.iter().sum();
    for step in iterations.iter().rev() {
        // b = −max(s + a, 0)
        for ((ds, db), &s) in ds.iter_mut().zip(&mut db).zip(s) {
            let open = f64::from(s) + step.a > 0.0;
            let through = if open { *db } else { 0.0 };
            *ds -= through;
            da -= through;
        }
        // a = ε·(ln k − ln Σ exp((s + b)/ε)), whose slope is minus a softmax.
        let scaled: Vec<f64> = s.iter().zip(&step.b).map(|(&s, b)| (f64::from(s) + b) / step.eps).collect();
        let largest = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scaled.iter().map(|v| (v - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for ((ds, db), weight) in ds.iter_mut().zip(&mut db).zip(weights) {
            *db = -da * weight / sum;
            *ds += *db;
        }
        da = 0.0;
    }
    // b₀ = −s
    ds.iter_mut().zip(db).for_each(|(ds, db)| *ds -= db);
    ds
}

/// The k places of the largest numbers of each segment, of equal ones the earliest, in ascending order.
pub fn largest(s: &[f32], segments: &[(usize, usize)]) -> Vec<i64> {
    let (mut found, mut at) = (Vec::new(), 0);
    for &(n, k) in segments {
        let mut order: Vec<usize> = (at..at + n).collect();
        order.sort_by(|&a, &b| s[b].total_cmp(&s[a]));
        order.truncate(k);
        order.sort_unstable();
        found.extend(order.into_iter().map(|row| row as i64));
        at += n;
    }
    found
}
