//! Linear layers of small networks that an adapter's file holds.

use engraft_nn::{Builder, Init, Result};
use engraft_tensor::{Param, Tensor};

/// A trained layer x·Wᵀ + b, W [out, in] and b `[out]`.
pub(crate) struct Dense {
    weight: Param,
    bias: Param,
}

impl Dense {
    /// One that starts as PyTorch's: both uniform in ±1/√in.
    pub fn new(b: &mut Builder<'_>, name: &str, (inn, out): (usize, usize)) -> Result<Dense> {
        Dense::starting(b, name, (inn, out), [Init::kaiming(inn), Init::kaiming(inn)])
    }

    /// One that starts so.
    pub fn starting(
        b: &mut Builder<'_>,
        name: &str,
        (inn, out): (usize, usize),
        [weight, bias]: [Init; 2],
    ) -> Result<Dense> {
        Ok(Dense {
            weight: b.param(&format!("{name}.weight"), &[out, inn], weight)?,
            bias: b.param(&format!("{name}.bias"), &[out], bias)?,
        })
    }

    /// x [tokens, in] → [tokens, out].
    pub fn of(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.matmul_t(&self.weight.get())?.plus(&self.bias.get())?)
    }
}
