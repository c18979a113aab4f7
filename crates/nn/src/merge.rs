//! The tensors of a plain model with an adapter folded in.

use engraft_tensor::{Tensor, no_grad};

use crate::linear::patched_vector;
use crate::{Adapter, Base, Error, Kind, Layout, Pass, Patch, Patched, Result, Site, Sites, Value};

/// A changed tensor.
pub struct MergedTensor<'a> {
    /// The site it belongs to; `site.tensor` is its name in the model's files.
    pub site: &'a Site,
    /// The new value, as stored in the file ([in, out] where the file has it so).
    pub value: Tensor,
}

/// W′ and v′ of every patched site; an error listing the sites that cannot be folded into weights.
pub fn merged_tensors<'a>(sites: &'a Sites, adapter: &Adapter) -> Result<Vec<MergedTensor<'a>>> {
    mergeable_sites(sites, adapter)?.into_iter().map(|site| merged_tensor(site, adapter)).collect()
}

/// The patched sites in model order; an error listing those that cannot be folded into weights.
pub fn mergeable_sites<'a>(sites: &'a Sites, adapter: &Adapter) -> Result<Vec<&'a Site>> {
    let patched: Vec<&Site> = adapter.sites().into_iter().map(|id| sites.get(id)).collect();
    let refused: Vec<String> = patched
        .iter()
        .filter(|s| !adapter.at(s.id).iter().all(mergeable))
        .map(|s| format!("{}: what sits at a {:?} site depends on the input", s.path, s.kind))
        .collect();
    if refused.is_empty() { Ok(patched) } else { Err(Error::Mismatch(refused)) }
}

/// W′ or v′ of one of the [`mergeable_sites`], for writing a model tensor by tensor.
pub fn merged_tensor<'a>(site: &'a Site, adapter: &Adapter) -> Result<MergedTensor<'a>> {
    let cx = Pass::new(Layout::counted(&[])?, None);
    no_grad(|| merged(site, adapter.at(site.id), &cx))
}

fn mergeable(patch: &Patch) -> bool {
    match patch {
        Patch::Weight(p) => p.mergeable(),
        Patch::Vector(_) => true,
        _ => false,
    }
}

fn merged<'a>(site: &'a Site, patches: &[Patch], cx: &Pass) -> Result<MergedTensor<'a>> {
    let value = match &site.value {
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
    };
    Ok(MergedTensor { site, value })
}
