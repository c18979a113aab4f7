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

/// The first of `targets` whose (out, in) are such, these, and how many others there are.
pub(crate) fn first_of<'s>(
    targets: &[&'s Site],
    such: impl Fn(usize, usize) -> bool,
) -> Option<(&'s str, (usize, usize), String)> {
    let sized = |site: &&'s Site| match site.kind {
        Kind::Linear { out, inn, .. } | Kind::Convolution { out, inn, .. } => {
            Some((site.path.as_str(), (out, inn)))
        }
        _ => None,
    };
    let mut all = targets.iter().filter_map(sized).filter(|(_, (out, inn))| such(*out, *inn));
    let (path, sizes) = all.next()?;
    let more = match all.count() {
        0 => String::new(),
        more => format!(", and at {more} more"),
    };
    Some((path, sizes, more))
}

/// What is told of products whose rank is more than their weight's.
pub(crate) fn beyond_rank(targets: &[&Site], rank: usize) -> Vec<String> {
    let Some((path, (out, inn), more)) = first_of(targets, |out, inn| rank > out.min(inn)) else {
        return vec![];
    };
    let least = out.min(inn);
    vec![format!(
        "`rank` is {rank}, more than the {least} that {path} can have{more}: what is beyond costs time and memory for little"
    )]
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
