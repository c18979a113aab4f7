//! A frozen vector that a model uses in its own way (a class token, learned positions, a layer scale); a site like any other.

use engraft_tensor::Tensor;

use crate::linear::patched_vector;
use crate::{Kind, Pass, Result, Role, SiteId, Sites, Value};

/// See the module.
#[derive(Clone)]
pub struct Parameter {
    value: Tensor,
    site: SiteId,
}

impl Parameter {
    /// Declares the site `path`; `tensor` is its name in the model's files, where it may have further dimensions.
    pub fn declare(
        sites: &mut Sites,
        (path, tensor): (&str, &str),
        role: Role,
        layer: Option<usize>,
        value: Tensor,
    ) -> Parameter {
        let (kind, frozen) = (Kind::Vector { len: value.len() }, Value::Vector(value.clone()));
        let site = sites.add_value(path, role, layer, kind, frozen, tensor);
        Parameter { value, site }
    }

    /// `f` of the rows x of each route, the vector under its patches, and the pass of those rows.
    pub fn apply(
        &self,
        x: &Tensor,
        cx: &Pass,
        f: impl Fn(&Tensor, &Tensor, &Pass) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if !cx.patched(self.site) {
            return f(x, &self.value, cx);
        }
        cx.by_route(self.site, x, |x, patches, cx| f(x, &patched_vector(&self.value, patches)?, cx))
    }
}
