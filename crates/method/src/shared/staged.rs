//! Two stages of one run: a change of whole matrices, then values at the places that it chose.
//!
//! In the first stage W′ = W + Δ, Δ of the shape of W; in the second W′ = W + S, S a mask's. Δ and what else only the first
//! stage needs is in checkpoints and not in the adapter's file; a file, and training that goes on from it, know S alone.

use std::sync::Arc;

use engraft_nn::{Adapter, Base, Builder, Error, Init, Pass, Patch, Result, Site, WeightPatch};
use engraft_tensor::{Param, Tensor};

use super::sparse::{Delta, Mask, shape};
use crate::Step;

/// The group of the tensors that stand for Δ, one a matrix.
pub(crate) const DENSE: &str = "dense";
const STAGE: &str = "sparse_stage";

/// Δ of one matrix.
pub(crate) trait Change: Send + Sync {
    /// Δ [out, in]; `at` is where a forward is, absent where W′ itself is asked for.
    fn change(&self, at: Option<(&Site, &Pass)>) -> Result<Tensor>;
}

/// Makes Δ of a site with the builder.
pub(crate) type Make<'a> = dyn Fn(&mut Builder<'_>, &Site) -> Result<Arc<dyn Change>> + 'a;

/// What was attached: the parameter that says which stage is on, if there is a first one, and the places of each matrix.
pub(crate) type Attached<'s> = (Option<Param>, Vec<(&'s Site, Param)>);

/// Attaches both stages at the targets, the first only where `make` is given.
pub(crate) fn attach<'s>(mask: &Mask, b: &mut Builder<'s>, make: Option<&Make<'_>>) -> Result<Attached<'s>> {
    let stage = match make {
        Some(_) => Some(b.state(STAGE, &[1], Init::Values(Tensor::from_i64(vec![0], [1])?))?),
        None => None,
    };
    let mut masks = Vec::new();
    for group in mask.groups(&b.targets())? {
        let (values, places) = mask.tensors(b, &group)?;
        for (site, first) in group.sites {
            let delta = Delta::new(values.clone(), places.clone(), shape(site)?, first);
            masks.push((site, places.clone()));
            let patch: Box<dyn WeightPatch> = match (make, &stage) {
                (Some(make), Some(stage)) => {
                    Box::new(Staged { change: make(b, site)?, delta, stage: stage.clone() })
                }
                _ => Box::new(delta),
            };
            b.patch(site.id, Patch::Weight(patch))?;
        }
    }
    Ok((stage, masks))
}

/// The last step of the first stage, which is this share of a run.
pub(crate) fn last_dense(share: f64, step: Step) -> u64 {
    ((share * step.total as f64).floor() as u64).max(1)
}

/// Whether the first stage is on.
pub(crate) fn is_dense(adapter: &Adapter) -> Result<bool> {
    stage(adapter).map_or(Ok(false), |(stage, _)| first_stage(&stage))
}

/// Whether this parameter says that the first stage is on.
pub(crate) fn first_stage(stage: &Param) -> Result<bool> {
    Ok(stage.value().to_i64()? == [0])
}

/// The parameter that says which stage is on, and what precedes the names of the method's tensors.
fn stage(adapter: &Adapter) -> Option<(Param, String)> {
    let named =
        adapter.params().iter().find(|p| p.name == STAGE || p.name.ends_with(&format!(".{STAGE}")))?;
    Some((named.param.clone(), named.name.trim_end_matches(STAGE).to_owned()))
}

/// Δ of the matrices in the order of the targets, each with what precedes the last part of its name.
pub(crate) fn matrices(adapter: &Adapter) -> impl Iterator<Item = (String, Param)> + '_ {
    let dense = adapter.params().iter().filter(|p| p.group == DENSE);
    dense.map(|p| {
        (p.name.rsplit_once('.').map_or(String::new(), |(stem, _)| stem.to_owned()), p.param.clone())
    })
}

/// The parameter called `name` in this method's part of the adapter.
pub(crate) fn own(adapter: &Adapter, name: &str) -> Result<Param> {
    let found = adapter.params().iter().find(|p| p.name == name);
    found
        .map(|p| p.param.clone())
        .ok_or_else(|| Error::Unsupported(format!("the adapter has no tensor `{name}`")))
}

/// Begins the second stage with these tensors, places and values; Δ goes back to zero.
pub(crate) fn settle(adapter: &Adapter, tensors: impl IntoIterator<Item = (String, Tensor)>) -> Result<()> {
    let Some((stage, _)) = stage(adapter) else { return Ok(()) };
    for (name, tensor) in tensors {
        own(adapter, &name)?.set(tensor)?;
    }
    for (_, dense) in matrices(adapter) {
        dense.set(Tensor::zeros(dense.value().shape()))?;
    }
    Ok(stage.set(Tensor::from_i64(vec![1], [1])?)?)
}

/// Begins the second stage with the largest entries of all Δ together, `of` giving Δ by the name of its matrix: at their values
/// or, rewound, at zero.
pub(crate) fn settle_largest(
    mask: &Mask,
    adapter: &Adapter,
    rewind: bool,
    of: &dyn Fn(&str) -> Result<Tensor>,
) -> Result<()> {
    let Some((_, prefix)) = stage(adapter) else { return Ok(()) };
    let values = own(adapter, &format!("{prefix}{}", mask.values))?;
    let count = values.value().len();
    let (mut best, mut first) = (super::scores::Best::new(count), 0);
    for (stem, _) in matrices(adapter) {
        let scores: Vec<f32> = of(&stem)?.to_vec()?.into_iter().map(f32::abs).collect();
        best.offer(&stem, first, &scores)?;
        first += scores.len() as u64;
    }
    let places = best.places();
    let (mut kept, mut first, mut next) = (Vec::with_capacity(count), 0, 0);
    for (stem, _) in matrices(adapter).filter(|_| !rewind) {
        let change = of(&stem)?.to_vec()?;
        let end = first + change.len() as u64;
        while next < places.len() && places[next] < end {
            kept.push(change[(places[next] - first) as usize]);
            next += 1;
        }
        first = end;
    }
    kept.resize(count, 0.0);
    let places = Tensor::from_i64(places.into_iter().map(|p| p as i64).collect(), [count])?;
    let values = Tensor::from_vec(kept, [count])?;
    settle(
        adapter,
        [(format!("{prefix}{}", mask.places), places), (format!("{prefix}{}", mask.values), values)],
    )
}

struct Staged {
    change: Arc<dyn Change>,
    delta: Delta,
    stage: Param,
}

impl Staged {
    fn is_dense(&self) -> Result<bool> {
        first_stage(&self.stage)
    }
}

impl WeightPatch for Staged {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        match self.is_dense()? {
            true => Ok(base.dense()?.add(&self.change.change(None)?)?),
            false => self.delta.weight(base),
        }
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        match self.is_dense()? {
            true => Ok(base.forward(x)?.plus(&x.matmul_t(&self.change.change(Some((site, cx)))?)?)?),
            false => self.delta.forward(x, base, site, cx),
        }
    }
}
