//! Attention on tensor cores: factors in bf16, for heads of up to 128 numbers, a multiple of 8.

use super::attention::{BLOCK, Sight, Tile, form, place};
use super::compile::Source;
use super::driver::{Arg, Cuda};
use crate::device::{AttentionBackward, Buffer};
use crate::ops::Attention;
use crate::tensor::Tensor;

/// Rows of a block, `ROWS` in the kernels, and of the tiles of keys and queries that it goes through.
const ROWS: usize = 128;
const KEYS: usize = 64;
const QUERIES: usize = 32;

/// Bytes of what comes with two tiles of queries: lse, delta, position.
const BESIDE: usize = 2 * 3 * 4 * QUERIES;

/// Numbers of a head as the kernels hold it, if they can: rows must begin at multiples of 16 bytes in bf16.
fn width(dim: usize) -> Option<usize> {
    match dim {
        _ if !dim.is_multiple_of(8) => None,
        0..=64 => Some(64),
        65..=128 => Some(128),
        _ => None,
    }
}

/// Whether `x` can be read by twos.
fn even(x: &Tensor) -> bool {
    x.arg().address().is_multiple_of(8)
}

/// Whether rows of bf16 can be read sixteen bytes at a time.
fn whole(rows: &[Arg]) -> bool {
    rows.iter().all(|row| row.address().is_multiple_of(16))
}

fn pick(width: usize, [narrow, wide]: [&'static str; 2]) -> &'static str {
    if width == 64 { narrow } else { wide }
}

/// Work of some tiles in bf16: the arguments, but for the tiles' own.
struct Work<'a> {
    source: [&'static str; 2],
    tiles: Vec<Tile>,
    heads: usize,
    width: usize,
    shared: usize,
    before: &'a [Arg],
    behind: &'a [Arg],
}

impl Cuda {
    fn launch_tiles(&self, w: Work) {
        let memory = self.upload_tiles(&w.tiles);
        let args = [w.before, &[memory.arg()], w.behind].concat();
        let kernel = pick(w.width, w.source);
        self.launch(Source::AttentionMma, kernel, [w.tiles.len() * w.heads, 1, 1], BLOCK, w.shared, &args);
    }

    /// y and lse of all rows, or of those that go in tiles; false, with nothing done, where the shapes do not allow it.
    pub(super) fn attend_in_bf16(
        &self,
        a: &Attention,
        sight: &Sight,
        [q, k, v]: [&Tensor; 3],
        all: bool,
        y: &mut Buffer,
        lse: &mut Buffer,
    ) -> bool {
        let Some(width) = width(a.spec.dim).filter(|_| even(q)) else { return false };
        let tiles = sight.long_tiles(ROWS, all);
        if tiles.is_empty() {
            return true;
        }
        let (k, v) = (k.bf16(self), v.bf16(self));
        if !whole(&[k, v]) {
            return false;
        }
        let before = [&[k, v][..], &form(a, sight)].concat();
        self.launch_tiles(Work {
            source: ["forward_64", "forward_128"],
            tiles,
            heads: a.spec.heads,
            width,
            shared: 2 * 2 * 2 * KEYS * width,
            before: &before,
            behind: &[q.arg(), y.arg(), lse.arg()],
        });
        true
    }

    /// dq, dk and dv where wanted; false, with nothing done, where the shapes do not allow it.
    pub(super) fn attend_back_in_bf16(
        &self,
        a: &Attention,
        sight: &Sight,
        g: &mut AttentionBackward<'_>,
        delta: &Buffer,
    ) -> bool {
        let Some(width) = width(a.spec.dim).filter(|_| even(g.q) && even(g.dy)) else { return false };
        let s = &a.spec;
        let [k, v, q, dy] = [g.k, g.v, g.q, g.dy].map(|x| x.bf16(self));
        if !whole(&[k, v, q, dy]) {
            return false;
        }
        let before = [&[k, v][..], &form(a, sight)].concat();
        let kept = [g.lse.arg(), delta.arg()];
        if let Some(dq) = &g.dq {
            self.launch_tiles(Work {
                source: ["backward_rows_64", "backward_rows_128"],
                tiles: sight.all_query_tiles(ROWS),
                heads: s.heads,
                width,
                shared: 2 * 2 * 2 * KEYS * width,
                before: &before,
                behind: &[g.q.arg(), g.dy.arg(), kept[0], kept[1], dq.arg()],
            });
        }
        if g.dk.is_some() || g.dv.is_some() {
            self.launch_tiles(Work {
                source: ["backward_keys_64", "backward_keys_128"],
                tiles: sight.key_tiles(ROWS),
                heads: s.kv_heads,
                width,
                shared: 2 * 2 * width * (ROWS + 2 * QUERIES) + BESIDE,
                before: &before,
                behind: &[q, dy, kept[0], kept[1], place(&g.dk), place(&g.dv)],
            });
        }
        true
    }
}
