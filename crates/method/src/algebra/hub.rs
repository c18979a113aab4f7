//! LoRAHub: adapters of other tasks composed for a new one, by weights that a search finds on a few examples.
//!
//! Â = Σ wᵢ·Aᵢ, B̂ = Σ wᵢ·Bᵢ, ΔW = B̂·Â, so that products of different adapters come in. The weights minimise the loss on the
//! examples plus λ·Σ|wᵢ|, λ = 0.05, within ±1.5, from 0 on, without gradients (Huang et al. 2023, arXiv:2307.13269). The
//! paper's search is that of Nevergrad; here it is CMA-ES. The scale of each adapter is shared between its factors, so that one
//! weight of 1 among zeros is that adapter.

use engraft_nn::{Error, Result};
use engraft_tensor::Tensor;
use serde_json::Value;

use super::cma::{Space, minimise};
use super::factors::{Factors, Found as Modules};
use super::{Options, Rule, Term, check, combine_checked};
use crate::Named;

/// How weights are looked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Search {
    /// λ, on the sum of the weights' sizes.
    pub penalty: f64,
    /// The largest size of a weight.
    pub bound: f64,
    /// How often the examples are looked at.
    pub evaluations: usize,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Search {
    fn default() -> Self {
        Search { penalty: 0.05, bound: 1.5, evaluations: 40, seed: 0 }
    }
}

/// Weights that were found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Of each adapter.
    pub weights: Vec<f64>,
    /// Loss plus λ·Σ|w| there.
    pub value: f64,
    /// The loss of the base alone, where the search begins.
    pub start: f64,
    /// How often the examples were looked at.
    pub evaluations: usize,
}

/// Sets the weights of `terms` to those under which `loss`, of a configuration and its tensors, is least.
///
/// # Errors
/// Adapters that cannot be composed, and what `loss` gives.
pub fn search(
    terms: &mut [Term],
    how: &Search,
    loss: &mut dyn FnMut(&Value, &Named) -> Result<f64>,
) -> Result<Found> {
    let (dimensions, bound) = (terms.len(), how.bound);
    let options = Options::of(Rule::LoraHub);
    let space = Space { dimensions, bound, evaluations: how.evaluations.max(1), seed: how.seed };
    check(terms, &options)?;
    let found = minimise(space, &mut |weights| {
        terms.iter_mut().zip(weights).for_each(|(term, weight)| term.weight = *weight);
        let composed = combine_checked(terms, &options, false)?;
        let size: f64 = weights.iter().map(|w| w.abs()).sum();
        Ok(loss(&composed.config, &composed.tensors)? + how.penalty * size)
    })?;
    terms.iter_mut().zip(&found.at).for_each(|(term, weight)| term.weight = *weight);
    Ok(Found { weights: found.at, value: found.value, start: found.start, evaluations: found.evaluations })
}

/// Σ w·√s·A and Σ w·√s·B.
pub(super) fn factors(parts: &[(&Factors, f64, usize)]) -> Result<(Tensor, Tensor)> {
    let sum = |of: &dyn Fn(&Factors) -> Tensor| -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (factors, weight, _) in parts {
            let part = of(factors).scale((weight * factors.scale.abs().sqrt()) as f32)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&part)?,
                None => part,
            });
        }
        sum.ok_or_else(|| Error::Unsupported("there is no adapter to compose".into()))
    };
    Ok((sum(&|f| f.a.clone())?, sum(&|f| f.b.clone())?))
}

/// What the adapters hold beside products: heads that are the same in all are kept. Others have no weight of 1.5 or below 0 that
/// means anything.
pub(super) fn carried(found: &Modules, terms: &[Term]) -> Result<Named> {
    let refused = |name: &str, why: &str| {
        Err(Error::Unsupported(format!(
            "LoRAHub composes low-rank products, and there is {name}, {why}; leave it out of the adapters, or use average or cat"
        )))
    };
    if let Some((name, _)) = found.biases.first() {
        return refused(name, "a bias beside its product");
    }
    let mut carried = Named::new();
    for (name, all) in &found.others {
        let Some(((_, first), others)) = all.split_first() else { continue };
        let mut same = all.len() == terms.len();
        for (_, other) in others {
            same &= other.shape() == first.shape() && other.to_bytes()? == first.to_bytes()?;
        }
        if !same {
            return refused(name, "which is trained as a whole and not the same in all");
        }
        carried.push((name.clone(), first.clone()));
    }
    Ok(carried)
}
