//! Bases that an adapter's file brings along: copies of tables and heads that are not the model's.

use engraft_nn::{Base, Error, Result, Role, Site, SiteId, Sites, Value as Frozen};
use engraft_tensor::Tensor;

use crate::Named;

/// A frozen table or head that the adapter was trained on and that is not the model's.
pub(crate) struct OtherBase {
    pub name: String,
    pub value: Tensor,
    pub sites: Vec<SiteId>,
}

/// Takes copies of frozen embeddings and heads out of the tensors of a file; those equal to the model's are dropped.
pub(crate) fn other_bases(tensors: Named, sites: &Sites) -> Result<(Named, Vec<OtherBase>)> {
    let tables = || sites.iter().filter(|s| s.is_weight() && matches!(s.role, Role::Embed | Role::Head));
    let (mut rest, mut others) = (Vec::new(), Vec::new());
    for (key, value) in tensors {
        let path = key.strip_prefix("base_model.model.").and_then(|k| k.strip_suffix(".weight"));
        let path = path.map(|p| p.strip_suffix(".base_layer").unwrap_or(p));
        let site = tables().find(|s| Some(s.path.as_str()) == path);
        let Some((site, Frozen::Weight(own))) = site.map(|s| (s, &s.value)) else {
            rest.push((key, value));
            continue;
        };
        let own = own.dense()?;
        if own.shape() != value.shape() {
            let message = format!(
                "the adapter was trained on a base whose table is {:?}; this model's is {:?}; resize the model's vocabulary first",
                value.shape(),
                own.shape()
            );
            return Err(Error::Site { path: site.path.clone(), message });
        }
        if !same(&own, &value)? {
            // A tied head is the same tensor of the model.
            let same_tensor = |s: &&Site| s.id == site.id || s.tensor.is_some() && s.tensor == site.tensor;
            let name = key.strip_prefix("base_model.model.").unwrap_or(&key).to_string();
            others.push(OtherBase {
                name,
                value,
                sites: tables().filter(same_tensor).map(|s| s.id).collect(),
            });
        }
    }
    Ok((rest, others))
}

/// Equal up to the rounding of bf16, in which the model may be held.
fn same(a: &Tensor, b: &Tensor) -> Result<bool> {
    let (a, b) = (a.to_vec()?, b.to_vec()?);
    Ok(a.iter().zip(&b).all(|(x, y)| (x - y).abs() <= y.abs() / 128.0))
}
