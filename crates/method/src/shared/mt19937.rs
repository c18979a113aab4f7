//! PyTorch's generator on the CPU, as far as `torch.randperm` uses it: the Mersenne Twister MT19937 of 32 bits.
//!
//! Matsumoto and Nishimura 1998, "Mersenne Twister". Masks that `peft` draws are the same ones here.

use std::collections::HashMap;

const N: usize = 624;
const M: usize = 397;

/// The seed of a `torch.Generator()` that nobody seeded.
pub(crate) const DEFAULT_SEED: u64 = 67_280_421_310_721;

struct Generator {
    state: [u32; N],
    next: usize,
}

impl Generator {
    /// `manual_seed`; as in PyTorch, the lower half of the seed counts.
    fn new(seed: u64) -> Self {
        let mut state = [0u32; N];
        state[0] = seed as u32;
        for i in 1..N {
            let before = state[i - 1];
            state[i] = (before ^ before >> 30).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Generator { state, next: N }
    }

    fn turn(&mut self) {
        for i in 0..N {
            let y = self.state[i] & 0x8000_0000 | self.state[(i + 1) % N] & 0x7fff_ffff;
            let mix = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ y >> 1 ^ mix;
        }
        self.next = 0;
    }

    fn word(&mut self) -> u32 {
        if self.next == N {
            self.turn();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= y << 7 & 0x9d2c_5680;
        y ^= y << 15 & 0xefc6_0000;
        y ^ y >> 18
    }

    fn double_word(&mut self) -> u64 {
        let high = u64::from(self.word());
        high << 32 | u64::from(self.word())
    }
}

/// The first `count` of `torch.randperm(n, generator)` after `generator.manual_seed(seed)`.
pub(crate) fn permuted(n: usize, count: usize, seed: u64) -> Vec<u64> {
    let mut generator = Generator::new(seed);
    // PyTorch draws 64 bits where 32 would favour some places.
    let wide = n >= u32::MAX as usize / 20;
    // Only what has left its place is kept.
    let mut moved: HashMap<u64, u64> = HashMap::new();
    let at = |moved: &HashMap<u64, u64>, i: u64| moved.get(&i).copied().unwrap_or(i);
    let mut order = Vec::with_capacity(count);
    for i in 0..count.min(n) as u64 {
        let rest = n as u64 - i;
        let skip = match (rest, wide) {
            (1, _) => 0,
            (_, true) => generator.double_word() % rest,
            (_, false) => u64::from(generator.word()) % rest,
        };
        order.push(at(&moved, i + skip));
        let first = at(&moved, i);
        moved.insert(i + skip, first);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_authors_program() {
        let mut generator = Generator::new(5489);
        assert_eq!(generator.word(), 3_499_211_612);
        let last = (1..10_000).map(|_| generator.word()).last();
        assert_eq!(last, Some(4_123_659_995), "the ten thousandth");
    }

    #[test]
    fn permutations_are_those_of_pytorch() {
        // torch.randperm(10, generator=torch.Generator().manual_seed(7)), and of the default generator.
        assert_eq!(permuted(10, 10, 7), SEVEN);
        assert_eq!(permuted(10, 10, DEFAULT_SEED), UNSEEDED);
        assert_eq!(permuted(10, 4, 7), SEVEN[..4]);
    }

    const SEVEN: [u64; 10] = [5, 0, 3, 4, 1, 7, 9, 6, 8, 2];
    const UNSEEDED: [u64; 10] = [0, 3, 7, 5, 2, 9, 8, 1, 4, 6];
}
