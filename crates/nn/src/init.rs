//! How a new trainable tensor starts.

use engraft_tensor::Tensor;
use engraft_tensor::cpu::random::Key;

use crate::Result;

/// Starting values of a parameter.
#[derive(Clone, Debug)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Normal with this standard deviation.
    Normal(f32),
    /// Uniform in ±bound.
    Uniform(f32),
    /// Given values.
    Values(Tensor),
}

impl Init {
    /// PyTorch's `kaiming_uniform_(a=√5)` for a matrix with `fan_in` columns: uniform in ±1/√fan_in.
    pub fn kaiming(fan_in: usize) -> Init {
        Init::Uniform(1.0 / (fan_in.max(1) as f32).sqrt())
    }

    /// The random numbers of what is called `name`.
    pub fn key(seed: u64, name: &str) -> Key {
        Key { seed, stream: stream(name) }
    }

    /// A tensor of `shape`, drawn from (seed, name) alone: it does not depend on what else is drawn.
    pub fn tensor(&self, shape: &[usize], seed: u64, name: &str) -> Result<Tensor> {
        let key = Init::key(seed, name);
        let draw = |f: &dyn Fn(u64) -> f32| {
            Tensor::from_vec((0..shape.iter().product::<usize>() as u64).map(f).collect(), shape)
        };
        Ok(match self {
            Init::Zeros => Tensor::zeros(shape),
            Init::Ones => Tensor::full(1.0, shape),
            Init::Normal(std) => draw(&|i| key.normal(i) * std)?,
            Init::Uniform(bound) => draw(&|i| (2.0 * key.uniform(i) - 1.0) * bound)?,
            Init::Values(t) => t.reshape(shape)?,
        })
    }
}

/// FNV-1a of a name: a stream number that does not change between versions.
fn stream(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_depend_on_seed_and_name_only() {
        let a = Init::Normal(1.0).tensor(&[50, 40], 1, "a").unwrap().to_vec().unwrap();
        assert_eq!(a, Init::Normal(1.0).tensor(&[50, 40], 1, "a").unwrap().to_vec().unwrap());
        assert_ne!(a, Init::Normal(1.0).tensor(&[50, 40], 1, "b").unwrap().to_vec().unwrap());
        assert_ne!(a, Init::Normal(1.0).tensor(&[50, 40], 2, "a").unwrap().to_vec().unwrap());
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let variance = a.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 0.1 && (variance - 1.0).abs() < 0.15, "{mean} {variance}");
        let u = Init::kaiming(16).tensor(&[1000], 1, "u").unwrap().to_vec().unwrap();
        assert!(u.iter().all(|v| v.abs() <= 0.25) && u.iter().any(|v| v.abs() > 0.24));
    }
}
