//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), in PyTorch's order of operations.
//!
//! `θ ← θ(1 − ηλ)`, `m ← m + (1 − β₁)(g − m)`, `v ← β₂v + (1 − β₂)g²`,
//! `θ ← θ − η/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)`. Scalars are worked out in f64, as Python does, and rounded once.

use crate::cpu::simd::{PART, dispatch};
use rayon::prelude::*;

/// The settings of one parameter group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate η.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator, outside the root.
    pub eps: f64,
    /// Decoupled decay λ.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// PyTorch's defaults.
    fn default() -> Self {
        AdamW { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// The scalars of one step, rounded to f32.
#[derive(Clone, Copy)]
struct Scalars {
    keep: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    root_correction2: f32,
    eps: f32,
    step_size: f32,
    grad_scale: f32,
}

impl AdamW {
    /// One step, the `step`-th of this parameter (from 1), with gradient `grad·grad_scale`; `m` and `v` start as zeros.
    ///
    /// `grad_scale` carries clipping and loss scaling, so that neither needs a pass of its own. Panics when the lengths
    /// differ or `step` is 0.
    pub fn step(
        &self,
        param: &mut [f32],
        grad: &[f32],
        m: &mut [f32],
        v: &mut [f32],
        step: u64,
        grad_scale: f32,
    ) {
        let length = param.len();
        assert!(
            [grad.len(), m.len(), v.len()] == [length; 3],
            "adamw: param, grad, m and v differ in length"
        );
        assert!(step > 0, "adamw: steps count from 1");
        // Beyond 2⁶⁰ steps both powers are long 0.
        let power = |beta: f64| beta.powf(step as f64);
        let scalars = Scalars {
            keep: (1.0 - self.learning_rate * self.weight_decay) as f32,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            root_correction2: (1.0 - power(self.beta2)).sqrt() as f32,
            eps: self.eps as f32,
            step_size: (self.learning_rate / (1.0 - power(self.beta1))) as f32,
            grad_scale,
        };
        let state = m.par_chunks_mut(PART).zip(v.par_chunks_mut(PART));
        let parts = param.par_chunks_mut(PART).zip(grad.par_chunks(PART)).zip(state);
        parts.for_each(|((param, grad), (m, v))| step_part(scalars, param, grad, m, v));
    }
}

#[inline(always)]
fn step_body<const L: usize>(s: Scalars, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
    for (((p, &g), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
        let g = g * s.grad_scale;
        // PyTorch's lerp takes the end that lies nearer.
        let near = *m + s.one_minus_beta1 * (g - *m);
        let far = g - (g - *m) * s.beta1;
        *m = if s.one_minus_beta1 < 0.5 { near } else { far };
        *v = *v * s.beta2 + s.one_minus_beta2 * g * g;
        let denominator = v.sqrt() / s.root_correction2 + s.eps;
        *p = *p * s.keep - s.step_size * *m / denominator;
    }
}

dispatch! { fn step_part(s: Scalars, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) = step_body; }

#[cfg(test)]
mod tests {
    use super::*;

    const START: [f32; 6] = [0.5, -1.25, 3e-3, 0.0, 7.5, -2e-2];

    fn gradient(step: usize) -> Vec<f32> {
        let g = |j: usize| ((j * 7 + step * 5) % 11) as f32 - 5.0;
        (0..6).map(|j| g(j) / 8.0 * 4f32.powi(-(j as i32))).collect()
    }

    fn run(settings: AdamW, scale: f32) -> [[f32; 6]; 3] {
        let (mut p, mut m, mut v) = (START, [0.0; 6], [0.0; 6]);
        for i in 0..10 {
            let g: Vec<f32> = gradient(i).iter().map(|g| g / scale).collect();
            settings.step(&mut p, &g, &mut m, &mut v, i as u64 + 1, scale);
        }
        [p, m, v]
    }

    fn assert_close(found: [[f32; 6]; 3], expected: [[f32; 6]; 3]) {
        for (found, expected) in found.as_flattened().iter().zip(expected.as_flattened()) {
            assert!((found - expected).abs() <= 1e-6 * expected.abs() + 1e-9, "{found}, expected {expected}");
        }
    }

    /// Ten steps of `torch.optim.AdamW` (PyTorch 2.15, CPU).
    #[test]
    fn ten_steps_equal_pytorch() {
        let expected = [
            [0.500828, -1.2498193, 0.0054398105, -0.0035602942, 7.498239, -0.016782215],
            [-0.018378738, 0.012079889, -0.0013330531, -7.2693144e-4, 1.5616209e-4, -2.4478018e-6],
            [0.0016945418, 9.818474e-5, 5.7142265e-6, 4.177342e-7, 2.2300302e-8, 1.4983433e-9],
        ];
        assert_close(run(AdamW::default(), 1.0), expected);
        assert_close(run(AdamW::default(), 0.25), expected);
        let settings = AdamW { learning_rate: 5e-2, beta1: 0.8, beta2: 0.95, eps: 1e-6, weight_decay: 0.3 };
        let expected = [
            [0.45237133, -1.0843961, 0.11211057, -0.12786107, 6.389093, 0.10645667],
            [-0.054428414, 0.024952138, -5.1733805e-4, -0.002017137, 2.3562471e-4, 2.0453464e-5],
            [0.066583715, 0.003939032, 2.3528002e-4, 1.6908169e-5, 8.7619946e-7, 6.043599e-8],
        ];
        assert_close(run(settings, 1.0), expected);
    }

    #[test]
    fn the_far_end_of_the_lerp_is_the_same_average() {
        let settings = AdamW { beta1: 0.25, ..AdamW::default() };
        let (mut p, mut m, mut v) = ([1.0], [2.0], [0.0]);
        settings.step(&mut p, &[4.0], &mut m, &mut v, 1, 1.0);
        assert_eq!(m, [0.25 * 2.0 + 0.75 * 4.0]);
    }
}
