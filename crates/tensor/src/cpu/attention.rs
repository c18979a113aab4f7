//! Attention over packed sequences: `y = softmax(scale·q·kᵀ, over the visible keys)·v`, tile by tile.
//!
//! Sequences of any lengths lie one behind another; a [`Span`] names a sequence's rows of q and of k and v. No score
//! matrix is ever whole: 64 keys at a time, with a running maximum and sum (FlashAttention, arXiv 2205.14135). A key is
//! visible when `!causal || kv_pos ≤ q_pos`, and, causal with a window, when `q_pos − kv_pos < window`. Positions do not
//! fall inside a span, so the visible keys of a row are one range, and tiles outside all ranges cost nothing.
//!
//! Shapes: q, y `[Tq, heads, dim]`; k, v `[Tk, kv_heads, dim]`; query head h reads key head `h·kv_heads/heads`; lse
//! `[Tq, heads]` is the logarithm of the softmax's denominator, −∞ where no key is visible (then y is 0).

mod backward;
mod decode;
#[cfg(test)]
mod tests;

pub use backward::{Gradients, backward};

use crate::cpu::math::exp;
use crate::cpu::simd::{dispatch, sum16};
use crate::cpu::tile::{self, Left, Out, Right};
use rayon::prelude::*;
use std::ops::Range;

/// Keys in one tile.
const TILE: usize = 64;

/// Fewer query rows than this stream through the keys; packing a tile would cost more than it saves.
const FEW: usize = 4;

/// One sequence: its rows of q and its rows of k and v.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Rows of q and y.
    pub q: Range<usize>,
    /// Rows of k and v.
    pub kv: Range<usize>,
}

/// The form of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Numbers in a head.
    pub dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Whether a query sees only keys at or before its own position.
    pub causal: bool,
    /// How many positions a causal query sees, its own included; without one, all. Ignored when not causal.
    pub window: Option<usize>,
}

/// What is added to the scaled score of a query and a key, by how far the key lies behind or ahead (T5's relative
/// positions).
#[derive(Clone, Copy, Debug)]
pub struct Bias<'a> {
    /// `[heads, distances]`
    pub values: &'a [f32],
    /// `kv_pos − q_pos` of the first column.
    pub first: i32,
}

/// What attention reads, in both directions.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[Tq, heads, dim]`
    pub q: &'a [f32],
    /// `[Tk, kv_heads, dim]`
    pub k: &'a [f32],
    /// `[Tk, kv_heads, dim]`
    pub v: &'a [f32],
    /// The sequences, in order of their rows of q.
    pub spans: &'a [Span],
    /// Positions of the queries, `[Tq]`.
    pub q_pos: &'a [i32],
    /// Positions of the keys, `[Tk]`.
    pub kv_pos: &'a [i32],
    /// Heads, scale and mask.
    pub spec: AttentionSpec,
    /// Added to the scores.
    pub bias: Option<Bias<'a>>,
}

/// A pointer that parallel units write through, each to rows and heads of its own.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: units write disjoint elements: `Inputs::check` refuses spans that overlap.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Inputs<'_> {
    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.spec.heads / self.spec.kv_heads
    }

    fn q_stride(&self) -> usize {
        self.spec.heads * self.spec.dim
    }

    fn kv_stride(&self) -> usize {
        self.spec.kv_heads * self.spec.dim
    }

    /// Panics unless the shapes fit, the spans lie inside them, apart and in order, and positions do not fall.
    fn check(&self, kv_apart: bool) {
        let s = self.spec;
        assert!(
            s.dim > 0 && s.kv_heads > 0 && s.heads.is_multiple_of(s.kv_heads),
            "attention: heads are {s:?}"
        );
        let (tq, tk) = (self.q_pos.len(), self.kv_pos.len());
        assert_eq!(self.q.len(), tq * self.q_stride(), "attention: q is not [Tq, heads, dim]");
        assert_eq!(self.k.len(), tk * self.kv_stride(), "attention: k is not [Tk, kv_heads, dim]");
        assert_eq!(self.v.len(), tk * self.kv_stride(), "attention: v is not [Tk, kv_heads, dim]");
        let (mut q_end, mut kv_end) = (0, 0);
        for span in self.spans {
            let Span { q, kv } = span;
            assert!(q_end <= q.start && q.start <= q.end && q.end <= tq, "attention: q rows of {span:?}");
            assert!(kv.start <= kv.end && kv.end <= tk, "attention: key rows of {span:?}");
            assert!(
                !kv_apart || kv_end <= kv.start,
                "attention: {span:?} shares keys with the span before it"
            );
            (q_end, kv_end) = (q.end, kv.end);
            let ordered = self.q_pos[q.clone()].is_sorted() && self.kv_pos[kv.clone()].is_sorted();
            assert!(!s.causal || ordered, "attention: positions fall inside {span:?}");
            self.check_bias(span);
        }
    }

    /// Panics unless the bias has a column for every distance inside `span`.
    fn check_bias(&self, span: &Span) {
        let Some(bias) = self.bias else { return };
        let ends = |positions: &[i32]| Some((*positions.iter().min()?, *positions.iter().max()?));
        let (Some(q), Some(kv)) = (ends(&self.q_pos[span.q.clone()]), ends(&self.kv_pos[span.kv.clone()]))
        else {
            return;
        };
        let distances = bias.values.len() / self.spec.heads;
        let (nearest, farthest) = (i64::from(kv.0) - i64::from(q.1), i64::from(kv.1) - i64::from(q.0));
        assert!(
            nearest >= i64::from(bias.first) && farthest < i64::from(bias.first) + distances as i64,
            "attention: {distances} biases from distance {} on do not cover {nearest}..={farthest}",
            bias.first
        );
    }

    /// Adds the biases of one row and head to its raw scores with the keys from row `key` of k on, scaling them first;
    /// gives the factor that is still to be applied.
    #[inline(always)]
    fn add_bias(&self, scores: &mut [f32], row: usize, head: usize, key: usize) -> f32 {
        let Some(bias) = self.bias else { return self.spec.scale };
        let distances = bias.values.len() / self.spec.heads;
        let values = &bias.values[head * distances..][..distances];
        let origin = self.q_pos[row] + bias.first;
        for (score, &at) in scores.iter_mut().zip(&self.kv_pos[key..]) {
            *score = *score * self.spec.scale + values[(at - origin) as usize];
        }
        1.0
    }

    /// The visible keys of each of `rows`, counted from the span's first key; both ends grow with the row.
    fn visible(&self, span: &Span, rows: Range<usize>) -> Vec<(usize, usize)> {
        let keys = &self.kv_pos[span.kv.clone()];
        if !self.spec.causal {
            return vec![(0, keys.len()); rows.len()];
        }
        let range = |&q: &i32| {
            let first = match self.spec.window {
                Some(window) => {
                    keys.partition_point(|&key| i64::from(q) - i64::from(key) >= window.min(1 << 40) as i64)
                }
                None => 0,
            };
            (first, keys.partition_point(|&key| key <= q).max(first))
        };
        self.q_pos[rows].iter().map(range).collect()
    }

    /// Where head `head` of row `row` of k or v starts.
    fn kv_at(&self, row: usize, head: usize) -> usize {
        row * self.kv_stride() + head * self.spec.dim
    }

    fn q_at(&self, row: usize, head: usize) -> usize {
        row * self.q_stride() + head * self.spec.dim
    }
}

/// The rows that see a key of `from..to`, as a range; rows inside it may still see none when positions leave gaps.
fn seeing(visible: &[(usize, usize)], from: usize, to: usize) -> Range<usize> {
    let start = visible.partition_point(|&(_, end)| end <= from);
    start..visible.partition_point(|&(first, _)| first < to).max(start)
}

/// Attention's values `y` and the log-sums `lse` that its backward pass needs.
///
/// Rows outside all spans get zeros. Spans may share keys. Panics when the lengths or spans do not fit.
pub fn forward(inputs: &Inputs, y: &mut [f32], lse: &mut [f32]) {
    inputs.check(false);
    assert_eq!(y.len(), inputs.q.len(), "attention: y is not [Tq, heads, dim]");
    assert_eq!(lse.len(), inputs.q_pos.len() * inputs.spec.heads, "attention: lse is not [Tq, heads]");
    y.fill(0.0);
    lse.fill(f32::NEG_INFINITY);
    let (y, lse) = (Shared(y.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    let (short, long): (Vec<&Span>, Vec<&Span>) = inputs.spans.iter().partition(|span| span.q.len() < FEW);
    decode::forward(inputs, &short, y, lse);
    let block = (128 / inputs.group()).clamp(16, 128);
    let mut units = Vec::new();
    for span in long {
        for start in span.q.clone().step_by(block) {
            let rows = start..span.q.end.min(start + block);
            units.extend((0..inputs.spec.kv_heads).map(|head| (span, head, rows.clone())));
        }
    }
    units.into_par_iter().for_each(|(span, head, rows)| forward_unit(inputs, span, head, rows, y, lse));
}

/// The rows `rows` of all query heads of key head `head`.
#[inline(always)]
fn forward_body<const L: usize>(
    x: &Inputs,
    span: &Span,
    head: usize,
    rows: Range<usize>,
    y: Shared,
    lse: Shared,
) {
    let (dim, group, count) = (x.spec.dim, x.group(), rows.len());
    let visible = x.visible(span, rows.clone());
    let (first, end) = (visible[0].0, visible[count - 1].1);
    let width = (end - first).min(TILE).next_multiple_of(16);
    let (mut keys, mut values) = (vec![0.0; dim * width], vec![0.0; width * dim]);
    let mut scores = vec![0.0; count * width];
    // Query heads of the group one behind another, `[group, count, dim]`, and likewise their sums of values.
    let (mut q, mut sums) = (vec![0.0; group * count * dim], vec![0.0; group * count * dim]);
    let mut state = vec![Running::START; group * count];
    for (g, q) in q.chunks_exact_mut(count * dim).enumerate() {
        // SAFETY: `check` found the span's rows inside q.
        unsafe {
            tile::gather(x.q[x.q_at(rows.start, head * group + g)..].as_ptr(), x.q_stride(), count, dim, q)
        };
    }
    for from in (first..end).step_by(TILE) {
        let to = end.min(from + TILE);
        let at = x.kv_at(span.kv.start + from, head);
        // SAFETY: rows from..to of the span, which `check` found inside k and v.
        unsafe {
            tile::transpose(x.k[at..].as_ptr(), x.kv_stride(), to - from, dim, width, &mut keys);
            tile::gather(x.v[at..].as_ptr(), x.kv_stride(), to - from, dim, &mut values);
        }
        let live = seeing(&visible, from, to);
        for g in 0..group {
            let at = (g * count + live.start) * dim;
            let (q, sums) = (&q[at..][..live.len() * dim], &mut sums[at..][..live.len() * dim]);
            let scores = &mut scores[..live.len() * width];
            // SAFETY: live rows of q by the packed keys into scores, each as long as its shape says.
            unsafe {
                let q = Left { data: q.as_ptr(), row: dim, col: 1 };
                let keys = Right { data: keys.as_ptr(), stride: width };
                let scores = Out { data: scores.as_mut_ptr(), stride: width, add: false };
                tile::product::<L>(live.len(), width, dim, q, keys, scores);
            }
            let each = scores.chunks_exact_mut(width).zip(sums.chunks_exact_mut(dim));
            for (i, (scores, sums)) in live.clone().zip(each) {
                let (a, b) = visible[i];
                let known = &mut scores[..to - from];
                let scale = x.add_bias(known, rows.start + i, head * group + g, span.kv.start + from);
                mask(scores, a.max(from) - from, b.min(to).saturating_sub(from), f32::NEG_INFINITY);
                let shrink = state[g * count + i].take_in::<L>(scores, scale);
                if shrink != 1.0 {
                    sums.iter_mut().for_each(|sum| *sum *= shrink);
                }
            }
            // SAFETY: live rows of shares by the packed values into the rows' sums.
            unsafe {
                let shares = Left { data: scores.as_ptr(), row: width, col: 1 };
                let values = Right { data: values.as_ptr(), stride: dim };
                let sums = Out { data: sums.as_mut_ptr(), stride: dim, add: true };
                tile::product::<L>(live.len(), dim, to - from, shares, values, sums);
            }
        }
    }
    for (at, (state, sums)) in state.iter().zip(sums.chunks_exact(dim)).enumerate() {
        let (row, head) = (rows.start + at % count, head * group + at / count);
        // SAFETY: this unit alone holds these rows and heads of y and lse.
        unsafe { state.finish(x, row, head, sums, y, lse) };
    }
}

dispatch! {
    fn forward_unit(x: &Inputs, span: &Span, head: usize, rows: Range<usize>, y: Shared, lse: Shared) = forward_body;
}

/// Sets everything outside `start..end` to `hidden`.
#[inline(always)]
fn mask(row: &mut [f32], start: usize, end: usize, hidden: f32) {
    let start = start.min(row.len());
    row[..start].fill(hidden);
    row[end.max(start)..].fill(hidden);
}

/// A row's largest score so far, and its sum of `exp(score − top)`.
#[derive(Clone, Copy)]
struct Running {
    top: f32,
    sum: f32,
}

impl Running {
    /// No key seen.
    const START: Running = Running { top: f32::NEG_INFINITY, sum: 0.0 };

    /// Writes one row and head of y and lse from its weighted sum of values; leaves them where no key was seen.
    ///
    /// # Safety
    /// Nobody else holds that row and head of y and lse.
    #[inline(always)]
    unsafe fn finish(&self, x: &Inputs, row: usize, head: usize, sums: &[f32], y: Shared, lse: Shared) {
        if self.top == f32::NEG_INFINITY && self.sum == 0.0 {
            return;
        }
        // SAFETY: the caller's; `check` found the row inside y and lse.
        let y = unsafe { std::slice::from_raw_parts_mut(y.0.add(x.q_at(row, head)), x.spec.dim) };
        let share = 1.0 / self.sum;
        y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum * share);
        // SAFETY: as above.
        unsafe { *lse.0.add(row * x.spec.heads + head) = self.top + self.sum.ln() };
    }

    /// Turns a tile's raw scores (−∞ where hidden, a multiple of 16 of them) into `exp(scale·score − top)`, and returns
    /// the factor by which everything before shrinks.
    #[inline(always)]
    fn take_in<const L: usize>(&mut self, scores: &mut [f32], scale: f32) -> f32 {
        let mut tops = [f32::NEG_INFINITY; 16];
        for scores in scores.as_chunks_mut::<16>().0 {
            for i in 0..16 {
                // Hidden scores stay −∞ whatever the scale's sign.
                scores[i] = if scores[i] == f32::NEG_INFINITY { scores[i] } else { scores[i] * scale };
                tops[i] = if scores[i] > tops[i] { scores[i] } else { tops[i] };
            }
        }
        let top = tops.into_iter().fold(self.top, f32::max);
        // Nothing visible so far, or nothing but NaN: 0 in place of −∞ lets the NaN through and keeps −∞ − −∞ out.
        let base = if top == f32::NEG_INFINITY { 0.0 } else { top };
        let mut sums = [0.0; 16];
        for scores in scores.as_chunks_mut::<16>().0 {
            for i in 0..16 {
                scores[i] = exp::<L>(scores[i] - base);
                sums[i] += scores[i];
            }
        }
        let shrink = if self.top == top { 1.0 } else { exp::<L>(self.top - base) };
        (self.top, self.sum) = (top, self.sum * shrink + sum16(sums));
        shrink
    }
}
