//! Products with a weight that is kept in another form, such as NF4: a slab of rows at a time is turned into f32, packed
//! into scratch and multiplied by the same tiles. The results have the same bits as with the whole matrix packed.

use std::ops::Range;

use rayon::prelude::*;

use super::pack::{Layout, Precision};
use super::product::{Direction, Start};
use super::{PackedMatrix, check_shape, isa::isa};

/// Weights of a slab, in elements (4 MiB in f32): small beside a model, large beside the cost of sharing out the work.
const SLAB_ELEMENTS: usize = 1 << 20;

/// A matrix that can give its rows as f32.
pub trait RowSource: Sync {
    /// `(out, in)`.
    fn shape(&self) -> (usize, usize);

    /// Writes `rows` to `dense` `[rows, in]`. Called from several threads.
    fn rows(&self, rows: Range<usize>, dense: &mut [f32]);

    /// Its codes, where it is four bits wide: a card expands them itself.
    fn four_bit(&self) -> Option<FourBit<'_>> {
        None
    }
}

/// A matrix of 4-bit codes, row-major: element i is `levels[code i] · scale(i / block)`.
pub struct FourBit<'a> {
    /// Elements that share a scale, an even number.
    pub block: usize,
    /// What each code stands for.
    pub levels: &'a [f32; 16],
    /// Two codes a byte, the even element in the high half.
    pub codes: &'a [u8],
    /// A scale a block.
    pub scales: FourBitScales<'a>,
}

/// Scales of a [`FourBit`].
pub enum FourBitScales<'a> {
    /// As they are.
    Plain(&'a [f32]),
    /// `map[code i] · scales[i / 256] + offset`.
    Double {
        /// An 8-bit code a block.
        codes: &'a [u8],
        /// A scale for each 256 codes.
        scales: &'a [f32],
        /// Added to all.
        offset: f32,
        /// What each 8-bit code stands for.
        map: &'a [f32; 256],
    },
}

/// `y = x · Wᵀ (+ bias)` with the rows of W taken from `source`; shapes as in [`PackedMatrix::forward`].
///
/// # Panics
/// When a slice does not have its shape.
pub fn streamed_forward(
    source: &dyn RowSource,
    precision: Precision,
    x: &[f32],
    rows: usize,
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    let (out, inn) = source.shape();
    check_shape("x", x.len(), rows, inn);
    check_shape("y", y.len(), rows, out);
    if let Some(bias) = bias {
        check_shape("bias", bias.len(), 1, out);
    }
    for_each_slab(source, precision, &mut |range, slab| {
        let start = bias.map_or(Start::Zero, |bias| Start::Bias(&bias[range.clone()]));
        let product = slab.product(Direction::Forward, start, x, inn, rows, out);
        product.compute(y.get_mut(range.start..).unwrap_or_default());
    });
}

/// `dx = dy · W`, or `dx += dy · W` with `accumulate`, with the rows of W taken from `source`; shapes as in
/// [`PackedMatrix::backward`].
///
/// # Panics
/// When a slice does not have its shape.
pub fn streamed_backward(
    source: &dyn RowSource,
    precision: Precision,
    dy: &[f32],
    rows: usize,
    accumulate: bool,
    dx: &mut [f32],
) {
    let (out, inn) = source.shape();
    check_shape("dy", dy.len(), rows, out);
    check_shape("dx", dx.len(), rows, inn);
    if out == 0 && !accumulate {
        dx.fill(0.0);
    }
    for_each_slab(source, precision, &mut |range, slab| {
        let start = if accumulate || range.start > 0 { Start::Result } else { Start::Zero };
        let dy = dy.get(range.start..).unwrap_or_default();
        slab.product(Direction::Backward, start, dy, out, rows, inn).compute(dx);
    });
}

/// Packs `source` slab by slab and hands each, with its range of rows, to `use_slab`.
fn for_each_slab(
    source: &dyn RowSource,
    precision: Precision,
    use_slab: &mut dyn FnMut(Range<usize>, &PackedMatrix),
) {
    let (out, inn) = source.shape();
    let width = isa().panel_width();
    let slab_rows = (SLAB_ELEMENTS / inn.max(1) / width).max(1) * width;
    let mut dense = vec![0.0; slab_rows.min(out) * inn];
    let mut slab: Option<PackedMatrix> = None;
    for start in (0..out).step_by(slab_rows) {
        let range = start..(start + slab_rows).min(out);
        let dense = &mut dense[..range.len() * inn];
        if inn > 0 {
            // Dequantising is work too: every thread does a panel's worth of rows at a time.
            dense.par_chunks_mut(width * inn).enumerate().for_each(|(i, part)| {
                let first = range.start + i * width;
                source.rows(first..first + part.len() / inn, part);
            });
        }
        let slab = slab.get_or_insert_with(|| {
            PackedMatrix::zeroed(Layout { out: range.len(), inn, precision, isa: isa() })
        });
        slab.layout = Layout { out: range.len(), ..slab.layout };
        slab.pack_block(0, dense);
        use_slab(range, slab);
    }
}
