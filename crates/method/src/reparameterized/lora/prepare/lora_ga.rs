//! LoRA-GA: the first step of LoRA goes where the first step of full training would.
//!
//! Wang, Yu and Li 2024, arXiv:2407.05000. With G = ∂L/∂W of some batches and G = U·Σ·Vᵀ, A₀ = κ·(the first r rows of Vᵀ) and
//! B₀ = κ·(the next r columns of U), κ = out^(1/4)/√γ; the paper takes s = α/√r (`rslora`). `peft` multiplies B₀ by singular
//! values and scales it alone; this follows the paper and its authors' program.

use engraft_nn::Result;
use engraft_tensor::Tensor;
use engraft_tensor::cpu::random::Key;
use engraft_tensor::linalg::svd_lowrank;

use super::{Place, summed};
use crate::reparameterized::lora::Lora;
use crate::{Calibration, Seen};

/// Rounds of the randomised decomposition.
const ROUNDS: usize = 4;

impl Lora {
    pub(super) fn lora_ga(&self, places: &[Place<'_>], base: &dyn Calibration) -> Result<()> {
        let all: Vec<usize> = (0..places.len()).collect();
        let sizes = |place: &Place<'_>| {
            let (a, b) = (place.a.value(), place.b.value());
            [b.dim(0), a.len() / a.dim(0).max(1)]
        };
        let numbers = |place: &Place<'_>| sizes(place).iter().product();
        summed(places, &all, numbers, (base, self.search.batches, true), gradient, |at, sum, _| {
            let place = &places[at];
            let rank = place.rank;
            let key = Key { seed: base.seed(), stream: place.site.id.0 as u64 };
            let svd = svd_lowrank(&sum, 4 * rank, ROUNDS, key)?;
            let size = (sizes(place)[0] as f64).powf(0.25) / self.search.gamma.sqrt();
            let a = svd.vt.rows_between(0, rank)?.scale(size as f32)?;
            let b = svd.u.narrow(1, rank, rank)?.scale(size as f32)?;
            place.set(&a, &b)
        })
    }
}

/// ∂L/∂W = dyᵀ·x.
fn gradient(seen: &Seen<'_>) -> Result<Vec<Tensor>> {
    match seen.dy {
        Some(dy) => Ok(vec![dy.t_matmul(seen.x)?]),
        None => Ok(vec![]),
    }
}
