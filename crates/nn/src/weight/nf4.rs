//! NF4: 4-bit codes of normally distributed numbers (Dettmers et al. 2023, arXiv:2305.14314), as `bitsandbytes` has it.
//!
//! Every `block` consecutive elements (row-major) share a scale a = max|x|; an element is stored as the index q of one
//! of 16 levels and read as level[q]·a. With double quantization the scales themselves are stored as 8-bit codes of
//! (a − mean a) in blocks of 256.

use std::ops::Range;

use engraft_tensor::frozen::{FourBit, FourBitScales, RowSource};

use crate::{Error, Result};

/// The 16 levels: quantiles of the normal distribution, scaled to ±1.
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Scales that share a second-level scale.
const SCALE_BLOCK: usize = 256;

/// A matrix [out, in] in NF4.
pub struct Nf4 {
    shape: (usize, usize),
    block: usize,
    /// Two codes a byte, the even element in the high half.
    codes: Vec<u8>,
    scales: Scales,
}

enum Scales {
    Plain(Vec<f32>),
    Double { codes: Vec<u8>, scales: Vec<f32>, offset: f32, map: Box<[f32; 256]> },
}

impl Scales {
    fn get(&self, i: usize) -> f32 {
        match self {
            Scales::Plain(scales) => scales[i],
            Scales::Double { codes, scales, offset, map } => {
                map[codes[i] as usize] * scales[i / SCALE_BLOCK] + offset
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Scales::Plain(scales) => scales.len() * 4,
            Scales::Double { codes, scales, .. } => codes.len() + scales.len() * 4 + 256 * 4 + 4,
        }
    }
}

/// The 8-bit signed dynamic map: for i in 0..7 the midpoints of 2^i cells of [0.1, 1] times 10^(i−6), both signs, and
/// 0 and 1, sorted.
fn dynamic_map() -> Box<[f32; 256]> {
    let mut values = vec![0.0, 1.0];
    for i in 0..7 {
        let cells = 1u32 << i;
        let edge = |c: u32| 0.1 + 0.9 * f64::from(c) / f64::from(cells);
        for c in 0..cells {
            let value = (edge(c) + edge(c + 1)) / 2.0 * 10f64.powi(i - 6);
            values.extend([value as f32, -value as f32]);
        }
    }
    values.sort_by(f32::total_cmp);
    let mut map = Box::new([0.0; 256]);
    map.copy_from_slice(&values);
    map
}

/// Index of the nearest entry of an ascending table; a tie takes the lower.
fn nearest(table: &[f32], x: f32) -> u8 {
    let above = table.partition_point(|&v| v < x);
    let index = match above {
        0 => 0,
        n if n == table.len() => n - 1,
        n => {
            // The midpoint in f32, as the reference has it: an element above it takes the upper code.
            let middle = (table[n - 1] + table[n]) / 2.0;
            if x > middle { n } else { n - 1 }
        }
    };
    index as u8
}

impl Nf4 {
    /// Quantizes the rows of `source`, a few at a time.
    pub fn quantize(source: &dyn RowSource, block: usize, double: bool) -> Result<Nf4> {
        if !block.is_power_of_two() || !(32..=4096).contains(&block) {
            return Err(Error::Unsupported(format!(
                "NF4 blocks hold a power of two from 32 to 4096 elements, not {block}"
            )));
        }
        let (out, inn) = source.shape();
        let total = out * inn;
        let mut codes = vec![0u8; total.div_ceil(2)];
        let mut scales = Vec::with_capacity(total.div_ceil(block));
        let mut pending: Vec<f32> = Vec::new();
        let mut done = 0;
        let rows_at_once = (1 << 16) / inn.max(1) + 1;
        for start in (0..out).step_by(rows_at_once) {
            let end = (start + rows_at_once).min(out);
            let kept = pending.len();
            pending.resize(kept + (end - start) * inn, 0.0);
            source.rows(start..end, &mut pending[kept..]);
            let whole = if end == out { pending.len() } else { pending.len() / block * block };
            for chunk in pending[..whole].chunks(block) {
                scales.push(encode(chunk, done, &mut codes));
                done += chunk.len();
            }
            pending.drain(..whole);
        }
        let scales = if double { double_quantize(&scales) } else { Scales::Plain(scales) };
        Ok(Nf4 { shape: (out, inn), block, codes, scales })
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.bytes()
    }

    /// The code of element `i`, row-major.
    pub fn code(&self, i: usize) -> u8 {
        let byte = self.codes[i / 2];
        if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 }
    }
}

/// Encodes one block whose first element is number `at`; gives its scale.
fn encode(block: &[f32], at: usize, codes: &mut [u8]) -> f32 {
    let scale = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (i, x) in block.iter().enumerate() {
        let code = nearest(&LEVELS, x * inverse);
        let n = at + i;
        codes[n / 2] |= if n.is_multiple_of(2) { code << 4 } else { code };
    }
    scale
}

fn double_quantize(scales: &[f32]) -> Scales {
    let map = dynamic_map();
    let offset = (scales.iter().map(|&s| f64::from(s)).sum::<f64>() / scales.len().max(1) as f64) as f32;
    let mut codes = Vec::with_capacity(scales.len());
    let mut second = Vec::new();
    for block in scales.chunks(SCALE_BLOCK) {
        let largest = block.iter().fold(0.0f32, |m, s| m.max((s - offset).abs()));
        let inverse = if largest > 0.0 { 1.0 / largest } else { 0.0 };
        codes.extend(block.iter().map(|s| nearest(&map[..], (s - offset) * inverse)));
        second.push(largest);
    }
    Scales::Double { codes, scales: second, offset, map }
}

impl RowSource for Nf4 {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let first = rows.start * self.shape.1;
        let (mut i, end) = (first, rows.end * self.shape.1);
        while i < end {
            let stop = ((i / self.block + 1) * self.block).min(end);
            let scale = self.scales.get(i / self.block);
            for n in i..stop {
                out[n - first] = LEVELS[self.code(n) as usize] * scale;
            }
            i = stop;
        }
    }

    fn four_bit(&self) -> Option<FourBit<'_>> {
        let scales = match &self.scales {
            Scales::Plain(scales) => FourBitScales::Plain(scales),
            Scales::Double { codes, scales, offset, map } => {
                FourBitScales::Double { codes, scales, offset: *offset, map }
            }
        };
        Some(FourBit { block: self.block, levels: &LEVELS, codes: &self.codes, scales })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rows(Vec<f32>, usize);
    impl RowSource for Rows {
        fn shape(&self) -> (usize, usize) {
            (self.0.len() / self.1, self.1)
        }
        fn rows(&self, rows: Range<usize>, out: &mut [f32]) {
            out.copy_from_slice(&self.0[rows.start * self.1..rows.end * self.1]);
        }
    }

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 1013) as f32 / 506.0 - 1.0) * 0.3).collect()
    }

    #[test]
    fn decoding_and_encoding_again_changes_nothing() {
        let source = Rows(numbers(37 * 53), 53);
        let first = Nf4::quantize(&source, 64, false).unwrap();
        let mut dense = vec![0.0; 37 * 53];
        first.rows(0..37, &mut dense);
        let again = Nf4::quantize(&Rows(dense.clone(), 53), 64, false).unwrap();
        assert_eq!(first.codes, again.codes);
        for (block, values) in source.0.chunks(64).zip(dense.chunks(64)) {
            let largest = |b: &[f32]| b.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            assert_eq!(largest(block), largest(values), "each block reproduces its largest element");
        }
        let mut some = vec![0.0; 2 * 53];
        first.rows(5..7, &mut some);
        assert_eq!(some, dense[5 * 53..7 * 53]);
    }

    #[test]
    fn memory_is_four_bits_and_the_scales() {
        let source = Rows(numbers(128 * 512), 512);
        let plain = Nf4::quantize(&source, 64, false).unwrap().bytes() as f64 * 8.0 / (128.0 * 512.0);
        assert!((plain - 4.5).abs() < 1e-9, "{plain}");
        let double = Nf4::quantize(&source, 64, true).unwrap().bytes() as f64 * 8.0 / (128.0 * 512.0);
        assert!(double < 4.3, "{double}");
    }

    #[test]
    fn zeros_and_bad_blocks() {
        let zero = Nf4::quantize(&Rows(vec![0.0; 70], 7), 64, false).unwrap();
        assert_eq!(zero.code(3), 7);
        for block in [0, 48, 16, 8192] {
            assert!(Nf4::quantize(&Rows(vec![0.0; 70], 7), block, false).is_err());
        }
    }

    #[test]
    fn the_dynamic_map_has_its_ends() {
        let map = dynamic_map();
        assert!((map[0] + 0.992_968_75).abs() < 1e-6 && map[255] == 1.0);
        assert!(map.windows(2).all(|w| w[0] < w[1]));
    }
}
