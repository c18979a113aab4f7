//! Attention for a few query rows on many keys, as in generation: bound by reading the keys and values once.
//!
//! All heads go through the keys together, so that memory is read in order, and long sequences are cut into parts of
//! 256 keys whose results are put together in order: with each part's `top`, `sum` and `Σ exp(score − top)·v`, the
//! whole is their sum, each shrunk by `exp(top − largest top)`.

use super::{Inputs, Running, Shared, Span, mask};
use crate::cpu::math::exp;
use crate::cpu::simd::{dispatch, fma, sum16};
use rayon::prelude::*;
use std::ops::Range;

/// Keys in one parallel part.
const PART: usize = 256;

/// Keys whose scores are held at once.
const TILE: usize = 32;

/// A part's result for the rows of its span: state `[rows, heads]` and weighted sums `[rows, heads, dim]`.
struct Partial {
    state: Vec<Running>,
    sums: Vec<f32>,
}

/// Writes the rows of `spans` in y and lse.
pub(super) fn forward(x: &Inputs, spans: &[&Span], y: Shared, lse: Shared) {
    let parts = |span: &Span| span.kv.clone().step_by(PART).map(move |from| from..from + PART);
    let units: Vec<(&Span, Range<usize>)> = spans
        .iter()
        .flat_map(|&span| parts(span).map(move |keys| (span, keys.start..keys.end.min(span.kv.end))))
        .collect();
    let found: Vec<Partial> = units.into_par_iter().map(|(span, keys)| part(x, span, keys)).collect();
    let mut found = found.as_slice();
    for span in spans {
        let (own, rest) = found.split_at(span.kv.len().div_ceil(PART));
        found = rest;
        // SAFETY: `check` found the spans apart, so these rows are this span's alone, and no part is running.
        unsafe { unite(x, span, own, y, lse) };
    }
}

/// # Safety
/// Nobody else holds the span's rows of y and lse.
unsafe fn unite(x: &Inputs, span: &Span, parts: &[Partial], y: Shared, lse: Shared) {
    let (heads, dim) = (x.spec.heads, x.spec.dim);
    let mut sums = vec![0.0; dim];
    for cell in 0..span.q.len() * heads {
        let mut whole = Running::START;
        whole.top = parts.iter().fold(whole.top, |top, part| top.max(part.state[cell].top));
        let base = if whole.top == f32::NEG_INFINITY { 0.0 } else { whole.top };
        sums.fill(0.0);
        for part in parts {
            let share = exp::<4>(part.state[cell].top - base);
            // A part of NaN alone has no top; its NaN must reach the result all the same.
            let share = if part.state[cell].sum.is_nan() { 1.0 } else { share };
            whole.sum += share * part.state[cell].sum;
            sums.iter_mut().zip(&part.sums[cell * dim..]).for_each(|(sum, part)| *sum += share * part);
        }
        // SAFETY: the caller's.
        unsafe { whole.finish(x, span.q.start + cell / heads, cell % heads, &sums, y, lse) };
    }
}

/// All rows and heads of a span against `keys`, rows of k and v.
#[inline(always)]
fn part_body<const L: usize>(x: &Inputs, span: &Span, keys: Range<usize>) -> Partial {
    let (heads, dim, group) = (x.spec.heads, x.spec.dim, x.group());
    let visible = x.visible(span, span.q.clone());
    let cells = span.q.len() * heads;
    let q = &x.q[x.q_at(span.q.start, 0)..][..cells * dim];
    let mut scores = vec![0.0; cells * TILE];
    let mut found = Partial { state: vec![Running::START; cells], sums: vec![0.0; cells * dim] };
    let first = visible.first().map_or(0, |v| v.0) + span.kv.start;
    let last = visible.last().map_or(0, |v| v.1) + span.kv.start;
    for from in (keys.start.max(first)..keys.end.min(last)).step_by(TILE) {
        let to = keys.end.min(last).min(from + TILE);
        for j in from..to {
            let key = &x.k[x.kv_at(j, 0)..][..x.kv_stride()];
            // Heads of one group lie side by side, and the groups in the order of the key heads.
            for (at, q) in q.chunks_exact(group * dim).enumerate() {
                let key = &key[at % x.spec.kv_heads * dim..][..dim];
                for (g, q) in q.chunks_exact(dim).enumerate() {
                    scores[(at * group + g) * TILE + j - from] = dot::<L>(q, key);
                }
            }
        }
        let start = from - span.kv.start;
        for (cell, scores) in scores.chunks_exact_mut(TILE).enumerate() {
            let (a, b) = visible[cell / heads];
            let scale = x.add_bias(&mut scores[..to - from], span.q.start + cell / heads, cell % heads, from);
            let end = b.min(to - span.kv.start).saturating_sub(start);
            mask(scores, a.max(start) - start, end, f32::NEG_INFINITY);
            let shrink = found.state[cell].take_in::<L>(scores, scale);
            if shrink != 1.0 {
                found.sums[cell * dim..][..dim].iter_mut().for_each(|sum| *sum *= shrink);
            }
        }
        for j in (from..to).step_by(4) {
            let values = &x.v[x.kv_at(j, 0)..x.kv_at(to.min(j + 4), 0)];
            for (at, sums) in found.sums.chunks_exact_mut(group * dim).enumerate() {
                let values = &values[at % x.spec.kv_heads * dim..];
                for (g, sums) in sums.chunks_exact_mut(dim).enumerate() {
                    let shares = &scores[(at * group + g) * TILE + j - from..][..to.min(j + 4) - j];
                    add_values::<L>(shares, values, x.kv_stride(), sums);
                }
            }
        }
    }
    found
}

/// `sums += Σ_j shares[j]·values[j]` for up to four keys, whose values lie `stride` apart.
#[inline(always)]
fn add_values<const L: usize>(shares: &[f32], values: &[f32], stride: usize, sums: &mut [f32]) {
    let dim = sums.len();
    if let &[a, b, c, d] = shares {
        let value = |j: usize| &values[j * stride..][..dim];
        let (va, vb, vc, vd) = (value(0), value(1), value(2), value(3));
        for i in 0..dim {
            let early = fma::<L>(b, vb[i], fma::<L>(a, va[i], sums[i]));
            sums[i] = fma::<L>(d, vd[i], fma::<L>(c, vc[i], early));
        }
    } else {
        for (&share, value) in shares.iter().zip(values.chunks(stride)) {
            sums.iter_mut().zip(value).for_each(|(sum, &v)| *sum = fma::<L>(share, v, *sum));
        }
    }
}

#[inline(always)]
fn dot<const L: usize>(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut lanes = [0.0; 16];
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            lanes[i] = fma::<L>(a[i], b[i], lanes[i]);
        }
    }
    sum16(lanes) + a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum::<f32>()
}

dispatch! { fn part(x: &Inputs, span: &Span, keys: Range<usize>) -> Partial = part_body; }
