//! The random numbers of PyTorch's generator for CPUs, to the bit.
//!
//! Some adapters hold a seed in place of random matrices or places (VeRA, RandLoRA, FourierFT), and mean what PyTorch
//! draws from it: a Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998) seeded with the lower 32 bits, one word a
//! single-precision number.

use serde_json::Value;

/// The seed of a `torch.Generator()` that nobody seeded.
pub(crate) const DEFAULT_SEED: Seed = Seed(67_280_421_310_721);

/// A seed as PyTorch takes it: any 64 bits, with a sign or without.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Seed(i128);

impl Seed {
    pub const fn of(number: u64) -> Seed {
        Seed(number as i128)
    }

    /// The whole numbers that PyTorch takes.
    pub fn read(value: &Value) -> Option<Seed> {
        value.as_u64().map(i128::from).or(value.as_i64().map(i128::from)).map(Seed)
    }

    /// The number itself, as files have it.
    pub fn written(self) -> Value {
        match u64::try_from(self.0) {
            Ok(number) => number.into(),
            Err(_) => (self.0 as i64).into(),
        }
    }

    /// The seed that lies `number` above this one.
    pub fn plus(self, number: u64) -> Seed {
        Seed(self.0 + i128::from(number))
    }
}

const N: usize = 624;
const M: usize = 397;
/// From here on `randperm` draws 64 bits a place.
const LARGE: usize = u32::MAX as usize / 20;

/// `torch.Generator().manual_seed(seed)`.
pub(crate) struct Generator {
    state: [u32; N],
    at: usize,
}

impl Generator {
    pub fn new(seed: Seed) -> Generator {
        let mut state = [0; N];
        // The lower bits of the two's complement.
        state[0] = seed.0 as u32;
        for i in 1..N {
            let before = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(before ^ before >> 30).wrapping_add(i as u32);
        }
        Generator { state, at: N }
    }

    /// The next 32 bits.
    pub fn bits(&mut self) -> u32 {
        if self.at == N {
            self.refill();
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= y << 7 & 0x9d2c_5680;
        y ^= y << 15 & 0xefc6_0000;
        y ^ y >> 18
    }

    /// The next 64 bits, the upper half drawn first.
    pub fn long_bits(&mut self) -> u64 {
        u64::from(self.bits()) << 32 | u64::from(self.bits())
    }

    fn refill(&mut self) {
        for i in 0..N {
            let y = self.state[i] & 0x8000_0000 | self.state[(i + 1) % N] & 0x7fff_ffff;
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ y >> 1 ^ odd;
        }
        self.at = 0;
    }

    /// One number of `uniform_(from, to)` in single precision. The last sum and product are rounded once, as PyTorch's
    /// kernels do on processors that can; what is rounded to the upper bound becomes the lower one.
    pub fn uniform(&mut self, from: f32, to: f32) -> f32 {
        let unit = (self.bits() & 0xff_ffff) as f32 / (1u32 << 24) as f32;
        let number = unit.mul_add(to - from, from);
        if number == to { from } else { number }
    }

    /// `count` numbers, uniform in ±bound.
    pub fn within(&mut self, bound: f64, count: usize) -> Vec<f32> {
        let bound = bound as f32;
        (0..count).map(|_| self.uniform(-bound, bound)).collect()
    }

    /// `count` numbers of `normal_(0, deviation)`: Box and Muller's, in single precision by sixteens where there are so
    /// many, else in double precision by pairs.
    pub fn normal(&mut self, deviation: f64, count: usize) -> Vec<f32> {
        const BLOCK: usize = 16;
        if count < BLOCK {
            let mut numbers = Vec::with_capacity(count + 1);
            while numbers.len() < count {
                let mut unit = || (self.long_bits() & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64;
                let (angle, size) = (2.0 * std::f64::consts::PI * unit(), (-2.0 * (-unit()).ln_1p()).sqrt());
                numbers.extend([angle.cos(), angle.sin()].map(|part| (size * part * deviation) as f32));
            }
            numbers.truncate(count);
            return numbers;
        }
        let mut numbers: Vec<f32> = (0..count).map(|_| self.uniform(0.0, 1.0)).collect();
        let turn = |block: &mut [f32]| {
            for i in 0..BLOCK / 2 {
                let size = (-2.0 * (1.0 - block[i]).ln()).sqrt();
                let angle = 2.0 * std::f32::consts::PI * block[i + BLOCK / 2];
                block[i] = size * angle.cos() * deviation as f32;
                block[i + BLOCK / 2] = size * angle.sin() * deviation as f32;
            }
        };
        numbers.chunks_exact_mut(BLOCK).for_each(turn);
        if !count.is_multiple_of(BLOCK) {
            // The last sixteen are drawn anew, some of them for the second time.
            let last = &mut numbers[count - BLOCK..];
            last.iter_mut().for_each(|number| *number = self.uniform(0.0, 1.0));
            turn(last);
        }
        numbers
    }

    /// The first `count` numbers of `randperm(n)`. The others are not drawn: each swap settles one place.
    pub fn permutation(&mut self, n: usize, count: usize) -> Vec<usize> {
        let mut moved = std::collections::HashMap::new();
        let mut first = Vec::with_capacity(count);
        for i in 0..count.min(n) {
            let left = (n - i) as u64;
            let step = match i + 1 == n {
                true => 0,
                false if n < LARGE => u64::from(self.bits()) % left,
                false => self.long_bits() % left,
            };
            let from = i + step as usize;
            let here = moved.get(&i).copied().unwrap_or(i);
            let there = moved.insert(from, here).unwrap_or(from);
            first.push(if from == i { here } else { there });
        }
        first
    }

    /// The same, and what the whole permutation would have drawn is drawn.
    pub fn whole_permutation(&mut self, n: usize, count: usize) -> Vec<usize> {
        let first = self.permutation(n, count);
        for _ in count.min(n)..n.saturating_sub(1) {
            match n < LARGE {
                true => u64::from(self.bits()),
                false => self.long_bits(),
            };
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_those_of_pytorch() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/random/torch.json");
        let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for case in file["cases"].as_array().unwrap() {
            let seed = Seed::read(&case["seed"]).unwrap();
            assert_eq!(seed.written(), case["seed"]);
            let list = |key: &str| case[key].as_array().unwrap().clone();
            let mut g = Generator::new(seed);
            let low: Vec<u64> = list("low_bits").iter().map(|v| v.as_u64().unwrap()).collect();
            assert_eq!(low.iter().map(|_| u64::from(g.bits() & 0x7ff_ffff)).collect::<Vec<_>>(), low);
            let mut g = Generator::new(seed);
            for bits in list("uniform_bits") {
                let number = g.uniform(-0.35, 0.35);
                assert_eq!(u64::from(number.to_bits()), bits.as_u64().unwrap(), "seed {seed:?}");
            }
            for normals in list("normals") {
                let expected: Vec<f64> =
                    normals.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
                let found = Generator::new(seed).normal(0.7, expected.len());
                // Their cosines and logarithms are not those of PyTorch's vector kernels to the last bit.
                for (a, b) in found.iter().zip(expected) {
                    assert!((f64::from(*a) - b).abs() < 1e-6, "seed {seed:?}: {found:?}");
                }
            }
            for permutation in list("permutations") {
                let order: Vec<usize> = permutation["first"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|v| v.as_u64().unwrap() as usize)
                    .collect();
                let n = permutation["n"].as_u64().unwrap() as usize;
                assert_eq!(
                    Generator::new(seed).permutation(n, order.len()),
                    order,
                    "seed {seed:?}, {n} places"
                );
            }
        }
    }

    #[test]
    fn a_generator_that_nobody_seeded_has_pytorch_s_seed() {
        // torch.randperm(10, generator=torch.Generator()).
        assert_eq!(Generator::new(DEFAULT_SEED).permutation(10, 10), [0, 3, 7, 5, 2, 9, 8, 1, 4, 6]);
    }

    #[test]
    fn a_whole_permutation_has_every_number_once() {
        let mut order = Generator::new(Seed::of(5)).permutation(100, 1000);
        assert_eq!(Generator::new(Seed::of(5)).permutation(100, 7), order[..7]);
        let mut whole = Generator::new(Seed::of(5));
        whole.permutation(100, 100);
        for count in [0, 7, 99, 100] {
            let mut some = Generator::new(Seed::of(5));
            assert_eq!(some.whole_permutation(100, count), order[..count]);
            assert_eq!(some.bits(), Generator { state: whole.state, at: whole.at }.bits());
        }
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
