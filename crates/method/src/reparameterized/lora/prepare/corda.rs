//! CorDA: the weight is decomposed as the data see it, and what they use most (or least) becomes A and B.
//!
//! Yang et al. 2024, arXiv:2406.05223, as `peft` has it. With C the mean of xᵀ·x over sequences, each divided by its largest
//! number, and 1 % of C's mean diagonal added to it, W·C = U·Σ·Vᵀ, so that W = U·Σ·(Vᵀ·C⁻¹). A₀ = √(Σ/s)·Vᵀ·C⁻¹ and
//! B₀ = U·√(Σ/s) of the r largest singular values where the data show what is to be learned (`ipm`), of the r smallest where
//! they show what is to be kept (`kpm`).

use engraft_nn::Result;
use engraft_tensor::Tensor;
use engraft_tensor::linalg::{solve_positive, svd};

use super::{Place, Prior, same_inputs, summed};
use crate::Calibration;
use crate::Seen;
use crate::reparameterized::lora::Lora;
use crate::reparameterized::lora::dora::site_weight;
use crate::reparameterized::lora::start::roots;

/// Share of the mean diagonal that is added to the diagonal.
const DAMPING: f32 = 0.01;

impl Lora {
    pub(super) fn corda(&self, places: &[Place<'_>], base: &dyn Calibration) -> Result<()> {
        let first = same_inputs(places, base)?;
        let sources: Vec<usize> = (0..places.len()).filter(|&at| first[at] == at).collect();
        let numbers = |place: &Place<'_>| place.a.value().len().pow(2) / place.rank.max(1).pow(2);
        let look = (base, self.search.batches, false);
        summed(places, &sources, numbers, look, of_sequences, |source, sum, count| {
            let c = damped(&sum.scale(1.0 / count as f32)?)?;
            let mut same = places.iter().zip(&first).filter(|(_, first)| **first == source);
            same.try_for_each(|(place, _)| self.corda_start(place, &c))
        })
    }

    fn corda_start(&self, place: &Place<'_>, c: &Tensor) -> Result<()> {
        let w = site_weight(place.site)?;
        let most = w.dim(0).min(w.dim(1));
        let svd = svd(&w.matmul(c)?)?;
        let from = match self.search.prior {
            Prior::Instruction => 0,
            Prior::Knowledge => most - place.rank,
        };
        let vt = svd.vt.rows_between(from, from + place.rank)?;
        let right = solve_positive(c, &vt.t()?)?.t()?;
        let u = svd.u.narrow(1, from, place.rank)?;
        let (a, b) = roots(&u, &svd.s[from..from + place.rank], &right, place.scale)?;
        place.set(&a, &b)
    }
}

/// xᵀ·x of each sequence, divided by its largest number.
fn of_sequences(seen: &Seen<'_>) -> Result<Vec<Tensor>> {
    let mut parts = Vec::new();
    for rows in seen.layout.sequences().iter().filter(|rows| !rows.is_empty()) {
        let x = seen.x.rows_between(rows.start, rows.end)?;
        let largest = x.to_vec()?.into_iter().fold(f32::NEG_INFINITY, f32::max).abs();
        let x = x.scale(1.0 / largest.max(f32::MIN_POSITIVE))?;
        parts.push(x.t_matmul(&x)?);
    }
    Ok(parts)
}

/// C with a share of its mean diagonal added to the diagonal.
fn damped(c: &Tensor) -> Result<Tensor> {
    let n = c.dim(0);
    let mut values = c.to_vec()?;
    let mean = (0..n).map(|i| values[i * n + i]).sum::<f32>() / n as f32;
    (0..n).for_each(|i| values[i * n + i] += DAMPING * mean);
    Ok(Tensor::from_vec(values, [n, n])?)
}
