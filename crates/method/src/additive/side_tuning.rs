//! Side-tuning: a small network of its own beside the frozen model, and a learnt share of each.
//!
//! R(x) = α·B(x) + (1 − α)·S(x), α = σ(a). B is the output of the last block, S a perceptron on what the first block reads, the
//! embedded tokens (or patches): S(x) = W_n·σ(… σ(W₁·x + b₁) …) + b_n; what the model has behind its blocks reads R. a starts at 0,
//! so that α is ½ and a new adapter changes the model; W and b start uniform in ±1/√in. With a → ∞ the base is back.
//!
//! Zhang et al. 2020, arXiv:1912.13503, section 3. The paper leaves S open; its own are smaller networks of the base's kind. One
//! that reads a token at a time needs no cache where text is written. Of an encoder–decoder model it lies beside the decoder.
//!
//! All names begin with `side.`. alpha `[1]`; i.weight [out, in] and i.bias of layer i, from 0: width → hidden → … → width.

use engraft_nn::{Builder, Init, Pass, Result};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::beside::{self, Side, mixed};
use crate::shared::dense::Dense;
use crate::shared::fields::{choice, int};
use crate::{Described, Entry, Info, Loaded, Method, peft};

const MAX: usize = 1 << 16;

/// The first is the default.
const ACTIVATIONS: &[(&str, Unary)] =
    &[("relu", Unary::Relu), ("gelu", Unary::Gelu), ("swish", Unary::Silu), ("tanh", Unary::Tanh)];

#[derive(Clone, Debug)]
struct SideTuning {
    hidden: usize,
    layers: usize,
    activation: Unary,
}

static INFO: Info = Info {
    name: "side_tuning",
    title: "Side-tuning",
    class: "additive",
    sites: "block",
    paper: "arXiv:1912.13503",
    summary: "R = α·B + (1 − α)·S, B the base's last output, S a perceptron on its first input; backward does not enter the base",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_SIDE_TUNING",
    fields: &[
        int("hidden", (1, MAX as i64), Some("256"), "Width inside the side network."),
        int("depth", (1, 64), Some("2"), "Matrices of the side network."),
        choice(
            "activation",
            &["relu", "gelu", "swish", "tanh"],
            "\"relu\"",
            "Function between its matrices.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> SideTuning {
    SideTuning {
        hidden: r.count("hidden", 256, MAX),
        layers: r.count("depth", 2, 64),
        activation: r.one_of("activation", ACTIVATIONS),
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn example() -> Box<dyn Method> {
    Box::new(SideTuning { hidden: 5, layers: 3, activation: Unary::Gelu })
}

impl Method for SideTuning {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("1 + hidden·(d + 1) + (depth − 2)·hidden·(hidden + 1) + d·(hidden + 1)")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let (blocks, width) = beside::blocks(b)?;
        let layer = |i: usize, b: &mut Builder<'_>| {
            let size = |end: bool| if end { width } else { self.hidden };
            Dense::new(b, &format!("side.{i}"), (size(i == 0), size(i + 1 == self.layers)))
        };
        let perceptron = Perceptron {
            layers: (0..self.layers).map(|i| layer(i, b)).collect::<Result<_>>()?,
            alpha: b.param("side.alpha", &[1], Init::Zeros)?,
            activation: self.activation,
        };
        beside::attach(b, perceptron, &blocks, |_| false)
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "activation": ACTIVATIONS.iter().find(|(_, f)| *f == self.activation).map(|(name, _)| *name),
            "hidden": self.hidden, "depth": self.layers,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// S and its share.
struct Perceptron {
    layers: Vec<Dense>,
    alpha: Param,
    activation: Unary,
}

impl Side for Perceptron {
    fn start(&self, x: &Tensor) -> Result<Tensor> {
        let mut s = x.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            s = layer.of(&if i == 0 { s } else { s.unary(self.activation)? })?;
        }
        Ok(s)
    }

    fn step(&self, state: Tensor, _number: usize, _out: &Tensor, _cx: &Pass) -> Result<Tensor> {
        Ok(state)
    }

    fn end(&self, state: Tensor, out: &Tensor) -> Result<Tensor> {
        mixed(out, &state, &self.alpha.get().unary(Unary::Sigmoid)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Layout, Patch};
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn the_share_goes_from_the_base_to_the_side_network() {
        let a = attached(&[chosen("side_tuning", json!({ "hidden": 4, "depth": 3 }))], &[]);
        let (d, h) = (6, 4);
        assert_eq!(a.adapter.trained_count(), 1 + h * (d + 1) + h * (h + 1) + d * (h + 1));
        let (sites, _) = toy();
        let run = |alpha: f32, factor: f32| {
            param(&a.adapter, "side.alpha").set(Tensor::full(alpha, [1])).unwrap();
            let cx = Pass::new(Layout::counted(&[3, 2]).unwrap(), None);
            let mut h = sample(&[5, 6], 1);
            for path in ["layers.0", "layers.1"] {
                let site = sites.get(site_id(&sites, path));
                let [Patch::Block(patch)] = a.adapter.at(site.id) else { panic!() };
                h = patch.around(&h, &|x: &Tensor, _: &Pass| Ok(x.scale(factor)?), site, &cx).unwrap();
            }
            h
        };
        let (base, side) = (sample(&[5, 6], 1).scale(4.0).unwrap(), run(-100.0, 2.0));
        close(&run(100.0, 2.0), &base, 1e-5);
        close(&side, &run(-100.0, 3.0), 1e-6);
        close(&run(0.0, 2.0), &base.add(&side).unwrap().scale(0.5).unwrap(), 1e-6);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("side_tuning", json!({ "hidden": 3, "activation": "tanh" }))], &["head"]);
        survives_saving(&[chosen("side_tuning", json!({ "depth": 1 }))], &[]);
        let settings = |text: Value| (ENTRY.from_settings)(text.as_object().unwrap());
        assert!(settings(json!({ "depth": 0 })).is_err());
        assert!(from_file(&json!({ "peft_type": "ENGRAFT_SIDE_TUNING", "odd": 1 })).is_err());
    }
}
