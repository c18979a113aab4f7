//! Layer norm and RMS norm; gain and bias are vector sites.

use engraft_tensor::{Tensor, ops};

use crate::linear::patched_vector;
use crate::{Kind, Pass, Result, Role, SiteId, Sites, Value};

/// A norm over the last dimension.
#[derive(Clone)]
pub struct Norm {
    eps: f32,
    gain: (Tensor, SiteId),
    bias: Option<(Tensor, SiteId)>,
}

impl Norm {
    /// Declares `path.weight` and, for a layer norm, `path.bias`. `tensor` is the module's name in the model's files.
    pub fn declare(
        sites: &mut Sites,
        (path, tensor): (&str, &str),
        layer: Option<usize>,
        gain: Tensor,
        bias: Option<Tensor>,
        eps: f32,
    ) -> Norm {
        let mut vector = |v: Tensor, suffix: &str| {
            let (kind, value) = (Kind::Vector { len: v.len() }, Value::Vector(v.clone()));
            let id = sites.add_value(
                format!("{path}.{suffix}"),
                Role::Norm,
                layer,
                kind,
                value,
                format!("{tensor}.{suffix}"),
            );
            (v, id)
        };
        let gain = vector(gain, "weight");
        let bias = bias.map(|b| vector(b, "bias"));
        Norm { eps, gain, bias }
    }

    /// x [.., width] → [.., width]; rows of x are the rows of the pass, or `heads` times as many.
    pub fn forward(&self, x: &Tensor, cx: &Pass) -> Result<Tensor> {
        let ids = [Some(self.gain.1), self.bias.as_ref().map(|b| b.1)];
        if !ids.into_iter().flatten().any(|id| cx.patched(id)) {
            return self.apply(x, &self.gain.0, self.bias.as_ref().map(|b| &b.0));
        }
        // Both vectors of a route come from the same adapter, so cut the rows once, at the gain.
        cx.by_route(self.gain.1, x, |x, patches, cx| {
            let gain = patched_vector(&self.gain.0, patches)?;
            let bias = match &self.bias {
                Some((b, id)) => Some(patched_vector(b, cx.patches_of_only_route(*id))?),
                None => None,
            };
            self.apply(x, &gain, bias.as_ref())
        })
    }

    fn apply(&self, x: &Tensor, gain: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        Ok(match bias {
            Some(bias) => ops::layer_norm(x, gain, bias, self.eps)?,
            None => ops::rms_norm(x, gain, self.eps)?,
        })
    }
}
