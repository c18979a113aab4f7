//! Linear layers that older names have as one: a matrix [Σ out, in] whose rows the current names cut.

use engraft_tensor::Tensor;
use engraft_tensor::ops::cat;
use std::sync::Arc;

use crate::{Base, Linear, Pass, Result, Role, Sites, Weight};

/// Several linear layers of one input. An adapter that goes by the older names sits at a site of all their rows, any
/// other one at the layers themselves.
#[derive(Clone)]
pub struct Joined {
    /// All rows; a view of the parts.
    whole: Linear,
    parts: Vec<Linear>,
}

impl Joined {
    /// Declares the site `path` of all rows of `parts`, and of their biases where they have such, for the older names.
    pub fn declare(
        sites: &mut Sites,
        (path, tensor): (&str, &str),
        role: Role,
        layer: Option<usize>,
        parts: Vec<Linear>,
    ) -> Result<Joined> {
        let weight = Weight::joined(parts.iter().map(|p| p.weight().clone()).collect());
        let biases: Option<Vec<_>> = parts.iter().map(Linear::bias).collect();
        let bias = match &biases {
            Some(all) => Some(cat(&all.iter().map(|(bias, _)| *bias).collect::<Vec<_>>(), 0)?),
            None => None,
        };
        let whole = Linear::declare(sites, (path, tensor), role, layer, Arc::new(weight), bias);
        let rows = |p: &Linear| p.weight().shape().0;
        sites.join(whole.site(), &parts.iter().map(|p| (p.site(), rows(p))).collect::<Vec<_>>());
        if let (Some((_, id)), Some(all)) = (whole.bias(), biases) {
            let lengths = all.iter().zip(&parts).map(|((_, id), p)| (*id, rows(p)));
            sites.join(id, &lengths.collect::<Vec<_>>());
        }
        Ok(Joined { whole, parts })
    }

    /// x [tokens, in] → what each of the layers gives, [tokens, out].
    pub fn forward(&self, x: &Tensor, sites: &Sites, cx: &Pass) -> Result<Vec<Tensor>> {
        let apart = |x: &Tensor, cx: &Pass| -> Result<Vec<Tensor>> {
            self.parts.iter().map(|p| p.forward(x, sites, cx)).collect()
        };
        if !self.whole.patched(cx) {
            return apart(x, cx);
        }
        let all = cx.by_route(self.whole.site(), x, |x, _, cx| {
            if self.whole.patched(cx) {
                return self.whole.forward(x, sites, cx);
            }
            Ok(cat(&apart(x, cx)?.iter().collect::<Vec<_>>(), 1)?)
        })?;
        let mut first = 0;
        let mut cut = |p: &Linear| {
            let rows = p.weight().shape().0;
            first += rows;
            Ok(all.narrow(1, first - rows, rows)?)
        };
        self.parts.iter().map(&mut cut).collect()
    }
}
