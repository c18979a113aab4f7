//! What adapters of several methods are made of: W_u·σ(W_d·x + b_d) + b_u, without a residual, and norms of their own.

use engraft_nn::{Builder, Init, Result};
use engraft_tensor::ops::layer_norm;
use engraft_tensor::{Param, Tensor};

use crate::shared::activations::Activation;

/// PyTorch's default for a layer norm.
const NORM_EPS: f32 = 1e-5;
/// Widest bottleneck.
pub(crate) const SIZE_MAX: usize = 1 << 16;

/// W_d [size, width], b_d `[size]`, W_u [width, size], b_u `[width]`.
pub(crate) struct Branch {
    down: Param,
    down_bias: Param,
    up: Param,
    up_bias: Param,
}

impl Branch {
    /// One whose tensors are `stem.down.weight` and so on; `starts` are those of W_d and W_u, biases start as zero.
    pub fn build(
        b: &mut Builder<'_>,
        stem: &str,
        (width, size): (usize, usize),
        [down, up]: [Init; 2],
    ) -> Result<Branch> {
        Ok(Branch {
            down: b.param(&format!("{stem}.down.weight"), &[size, width], down)?,
            down_bias: b.param(&format!("{stem}.down.bias"), &[size], Init::Zeros)?,
            up: b.param(&format!("{stem}.up.weight"), &[width, size], up)?,
            up_bias: b.param(&format!("{stem}.up.bias"), &[width], Init::Zeros)?,
        })
    }

    /// σ(W_d·x + b_d).
    pub fn middle(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        activation.apply(x.matmul_t(&self.down.get())?.plus(&self.down_bias.get())?)
    }

    /// W_u·x + b_u.
    pub fn up(&self, middle: &Tensor) -> Result<Tensor> {
        Ok(middle.matmul_t(&self.up.get())?.plus(&self.up_bias.get())?)
    }
}

/// Glorot-uniform starts of W_d and W_u.
pub(crate) fn glorot(width: usize, size: usize) -> [Init; 2] {
    let start = Init::Uniform((6.0 / (width + size) as f32).sqrt());
    [start.clone(), start]
}

/// W_d Kaiming-uniform, W_u zero: no change at first.
pub(crate) fn zero_up(width: usize) -> [Init; 2] {
    [Init::kaiming(width), Init::Zeros]
}

/// A trained layer norm.
pub(crate) struct Norm {
    gain: Param,
    bias: Param,
}

impl Norm {
    /// One of `width`, saved as `name`.
    pub fn build(b: &mut Builder<'_>, name: &str, width: usize) -> Result<Norm> {
        let gain = b.param(&format!("{name}.weight"), &[width], Init::Ones)?;
        Ok(Norm { gain, bias: b.param(&format!("{name}.bias"), &[width], Init::Zeros)? })
    }

    /// The normed rows of x.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(layer_norm(x, &self.gain.get(), &self.bias.get(), NORM_EPS)?)
    }
}
