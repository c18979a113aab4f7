//! Rotary tables: plain, and stretched to longer contexts (`linear`, `dynamic`, `llama3`, `yarn`).
//!
//! Angle of position p and pair i is p·f_i with f_i = θ^(−2i/d); a scaling changes the f_i, and yarn also scales cos
//! and sin. Formulas as in `transformers`' `modeling_rope_utils`.

use engraft_tensor::Tensor;

use crate::Result;

/// How frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// f/factor (Chen et al. 2023, arXiv:2306.15595).
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// θ grows with the length of the input beyond the original context (NTK-aware).
    Dynamic {
        /// Stretch.
        factor: f64,
        /// Positions the model was trained with.
        original: usize,
    },
    /// Low frequencies stretched, high ones kept, a ramp between (Llama 3.1).
    Llama3 {
        /// Stretch of low frequencies.
        factor: f64,
        /// Wavelengths above original/low are stretched.
        low: f64,
        /// Wavelengths below original/high are kept.
        high: f64,
        /// Positions the model was trained with.
        original: usize,
    },
    /// Interpolation by ramp over dimensions, and a temperature (Peng et al. 2023, arXiv:2309.00071).
    Yarn {
        /// Stretch.
        factor: f64,
        /// Positions the model was trained with.
        original: usize,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which it is stretched.
        beta_slow: f64,
        /// Factor on cos and sin; derived from `factor` if absent.
        attention_factor: Option<f64>,
        /// DeepSeek's two parameters of the derived factor.
        mscale: Option<(f64, f64)>,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
}

/// Frequencies of a model.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// θ.
    pub theta: f64,
    /// Rotated dimensions of a head.
    pub dim: usize,
    /// Scaling.
    pub scaling: RopeScaling,
}

impl Rotary {
    /// cos and sin [positions, dim/2] for inputs that reach `positions`.
    pub fn tables(&self, positions: usize) -> Result<(Tensor, Tensor)> {
        let (frequencies, scale) = self.frequencies(positions);
        let half = frequencies.len();
        let (mut cos, mut sin) = (Vec::with_capacity(positions * half), Vec::with_capacity(positions * half));
        for p in 0..positions {
            for f in &frequencies {
                // f32 as the reference computes it: angle rounded once.
                let angle = p as f32 * *f as f32;
                cos.push((f64::from(angle).cos() * scale) as f32);
                sin.push((f64::from(angle).sin() * scale) as f32);
            }
        }
        Ok((Tensor::from_vec(cos, [positions, half])?, Tensor::from_vec(sin, [positions, half])?))
    }

    /// f_i, and the factor on cos and sin.
    fn frequencies(&self, positions: usize) -> (Vec<f64>, f64) {
        let plain = |theta: f64| -> Vec<f64> {
            (0..self.dim / 2).map(|i| theta.powf(-2.0 * i as f64 / self.dim as f64)).collect()
        };
        match &self.scaling {
            RopeScaling::None => (plain(self.theta), 1.0),
            RopeScaling::Linear { factor } => (plain(self.theta).iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Dynamic { factor, original } => {
                let length = positions.max(*original) as f64 / *original as f64;
                let grow = factor * length - (factor - 1.0);
                let exponent = self.dim as f64 / (self.dim as f64 - 2.0);
                (plain(self.theta * grow.powf(exponent)), 1.0)
            }
            RopeScaling::Llama3 { factor, low, high, original } => {
                let stretch = |f: f64| {
                    let wavelength = std::f64::consts::TAU / f;
                    let original = *original as f64;
                    if wavelength < original / high {
                        f
                    } else if wavelength > original / low {
                        f / factor
                    } else {
                        let keep = (original / wavelength - low) / (high - low);
                        (1.0 - keep) * f / factor + keep * f
                    }
                };
                (plain(self.theta).into_iter().map(stretch).collect(), 1.0)
            }
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                truncate,
            } => {
                let frequencies = plain(self.theta);
                let ramp = self.yarn_ramp(*original, *beta_fast, *beta_slow, *truncate);
                let mixed =
                    frequencies.iter().zip(ramp).map(|(f, r)| f / factor * r + f * (1.0 - r)).collect();
                let temperature = |m: f64| if *factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
                let derived = match mscale {
                    Some((m, all)) => temperature(*m) / temperature(*all),
                    None => temperature(1.0),
                };
                (mixed, attention_factor.unwrap_or(derived))
            }
        }
    }

    /// 0 where a dimension is kept, 1 where it is stretched.
    fn yarn_ramp(&self, original: usize, fast: f64, slow: f64, truncate: bool) -> Vec<f64> {
        let dimension = |rotations: f64| {
            self.dim as f64 * (original as f64 / (rotations * std::f64::consts::TAU)).ln()
                / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (dimension(fast), dimension(slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(self.dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        (0..self.dim / 2).map(|i| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0)).collect()
    }
}
