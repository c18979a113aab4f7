//! The product's own bias.

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Site, VectorPatch, WeightPatch};
use engraft_tensor::{Param, Tensor};

use super::factors::Factors;
use super::form::At;
use super::{Lora, Start};

impl Lora {
    /// s·(B·A·x + c) = s·B·A·x + s·c: the second part belongs to the layer's bias, or to the output where there is none.
    pub(super) fn attach_product_bias(
        &self,
        b: &mut Builder<'_>,
        site: &Site,
        out: usize,
        factors: &Factors,
    ) -> Result<()> {
        let init = if self.start == Start::Random { Init::kaiming(out) } else { Init::Zeros };
        let name = format!("{}.lora_B.bias", site.path);
        let param = b.param_in_group(&name, &[out], init, self.group(true))?;
        let shift = Shift { param, scale: factors.scale, form: factors.form.clone() };
        match b.sites().bias_of(&site.path).filter(|_| factors.mergeable()) {
            Some(bias) => b.patch(bias.id, Patch::Vector(Box::new(shift))),
            None => b.patch(site.id, Patch::Weight(Box::new(shift))),
        }
    }
}

/// A scaled bias of the product: v + s·c, or x·Wᵀ + s·c where the layer has no bias to carry it.
struct Shift {
    param: Param,
    scale: f32,
    /// aLoRA's bias is added where its product is.
    form: At,
}

impl Shift {
    fn vector_added(&self) -> Result<Tensor> {
        Ok(self.param.get().scale(self.scale)?)
    }
}

impl VectorPatch for Shift {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        Ok(v.add(&self.vector_added()?)?)
    }
}

impl WeightPatch for Shift {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        base.dense()
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let mut added = self.vector_added()?;
        if let At::Alora(invoked) = &self.form {
            added = invoked.mask(x, site, cx)?.mul(&added)?;
        }
        Ok(base.forward(x)?.add(&added)?)
    }

    fn mergeable(&self) -> bool {
        false
    }

    fn lacks_bias(&self) -> bool {
        !matches!(self.form, At::Alora(_))
    }
}
