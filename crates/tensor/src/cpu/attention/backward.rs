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
    /// `[heads, distances]`
    pub dbias: Option<&'a mut [f32]>,
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
    let Gradients { dq, dk, dv, dbias } = wanted;
    let (dq, dk, dv) = (share(dq, q), share(dk, k), share(dv, k));
    let dim = inputs.spec.dim;
    let mut delta = vec![0.0; lse.len()];
    let given = y.par_chunks(64 * dim).zip(dy.par_chunks(64 * dim));
    delta.par_chunks_mut(64).zip(given).for_each(|(delta, (y, dy))| row_dots(y, dy, dim, delta));
    let kept = Kept { lse, dy, delta: &delta };
    let units = units(inputs, dq, dk, dv);
    units.into_par_iter().for_each(|unit| backward_unit(inputs, kept, unit));
    if let Some(dbias) = dbias {
        bias_gradient(inputs, kept, dbias);
    }
}

/// `dbias[head, distance] = Σ p·(dy·vᵀ − δ)` over the pairs at that distance, each head in the order of the rows. Only
/// runs that train the biases themselves need it, so the scores are simply made once more.
fn bias_gradient(x: &Inputs, kept: Kept, dbias: &mut [f32]) {
    let Some(bias) = x.bias else { return dbias.fill(0.0) };
    assert_eq!(dbias.len(), bias.values.len(), "attention: dbias is not [heads, distances]");
    let dim = x.spec.dim;
    let dot = |a: &[f32], b: &[f32]| sum_pairs(&a[..dim], &b[..dim], |a, b| a * b);
    let head_sums = |(head, sums): (usize, &mut [f32])| {
        sums.fill(0.0);
        for span in x.spans {
            for (row, (start, end)) in span.q.clone().zip(x.visible(span, span.q.clone())) {
                let (at, cell) = (x.q_at(row, head), row * x.spec.heads + head);
                for key in span.kv.start + start..span.kv.start + end {
                    let kv = x.kv_at(key, head / x.group());
                    let mut score = [dot(&x.q[at..], &x.k[kv..])];
                    let scale = x.add_bias(&mut score, row, head, key);
                    let share = (score[0] * scale - kept.lse[cell]).exp();
                    let distance = (x.kv_pos[key] - x.q_pos[row] - bias.first) as usize;
                    sums[distance] += share * (dot(&kept.dy[at..], &x.v[kv..]) - kept.delta[cell]);
                }
            }
        }
    };
    dbias.par_chunks_mut(bias.values.len() / x.spec.heads).enumerate().for_each(head_sums);
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

/// Buffers of one unit: tiles lie dense, whatever their strides in the inputs.
struct Scratch {
    width: usize,
    /// The tile's keys and values, `[width, dim]`, and both transposed, `[dim, width]`.
    keys: Vec<f32>,
    keys_turned: Vec<f32>,
    values_turned: Vec<f32>,
    /// The rows' q and dy, `[ROWS, dim]`.
    q: Vec<f32>,
    dy: Vec<f32>,
    /// `[ROWS, width]`: p; dy·vᵀ and then ds.
    shares: Vec<f32>,
    slopes: Vec<f32>,
    /// `[width, dim]`: the tile's gradients.
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Scratch {
    fn new(rows: usize, width: usize, dim: usize) -> Self {
        let tile = || vec![0.0; width * dim];
        let cells = || vec![0.0; rows * width];
        let block = || vec![0.0; rows * dim];
        let (keys, keys_turned, values_turned) = (tile(), tile(), tile());
        let (q, dy, shares, slopes) = (block(), block(), cells(), cells());
        Scratch { width, keys, keys_turned, values_turned, q, dy, shares, slopes, dk: tile(), dv: tile() }
    }
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
    let mut scratch = Scratch::new(visible.len().min(ROWS), width, dim);
    for from in (first..end).step_by(TILE) {
        let tile = from..end.min(from + TILE);
        let (at, stride) = (x.kv_at(unit.span.kv.start + from, unit.head), x.kv_stride());
        // SAFETY: the tile's rows lie inside the span, which `check` found inside k and v.
        unsafe {
            let (k, v) = (x.k[at..].as_ptr(), x.v[at..].as_ptr());
            tile::gather(k, stride, tile.len(), dim, &mut scratch.keys);
            tile::transpose(scratch.keys.as_ptr(), dim, tile.len(), dim, width, &mut scratch.keys_turned);
            tile::transpose(v, stride, tile.len(), dim, width, &mut scratch.values_turned);
        }
        scratch.dk.fill(0.0);
        scratch.dv.fill(0.0);
        let live = seeing(&visible, tile.start, tile.end);
        for g in 0..x.group() {
            for start in live.clone().step_by(ROWS) {
                let block = Block {
                    head: unit.head * x.group() + g,
                    rows: start..live.end.min(start + ROWS),
                    keys: tile.clone(),
                };
                block_gradients::<L>(x, kept, &unit, &visible, block, &mut scratch);
            }
        }
        for (gradient, sums) in [(unit.dk, &scratch.dk), (unit.dv, &scratch.dv)] {
            let Some(gradient) = gradient else { continue };
            for (j, sums) in sums.chunks_exact(dim).take(tile.len()).enumerate() {
                // SAFETY: this unit alone writes these keys at its head.
                let row = unsafe { std::slice::from_raw_parts_mut(gradient.0.add(at + j * stride), dim) };
                row.copy_from_slice(sums);
            }
        }
    }
}

/// Some rows (counted from the unit's first) of a query head against a tile of keys (from the span's first).
struct Block {
    head: usize,
    rows: Range<usize>,
    keys: Range<usize>,
}

/// Adds one block's share: to dk and dv in the scratch, to dq in place.
#[inline(always)]
fn block_gradients<const L: usize>(
    x: &Inputs,
    kept: Kept,
    unit: &Unit,
    visible: &[(usize, usize)],
    block: Block,
    scratch: &mut Scratch,
) {
    let Block { head, rows, keys } = block;
    let (m, n, dim, width) = (rows.len(), keys.len(), x.spec.dim, scratch.width);
    let row = unit.rows.start + rows.start;
    let at = x.q_at(row, head);
    let Scratch { q, dy, shares, slopes, .. } = scratch;
    let (shares, slopes) = (&mut shares[..m * width], &mut slopes[..m * width]);
    // SAFETY: m rows of q and dy, which `check` found inside both, by the packed tiles into buffers of m·width.
    unsafe {
        tile::gather(x.q[at..].as_ptr(), x.q_stride(), m, dim, q);
        tile::gather(kept.dy[at..].as_ptr(), x.q_stride(), m, dim, dy);
        let rows = |data: &[f32]| Left { data: data.as_ptr(), row: dim, col: 1 };
        let tile = |data: &[f32]| Right { data: data.as_ptr(), stride: width };
        let out = |data: &mut [f32]| Out { data: data.as_mut_ptr(), stride: width, add: false };
        tile::product::<L>(m, width, dim, rows(q), tile(&scratch.keys_turned), out(shares));
        tile::product::<L>(m, width, dim, rows(dy), tile(&scratch.values_turned), out(slopes));
    }
    for (i, (shares, slopes)) in
        shares.chunks_exact_mut(width).zip(slopes.chunks_exact_mut(width)).enumerate()
    {
        let (a, b) = visible[rows.start + i];
        let at = (row + i) * x.spec.heads + head;
        let (lse, delta) = (kept.lse[at], kept.delta[at]);
        let scale = x.add_bias(&mut shares[..n], row + i, head, unit.span.kv.start + keys.start);
        for share in &mut *shares {
            *share = exp::<L>(*share * scale - lse);
        }
        let (start, stop) = (a.max(keys.start) - keys.start, b.min(keys.end).saturating_sub(keys.start));
        mask(shares, start, stop, 0.0);
        for (slope, &share) in slopes.iter_mut().zip(&*shares) {
            *slope = share * (*slope - delta) * x.spec.scale;
        }
        mask(slopes, start, stop, 0.0);
    }
    let turned = |data: &[f32]| Left { data: data.as_ptr(), row: 1, col: width };
    let dense = |data: &[f32]| Right { data: data.as_ptr(), stride: dim };
    // SAFETY: the products' shapes are those of the buffers; this unit alone writes these rows of dq at this head.
    unsafe {
        if unit.dv.is_some() {
            let out = Out { data: scratch.dv.as_mut_ptr(), stride: dim, add: true };
            tile::product::<L>(n, dim, m, turned(shares), dense(dy), out);
        }
        if unit.dk.is_some() {
            let out = Out { data: scratch.dk.as_mut_ptr(), stride: dim, add: true };
            tile::product::<L>(n, dim, m, turned(slopes), dense(q), out);
        }
        if let Some(dq) = unit.dq {
            let slopes = Left { data: slopes.as_ptr(), row: width, col: 1 };
            let out = Out { data: dq.0.add(at), stride: x.q_stride(), add: true };
            tile::product::<L>(m, dim, n, slopes, dense(&scratch.keys), out);
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
