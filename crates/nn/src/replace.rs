//! A tensor trained as a whole: `peft`'s `modules_to_save`, heads, and the dense change of full fine-tuning.

use engraft_tensor::{Param, Tensor};

use crate::{Base, Result, VectorPatch, WeightPatch};

/// W′ = P and v′ = P, with P starting as the frozen value.
pub struct Replacement(pub Param);

impl WeightPatch for Replacement {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let p = self.0.get();
        if p.shape().len() == 2 {
            return Ok(p);
        }
        // A convolution's P has the shape of the file.
        let (rows, width) = base.shape();
        Ok(p.reshape([rows, width])?)
    }
}

/// v′ = 0: a bias that is left out.
pub struct LeftOut;

impl VectorPatch for LeftOut {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        Ok(Tensor::zeros(v.shape()))
    }
}

impl VectorPatch for Replacement {
    fn vector(&self, _v: &Tensor) -> Result<Tensor> {
        Ok(self.0.get())
    }
}
