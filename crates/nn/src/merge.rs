//! The tensors of a plain model with an adapter folded in.

use engraft_tensor::{Tensor, no_grad};

use crate::linear::patched_vector;
use crate::{Adapter, Base, Error, Kind, Layout, Names, Pass, Patch, Patched, Result, Site, Sites, Value};

/// A changed tensor.
pub struct MergedTensor<'a> {
    /// The site it belongs to; `site.tensor` is its name in the model's files.
    pub site: &'a Site,
    /// The new value, as stored in the file ([in, out] where the file has it so).
    pub value: Tensor,
}

/// W′ and v′ of every patched site; an error listing the sites that cannot be folded into weights.
pub fn merged_tensors<'a>(sites: &'a Sites, adapter: &Adapter) -> Result<Vec<MergedTensor<'a>>> {
    mergeable_sites(sites, adapter)?.into_iter().map(|site| merged_tensor(sites, site, adapter)).collect()
}

/// The patched sites in model order; an error listing those that cannot be folded into weights.
pub fn mergeable_sites<'a>(sites: &'a Sites, adapter: &Adapter) -> Result<Vec<&'a Site>> {
    let patched: Vec<&Site> = adapter.sites().into_iter().map(|id| sites.get(id)).collect();
    let refused: Vec<String> = patched
        .iter()
        .filter(|s| !adapter.at(s.id).iter().all(mergeable))
        .map(|s| format!("{}: {}", s.path, reason(adapter.at(s.id))))
        .collect();
    if !refused.is_empty() {
        return Err(Error::Mismatch(refused));
    }
    // What older names have as one matrix is several, under the names that merging follows.
    let changed = |s: &&Site| {
        let whole = s.part_of.is_some_and(|(whole, _)| !adapter.at(whole).is_empty());
        whole || !adapter.at(s.id).is_empty()
    };
    Ok(sites.named(Names::Current).iter().filter(changed).collect())
}

/// W′ or v′ of one of the [`mergeable_sites`], for writing a model tensor by tensor.
pub fn merged_tensor<'a>(sites: &Sites, site: &'a Site, adapter: &Adapter) -> Result<MergedTensor<'a>> {
    let cx = Pass::new(Layout::counted(&[])?, None);
    let whole = site.part_of.filter(|(whole, _)| !adapter.at(*whole).is_empty());
    let value = no_grad(|| match whole {
        None => merged(site, adapter.at(site.id), &cx),
        Some((whole, first)) => {
            let value = merged(sites.get(whole), adapter.at(whole), &cx)?;
            Ok(value.rows_between(first, first + site.kind.rows())?)
        }
    })?;
    Ok(MergedTensor { site, value })
}

fn mergeable(patch: &Patch) -> bool {
    match patch {
        Patch::Weight(p) => p.mergeable(),
        Patch::Vector(_) => true,
        _ => false,
    }
}

/// Why patches, some of which are not mergeable, are no weight.
fn reason(patches: &[Patch]) -> &'static str {
    let lacks_bias = |p: &Patch| matches!(p, Patch::Weight(p) if p.lacks_bias());
    match patches.iter().filter(|p| !mergeable(p)).all(lacks_bias) {
        true => "a constant is added to its output, and the layer has no bias that could take it",
        false => "what is attached there depends on the input",
    }
}

fn merged(site: &Site, patches: &[Patch], cx: &Pass) -> Result<Tensor> {
    Ok(match &site.value {
        Value::Weight(w) => {
            let value = Patched::new(w.as_ref(), patches, site, cx).dense()?;
            match site.kind {
                Kind::Linear { transposed: true, .. } => value.t()?,
                Kind::Convolution { shape, .. } => value.reshape(shape)?,
                _ => value,
            }
        }
        Value::Vector(v) => patched_vector(v, patches)?,
        Value::None => {
            return Err(Error::Site {
                path: site.path.clone(),
                message: "holds no tensor to merge into".into(),
            });
        }
    })
}
