//! Which neurons of a model's MLPs are active under an adapter: how alike two adapters make it, two prompts above all.
//!
//! A neuron is an input of an MLP's last matrix, and active where it is above zero. What a prompt does is seen at one token that
//! says nothing: a mask, or the first that a decoder writes. Two prompts are as alike as the cosine of their states, ones and
//! zeros over all layers: the overlapping rate of activated neurons.
//!
//! Su et al. 2022 (TPT), arXiv:2111.06719, section 5.

use std::sync::{Arc, Mutex};

use engraft_nn::{Adapter, Base, Inputs, Model, Pass, Patch, Result, Role, Site, SiteId, Stack, WeightPatch};
use engraft_tensor::{Tensor, no_grad};

use crate::{Chosen, look_first};

/// The states of all neurons at the last token of the one sequence of `inputs`, layer by layer; of an encoder–decoder model the
/// decoder's.
///
/// # Errors
/// Whatever the model refuses.
pub fn active_neurons(
    model: &dyn Model,
    adapter: Adapter,
    methods: &[Chosen],
    inputs: &Inputs,
) -> Result<Vec<bool>> {
    let seen: Arc<Mutex<Vec<bool>>> = Arc::default();
    let ends = |s: &&Site| s.role == Role::Down && s.is_weight() && s.stack != Stack::Encoder;
    let probe = |site: &Site| -> (SiteId, Patch) { (site.id, Patch::Weight(Box::new(Probe(seen.clone())))) };
    let probes = model.sites().iter().filter(ends).map(probe).collect();
    let adapter = Arc::new(adapter.with_patches(probes));
    let cx = Pass::new(inputs.layout.clone(), Some(adapter.clone()));
    no_grad(|| {
        look_first(methods, &adapter, model, inputs, &cx)?;
        model.features(inputs, &cx).map(|_| ())
    })?;
    let states = std::mem::take(&mut *seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    Ok(states)
}

/// The cosine of two states; 0 where one of them has no active neuron.
pub fn overlap(a: &[bool], b: &[bool]) -> f64 {
    let count = |states: &[bool]| states.iter().filter(|&&active| active).count() as f64;
    let both = a.iter().zip(b).filter(|(a, b)| **a && **b).count() as f64;
    let norms = (count(a) * count(b)).sqrt();
    if norms > 0.0 { both / norms } else { 0.0 }
}

/// Sees the input of a weight and changes nothing.
struct Probe(Arc<Mutex<Vec<bool>>>);

impl WeightPatch for Probe {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        base.dense()
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let last = x.rows_between(x.dim(0) - 1, x.dim(0))?.to_vec()?;
        let mut seen = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        seen.extend(last.into_iter().map(|v| v > 0.0));
        drop(seen);
        base.forward(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_that_agree_overlap_wholly() {
        let a = [true, false, true, true];
        assert_eq!(overlap(&a, &a), 1.0);
        assert_eq!(overlap(&a, &[false, true, false, false]), 0.0);
        // One of three and one of one: 1/√3.
        assert!((overlap(&a, &[true, false, false, false]) - 3f64.sqrt().recip()).abs() < 1e-12);
        assert_eq!(overlap(&a, &[false; 4]), 0.0);
    }
}
