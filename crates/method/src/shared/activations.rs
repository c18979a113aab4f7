//! The functions in the middle of adapters, under the names that `transformers` has for them.

use engraft_nn::Result;
use engraft_tensor::Tensor;
use engraft_tensor::ops::Unary;

/// A function of every number, and what it is called.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Activation {
    name: &'static str,
    function: Function,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Function {
    Of(Unary),
    Linear,
    /// 0.01·x below zero.
    Leaky,
    /// x·tanh(ln(1 + eˣ)).
    Mish,
    /// max(x, 0)².
    Squared,
    /// min(max(x, 0), 6).
    Six,
    /// min(GELU(x), 10).
    Ten,
    /// ½·(1 + erf((x − μ)/(σ·√2))).
    Laplace,
}

const fn named(name: &'static str, function: Function) -> (&'static str, Activation) {
    (name, Activation { name, function })
}

/// All that have no parameters.
pub(crate) const ACTIVATIONS: &[(&str, Activation)] = &[
    named("relu", Function::Of(Unary::Relu)),
    named("swish", Function::Of(Unary::Silu)),
    named("silu", Function::Of(Unary::Silu)),
    named("gelu", Function::Of(Unary::Gelu)),
    named("gelu_python", Function::Of(Unary::Gelu)),
    named("gelu_10", Function::Ten),
    named("gelu_new", Function::Of(Unary::GeluTanh)),
    named("gelu_fast", Function::Of(Unary::GeluTanh)),
    named("gelu_accurate", Function::Of(Unary::GeluTanh)),
    named("gelu_python_tanh", Function::Of(Unary::GeluTanh)),
    named("gelu_pytorch_tanh", Function::Of(Unary::GeluTanh)),
    named("quick_gelu", Function::Of(Unary::QuickGelu)),
    named("tanh", Function::Of(Unary::Tanh)),
    named("sigmoid", Function::Of(Unary::Sigmoid)),
    named("leakyrelu", Function::Leaky),
    named("leaky_relu", Function::Leaky),
    named("relu2", Function::Squared),
    named("relu6", Function::Six),
    named("mish", Function::Mish),
    named("laplace", Function::Laplace),
    named("linear", Function::Linear),
];

/// Their names, for the settings of a recipe.
pub(crate) const NAMES: &[&str] = &[
    "relu",
    "swish",
    "silu",
    "gelu",
    "gelu_python",
    "gelu_10",
    "gelu_new",
    "gelu_fast",
    "gelu_accurate",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "tanh",
    "sigmoid",
    "leakyrelu",
    "leaky_relu",
    "relu2",
    "relu6",
    "mish",
    "laplace",
    "linear",
];

impl Activation {
    /// max(x, 0).
    pub const RELU: Activation = Activation { name: "relu", function: Function::Of(Unary::Relu) };
    /// x·σ(x).
    pub const SWISH: Activation = Activation { name: "swish", function: Function::Of(Unary::Silu) };
    /// x·Φ(x).
    pub const GELU: Activation = Activation { name: "gelu", function: Function::Of(Unary::Gelu) };

    /// Its name.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The function of every element of x.
    pub fn apply(self, x: Tensor) -> Result<Tensor> {
        Ok(match self.function {
            Function::Of(f) => x.unary(f)?,
            Function::Linear => x,
            Function::Leaky => x.scale(0.01)?.add(&x.unary(Unary::Relu)?.scale(0.99)?)?,
            Function::Squared => x.unary(Unary::Relu)?.unary(Unary::Square)?,
            Function::Six => capped(&x.unary(Unary::Relu)?, 6.0)?,
            Function::Ten => capped(&x.unary(Unary::Gelu)?, 10.0)?,
            // tanh(ln(1 + eˣ)) is (1 − s²)/(1 + s²) with s = σ(−x), which never overflows.
            Function::Mish => {
                let square = x.scale(-1.0)?.unary(Unary::Sigmoid)?.unary(Unary::Square)?;
                let above = square.scale(-1.0)?.unary(Unary::Shift(1.0))?;
                x.mul(&above)?.div(&square.unary(Unary::Shift(1.0))?)?
            }
            Function::Laplace => {
                let (mean, deviation) =
                    (std::f32::consts::FRAC_1_SQRT_2, 0.282_095 * std::f32::consts::SQRT_2);
                let z = x.unary(Unary::Shift(-mean))?.scale(1.0 / deviation)?;
                z.unary(Unary::Erf)?.unary(Unary::Shift(1.0))?.scale(0.5)?
            }
        })
    }
}

/// min(x, most).
fn capped(x: &Tensor, most: f32) -> Result<Tensor> {
    Ok(x.sub(&x.unary(Unary::Shift(-most))?.unary(Unary::Relu)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What PyTorch gives at −3, −0.5, 0.7, 8 and 12.
    #[test]
    fn values() {
        let x = Tensor::from_vec(vec![-3.0, -0.5, 0.7, 8.0, 12.0], [5]).unwrap();
        let expected = [
            ("leakyrelu", [-0.03, -0.005, 0.7, 8.0, 12.0]),
            ("relu2", [0.0, 0.0, 0.49, 64.0, 144.0]),
            ("relu6", [0.0, 0.0, 0.7, 6.0, 6.0]),
            ("gelu_10", [-0.004_049_7, -0.154_268_8, 0.530_625_4, 8.0, 10.0]),
            ("mish", [-0.145_647_5, -0.220_743_8, 0.561_148_3, 7.999_998, 12.0]),
            ("laplace", [0.0, 9.4e-6, 0.489_951, 1.0, 1.0]),
            ("linear", [-3.0, -0.5, 0.7, 8.0, 12.0]),
        ];
        for (name, values) in expected {
            let f = ACTIVATIONS.iter().find(|a| a.0 == name).unwrap().1;
            let y = f.apply(x.clone()).unwrap().to_vec().unwrap();
            for (a, b) in y.iter().zip(values) {
                assert!((a - b).abs() < 2e-5, "{name}: {y:?} instead of {values:?}");
            }
        }
    }

    #[test]
    fn every_name_is_there_once() {
        assert!(ACTIVATIONS.iter().map(|a| a.0).eq(NAMES.iter().copied()));
        assert!(ACTIVATIONS.iter().all(|(name, f)| *name == f.name()));
    }
}
