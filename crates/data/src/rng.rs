//! The random numbers behind shuffles and masks: SplitMix64, keyed by (seed, stream, index).
//!
//! Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
//! Resuming a run repeats the order of its rows, so the algorithm has a version, [`VERSION`], that a checkpoint
//! stores; any change of what is drawn must raise it.

/// The version of the shuffle and mask algorithms of this crate.
pub const VERSION: u32 = 1;

/// A stream of 64-bit numbers that is a function of its key alone.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of `(seed, stream, index)`; different keys give unrelated streams.
    pub fn new(seed: u64, stream: u64, index: u64) -> Random {
        let mut state = Random(seed);
        for part in [stream, index] {
            state = Random(state.next() ^ part.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        }
        Random(state.next())
    }

    /// The next 64 bits.
    #[allow(clippy::should_implement_trait)] // an endless stream, not an iterator
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound`, without bias (draws below `2^64 mod bound` are thrown away); 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 {
            return 0;
        }
        let rejected = bound.wrapping_neg() % bound;
        loop {
            let draw = self.next();
            if draw >= rejected {
                return draw % bound;
            }
        }
    }

    /// Uniform in `[0, 1)`, a multiple of 2^-53.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Fisher and Yates' shuffle, from the last element down.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_splitmix64() {
        // The first outputs for state 0, as published with the reference C code.
        let mut random = Random(0);
        assert_eq!(random.next(), 0xE220_A839_7B1D_CDAF);
        assert_eq!(random.next(), 0x6E78_9E6A_A1B9_65F4);
        assert_eq!(random.next(), 0x06C4_5D18_8009_454F);
    }

    #[test]
    fn the_shuffle_of_version_one_never_changes() {
        assert_eq!(VERSION, 1);
        let mut items: Vec<u32> = (0..10).collect();
        Random::new(42, 1, 0).shuffle(&mut items);
        assert_eq!(items, [0, 7, 6, 8, 5, 4, 2, 9, 1, 3]);
    }

    #[test]
    fn draws_are_uniform() {
        let mut random = Random::new(7, 0, 0);
        let mut counts = [0u32; 6];
        (0..60_000).for_each(|_| counts[random.below(6) as usize] += 1);
        assert!(counts.iter().all(|n| n.abs_diff(10_000) < 500), "{counts:?}");
        let mean = (0..10_000).map(|_| random.unit()).sum::<f64>() / 1e4;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        assert_eq!(random.below(0), 0);
    }
}
