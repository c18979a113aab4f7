//! How weights lie in memory, and the moves between that layout, row-major matrices and the transposed layout.
//!
//! W `[out, in]` is cut into panels of NR outs (see `Isa::panel_width`), each stored as `[steps, NR]` words. In f32 a step
//! is one in; in bf16 it is two, the word holding both. Missing outs, an odd last in and what tiles have beyond it are zeros. So a panel is the
//! transpose, as 32-bit words, of NR rows of W, and every move here is a transpose of words:
//!
//! - packing transposes NR rows (rounded to bf16 first where asked);
//! - the backward product needs the panels of Wᵀ: squares of NR × NR of the stored panels, transposed back.

use super::isa::{Isa, Task};
use super::lanes::Lanes;

/// The numbers that products are made of. Sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Weights and activations in f32.
    F32,
    /// Weights and activations rounded to the nearest bf16 (ties to even).
    Bf16,
}

impl Precision {
    /// How many k one word holds.
    pub(super) fn per_word(self) -> usize {
        match self {
            Precision::F32 => 1,
            Precision::Bf16 => 2,
        }
    }

    /// What a value is after being stored in this precision.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Precision::F32 => value,
            Precision::Bf16 => f32::from_bits(to_bf16(value) << 16),
        }
    }
}

/// The bf16 nearest to `value`, ties to even, in the low half; NaN stays NaN.
#[inline(always)]
pub(super) fn to_bf16(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    if bits & 0x7fff_ffff > 0x7f80_0000 { quiet_nan } else { rounded }
}

/// The bf16 of `low` and `high` as one word.
#[inline(always)]
pub(super) fn to_pair(low: f32, high: f32) -> u32 {
    to_bf16(low) | (to_bf16(high) << 16)
}

/// Sixteen words that fill a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Words on a cache line boundary.
#[derive(Default)]
pub(super) struct Words {
    lines: Vec<Line>,
}

impl Words {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        Words { lines: vec![Line([0; 16]); len.div_ceil(16)] }
    }

    /// Grows to at least `len` words; contents are kept.
    pub fn reserve(&mut self, len: usize) {
        if self.lines.len() * 16 < len {
            self.lines.resize(len.div_ceil(16), Line([0; 16]));
        }
    }

    /// Whole lines of words, at least as many as asked for.
    pub fn as_slice(&self) -> &[u32] {
        // SAFETY: `Line` is `repr(C)` around sixteen u32 without padding.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * 16) }
    }

    /// The same, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [u32] {
        // SAFETY: as in `as_slice`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len() * 16) }
    }
}

/// The extents of packed weights.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub out: usize,
    pub inn: usize,
    pub precision: Precision,
    pub isa: Isa,
}

impl Layout {
    /// Outs in a panel.
    pub fn width(&self) -> usize {
        self.isa.panel_width()
    }
    /// Whether products go by the tiles of AMX.
    pub fn is_tiled(&self) -> bool {
        self.isa == Isa::AmxBf16 && self.precision == Precision::Bf16
    }
    /// Steps of a panel; tiles have 16.
    pub fn steps(&self) -> usize {
        let steps = self.inn.div_ceil(self.precision.per_word());
        if self.is_tiled() { steps.next_multiple_of(16) } else { steps }
    }
    /// Number of panels.
    pub fn panels(&self) -> usize {
        self.out.div_ceil(self.width())
    }
    /// Words of one panel.
    pub fn panel_words(&self) -> usize {
        self.steps() * self.width()
    }
    /// Words of all panels, or nothing when that number overflows.
    pub fn checked_words(&self) -> Option<usize> {
        self.steps()
            .checked_mul(self.width())?
            .checked_mul(self.panels())?
            .checked_mul(4)
            .map(|bytes| bytes / 4)
    }
}

/// Packs up to NR rows of W into one panel.
pub(super) struct PackPanel<'a> {
    pub layout: Layout,
    /// `[rows, in]`, at most NR rows.
    pub rows: &'a [f32],
    /// Scratch; grows to `[NR, steps]` in bf16.
    pub pairs: &'a mut Words,
    /// `[steps, NR]`; outs without a row become zero.
    pub panel: &'a mut [u32],
}

impl Task for PackPanel<'_> {
    #[inline(always)]
    unsafe fn run<L: Lanes, const NV: usize>(self) {
        let Layout { inn, precision, .. } = self.layout;
        let (width, steps) = (L::WIDTH * NV, self.layout.steps());
        let rows = self.rows.len().checked_div(inn).unwrap_or(0);
        assert!(
            rows <= width && self.panel.len() == width * steps,
            "one panel takes at most its width of rows"
        );
        let source = match precision {
            Precision::F32 => self.rows.as_ptr().cast::<u32>(),
            Precision::Bf16 => {
                self.pairs.reserve(width * steps);
                let pairs = self.pairs.as_mut_slice();
                for r in 0..rows {
                    let row = &mut pairs[r * steps..(r + 1) * steps];
                    row[inn.div_ceil(2)..].fill(0);
                    round_row(&self.rows[r * inn..(r + 1) * inn], row);
                }
                self.pairs.as_slice().as_ptr()
            }
        };
        // SAFETY: `source` holds `rows` rows of `steps` words (in f32, steps = in); the panel is `[steps, width]`.
        unsafe { transpose::<L>(source, steps, rows, width, steps, self.panel.as_mut_ptr(), width) }
    }
}

/// Rounds `row` `[k]` to bf16 pairs `[ceil(k / 2)]`.
#[inline(always)]
pub(super) fn round_row(row: &[f32], pairs: &mut [u32]) {
    let (twos, last) = row.as_chunks::<2>();
    for (pair, two) in pairs.iter_mut().zip(twos) {
        *pair = to_pair(two[0], two[1]);
    }
    if let [value] = last {
        pairs[twos.len()] = to_bf16(*value);
    }
}

/// The transposing of stored panels for the backward product: writes the panel of Wᵀ that holds the `ins` from
/// `panel · NR` on, for `k` outs from `k0` on, as `[steps, NR]` words. `k0` is a multiple of NR.
///
/// # Safety
/// The processor has the lanes' instructions. `words` is laid out as `layout` says. `into` has room for `k` rounded up to a
/// multiple of NR.
#[inline(always)]
pub(super) unsafe fn transposed_panel<L: Lanes, const NV: usize>(
    layout: &Layout,
    words: &[u32],
    panel: usize,
    k0: usize,
    k: usize,
    into: *mut u32,
) {
    let width = L::WIDTH * NV;
    let per_word = layout.precision.per_word();
    let in0 = panel * width;
    let ins = width.min(layout.inn - in0);
    for (n, source) in (k0 / width..(k0 + k).div_ceil(width)).enumerate() {
        let start = source * layout.panel_words() + in0 / per_word * width;
        let square = &words[start..start + ins.div_ceil(per_word) * width];
        // SAFETY: the caller's promise; source panel n gives the steps of its NR outs, NR / per_word of them.
        unsafe {
            let into = into.add(n * (width / per_word) * width);
            match layout.precision {
                Precision::F32 => transpose::<L>(square.as_ptr(), width, ins, width, width, into, width),
                Precision::Bf16 => {
                    let mut halves = [0u32; 64 * 32];
                    exchange_pairs(square, width, &mut halves);
                    transpose::<L>(halves.as_ptr(), width / 2, width, width, width / 2, into, width);
                }
            }
        }
    }
}

/// From words of (in pair) × out to words of in × (out pair): row m of `square` `[ins / 2, width]` becomes rows 2m and
/// 2m + 1 of `halves` `[width, width / 2]`. Rows that `square` lacks stay zero.
#[inline(always)]
fn exchange_pairs(square: &[u32], width: usize, halves: &mut [u32]) {
    for (from, to) in square.chunks_exact(width).zip(halves.chunks_exact_mut(width)) {
        let (even_in, odd_in) = to.split_at_mut(width / 2);
        let (twos, _) = from.as_chunks::<2>();
        for ((two, even), odd) in twos.iter().zip(even_in).zip(odd_in) {
            *even = (two[0] & 0xffff) | (two[1] << 16);
            *odd = (two[0] >> 16) | (two[1] & 0xffff_0000);
        }
    }
}

/// Transposes words: `into[c][r] = from[r][c]` for `c < columns`, `r < padded_rows`, with zeros for `r ≥ rows`.
///
/// # Safety
/// The processor has the lanes' instructions. `from` is good for `[rows, columns]` at `from_stride`, `into` for
/// `[columns, padded_rows]` at `into_stride`. `padded_rows` is a multiple of the lanes.
#[inline(always)]
pub(in crate::cpu) unsafe fn transpose<L: Lanes>(
    from: *const u32,
    from_stride: usize,
    rows: usize,
    padded_rows: usize,
    columns: usize,
    into: *mut u32,
    into_stride: usize,
) {
    let w = L::WIDTH;
    let mut block = [0u32; 16 * 16];
    for c in (0..columns).step_by(w) {
        for r in (0..padded_rows).step_by(w) {
            // SAFETY: the block at (r, c) is inside both matrices, or goes through `block`, of which only the part inside
            // them is read and written.
            unsafe {
                let (high, wide) = (rows.saturating_sub(r).min(w), (columns - c).min(w));
                let target = into.add(c * into_stride + r);
                if high == w && wide == w {
                    transpose_block::<L>(from.add(r * from_stride + c), from_stride, target, into_stride);
                    continue;
                }
                for j in 0..wide {
                    for i in 0..w {
                        block[j * w + i] =
                            if i < high { *from.add((r + i) * from_stride + c + j) } else { 0 };
                    }
                    std::ptr::copy_nonoverlapping(block.as_ptr().add(j * w), target.add(j * into_stride), w);
                }
            }
        }
    }
}

/// Transposes a square of `WIDTH` × `WIDTH` words by log2(WIDTH) rounds of zipping row i with row i + WIDTH / 2.
///
/// # Safety
/// The processor has the lanes' instructions; both pointers are good for the square.
#[inline(always)]
unsafe fn transpose_block<L: Lanes>(
    from: *const u32,
    from_stride: usize,
    into: *mut u32,
    into_stride: usize,
) {
    // SAFETY: the caller's promise; WIDTH is at most 16.
    unsafe {
        let w = L::WIDTH;
        let mut rows = [L::zero(); 16];
        for (i, row) in rows.iter_mut().enumerate().take(w) {
            *row = L::load(from.add(i * from_stride));
        }
        let mut round = 1;
        while round < w {
            let before = rows;
            for i in 0..w / 2 {
                (rows[2 * i], rows[2 * i + 1]) = L::zip(before[i], before[i + w / 2]);
            }
            round *= 2;
        }
        for (j, row) in rows.iter().enumerate().take(w) {
            L::store(into.add(j * into_stride), *row);
        }
    }
}
