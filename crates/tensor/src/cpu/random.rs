//! Random numbers as pure functions of (seed, stream, counter): Philox 4×32-10.
//!
//! Ten rounds of two 32×32→64-bit products mix a 128-bit counter under a 64-bit key (Salmon et al., "Parallel Random
//! Numbers: As Easy as 1, 2, 3", SC 2011). Here the key is the seed, the upper half of the counter the stream and the
//! lower half the index of a block of four words, so any element can be made anywhere, in any order.

use crate::cpu::simd::dispatch;

const MULTIPLY: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// One source of random numbers: every stream of a seed is independent of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The run's seed.
    pub seed: u64,
    /// What the numbers are for: a layer and step, a parameter, an epoch.
    pub stream: u64,
}

/// The Philox 4×32-10 function itself.
#[inline(always)]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut a, mut b, mut c, mut d] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let x = u64::from(MULTIPLY[0]) * u64::from(a);
        let y = u64::from(MULTIPLY[1]) * u64::from(c);
        (a, b, c, d) = ((y >> 32) as u32 ^ b ^ k0, y as u32, (x >> 32) as u32 ^ d ^ k1, x as u32);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [a, b, c, d]
}

impl Key {
    /// The four words of block `block`.
    #[inline(always)]
    pub fn block(self, block: u64) -> [u32; 4] {
        let low = |x: u64| x as u32;
        let high = |x: u64| (x >> 32) as u32;
        philox(
            [low(block), high(block), low(self.stream), high(self.stream)],
            [low(self.seed), high(self.seed)],
        )
    }

    /// Word `index` of the stream: 32 random bits.
    #[inline]
    pub fn bits(self, index: u64) -> u32 {
        self.block(index / 4)[(index % 4) as usize]
    }

    /// Element `index` of the stream as a number in [0, 1), a multiple of 2⁻²⁴.
    #[inline]
    pub fn uniform(self, index: u64) -> f32 {
        unit(self.bits(index))
    }

    /// Element `index` of the stream as a standard normal number.
    #[inline]
    pub fn normal(self, index: u64) -> f32 {
        normals(self.block(index / 4))[(index % 4) as usize]
    }

    /// Fills `out` with words `first..` of the stream.
    pub fn fill_bits(self, first: u64, out: &mut [u32]) {
        fill_words(self, first, out);
    }

    /// Fills `out` with numbers in [0, 1): element `i` is `uniform(i)`.
    pub fn fill_uniform(self, out: &mut [f32]) {
        for (out, block) in out.chunks_mut(4).zip(0..) {
            let words = self.block(block).map(unit);
            out.copy_from_slice(&words[..out.len()]);
        }
    }

    /// Fills `out` with standard normal numbers: element `i` is `normal(i)`.
    pub fn fill_normal(self, out: &mut [f32]) {
        for (out, block) in out.chunks_mut(4).zip(0..) {
            out.copy_from_slice(&normals(self.block(block))[..out.len()]);
        }
    }

    /// Puts `items` into a uniformly random order (Fisher–Yates; each draw is unbiased).
    pub fn shuffle<T>(self, items: &mut [T]) {
        let mut words = Words { key: self, next: 0 };
        for last in (1..items.len()).rev() {
            items.swap(last, words.below(last as u64 + 1) as usize);
        }
    }
}

/// The upper 24 bits of a word as a number in [0, 1).
#[inline(always)]
fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Box–Muller: two words make two independent normal numbers. In f64, so that the tails keep their digits.
fn normals(words: [u32; 4]) -> [f32; 4] {
    let pair = |a: u32, b: u32| {
        let u = (f64::from(a) + 0.5) / 4_294_967_296.0; // in (0, 1)
        let radius = (-2.0 * u.ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * f64::from(b) / 4_294_967_296.0).sin_cos();
        [(radius * cos) as f32, (radius * sin) as f32]
    };
    let ([a, b], [c, d]) = (pair(words[0], words[1]), pair(words[2], words[3]));
    [a, b, c, d]
}

/// The words of a stream one after another, for draws that need an unknown number of them.
struct Words {
    key: Key,
    next: u64,
}

impl Words {
    fn draw(&mut self) -> u64 {
        let [a, b, c, d] = self.key.block(self.next / 2);
        let (low, high) = if self.next.is_multiple_of(2) { (a, b) } else { (c, d) };
        self.next += 1;
        u64::from(high) << 32 | u64::from(low)
    }

    /// A number in 0..bound, each equally likely: the upper half of a 128-bit product, where the few draws that would
    /// favour small numbers are thrown again (Lemire 2019).
    fn below(&mut self, bound: u64) -> u64 {
        let unfair = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.draw()) * u128::from(bound);
            if product as u64 >= unfair {
                return (product >> 64) as u64;
            }
        }
    }
}

/// Eight blocks side by side, so that the rounds run in vectors.
#[inline(always)]
fn fill_words_body<const L: usize>(key: Key, first: u64, out: &mut [u32]) {
    let head = (first.wrapping_neg() % 4).min(out.len() as u64) as usize;
    let (head, rest) = out.split_at_mut(head);
    for (out, index) in head.iter_mut().zip(first..) {
        *out = key.bits(index);
    }
    let mut block = first.div_ceil(4);
    let mut eights = rest.chunks_exact_mut(32);
    for out in &mut eights {
        let mut words = [[0; 4]; 8];
        for (i, words) in words.iter_mut().enumerate() {
            *words = key.block(block.wrapping_add(i as u64));
        }
        out.copy_from_slice(words.as_flattened());
        block += 8;
    }
    for (out, block) in eights.into_remainder().chunks_mut(4).zip(block..) {
        out.copy_from_slice(&key.block(block)[..out.len()]);
    }
}

dispatch! { fn fill_words(key: Key, first: u64, out: &mut [u32]) = fill_words_body; }

/// Puts `indices` into the random order of (seed, stream).
pub fn shuffle(indices: &mut [usize], seed: u64, stream: u64) {
    Key { seed, stream }.shuffle(indices);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with Random123.
    #[test]
    fn philox_gives_the_known_answers() {
        let ones = u32::MAX;
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([ones; 4], [ones; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        let pi = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344];
        assert_eq!(philox(pi, [0xa4093822, 0x299f31d0]), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }

    #[test]
    fn filling_equals_drawing_one_by_one() {
        let key = Key { seed: 7, stream: 1 << 40 };
        for first in [0, 1, 3, 4, (1u64 << 34) - 2] {
            for length in [0, 1, 2, 5, 33, 100] {
                let mut words = vec![0; length];
                key.fill_bits(first, &mut words);
                let single: Vec<u32> = (0..length as u64).map(|i| key.bits(first + i)).collect();
                assert_eq!(words, single, "first {first}, length {length}");
            }
        }
        let (mut uniform, mut normal) = ([0.0; 11], [0.0; 11]);
        key.fill_uniform(&mut uniform);
        key.fill_normal(&mut normal);
        for i in 0..11 {
            assert_eq!(uniform[i], key.uniform(i as u64));
            assert_eq!(normal[i], key.normal(i as u64));
        }
    }

    #[test]
    fn moments_and_range() {
        let key = Key { seed: 3, stream: 5 };
        let n = 200_000;
        let (mut uniform, mut normal) = (vec![0.0f32; n], vec![0.0f32; n]);
        key.fill_uniform(&mut uniform);
        key.fill_normal(&mut normal);
        assert!(uniform.iter().all(|u| (0.0..1.0).contains(u)));
        let moment = |x: &[f32], p: i32| x.iter().map(|&x| f64::from(x).powi(p)).sum::<f64>() / n as f64;
        assert!((moment(&uniform, 1) - 0.5).abs() < 0.003 && (moment(&uniform, 2) - 1.0 / 3.0).abs() < 0.003);
        for (p, expected) in [(1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)] {
            assert!((moment(&normal, p) - expected).abs() < 0.05, "moment {p} of the normal numbers");
        }
        let other = Key { stream: 6, ..key };
        assert_ne!(key.block(0), other.block(0));
    }

    #[test]
    fn shuffles_are_fair_permutations() {
        let mut counts = [[0u32; 5]; 5];
        for stream in 0..20_000 {
            let mut items = [0usize, 1, 2, 3, 4];
            shuffle(&mut items, 11, stream);
            for (place, &item) in items.iter().enumerate() {
                counts[place][item] += 1;
            }
        }
        for count in counts.as_flattened() {
            assert!(count.abs_diff(4_000) < 300, "{counts:?}");
        }
        let mut large: Vec<usize> = (0..1000).collect();
        shuffle(&mut large, 1, 2);
        assert_ne!(large, (0..1000).collect::<Vec<_>>());
        large.sort_unstable();
        assert_eq!(large, (0..1000).collect::<Vec<_>>());
    }
}
