//! The gradients of attention, from the values and log-sums that the forward pass kept.
//!
//! With `p = exp(scale·q·kᵀ − lse)` made again tile by tile and `δ = Σ dy·y` of each row:
//! `dv = pᵀ·dy`, `ds = p·(dy·vᵀ − δ)·scale`, `dq = ds·k`, `dk = dsᵀ·q`; dk and dv are sums over the query heads of a
//! group, always in the same order.

use super::{Inputs, Shared, Span, TILE, mask, seeing};
use crate::cpu::math::exp;
use crate::cpu::simd::{dispatch, sum_pairs};
use crate::cpu::tile::{self, Left, Out, Right};
use rayon::prelude::*;
use std::ops::Range;

/// Query rows worked on at once.
const ROWS: usize = 96;

/// Rows or keys of a part when one sequence is cut for more cores.
const PART: usize = 256;

/// The gradients that are wanted; each is overwritten.
#[derive(Debug, Default)]
pub struct Gradients<'a> {
    /// `[Tq, heads, dim]`
    pub dq: Option<&'a mut [f32]>,
    /// `[Tk, kv_heads, dim]`
    pub dk: Option<&'a mut [f32]>,
    /// `[Tk, kv_heads, dim]`
    pub dv: Option<&'a mut [f32]>,
}

/// A part of the work: some rows against some keys of one span, and what of it is written.
#[derive(Clone)]
struct Unit<'a> {
    span: &'a Span,
    head: usize,
    rows: Range<usize>,
    /// Counted from the span's first key.
    keys: Range<usize>,
    dq: Option<Shared>,
    dk: Option<Shared>,
    dv: Option<Shared>,
}

/// What a unit reads besides the inputs.
#[derive(Clone, Copy)]
struct Kept<'a> {
    lse: &'a [f32],
    dy: &'a [f32],
    /// `Σ dy·y` of each row and head, `[Tq, heads]`.
    delta: &'a [f32],
}

/// Writes the gradients asked for, from dy `[Tq, heads, dim]` and what [`super::forward`] gave.
///
/// Rows outside all spans get zeros. Panics when the lengths do not fit or two spans share keys.
pub fn backward(inputs: &Inputs, y: &[f32], lse: &[f32], dy: &[f32], wanted: Gradients) {
    inputs.check(true);
    let (q, k) = (inputs.q.len(), inputs.k.len());
    assert!(y.len() == q && dy.len() == q, "attention: y or dy is not [Tq, heads, dim]");
    assert_eq!(lse.len(), inputs.q_pos.len() * inputs.spec.heads, "attention: lse is not [Tq, heads]");
    let share = |gradient: Option<&mut [f32]>, length: usize| {
        gradient.map(|gradient| {
            assert_eq!(gradient.len(), length, "attention: a gradient has the wrong length");
            gradient.fill(0.0);
            Shared(gradient.as_mut_ptr())
        })
    };
    let Gradients { dq, dk, dv } = wanted;
    let (dq, dk, dv) = (share(dq, q), share(dk, k), share(dv, k));
    let dim = inputs.spec.dim;
    let mut delta = vec![0.0; lse.len()];
    let given = y.par_chunks(64 * dim).zip(dy.par_chunks(64 * dim));
    delta.par_chunks_mut(64).zip(given).for_each(|(delta, (y, dy))| row_dots(y, dy, dim, delta));
    let units = units(inputs, dq, dk, dv);
    units.into_par_iter().for_each(|unit| backward_unit(inputs, Kept { lse, dy, delta: &delta }, unit));
}

/// The parts, cut by shapes alone: each sequence and key head, or, when these are few and long, rows for dq and keys for
/// dk and dv apart (the scores are then made twice).
fn units<'a>(x: &Inputs<'a>, dq: Option<Shared>, dk: Option<Shared>, dv: Option<Shared>) -> Vec<Unit<'a>> {
    let few = x.spans.len() * x.spec.kv_heads < 8;
    let mut units = Vec::new();
    for span in x.spans {
        for head in 0..x.spec.kv_heads {
            let whole = Unit { span, head, rows: span.q.clone(), keys: 0..span.kv.len(), dq, dk, dv };
            if !few || span.q.len().max(span.kv.len()) <= PART {
                units.push(whole);
                continue;
            }
            for start in span.q.clone().step_by(PART).filter(|_| dq.is_some()) {
                let rows = start..span.q.end.min(start + PART);
                units.push(Unit { rows, dk: None, dv: None, ..whole.clone() });
            }
            for start in (0..span.kv.len()).step_by(PART).filter(|_| dk.is_some() || dv.is_some()) {
                let keys = start..span.kv.len().min(start + PART);
                units.push(Unit { keys, dq: None, ..whole.clone() });
            }
        }
    }
    units
}

/// Buffers of one unit.
struct Scratch {
    /// `[dim, width]`, the tile's keys transposed.
    keys: Vec<f32>,
    /// `[dim, width]`, the tile's values transposed.
    values: Vec<f32>,
    /// `[ROWS, width]`, p.
    shares: Vec<f32>,
    /// `[ROWS, width]`, dy·vᵀ and then ds.
    slopes: Vec<f32>,
}

#[inline(always)]
fn unit_body<const L: usize>(x: &Inputs, kept: Kept, unit: Unit) {
    let visible = x.visible(unit.span, unit.rows.clone());
    let (Some(&(first, _)), Some(&(_, end))) = (visible.first(), visible.last()) else { return };
    let (first, end) = (first.max(unit.keys.start), end.min(unit.keys.end));
    if first >= end {
        return;
    }
    let (dim, width) = (x.spec.dim, (end - first).min(TILE).next_multiple_of(16));
    let cells = visible.len().min(ROWS) * width;
    let mut scratch = Scratch {
        keys: vec![0.0; dim * width],
        values: vec![0.0; dim * width],
        shares: vec![0.0; cells],
        slopes: vec![0.0; cells],
    };
    for from in (first..end).step_by(TILE) {
        let tile = from..end.min(from + TILE);
        let at = x.kv_at(unit.span.kv.start + from, unit.head);
        // SAFETY: the tile's rows lie inside the span, which `check` found inside k and v.
        unsafe {
            let (k, v, stride) = (x.k.as_ptr().add(at), x.v.as_ptr().add(at), x.kv_stride());
            tile::transpose(k, stride, tile.len(), dim, width, &mut scratch.keys);
            tile::transpose(v, stride, tile.len(), dim, width, &mut scratch.values);
        }
        let live = seeing(&visible, tile.start, tile.end);
        for g in 0..x.group() {
            for start in live.clone().step_by(ROWS) {
                let rows = start..live.end.min(start + ROWS);
                tile_gradients::<L>(
                    x,
                    kept,
                    &unit,
                    unit.head * x.group() + g,
                    &visible,
                    rows,
                    tile.clone(),
                    &mut scratch,
                );
            }
        }
    }
}

/// One tile's share in the gradients: `rows` (counted from the unit's first) of query head `head` against `keys`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn tile_gradients<const L: usize>(
    x: &Inputs,
    kept: Kept,
    unit: &Unit,
    head: usize,
    visible: &[(usize, usize)],
    rows: Range<usize>,
    keys: Range<usize>,
    scratch: &mut Scratch,
) {
    let (m, n, dim) = (rows.len(), keys.len(), x.spec.dim);
    let width = scratch.keys.len() / dim;
    let row = unit.rows.start + rows.start;
    let (q_at, kv_at) = (x.q_at(row, head), x.kv_at(unit.span.kv.start + keys.start, unit.head));
    let (q, dy) = (&x.q[q_at..], &kept.dy[q_at..]);
    let by_rows = |data: &[f32]| Left { data: data.as_ptr(), row: x.q_stride(), col: 1 };
    let tile = |data: &[f32]| Right { data: data.as_ptr(), stride: width };
    let (shares, slopes) = (&mut scratch.shares[..m * width], &mut scratch.slopes[..m * width]);
    // SAFETY: m rows of q and dy by the packed tiles into buffers of m·width.
    unsafe {
        let out = |data: &mut [f32]| Out { data: data.as_mut_ptr(), stride: width, add: false };
        tile::product::<L>(m, width, dim, by_rows(q), tile(&scratch.keys), out(shares));
        tile::product::<L>(m, width, dim, by_rows(dy), tile(&scratch.values), out(slopes));
    }
    for (i, (shares, slopes)) in
        shares.chunks_exact_mut(width).zip(slopes.chunks_exact_mut(width)).enumerate()
    {
        let (a, b) = visible[rows.start + i];
        let at = (row + i) * x.spec.heads + head;
        let (lse, delta) = (kept.lse[at], kept.delta[at]);
        for share in &mut *shares {
            *share = exp::<L>(*share * x.spec.scale - lse);
        }
        let (start, stop) = (a.max(keys.start) - keys.start, b.min(keys.end).saturating_sub(keys.start));
        mask(shares, start, stop, 0.0);
        for (slope, &share) in slopes.iter_mut().zip(&*shares) {
            *slope = share * (*slope - delta) * x.spec.scale;
        }
        mask(slopes, start, stop, 0.0);
    }
    let turned = |data: &[f32]| Left { data: data.as_ptr(), row: 1, col: width };
    let q_rows = |data: &[f32]| Right { data: data.as_ptr(), stride: x.q_stride() };
    // SAFETY: this unit alone writes these rows of dq, or these keys of dk and dv, at its head.
    unsafe {
        if let Some(dv) = unit.dv {
            let out = Out { data: dv.0.add(kv_at), stride: x.kv_stride(), add: true };
            tile::product::<L>(n, dim, m, turned(shares), q_rows(dy), out);
        }
        if let Some(dk) = unit.dk {
            let out = Out { data: dk.0.add(kv_at), stride: x.kv_stride(), add: true };
            tile::product::<L>(n, dim, m, turned(slopes), q_rows(q), out);
        }
        if let Some(dq) = unit.dq {
            let slopes = Left { data: slopes.as_ptr(), row: width, col: 1 };
            let keys = Right { data: x.k[kv_at..].as_ptr(), stride: x.kv_stride() };
            let out = Out { data: dq.0.add(q_at), stride: x.q_stride(), add: true };
            tile::product::<L>(m, dim, n, slopes, keys, out);
        }
    }
}

#[inline(always)]
fn row_dots_body<const L: usize>(a: &[f32], b: &[f32], dim: usize, out: &mut [f32]) {
    for ((out, a), b) in out.iter_mut().zip(a.chunks_exact(dim)).zip(b.chunks_exact(dim)) {
        *out = sum_pairs(a, b, |a, b| a * b);
    }
}

dispatch! {
    fn backward_unit(x: &Inputs, kept: Kept, unit: Unit) = unit_body;
    fn row_dots(a: &[f32], b: &[f32], dim: usize, out: &mut [f32]) = row_dots_body;
}
