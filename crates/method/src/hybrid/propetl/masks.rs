//! Binary masks over a prototype: which of its entries a layer, and a task, keep.

use std::sync::Arc;

use engraft_nn::Result;
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};

use crate::shared::bits::Bits;
use crate::shared::kept::Kept;

/// One where |score| is among the `kept` largest, else zero.
pub(super) fn chosen(scores: &Tensor, kept: usize) -> Result<Tensor> {
    let n = scores.len();
    let sizes = scores.detach().unary(Unary::Abs)?.reshape([1, n])?;
    let places = sizes.top_k(kept)?.1.reshape([kept])?;
    Ok(Tensor::full(1.0, [kept]).scatter_add(&places, n)?.reshape(scores.shape())?)
}

/// A mask, trained or from a file.
pub(super) enum Mask {
    Trained { scores: Param, kept: usize, mask: Kept<Tensor> },
    Saved(Bits),
}

impl Mask {
    pub fn trained(scores: Param, kept: usize) -> Mask {
        Mask::Trained { scores, kept, mask: Kept::new() }
    }

    /// One for what is kept, else zero; its gradient is that of |scores|.
    fn get(&self) -> Result<Tensor> {
        match self {
            Mask::Saved(bits) => bits.mask(),
            Mask::Trained { scores, kept, mask } => mask.of(&[scores], || {
                let sizes = scores.get().unary(Unary::Abs)?;
                // The difference is zero, and has a slope.
                Ok(sizes.sub(&sizes.detach())?.add(&chosen(&scores.value(), *kept)?)?)
            }),
        }
    }
}

/// A matrix that all layers share, and of several tasks the mask of each.
#[derive(Clone)]
pub(super) struct Prototype {
    pub values: Param,
    /// Empty where there is one task.
    pub tasks: Vec<Arc<Mask>>,
}

/// The part of a prototype that one layer has.
pub(super) struct Masked {
    pub prototype: Prototype,
    pub layer: Mask,
}

impl Masked {
    /// Φ where the layer or the task keeps it: for gradients 1 − (1 − m)·(1 − m′).
    pub fn of(&self, task: usize) -> Result<Tensor> {
        let layer = self.layer.get()?;
        let mask = match self.prototype.tasks.get(task) {
            None => layer,
            Some(task) => {
                let task = task.get()?;
                layer.add(&task)?.sub(&layer.mul(&task)?)?
            }
        };
        Ok(self.prototype.values.get().mul(&mask)?)
    }
}
