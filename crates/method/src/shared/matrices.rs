//! Linear layers as targets: their sizes, their frozen weights, and norms of matrices.

use engraft_nn::{Base, Error, Kind, Result, Site, Value};
use engraft_tensor::Tensor;
use engraft_tensor::ops::Unary;

/// (out, in) of a target of the method called `title`, which must be a linear layer.
pub(crate) fn linear(site: &Site, title: &str) -> Result<(usize, usize)> {
    let what = match site.kind {
        Kind::Linear { out, inn, .. } => return Ok((out, inn)),
        Kind::Embedding { .. } => "an embedding",
        Kind::Convolution { .. } => "a convolution",
        _ => "no matrix",
    };
    let message =
        format!("{title} adapts linear layers, and this is {what}; leave it out of the targets, or use lora");
    Err(Error::Site { path: site.path.clone(), message })
}

/// W as it is before any patch.
pub(crate) fn frozen(site: &Site) -> Result<Tensor> {
    match &site.value {
        Value::Weight(w) => w.dense(),
        _ => Err(Error::Site { path: site.path.clone(), message: "expected a weight, found none".into() }),
    }
}

/// Norms of w over dimension `dim`, which stays with size 1.
pub(crate) fn norms(w: &Tensor, dim: usize) -> Result<Tensor> {
    Ok(w.unary(Unary::Square)?.sum_dim(dim)?.unary(Unary::Sqrt)?)
}
