//! How several tensors of one shape become one: what is kept of each, whose sign wins, the weighted sum.

use engraft_nn::{Init, Result};
use engraft_tensor::Tensor;
use engraft_tensor::cpu::random::Key;

use super::Options;

/// How TIES elects the sign of an element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sign {
    /// The sign of the sum.
    #[default]
    Total,
    /// The sign that more tensors have.
    Frequency,
}

/// The steps of a rule.
#[derive(Clone, Copy, Default)]
pub(super) struct Recipe {
    /// Keep the largest share of each tensor.
    pub keep_largest: bool,
    /// Keep a random share of each tensor, scaled up by what was dropped.
    pub keep_random: bool,
    /// Only elements of the elected sign count, and their mean is taken.
    pub elect: bool,
}

/// Tensors of one shape with their weights.
pub(super) struct Stack {
    pub tensors: Vec<Tensor>,
    pub weights: Vec<f64>,
    /// Which adapter each comes from.
    pub numbers: Vec<usize>,
    /// What is drawn for them depends on this name.
    pub name: String,
}

impl Stack {
    /// The one tensor.
    pub fn combine(&self, recipe: Recipe, options: &Options) -> Result<Tensor> {
        let Some(first) = self.tensors.first() else { return Ok(Tensor::zeros([0])) };
        let kept = self.tensors.iter().zip(&self.numbers).map(|(tensor, &number)| {
            let mut values = tensor.to_vec()?;
            if recipe.keep_largest {
                keep_largest(&mut values, options.density);
            }
            if recipe.keep_random {
                keep_random(&mut values, options.density, key(options.seed, &self.name, number));
            }
            Ok(values)
        });
        let kept = kept.collect::<Result<Vec<_>>>()?;
        let mut sum = vec![0.0f32; first.len()];
        for (at, sum) in sum.iter_mut().enumerate() {
            let elected = recipe.elect.then(|| elected(&kept, at, options.sign));
            let (mut total, mut count) = (0.0f32, 0u32);
            for (values, weight) in kept.iter().zip(&self.weights) {
                let value = values[at];
                // A zero has neither sign.
                if elected.is_none_or(|sign| value != 0.0 && (value > 0.0) == (sign > 0.0)) {
                    total += value * *weight as f32;
                    count += 1;
                }
            }
            *sum = if elected.is_some() { total / count.max(1) as f32 } else { total };
        }
        Ok(Tensor::from_vec(sum, first.shape())?)
    }
}

/// 1 or −1: the sign that counts at an element; positive where neither has more.
fn elected(kept: &[Vec<f32>], at: usize, sign: Sign) -> f32 {
    let votes = kept.iter().map(|values| match sign {
        Sign::Total => values[at],
        Sign::Frequency if values[at] == 0.0 => 0.0,
        Sign::Frequency => values[at].signum(),
    });
    if votes.sum::<f32>() >= 0.0 { 1.0 } else { -1.0 }
}

/// Zeroes all but the ⌊density·n⌋ largest by magnitude; of equals the first stay.
fn keep_largest(values: &mut [f32], density: f64) {
    let keep = (density * values.len() as f64) as usize;
    if density >= 1.0 || keep >= values.len() {
        return;
    }
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].abs().total_cmp(&values[a].abs()).then(a.cmp(&b)));
    for &at in &order[keep..] {
        values[at] = 0.0;
    }
}

/// Keeps each number with probability `density`, divided by it.
fn keep_random(values: &mut [f32], density: f64, key: Key) {
    if density >= 1.0 {
        return;
    }
    for (at, value) in values.iter_mut().enumerate() {
        let stays = f64::from(key.uniform(at as u64)) < density;
        *value = if stays { *value / density as f32 } else { 0.0 };
    }
}

/// What is dropped depends on the seed, the tensor and the adapter alone.
fn key(seed: u64, name: &str, number: usize) -> Key {
    let key = Init::key(seed, name);
    Key { stream: key.stream.wrapping_add(number as u64), ..key }
}
