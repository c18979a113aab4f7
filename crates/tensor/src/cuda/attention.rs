//! Attention over packed sequences: the work is cut into tiles here, where the spans and positions are known, so that short
//! sequences cost no idle blocks and keys that nobody in a tile sees are never read.
//!
//! Sequences of a few queries (generation) go through their keys in parts of [`PART`], put together in order. How a sequence
//! is cut depends on nothing but itself, so neither do its results.

use super::compile::Source;
use super::driver::{Arg, Cuda, DeviceMemory};
use crate::cpu::attention::Span;
use crate::device::{AttentionBackward, Buffer};
use crate::ops::Attention;
use crate::tensor::Tensor;
use std::ops::Range;

/// Rows of a tile of the kernels in f32, `SIDE` there.
const SIDE: usize = 64;

/// Fewer query rows than this are a matter of reading the keys once.
const FEW: usize = 4;

/// Keys in a part of the work for few rows, as there.
const PART: usize = 128;

/// Blocks that share the gradient of a head's bias.
const BIAS_BLOCKS: usize = 32;

/// Threads of a block of tiles.
pub(super) const BLOCK: [u32; 3] = [256, 1, 1];

/// Work of a block, as `struct Tile` of the kernels: `count` rows of one side, and rows `from..end` of the other.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Tile {
    pub first: i32,
    pub count: i32,
    pub from: i32,
    pub end: i32,
}

impl Tile {
    fn of(rows: Range<usize>, others: Range<usize>) -> Tile {
        let number = |n: usize| i32::try_from(n).expect("rows of a batch are below 2³¹");
        Tile {
            first: number(rows.start),
            count: number(rows.len()),
            from: number(others.start),
            end: number(others.end),
        }
    }

    /// Longest first, so that no long one is left to the end.
    fn sorted(mut tiles: Vec<Tile>) -> Vec<Tile> {
        tiles.sort_by_key(|tile| tile.from - tile.end);
        tiles
    }
}

/// What is visible, from the positions on the host.
pub(super) struct Sight<'a> {
    spans: &'a [Span],
    queries: &'a [i32],
    keys: &'a [i32],
    causal: bool,
    /// How far behind a query the last key is that it sees; nothing is visible where there is none.
    reach: Option<u32>,
}

impl<'a> Sight<'a> {
    pub(super) fn of(a: &'a Attention) -> Sight<'a> {
        let (queries, keys) = (a.spans.query_positions.i32(), a.spans.key_positions.i32());
        let reach = match a.spec.window {
            Some(window) if a.spec.causal => {
                window.checked_sub(1).map(|reach| u32::try_from(reach).unwrap_or(u32::MAX))
            }
            _ => Some(u32::MAX),
        };
        Sight { spans: &a.spans.spans, queries, keys, causal: a.spec.causal, reach }
    }

    /// The keys of `span` that its query rows `rows` see between them, which are none or more.
    fn keys_of(&self, span: &Span, rows: &Range<usize>) -> Range<usize> {
        let Some(reach) = self.reach.filter(|_| !rows.is_empty()) else {
            return span.kv.start..span.kv.start;
        };
        if !self.causal {
            return span.kv.clone();
        }
        let keys = &self.keys[span.kv.clone()];
        let (first, last) = (i64::from(self.queries[rows.start]), self.queries[rows.end - 1]);
        let start = keys.partition_point(|&key| first - i64::from(key) > i64::from(reach));
        let end = keys.partition_point(|&key| key <= last).max(start);
        span.kv.start + start..span.kv.start + end
    }

    /// The query rows of `span` that see any of the key rows `rows`.
    fn queries_of(&self, span: &Span, rows: &Range<usize>) -> Range<usize> {
        let Some(reach) = self.reach.filter(|_| !rows.is_empty()) else { return span.q.start..span.q.start };
        if !self.causal {
            return span.q.clone();
        }
        let queries = &self.queries[span.q.clone()];
        let (first, last) = (self.keys[rows.start], i64::from(self.keys[rows.end - 1]));
        let start = queries.partition_point(|&query| query < first);
        let end = queries.partition_point(|&query| i64::from(query) - last <= i64::from(reach)).max(start);
        span.q.start + start..span.q.start + end
    }

    /// Tiles of `height` query rows of `spans`, over the keys.
    fn query_tiles<'s>(&self, spans: impl Iterator<Item = &'s Span>, height: usize) -> Vec<Tile> {
        let tiles = spans.flat_map(|span| {
            pieces(&span.q, height).map(move |rows| Tile::of(rows.clone(), self.keys_of(span, &rows)))
        });
        Tile::sorted(tiles.collect())
    }

    /// Tiles of `height` query rows, over the keys.
    pub(super) fn all_query_tiles(&self, height: usize) -> Vec<Tile> {
        self.query_tiles(self.spans.iter(), height)
    }

    /// Tiles of `height` keys, over the query rows.
    pub(super) fn key_tiles(&self, height: usize) -> Vec<Tile> {
        let tiles = self.spans.iter().flat_map(|span| {
            pieces(&span.kv, height).map(move |rows| Tile::of(rows.clone(), self.queries_of(span, &rows)))
        });
        Tile::sorted(tiles.collect())
    }

    /// Tiles of `height` query rows of the sequences that have more than a few; of all where `many`.
    pub(super) fn long_tiles(&self, height: usize, many: bool) -> Vec<Tile> {
        self.query_tiles(self.spans.iter().filter(|span| many || span.q.len() >= FEW), height)
    }

    /// Sequences of a few rows: the parts of their keys, and each sequence's rows with the range of its parts.
    fn few(&self) -> (Vec<Tile>, Vec<Tile>) {
        let (mut parts, mut spans) = (Vec::new(), Vec::new());
        for span in self.spans.iter().filter(|span| (1..FEW).contains(&span.q.len())) {
            let (seen, before) = (self.keys_of(span, &span.q), parts.len());
            let cut = pieces(&span.kv, PART).map(|keys| keys.start.max(seen.start)..keys.end.min(seen.end));
            parts.extend(cut.filter(|keys| !keys.is_empty()).map(|keys| Tile::of(span.q.clone(), keys)));
            spans.push(Tile::of(span.q.clone(), before..parts.len()));
        }
        (parts, spans)
    }

    /// Whether every query row is in a span.
    fn names_all_queries(&self) -> bool {
        self.spans.iter().map(|span| span.q.len()).sum::<usize>() == self.queries.len()
    }

    /// Whether every key row is in a span (no two share one where gradients are asked for).
    fn names_all_keys(&self) -> bool {
        self.spans.iter().map(|span| span.kv.len()).sum::<usize>() == self.keys.len()
    }

    /// The mask's arguments, `causal` and `reach`.
    pub(super) fn mask(&self) -> [Arg; 2] {
        [Arg::I32(i32::from(self.causal)), Arg::U32(self.reach.unwrap_or(0))]
    }
}

/// `rows` in pieces of `size`, the last perhaps shorter.
fn pieces(rows: &Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = rows.end;
    rows.clone().step_by(size).map(move |start| start..end.min(start + size))
}

/// What all kernels take behind their factors: positions, bias, heads, scale and mask.
pub(super) fn form(a: &Attention, sight: &Sight) -> Vec<Arg> {
    let s = &a.spec;
    let (bias, distances, first) = match &a.bias {
        Some(bias) => (bias.values.arg(), bias.values.dim(1), bias.first),
        None => (Arg::NULL, 0, 0),
    };
    let mut args = vec![
        a.spans.query_positions.arg(),
        a.spans.key_positions.arg(),
        bias,
        Arg::I64(distances as i64),
        Arg::I32(first),
        Arg::I32(s.heads as i32),
        Arg::I32(s.kv_heads as i32),
        Arg::I32(s.dim as i32),
        Arg::F32(s.scale),
    ];
    args.extend(sight.mask());
    args
}

/// All arguments of the kernels in f32 before their tiles.
fn inputs(a: &Attention, sight: &Sight, q: &Tensor, k: &Tensor, v: &Tensor) -> Vec<Arg> {
    [q.arg(), k.arg(), v.arg()].into_iter().chain(form(a, sight)).collect()
}

impl Cuda {
    /// y and lse; factors may be rounded to bf16 where `bf16`.
    #[allow(clippy::too_many_arguments, reason = "the interface's own arguments and one more")]
    pub(super) fn attention(
        &self,
        a: &Attention,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &mut Buffer,
        lse: &mut Buffer,
        bf16: bool,
    ) {
        let sight = Sight::of(a);
        if !sight.names_all_queries() {
            let n = q.dim(0) * a.spec.heads;
            let args = [Arg::I64(n as i64), Arg::I32(a.spec.dim as i32), y.arg(), lse.arg()];
            self.launch_over(Source::Attention, "clear_rows", n * a.spec.dim, &args);
        }
        let (mut before, few) = (inputs(a, &sight, q, k, v), decode_kernel(a.spec.dim));
        if let Some(kernel) = few {
            self.attend_few(a, kernel, sight.few(), &before, y, lse);
        }
        if bf16 && self.attend_in_bf16(a, &sight, [q, k, v], few.is_none(), y, lse) {
            return;
        }
        let tiles = sight.long_tiles(SIDE, few.is_none());
        if tiles.is_empty() {
            return;
        }
        let memory = self.upload_tiles(&tiles);
        before.extend([memory.arg(), y.arg(), lse.arg()]);
        let (kernel, parts) = by_width(a.spec.dim, ["forward_64", "forward_128"]);
        self.launch(Source::Attention, kernel, [tiles.len() * a.spec.heads, parts, 1], BLOCK, 0, &before);
    }

    /// The rows of sequences with a few of them.
    fn attend_few(
        &self,
        a: &Attention,
        kernel: &'static str,
        (parts, spans): (Vec<Tile>, Vec<Tile>),
        inputs: &[Arg],
        y: &mut Buffer,
        lse: &mut Buffer,
    ) {
        let Some(rows) = spans.iter().map(|span| span.count as usize).max() else { return };
        let cells = rows * a.spec.heads;
        let count = parts.len();
        // One upload for both lists.
        let memory = self.upload_tiles(&[parts, spans.clone()].concat());
        let spans_at = memory.arg().offset(count * size_of::<Tile>());
        let states = Buffer::f32(2 * count * cells);
        let sums = Buffer::f32(count * cells * a.spec.dim);
        let rows = Arg::I32(rows as i32);
        let mut args = inputs.to_vec();
        args.extend([memory.arg(), rows, states.arg(), sums.arg()]);
        self.launch(Source::Attention, kernel, [count * a.spec.kv_heads, 1, 1], [128, 1, 1], 0, &args);
        let (heads, dim) = (Arg::I32(a.spec.heads as i32), Arg::I32(a.spec.dim as i32));
        let args = [spans_at, rows, heads, dim, states.arg(), sums.arg(), y.arg(), lse.arg()];
        let grid = [spans.len(), cells.div_ceil(4), 1];
        self.launch(Source::Attention, "unite_parts", grid, [128, 1, 1], 0, &args);
    }

    /// The gradients that are asked for.
    pub(super) fn attention_backward(&self, a: &Attention, mut g: AttentionBackward<'_>, bf16: bool) {
        let (sight, s) = (Sight::of(a), &a.spec);
        if let Some(dq) = g.dq.as_deref_mut().filter(|_| !sight.names_all_queries()) {
            self.fill(0.0, dq);
        }
        for d in [g.dk.as_deref_mut(), g.dv.as_deref_mut()].into_iter().flatten() {
            if !sight.names_all_keys() {
                self.fill(0.0, d);
            }
        }
        let n = g.q.dim(0) * s.heads;
        let delta = Buffer::f32(n);
        let args = [g.y.arg(), g.dy.arg(), Arg::I64(n as i64), Arg::I32(s.dim as i32), delta.arg()];
        self.launch_over(Source::Attention, "row_dots", 32 * n, &args);
        let before = inputs(a, &sight, g.q, g.k, g.v);
        if let Some(dbias) = g.dbias.take() {
            self.bias_gradient(&sight, &g, &before, &delta, dbias);
        }
        if bf16 && self.attend_back_in_bf16(a, &sight, &mut g, &delta) {
            return;
        }
        let args = |tiles: &DeviceMemory, gradients: &[Arg]| {
            let kept = [tiles.arg(), g.dy.arg(), g.lse.arg(), delta.arg()];
            [&before[..], &kept, gradients].concat()
        };
        if let Some(dq) = &g.dq {
            let tiles = sight.all_query_tiles(SIDE);
            let memory = self.upload_tiles(&tiles);
            let args = args(&memory, &[dq.arg()]);
            let (kernel, parts) = by_width(s.dim, ["backward_rows_64", "backward_rows_128"]);
            self.launch(Source::Attention, kernel, [tiles.len() * s.heads, parts, 1], BLOCK, 0, &args);
        }
        if g.dk.is_some() || g.dv.is_some() {
            let tiles = sight.key_tiles(SIDE);
            let memory = self.upload_tiles(&tiles);
            let args = args(&memory, &[place(&g.dk), place(&g.dv)]);
            let (kernel, parts) = by_width(s.dim, ["backward_keys_64", "backward_keys_128"]);
            self.launch(Source::Attention, kernel, [tiles.len() * s.kv_heads, parts, 1], BLOCK, 0, &args);
        }
    }

    /// dbias, in f32: only runs that train the biases want it.
    fn bias_gradient(
        &self,
        sight: &Sight,
        g: &AttentionBackward<'_>,
        inputs: &[Arg],
        delta: &Buffer,
        dbias: &mut Buffer,
    ) {
        let tiles = sight.all_query_tiles(SIDE);
        let heads = g.q.dim(1);
        let blocks = tiles.len().min(BIAS_BLOCKS);
        let n = dbias.len();
        let parts = Buffer::f32(blocks * n);
        let memory = self.upload_tiles(&tiles);
        let mut args = inputs.to_vec();
        args.extend([memory.arg(), Arg::I32(tiles.len() as i32), g.dy.arg(), g.lse.arg()]);
        args.extend([delta.arg(), parts.arg()]);
        self.launch(Source::Attention, "backward_bias", [blocks, heads, 1], BLOCK, 0, &args);
        let args = [parts.arg(), Arg::I64(n as i64), Arg::I32(blocks as i32), dbias.arg()];
        self.launch_over(Source::Attention, "sum_parts", n, &args);
    }

    pub(super) fn upload_tiles(&self, tiles: &[Tile]) -> DeviceMemory {
        self.upload(tiles)
    }
}

/// Memory of a gradient, if it is wanted.
pub(super) fn place(gradient: &Option<&mut Buffer>) -> Arg {
    gradient.as_ref().map_or(Arg::NULL, |gradient| gradient.arg())
}

/// The kernel for heads of `dim` numbers, and in how many parts these are cut.
fn by_width(dim: usize, [narrow, wide]: [&'static str; 2]) -> (&'static str, usize) {
    if dim <= 64 { (narrow, 1) } else { (wide, dim.div_ceil(128)) }
}

/// The kernel for a few rows; very wide heads have none.
fn decode_kernel(dim: usize) -> Option<&'static str> {
    match dim {
        0..=32 => Some("decode_32"),
        33..=64 => Some("decode_64"),
        65..=128 => Some("decode_128"),
        129..=256 => Some("decode_256"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::attention::{self, AttentionSpec};
    use crate::ops::{RelativeBias, Spans};
    use crate::testing::sample;

    fn sight<'a>(spans: &'a [Span], positions: &'a [i32], reach: Option<u32>) -> Sight<'a> {
        Sight { spans, queries: positions, keys: positions, causal: true, reach }
    }

    #[test]
    fn tiles_cover_what_is_visible_and_no_more() {
        let (spans, positions) = ([Span { q: 0..150, kv: 0..150 }], (0..150).collect::<Vec<_>>());
        let all = sight(&spans, &positions, Some(u32::MAX));
        let expected = [(128, 22, 0, 150), (64, 64, 0, 128), (0, 64, 0, 64)];
        let tile = |(first, count, from, end)| Tile { first, count, from, end };
        assert_eq!(all.all_query_tiles(64), expected.map(tile));
        let expected = [(0, 64, 0, 150), (64, 64, 64, 150), (128, 22, 128, 150)];
        assert_eq!(all.key_tiles(64), expected.map(tile));
        let near = sight(&spans, &positions, Some(9));
        assert!(near.all_query_tiles(64).contains(&tile((64, 64, 55, 128))));
        assert!(near.key_tiles(64).contains(&tile((0, 64, 0, 73))));
        let none = sight(&spans, &positions, None);
        assert!(none.all_query_tiles(64).iter().all(|t| t.from == t.end));
    }

    /// Sequences of (queries, keys), the queries at the keys' last positions; forward and backward on the card against the
    /// processor's own kernels.
    fn compare(spec: AttentionSpec, lengths: &[(usize, usize)], biased: bool) {
        let Some(card) = crate::device::card() else { return println!("skipped: no card was asked for") };
        let (mut spans, mut q_pos, mut kv_pos) = (Vec::new(), Vec::new(), Vec::new());
        for &(q, kv) in lengths {
            spans.push(Span { q: q_pos.len()..q_pos.len() + q, kv: kv_pos.len()..kv_pos.len() + kv });
            q_pos.extend((0..q).map(|i| (kv + i) as i32 - q as i32));
            kv_pos.extend(0..kv as i32);
        }
        let shapes = [[q_pos.len(), spec.heads, spec.dim], [kv_pos.len(), spec.kv_heads, spec.dim]];
        let [q, k, v, dy] = [(0, 1), (1, 2), (1, 3), (0, 4)].map(|(i, seed)| sample(&shapes[i], seed));
        let reach = lengths.iter().map(|l| l.1).max().unwrap_or(0);
        let values = sample(&[spec.heads, 2 * reach + 1], 5);
        let first = -(reach as i32);
        let host = |t: &Tensor| t.to_vec().unwrap();
        let (q_host, k_host, v_host, bias_host) = (host(&q), host(&k), host(&v), host(&values));
        let bias = biased.then_some(attention::Bias { values: &bias_host, first });
        let (q_at, kv_at) = (&q_pos[..], &kv_pos[..]);
        let x = attention::Inputs {
            q: &q_host,
            k: &k_host,
            v: &v_host,
            spans: &spans,
            q_pos: q_at,
            kv_pos: kv_at,
            spec,
            bias,
        };
        let zeros = |n: usize| vec![0.0; n];
        let (mut y, mut lse) = (zeros(q.len()), zeros(q_pos.len() * spec.heads));
        attention::forward(&x, &mut y, &mut lse);
        let mut d = [zeros(q.len()), zeros(k.len()), zeros(k.len()), zeros(values.len())];
        let [dq, dk, dv, dbias] = d.each_mut();
        let dbias = biased.then_some(&mut dbias[..]);
        let wanted = attention::Gradients { dq: Some(dq), dk: Some(dk), dv: Some(dv), dbias };
        attention::backward(&x, &y, &lse, &host(&dy), wanted);

        let positions = |at: &[i32]| Tensor::from_i32(at.to_vec(), [at.len()]).unwrap();
        let (query_positions, key_positions) = (positions(q_at), positions(kv_at));
        let spans = Spans { spans: spans.into(), query_positions, key_positions };
        let a = Attention { spans, spec, bias: biased.then_some(RelativeBias { values, first }) };
        let expected = [&y, &lse, &d[0], &d[1], &d[2], &d[3]];
        for bf16 in [false, true] {
            let tolerance = if bf16 { 1e-2 } else { 1e-5 };
            for (i, found) in on_card(card, &a, [&q, &k, &v, &dy], bf16).iter().enumerate() {
                let error = distance(found, expected[i]);
                assert!(error < tolerance, "result {i} is off by {error:e}: {spec:?}, bf16 {bf16}");
            }
        }
    }

    /// y, lse, dq, dk, dv and, with a bias, dbias.
    fn on_card(card: &Cuda, a: &Attention, [q, k, v, dy]: [&Tensor; 4], bf16: bool) -> Vec<Vec<f32>> {
        let n = q.dim(0) * q.dim(1);
        let (mut y, mut lse) = (Buffer::f32(q.len()), Buffer::f32(n));
        card.attention(a, q, k, v, &mut y, &mut lse, bf16);
        let (y, lse) = (&Tensor::new(q.shape(), y), &Tensor::new([n], lse));
        let mut found: Vec<Buffer> = [q, k, v].iter().map(|of| Buffer::f32(of.len())).collect();
        found.extend(a.bias.as_ref().map(|bias| Buffer::f32(bias.values.len())));
        let mut places = found.iter_mut();
        let (dq, dk, dv, dbias) = (places.next(), places.next(), places.next(), places.next());
        card.attention_backward(a, AttentionBackward { q, k, v, y, lse, dy, dq, dk, dv, dbias }, bf16);
        let gradients = found.into_iter().map(|d| Tensor::new([d.len()], d).to_vec().unwrap());
        [y, lse].map(|t| t.to_vec().unwrap()).into_iter().chain(gradients).collect()
    }

    /// The length of the difference over that of what was expected.
    fn distance(found: &[f32], expected: &[f32]) -> f64 {
        assert_eq!(found.len(), expected.len());
        let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let error = squares(&mut found.iter().zip(expected).filter(|(a, b)| a != b).map(|(a, b)| a - b));
        (error / squares(&mut expected.iter().copied().filter(|x| x.is_finite())).max(1e-30)).sqrt()
    }

    #[test]
    fn a_card_equals_the_processor() {
        let ragged =
            [(1, 1), (5, 5), (40, 40), (0, 0), (17, 17), (2, 70), (300, 300), (1, 900), (3, 9), (130, 390)];
        let heads = [(4, 2, 8), (3, 3, 20), (8, 1, 5), (2, 1, 64), (2, 1, 128), (2, 2, 80), (2, 1, 256)];
        let masks = [(false, None), (true, None), (true, Some(7)), (true, Some(100)), (true, Some(0))];
        let cases = heads.iter().flat_map(|heads| masks.iter().map(move |mask| (heads, mask)));
        // Every other case has a bias: with odd numbers of heads and masks, each of both comes with and without.
        for (i, (&(heads, kv_heads, dim), &(causal, window))) in cases.enumerate() {
            let scale = 2.0 / (dim as f32).sqrt();
            let spec = AttentionSpec { heads, kv_heads, dim, causal, window, scale };
            compare(spec, &ragged, i % 2 == 1);
        }
    }

    #[test]
    fn few_rows_are_cut_by_their_own_keys_alone() {
        let spans = [Span { q: 0..1, kv: 10..300 }, Span { q: 1..2, kv: 0..0 }];
        let mut positions = vec![0; 300];
        positions[0] = 280;
        positions[10..].iter_mut().zip(0..).for_each(|(p, i)| *p = i);
        let tile = |(first, count, from, end)| Tile { first, count, from, end };
        let (parts, rows) = sight(&spans, &positions, Some(u32::MAX)).few();
        assert_eq!(parts, [(0, 1, 10, 138), (0, 1, 138, 266), (0, 1, 266, 291)].map(tile));
        assert_eq!(rows, [(0, 1, 0, 3), (1, 1, 3, 3)].map(tile));
    }
}
