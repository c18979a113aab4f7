//! Biases: the product's own, and those of the model that are trained along.

use engraft_nn::{Base, Builder, Init, Kind, Pass, Patch, Result, Site, VectorPatch, WeightPatch};
use engraft_tensor::{Param, Tensor};

use super::{Biases, Lora, Start};

impl Lora {
    /// s·(B·A·x + c) = s·B·A·x + s·c: the second part belongs to the layer's bias, or to the output where there is none.
    pub(super) fn attach_product_bias(
        &self,
        b: &mut Builder<'_>,
        site: &Site,
        out: usize,
        scale: f32,
    ) -> Result<()> {
        let init = if self.start == Start::Random { Init::kaiming(out) } else { Init::Zeros };
        let name = format!("{}.lora_B.bias", site.path);
        let param = b.param_in_group(&name, &[out], init, self.group(true))?;
        match b.sites().bias_of(&site.path) {
            Some(bias) => b.patch(bias.id, Patch::Vector(Box::new(Shift { param, scale }))),
            None => b.patch(site.id, Patch::Weight(Box::new(Shift { param, scale }))),
        }
    }

    /// `bias = "all"` trains every vector called `bias`, `"lora_only"` those of the targets.
    pub(super) fn attach_biases(&self, b: &mut Builder<'_>) -> Result<()> {
        let targets: Vec<&str> = b.targets().iter().map(|s| s.path.as_str()).collect();
        let sites = b.sites();
        for site in sites.of_kind(|k| matches!(k, Kind::Vector { .. })) {
            let Some(module) = site.path.strip_suffix(".bias") else { continue };
            let of_target = targets.contains(&module);
            let wanted = self.bias == Biases::All || self.bias == Biases::OfTargets && of_target;
            if wanted && !b.replaced(site.id) {
                // peft moves the layers it changes one level down.
                let name = if of_target { format!("{module}.base_layer.bias") } else { site.path.clone() };
                b.replace_as(site.id, &name)?;
            }
        }
        Ok(())
    }
}

/// A scaled bias of the product: v + s·c, or x·Wᵀ + s·c where the layer has no bias to carry it.
struct Shift {
    param: Param,
    scale: f32,
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

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        Ok(base.forward(x)?.add(&self.vector_added()?)?)
    }

    fn mergeable(&self) -> bool {
        false
    }
}
