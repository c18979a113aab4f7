//! DoRA: W′ = m ⊙ (W + s·B·A)/‖W + s·B·A‖, norms of rows, constants to the gradient; m starts as the rows' norms of W.
//!
//! Liu et al. 2024, arXiv:2402.09353. m is `[out]`, of a convolution [1, out, 1, 1].

use engraft_nn::{Base, Error, Mode, Pass, Result, Site, Value, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor, no_grad};

use super::factors::Factors;

/// Magnitude and direction.
pub(super) struct Dora {
    pub factors: Factors,
    pub magnitude: Param,
}

impl Dora {
    /// m/‖W + s·B·A‖ `[out]`; the norm is a constant to the gradient.
    fn gain(&self, changed: &Tensor) -> Result<Tensor> {
        let magnitude = self.magnitude.get().reshape([changed.dim(0)])?;
        Ok(magnitude.div(&no_grad(|| row_norms(&changed.detach()))?)?)
    }
}

impl WeightPatch for Dora {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let changed = base.dense()?.add(&self.factors.product()?)?;
        let gain = self.gain(&changed)?;
        Ok(changed.mul(&gain.reshape([gain.len(), 1])?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let changed = no_grad(|| -> Result<Tensor> { Ok(base.dense()?.add(&self.factors.product()?)?) })?;
        let gain = self.gain(&changed)?;
        let dropped = cx.dropout(x, self.factors.dropout, site.id, 0)?;
        let straight = base.forward(x)?;
        if self.factors.dropout == 0.0 || cx.mode() == Mode::Eval {
            return Ok(self.factors.added_to(straight, &dropped)?.mul(&gain)?);
        }
        // Dropout acts on what is added to the frozen output: (g − 1)·drop(x)·Wᵀ + g·s·(drop(x)·Aᵀ)·Bᵀ.
        let frozen = base.forward(&dropped)?;
        let moved = self.factors.added_to(frozen.clone(), &dropped)?.mul(&gain)?.sub(&frozen)?;
        Ok(straight.add(&moved)?)
    }
}

/// W as it is before any patch.
pub(super) fn site_weight(site: &Site) -> Result<Tensor> {
    match &site.value {
        Value::Weight(w) => w.dense(),
        _ => Err(Error::Site { path: site.path.clone(), message: "expected a weight, found none".into() }),
    }
}

/// ‖row‖ of every row of w [out, in]: `[out]`.
pub(super) fn row_norms(w: &Tensor) -> Result<Tensor> {
    let out = w.dim(0);
    Ok(w.unary(Unary::Square)?.sum_to(&[out, 1])?.unary(Unary::Sqrt)?.reshape([out])?)
}
