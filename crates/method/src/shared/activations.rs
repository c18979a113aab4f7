//! The functions in the middle of adapters, under the names that `transformers` has for them (`ACT2FN`).
//!
//! `prelu` and `xielu` have numbers that are trained where a model has them; a method that looks one up by name gets a new
//! one each time, whose numbers are those it starts with.

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
    /// x above 0, so many times x below.
    Leaky(f32),
    /// The first one, kept within [lowest, highest].
    Clipped(Unary, f32, f32),
    /// x kept within [0, 6].
    Relu6,
    /// x·relu6(x + 3)/6.
    HardSwish,
    /// max(x, 0)².
    SquaredRelu,
    /// ln(1 + eˣ), its root taken.
    SqrtSoftplus,
    /// x·tanh ln(1 + eˣ).
    Mish,
    /// ½ + ½·erf((x − μ)/(σ·√2)), μ and σ those of a squared ReLU's bend (MEGA).
    Laplace,
    /// a·x² + ½x above 0, b·(eˣ − 1 − x) + ½x below (arXiv:2411.13010).
    XIelu,
}

const fn named(name: &'static str, function: Function) -> (&'static str, Activation) {
    (name, Activation { name, function })
}

/// All names; last the two whose numbers a model would train.
pub(crate) const ALL: &[(&str, Activation)] = &[
    named("relu", Function::Of(Unary::Relu)),
    named("silu", Function::Of(Unary::Silu)),
    named("swish", Function::Of(Unary::Silu)),
    named("gelu", Function::Of(Unary::Gelu)),
    named("gelu_python", Function::Of(Unary::Gelu)),
    named("gelu_new", Function::Of(Unary::GeluTanh)),
    named("gelu_fast", Function::Of(Unary::GeluTanh)),
    named("gelu_accurate", Function::Of(Unary::GeluTanh)),
    named("gelu_pytorch_tanh", Function::Of(Unary::GeluTanh)),
    named("gelu_python_tanh", Function::Of(Unary::GeluTanh)),
    named("gelu_10", Function::Clipped(Unary::Gelu, -10.0, 10.0)),
    named("quick_gelu", Function::Of(Unary::QuickGelu)),
    named("sigmoid", Function::Of(Unary::Sigmoid)),
    named("tanh", Function::Of(Unary::Tanh)),
    named("leakyrelu", Function::Leaky(0.01)),
    named("leaky_relu", Function::Leaky(0.01)),
    named("relu6", Function::Relu6),
    named("relu2", Function::SquaredRelu),
    named("hardswish", Function::HardSwish),
    named("mish", Function::Mish),
    named("sqrtsoftplus", Function::SqrtSoftplus),
    named("laplace", Function::Laplace),
    named("linear", Function::Linear),
    named("prelu", Function::Leaky(0.25)),
    named("xielu", Function::XIelu),
];

/// All that have no numbers of their own.
pub(crate) const ACTIVATIONS: &[(&str, Activation)] = ALL.split_at(ALL.len() - 2).0;

/// The names of [`ALL`], for the settings of a recipe.
pub(crate) const ALL_NAMES: &[&str] = &names();

/// The names of [`ACTIVATIONS`].
pub(crate) const NAMES: &[&str] = ALL_NAMES.split_at(ACTIVATIONS.len()).0;

const fn names() -> [&'static str; ALL.len()] {
    let mut names = [""; ALL.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = ALL[i].0;
        i += 1;
    }
    names
}

impl Activation {
    /// max(x, 0).
    pub const TANH: Activation = Activation { name: "tanh", function: Function::Of(Unary::Tanh) };
    pub const RELU: Activation = Activation { name: "relu", function: Function::Of(Unary::Relu) };
    /// x·σ(x).
    pub const SWISH: Activation = Activation { name: "swish", function: Function::Of(Unary::Silu) };
    /// x·Φ(x).
    pub const GELU: Activation = Activation { name: "gelu", function: Function::Of(Unary::Gelu) };

    /// x·Φ(x), by the tanh.
    pub const GELU_NEW: Activation = Activation { name: "gelu_new", function: Function::Of(Unary::GeluTanh) };

    /// Its name.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The function of every element of x.
    pub fn apply(self, x: Tensor) -> Result<Tensor> {
        Ok(match self.function {
            Function::Of(f) => x.unary(f)?,
            Function::Linear => x,
            Function::Leaky(below) => x.scale(below)?.add(&x.unary(Unary::Relu)?.scale(1.0 - below)?)?,
            Function::Clipped(f, lowest, highest) => within(&x.unary(f)?, lowest, highest)?,
            Function::Relu6 => within(&x, 0.0, 6.0)?,
            Function::HardSwish => {
                x.mul(&within(&x.unary(Unary::Shift(3.0))?, 0.0, 6.0)?)?.scale(1.0 / 6.0)?
            }
            Function::SquaredRelu => x.unary(Unary::Relu)?.unary(Unary::Square)?,
            Function::SqrtSoftplus => softplus(&x)?.unary(Unary::Sqrt)?,
            Function::Mish => x.mul(&softplus(&x)?.unary(Unary::Tanh)?)?,
            Function::Laplace => {
                let [mean, deviation] = [0.5f32.sqrt(), 0.282_095];
                let z = x.unary(Unary::Shift(-mean))?.scale(1.0 / (deviation * std::f32::consts::SQRT_2))?;
                z.unary(Unary::Erf)?.scale(0.5)?.unary(Unary::Shift(0.5))?
            }
            Function::XIelu => {
                // What `transformers` makes of its starting numbers, which it holds in bf16.
                let (a, b) = (0.800_781_25, 0.800_781_25);
                let above = x.unary(Unary::Relu)?.unary(Unary::Square)?.scale(a)?;
                let below = x.scale(-1.0)?.unary(Unary::Relu)?.scale(-1.0)?;
                let bent = below.unary(Unary::Exp)?.unary(Unary::Shift(-1.0))?.sub(&below)?.scale(b)?;
                above.add(&bent)?.add(&x.scale(0.5)?)?
            }
        })
    }
}

/// x kept within [lowest, highest].
fn within(x: &Tensor, lowest: f32, highest: f32) -> Result<Tensor> {
    let above = x.unary(Unary::Shift(-lowest))?.unary(Unary::Relu)?;
    let beyond = x.unary(Unary::Shift(-highest))?.unary(Unary::Relu)?;
    Ok(above.sub(&beyond)?.unary(Unary::Shift(lowest))?)
}

/// ln(1 + eˣ) = max(x, 0) + ln(1 + e^−|x|).
fn softplus(x: &Tensor) -> Result<Tensor> {
    let small = x.unary(Unary::Abs)?.scale(-1.0)?.unary(Unary::Exp)?;
    Ok(x.unary(Unary::Relu)?.add(&small.unary(Unary::Shift(1.0))?.unary(Unary::Log)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_tensor::testing::check_gradients;

    #[test]
    fn values_are_those_of_transformers() {
        let at = [-4.0f32, -1.0, -0.3, 0.0, 0.5, 2.0, 7.0];
        let x = Tensor::from_vec(at.to_vec(), [7]).unwrap();
        for (name, expected) in [
            ("gelu_python", [-0.000_126_7, -0.158_655_3, -0.114_626_6, 0.0, 0.345_731_2, 1.954_499_7, 7.0]),
            ("gelu_fast", [-0.000_070_2, -0.158_808, -0.114_629_1, 0.0, 0.345_714, 1.954_597_7, 7.0]),
            ("gelu_accurate", [-0.000_070_2, -0.158_808, -0.114_629_1, 0.0, 0.345_714, 1.954_597_7, 7.0]),
            ("gelu_python_tanh", [-0.000_070_2, -0.158_808, -0.114_629_1, 0.0, 0.345_714, 1.954_597_7, 7.0]),
            ("gelu_10", [-0.000_126_7, -0.158_655_3, -0.114_626_6, 0.0, 0.345_731_2, 1.9545, 7.0]),
            ("leaky_relu", [-0.04, -0.01, -0.003, 0.0, 0.5, 2.0, 7.0]),
            ("prelu", [-1.0, -0.25, -0.075, 0.0, 0.5, 2.0, 7.0]),
            ("relu6", [0.0, 0.0, 0.0, 0.0, 0.5, 2.0, 6.0]),
            ("relu2", [0.0, 0.0, 0.0, 0.0, 0.25, 4.0, 49.0]),
            ("hardswish", [0.0, -0.333_333_3, -0.135, 0.0, 0.291_666_7, 1.666_666_6, 7.0]),
            ("mish", [-0.072_591_8, -0.303_401_4, -0.151_133_2, 0.0, 0.375_245_2, 1.943_959, 6.999_988_6]),
            (
                "sqrtsoftplus",
                [0.134_721_7, 0.559_697_9, 0.744_550_4, 0.832_554_6, 0.986_953_4, 1.458_399_2, 2.645_923_6],
            ),
            ("laplace", [0.0, 0.0, 0.000_178_4, 0.006_094_5, 0.231_421_1, 0.999_997_7, 1.0]),
            (
                "xielu",
                [0.417_010_5, -0.205_409, -0.117_313_5, -0.000_000_8, 0.450_195_3, 4.203_125, 42.738_28],
            ),
            ("linear", [-4.0, -1.0, -0.3, 0.0, 0.5, 2.0, 7.0]),
            (
                "quick_gelu",
                [-0.004_414_7, -0.154_204_2, -0.112_515_9, 0.0, 0.350_388_4, 1.935_658_6, 6.999_953_3],
            ),
            ("silu", [-0.071_944_8, -0.268_941_4, -0.127_667_2, 0.0, 0.311_229_7, 1.761_594, 6.993_623]),
        ] {
            let f = ALL.iter().find(|(known, _)| *known == name).unwrap().1;
            let found = f.apply(x.clone()).unwrap().to_vec().unwrap();
            for (a, b) in found.iter().zip(expected) {
                assert!(
                    (a - b).abs() <= 3e-6 * b.abs().max(1.0),
                    "{name}: {found:?} instead of {expected:?}"
                );
            }
        }
        assert!(ALL.iter().all(|(name, f)| *name == f.name()));
        assert!(!NAMES.contains(&"prelu") && NAMES.contains(&"linear") && ALL_NAMES.contains(&"xielu"));
    }

    #[test]
    fn gradients_are_finite_differences() {
        // Off the bends.
        let x = Tensor::from_vec(vec![-3.6, -0.7, -0.21, 0.37, 1.3, 6.9, 11.0], [7]).unwrap();
        for (name, f) in ALL {
            let y = |v: &[Tensor]| {
                f.apply(v[0].clone()).map_err(|e| engraft_tensor::Error::Backward(e.to_string()))
            };
            check_gradients(std::slice::from_ref(&x), y).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
}
