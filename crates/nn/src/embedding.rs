//! A frozen table that is looked up; a site like any weight.

use std::sync::Arc;

use engraft_tensor::Tensor;

use crate::{Base, Kind, Pass, Patched, Result, Role, SiteId, Sites, Value, Weight};

/// ids `[tokens]` → rows [tokens, width].
#[derive(Clone)]
pub struct Embedding {
    weight: Arc<Weight>,
    site: SiteId,
}

impl Embedding {
    /// Declares the site `path`; `tensor` is the module's name in the model's files.
    pub fn declare(
        sites: &mut Sites,
        (path, tensor): (&str, &str),
        role: Role,
        weight: Arc<Weight>,
    ) -> Embedding {
        let (rows, width) = weight.shape();
        let value = Value::Weight(weight.clone());
        let kind = Kind::Embedding { rows, width };
        let site = sites.add_value(path, role, None, kind, value, format!("{tensor}.weight"));
        Embedding { weight, site }
    }

    /// The table.
    pub fn weight(&self) -> &Arc<Weight> {
        &self.weight
    }

    /// ids `I64` `[tokens]` → [tokens, width].
    pub fn forward(&self, ids: &Tensor, sites: &Sites, cx: &Pass) -> Result<Tensor> {
        if !cx.patched(self.site) {
            return self.weight.lookup(ids);
        }
        let site = sites.get(self.site);
        cx.by_route(self.site, ids, |ids, patches, cx| {
            Patched::new(self.weight.as_ref(), patches, site, cx).lookup(ids)
        })
    }
}
