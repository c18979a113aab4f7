//! The random numbers of NumPy's default generator, as UniLoRA's indices need them.
//!
//! PCG64 (O'Neill 2014: a 128-bit linear congruence, of which 64 bits are xored and rotated) seeded by `SeedSequence`; places
//! below a bound by Lemire's product in `choice`, and by masks in `shuffle`.

const MULTIPLY: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;

/// `numpy.random.default_rng(seed)`.
pub(crate) struct Generator {
    state: u128,
    step: u128,
    /// The upper half of a word whose lower half was given already.
    kept: Option<u32>,
}

/// Mixes one word under a constant that changes with each.
fn hash(value: u32, constant: &mut u32, multiply: u32) -> u32 {
    let value = value ^ *constant;
    *constant = constant.wrapping_mul(multiply);
    let value = value.wrapping_mul(*constant);
    value ^ value >> 16
}

/// The eight words that `SeedSequence(seed)` gives.
fn seed_words(seed: u64) -> [u32; 8] {
    let entropy = [seed as u32, (seed >> 32) as u32, 0, 0];
    let mut constant = 0x43b0_d7e5;
    let mut pool = entropy.map(|word| hash(word, &mut constant, 0x931e_8875));
    for from in 0..4 {
        for to in (0..4).filter(|&to| to != from) {
            let other = hash(pool[from], &mut constant, 0x931e_8875);
            let mixed = pool[to].wrapping_mul(0xca01_f9dd).wrapping_sub(other.wrapping_mul(0x4973_f715));
            pool[to] = mixed ^ mixed >> 16;
        }
    }
    let mut constant = 0x8b51_f9dd;
    std::array::from_fn(|i| hash(pool[i % 4], &mut constant, 0x58f3_8ded))
}

impl Generator {
    pub fn new(seed: u64) -> Generator {
        let words = seed_words(seed);
        let long = |at: usize| u128::from(words[2 * at]) | u128::from(words[2 * at + 1]) << 32;
        let (start, sequence) = (long(0) << 64 | long(1), long(2) << 64 | long(3));
        let mut g = Generator { state: 0, step: sequence << 1 | 1, kept: None };
        g.advance();
        g.state = g.state.wrapping_add(start);
        g.advance();
        g
    }

    fn advance(&mut self) {
        self.state = self.state.wrapping_mul(MULTIPLY).wrapping_add(self.step);
    }

    /// The next 64 bits.
    pub fn long_bits(&mut self) -> u64 {
        self.advance();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    /// The next 32 bits: of each word first the lower half.
    fn bits(&mut self) -> u32 {
        self.kept.take().unwrap_or_else(|| {
            let word = self.long_bits();
            self.kept = Some((word >> 32) as u32);
            word as u32
        })
    }

    /// A number up to `most`, by a product.
    fn below(&mut self, most: u32) -> usize {
        if most == 0 {
            return 0;
        }
        let count = u64::from(most) + 1;
        let mut product = u64::from(self.bits()) * count;
        if (product as u32) < count as u32 {
            let least = (u32::MAX - most) % count as u32;
            while (product as u32) < least {
                product = u64::from(self.bits()) * count;
            }
        }
        (product >> 32) as usize
    }

    /// A number up to `most`, by a mask.
    fn masked(&mut self, most: u32) -> usize {
        if most == 0 {
            return 0;
        }
        let mask = u32::MAX >> most.leading_zeros();
        loop {
            let value = self.bits() & mask;
            if value <= most {
                return value as usize;
            }
        }
    }

    /// `choice(n, size=count, replace=False)`, for n below 2³².
    pub fn choice(&mut self, n: usize, count: usize) -> Vec<usize> {
        let mut chosen: Vec<usize>;
        let mut first = 1;
        if n > 10_000 && count > n / 50 {
            chosen = (0..n).collect();
            first = (n - count).max(1);
        } else {
            chosen = Vec::with_capacity(count);
            let mut seen = std::collections::HashSet::new();
            for j in n - count..n {
                let value = self.below(j as u32);
                let value = if seen.contains(&value) { j } else { value };
                seen.insert(value);
                chosen.push(value);
            }
        }
        for i in (first..chosen.len()).rev() {
            let j = self.below(i as u32);
            chosen.swap(i, j);
        }
        chosen.split_off(chosen.len() - count)
    }

    /// `shuffle(data)`, for less than 2³² numbers.
    pub fn shuffle<T>(&mut self, data: &mut [T]) {
        for i in (1..data.len()).rev() {
            let j = self.masked(i as u32);
            data.swap(i, j);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn draws_are_those_of_numpy() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/random/numpy.json");
        let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let cases = |key: &str| file[key].as_array().unwrap().clone();
        let number = |case: &Value, key: &str| case[key].as_u64().unwrap();
        let numbers = |v: &Value| -> Vec<usize> {
            v.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect()
        };
        for case in cases("raw") {
            let mut g = Generator::new(number(&case, "seed"));
            for word in case["words"].as_array().unwrap() {
                assert_eq!(g.long_bits().to_string(), word.as_str().unwrap());
            }
        }
        for case in cases("choices") {
            let (n, count) = (number(&case, "n") as usize, number(&case, "count") as usize);
            assert_eq!(Generator::new(number(&case, "seed")).choice(n, count), numbers(&case["chosen"]));
        }
        for case in cases("shuffles") {
            let mut data: Vec<usize> = (0..number(&case, "n") as usize).collect();
            Generator::new(number(&case, "seed")).shuffle(&mut data);
            assert_eq!(data, numbers(&case["order"]));
        }
    }
}
