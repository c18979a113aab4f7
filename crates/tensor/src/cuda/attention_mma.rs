//! Attention on tensor cores: factors in bf16, for heads of up to 128 numbers, a multiple of 8.

use super::attention::{BLOCK, Sight, Tile, form, place};
use super::compile::Source;
use super::driver::{Arg, Cuda};
use crate::device::{AttentionBackward, Buffer};
use crate::ops::Attention;
use crate::tensor::Tensor;

/// Rows of a block, `ROWS` in the kernels, and of the tiles of keys that the backward pass goes through.
const ROWS: usize = 128;
const KEYS: usize = 64;

/// What differs between cards: the constants of the same names in the kernels.
struct Sizes {
    /// Whether a block's own rows stay in shared memory.
    by_groups: bool,
    forward_keys: usize,
    queries: usize,
    stages: usize,
}

impl Sizes {
    fn of(card: &Cuda) -> Sizes {
        match card.by_groups() {
            true => Sizes { by_groups: true, forward_keys: 128, queries: 64, stages: 3 },
            false => Sizes { by_groups: false, forward_keys: 64, queries: 32, stages: 2 },
        }
    }

    /// Shared memory, in bytes: a block's own rows of `kinds`, and `others` rows of two kinds.
    fn bytes(&self, width: usize, kinds: usize, others: usize) -> usize {
        2 * width * (if self.by_groups { kinds * ROWS } else { 0 } + 2 * others)
    }
}

/// Numbers of a head as the kernels hold it, if they can: rows must begin at multiples of 16 bytes in bf16.
fn width(dim: usize) -> Option<usize> {
    match dim {
        _ if !dim.is_multiple_of(8) => None,
        0..=64 => Some(64),
        65..=128 => Some(128),
        _ => None,
    }
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
        let Some(width) = width(a.spec.dim) else { return false };
        let tiles = sight.long_tiles(ROWS, all);
        if tiles.is_empty() {
            return true;
        }
        let [q, k, v] = [q, k, v].map(|x| x.bf16(self));
        if !whole(&[q, k, v]) {
            return false;
        }
        let sizes = Sizes::of(self);
        let before = [&[k, v][..], &form(a, sight)].concat();
        self.launch_tiles(Work {
            source: ["forward_64", "forward_128"],
            tiles,
            heads: a.spec.heads,
            width,
            shared: sizes.bytes(width, 1, 2 * sizes.forward_keys),
            before: &before,
            behind: &[q, y.arg(), lse.arg()],
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
        let Some(width) = width(a.spec.dim) else { return false };
        let (s, sizes) = (&a.spec, Sizes::of(self));
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
                shared: sizes.bytes(width, 2, sizes.stages * KEYS),
                before: &before,
                behind: &[q, dy, kept[0], kept[1], dq.arg()],
            });
        }
        if g.dk.is_some() || g.dv.is_some() {
            // The block's keys and values, stages of queries and dy, and with these lse, delta and position.
            let Sizes { queries, stages, .. } = sizes;
            let shared = 2 * 2 * width * (ROWS + stages * queries) + stages * 3 * 4 * queries;
            self.launch_tiles(Work {
                source: ["backward_keys_64", "backward_keys_128"],
                tiles: sight.key_tiles(ROWS),
                heads: s.kv_heads,
                width,
                shared,
                before: &before,
                behind: &[q, dy, kept[0], kept[1], place(&g.dk), place(&g.dv)],
            });
        }
        true
    }
}
