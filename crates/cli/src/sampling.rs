//! From logits to the next token.
//!
//! Greedy: the largest logit, the lowest id of equals. Otherwise, in `transformers`' order: logits / temperature, the
//! `top_k` largest, of those the fewest whose probabilities sum to at least `top_p`, then a draw. The draws are a
//! function of the seed alone.

use engraft_data::rng::Random;

/// Stream of the random numbers that generation draws.
const STREAM: u64 = 0x67656e; // "gen"

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// 0 is greedy.
    pub temperature: f64,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f64,
}

/// Chooses tokens one after another.
pub struct Sampler {
    choice: Choice,
    random: Random,
}

impl Sampler {
    /// A sampler whose draws `seed` decides.
    pub fn new(choice: Choice, seed: u64) -> Sampler {
        Sampler { choice, random: Random::new(seed, STREAM, 0) }
    }

    /// The next token by `logits`, shape `[vocabulary]`; `None` where no logit is a finite number.
    pub fn next(&mut self, logits: &[f32]) -> Option<u32> {
        let best = greedy(logits)?;
        if self.choice.temperature == 0.0 {
            return Some(best);
        }
        let kept = self.kept(logits);
        let total: f64 = kept.iter().map(|(_, p)| p).sum();
        let mut left = self.random.unit() * total;
        for (id, p) in &kept {
            left -= p;
            if left < 0.0 {
                return Some(*id);
            }
        }
        kept.last().map(|(id, _)| *id)
    }

    /// The tokens that may be drawn with their unnormalised probabilities, most probable first.
    fn kept(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let mut ids: Vec<u32> =
            (0..logits.len() as u32).filter(|id| logits[*id as usize].is_finite()).collect();
        let falling = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let k = self.choice.top_k;
        if k > 0 && k < ids.len() {
            ids.select_nth_unstable_by(k - 1, falling);
            ids.truncate(k);
        }
        ids.sort_unstable_by(falling);
        let largest = ids.first().map_or(0.0, |id| f64::from(logits[*id as usize]));
        let weight = |id: &u32| ((f64::from(logits[*id as usize]) - largest) / self.choice.temperature).exp();
        let mut kept: Vec<(u32, f64)> = ids.iter().map(|id| (*id, weight(id))).collect();
        let enough = self.choice.top_p * kept.iter().map(|(_, p)| p).sum::<f64>();
        let mut sum = 0.0;
        let count = kept.iter().take_while(|(_, p)| {
            let before = sum;
            sum += p;
            before < enough
        });
        let count = count.count().max(1);
        kept.truncate(count);
        kept
    }
}

/// The lowest id of the largest logit.
fn greedy(logits: &[f32]) -> Option<u32> {
    let mut best: Option<usize> = None;
    for (id, logit) in logits.iter().enumerate() {
        if logit.is_finite() && best.is_none_or(|best| *logit > logits[best]) {
            best = Some(id);
        }
    }
    best.map(|id| id as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 3.0, 1.0, 3.0, f32::NAN];

    fn sampler(temperature: f64, top_k: usize, top_p: f64) -> Sampler {
        Sampler::new(Choice { temperature, top_k, top_p }, 7)
    }

    fn drawn(mut sampler: Sampler, logits: &[f32]) -> [usize; 5] {
        let mut counts = [0; 5];
        for _ in 0..20_000 {
            counts[sampler.next(logits).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_of_the_largest_and_refuses_nothing_finite() {
        assert_eq!(sampler(0.0, 0, 1.0).next(&LOGITS), Some(1));
        assert_eq!(sampler(1.0, 0, 1.0).next(&[f32::NAN, f32::INFINITY]), None);
    }

    #[test]
    fn draws_follow_the_softmax_at_a_temperature() {
        let logits = [0.0, 1.0, 2.0, -1.0, 0.5];
        let counts = drawn(sampler(0.7, 0, 1.0), &logits);
        let weights = logits.map(|l| (f64::from(l) / 0.7).exp());
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(weights) {
            let share = *count as f64 / 20_000.0;
            assert!((share - weight / total).abs() < 0.012, "{counts:?}");
        }
    }

    #[test]
    fn top_k_and_top_p_leave_the_rest_out() {
        let counts = drawn(sampler(1.0, 2, 1.0), &LOGITS);
        assert!(counts[1] > 0 && counts[3] > 0 && counts[0] + counts[2] + counts[4] == 0, "{counts:?}");
        // Probabilities 0.46, 0.46, 0.06, 0.02: two tokens reach 0.9, three reach 0.95.
        let counts = drawn(sampler(1.0, 0, 0.9), &LOGITS);
        assert!(counts[2] == 0 && counts[0] == 0, "{counts:?}");
        let counts = drawn(sampler(1.0, 0, 0.95), &LOGITS);
        assert!(counts[2] > 0 && counts[0] == 0, "{counts:?}");
        assert_eq!(sampler(1.0, 0, 0.0).kept(&LOGITS).len(), 1);
    }

    #[test]
    fn a_seed_decides_every_draw() {
        let draws = |seed| {
            let mut sampler = Sampler::new(Choice { temperature: 1.0, top_k: 0, top_p: 1.0 }, seed);
            (0..50).map(|_| sampler.next(&[0.1, 0.2, 0.3]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }
}
