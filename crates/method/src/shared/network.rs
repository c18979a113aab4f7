//! Small networks that are trained in place of what an adapter's file holds: their output.
//!
//! A layer is y = x·Wᵀ + b, W [out, in] and b `[out]` uniform in ±1/√in. A recurrent layer reads its rows in both directions,
//! outputs side by side; its tensors are uniform in ±1/√hidden. Names and starts are PyTorch's.

use engraft_nn::{Builder, Error, Init, Result};
use engraft_tensor::ops::lstm;
use engraft_tensor::{Param, Tensor, ops::cat};

use crate::Named;

/// A tensor by its name in the network.
pub(crate) type Lookup<'a> = dyn Fn(&str) -> Result<Tensor> + 'a;

/// A tensor of a network: name, sizes, start.
pub(crate) struct Part(String, Vec<usize>, Init);

impl Part {
    /// Rows N(0, 1), as PyTorch's embeddings start.
    pub fn embedding(name: &str, rows: usize, width: usize) -> Vec<Part> {
        vec![Part(format!("{name}.weight"), vec![rows, width], Init::Normal(1.0))]
    }

    /// A layer from `inn` to `out` numbers.
    pub fn layer(name: &str, (inn, out): (usize, usize)) -> Vec<Part> {
        vec![
            Part(format!("{name}.weight"), vec![out, inn], Init::kaiming(inn)),
            Part(format!("{name}.bias"), vec![out], Init::kaiming(inn)),
        ]
    }

    /// The same tensors, started as zeros.
    pub fn zeros(parts: Vec<Part>) -> Vec<Part> {
        parts.into_iter().map(|Part(name, sizes, _)| Part(name, sizes, Init::Zeros)).collect()
    }

    /// Recurrent layers one after another, the first of rows of `inn` numbers, each of `hidden` a direction.
    pub fn recurrent(name: &str, inn: usize, hidden: usize, layers: usize) -> Vec<Part> {
        let part = |layer: usize, kind: &str, direction: &str, sizes: &[usize]| {
            let name = format!("{name}.{kind}_l{layer}{direction}");
            Part(name, sizes.to_vec(), Init::kaiming(hidden))
        };
        let mut parts = Vec::new();
        for layer in 0..layers {
            let inn = if layer == 0 { inn } else { 2 * hidden };
            for direction in DIRECTIONS {
                parts.push(part(layer, "weight_ih", direction, &[4 * hidden, inn]));
                parts.push(part(layer, "weight_hh", direction, &[4 * hidden, hidden]));
                parts.push(part(layer, "bias_ih", direction, &[4 * hidden]));
                parts.push(part(layer, "bias_hh", direction, &[4 * hidden]));
            }
        }
        parts
    }
}

const DIRECTIONS: [&str; 2] = ["", "_reverse"];

/// The trained tensors of a network, which the adapter's file does not hold.
pub(crate) struct Network(Vec<(String, Param)>);

impl Network {
    /// New tensors.
    pub fn new(b: &mut Builder<'_>, parts: Vec<Part>) -> Result<Network> {
        let tensor = |Part(name, sizes, init)| {
            let param = b.working(&name, &sizes, init, "")?;
            Ok((name, param))
        };
        Ok(Network(parts.into_iter().map(tensor).collect::<Result<_>>()?))
    }

    /// A tensor as training sees it.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let found = self.0.iter().find(|(own, _)| own == name);
        found.map(|(_, param)| param.get()).ok_or_else(|| missing(name))
    }
}

/// A tensor among those of an adapter.
pub(crate) fn named(tensors: &Named) -> impl Fn(&str) -> Result<Tensor> + '_ {
    |name| {
        let found = tensors.iter().find(|(own, _)| own == name);
        found.map(|(_, tensor)| tensor.clone()).ok_or_else(|| missing(name))
    }
}

fn missing(name: &str) -> Error {
    Error::Unsupported(format!("the adapter has no tensor `{name}`"))
}

/// x [rows, in] → x·Wᵀ + b [rows, out] of the layer `name`.
pub(crate) fn layer(get: &Lookup<'_>, name: &str, x: &Tensor) -> Result<Tensor> {
    Ok(x.matmul_t(&get(&format!("{name}.weight"))?)?.plus(&get(&format!("{name}.bias"))?)?)
}

/// x [steps, in] → [steps, 2·hidden] of recurrent layer `number`.
pub(crate) fn recurrent(get: &Lookup<'_>, name: &str, number: usize, x: &Tensor) -> Result<Tensor> {
    let order: Vec<i64> = (0..x.dim(0) as i64).rev().collect();
    let reversed = Tensor::from_i64(order, [x.dim(0)])?;
    let direction = |direction: &str| -> Result<Tensor> {
        let get = |kind: &str| get(&format!("{name}.{kind}_l{number}{direction}"));
        let x = if direction.is_empty() { x.clone() } else { x.gather(&reversed)? };
        let z = x.matmul_t(&get("weight_ih")?)?.plus(&get("bias_ih")?)?.plus(&get("bias_hh")?)?;
        let h = lstm(&z, &get("weight_hh")?)?;
        Ok(if direction.is_empty() { h } else { h.gather(&reversed)? })
    };
    let [forward, backward] = DIRECTIONS.map(direction);
    Ok(cat(&[&forward?, &backward?], 1)?)
}
