//! PEANuT: the change of a weight is what a small network makes of the weight itself.
//!
//! W′ = W + s·B·h, h = f(A·W) [r, in]: every column of W goes through A, `depth` hidden layers that narrow nothing, and as many
//! that add what theirs had before: hᵢ₊₁ = f(Eᵢ·hᵢ), then h ← f(Dᵢ·h) + what Eₙ₋ᵢ was given. f is ReLU or another activation.
//! All are Kaiming-uniform noise but B, which starts as zero, so W′ = W.
//! h is made once a pass; rows see thin factors, y = x·Wᵀ + s·(x·hᵀ)·Bᵀ.
//!
//! Zhong et al. 2024, arXiv:2410.01870.
//!
//! `peanut_A.weight` [rank, out], `peanut_encoders.N.weight` and `peanut_decoders.N.weight` [rank, rank],
//! `peanut_B.weight` [out, rank].

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, number};
use crate::shared::activations::{ALL, ALL_NAMES, Activation};
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::matrices;
use crate::{Described, Entry, Info, Loaded, Method, peft};

#[derive(Clone)]
struct Peanut {
    rank: usize,
    depth: usize,
    scaling: f64,
    /// As in the file: several names stand for one function.
    activation: Activation,
    init_weights: bool,
}

static INFO: Info = Info {
    name: "peanut",
    title: "PEANuT",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2410.01870",
    summary: "W′ = W + s·B·f(A·W): the change is a small network's of the weight",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "PEANUT",
    fields: &[
        int("rank", (1, 1024), Some("32"), "Width r of the network."),
        int("depth", (0, 64), Some("0"), "Hidden layers on each side."),
        choice("act_fn", ALL_NAMES, "\"relu\"", "The activation."),
        float("scaling", (0.0, 1e9), "1", "Factor on the change."),
        flag("init_weights", "true", "Start B as zero; otherwise B is drawn too."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, "rank"))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| read(r, "r"))
}

/// Recipes and files differ in one name.
fn read(r: &mut Reader<'_>, rank: &'static str) -> Peanut {
    Peanut {
        rank: r.count(rank, 32, 1 << 16),
        depth: r.whole("depth", 0, 1 << 10),
        scaling: r.float("scaling", 1.0),
        activation: r.one_of("act_fn", ALL),
        init_weights: r.flag("init_weights", true),
    }
}

fn example() -> Box<dyn Method> {
    // Smooth, so that finite differences show the whole gradient.
    Box::new(Peanut { rank: 3, depth: 1, scaling: 1.5, activation: Activation::GELU, init_weights: true })
}

impl Method for Peanut {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let r = self.rank;
        for site in b.targets() {
            let (out, _) = matrices::linear(site, INFO.title)?;
            let name = |end: &str| format!("{}.peanut_{end}.weight", site.path);
            let a = b.param(&name("A"), &[r, out], Init::kaiming(out))?;
            let mut hidden = |part: &str| -> Result<Vec<Param>> {
                (0..self.depth)
                    .map(|i| b.param(&name(&format!("{part}.{i}")), &[r, r], Init::kaiming(r)))
                    .collect()
            };
            let (encoders, decoders) = (hidden("encoders")?, hidden("decoders")?);
            let start = if self.init_weights { Init::Zeros } else { Init::kaiming(r) };
            let network = Network {
                a,
                encoders,
                decoders,
                b: b.param(&name("B"), &[out, r], start)?,
                activation: self.activation,
                scaling: self.scaling as f32,
            };
            b.patch(site.id, Patch::Weight(Box::new(network)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "act_fn": self.activation.name(), "depth": self.depth, "init_weights": self.init_weights, "layers_pattern": null,
            "layers_to_transform": null, "r": self.rank, "scaling": number(self.scaling),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

struct Network {
    a: Param,
    encoders: Vec<Param>,
    decoders: Vec<Param>,
    b: Param,
    activation: Activation,
    scaling: f32,
}

impl Network {
    /// h [rank, in]: the network on the columns of W.
    fn hidden(&self, base: &dyn Base) -> Result<Tensor> {
        let layer = |m: &Param, h: &Tensor| -> Result<Tensor> { self.activation.apply(m.get().matmul(h)?) };
        let mut h = layer(&self.a, &base.dense()?)?;
        let mut before = Vec::with_capacity(self.encoders.len());
        for encoder in &self.encoders {
            let next = layer(encoder, &h)?;
            before.push(h);
            h = next;
        }
        for (decoder, given) in self.decoders.iter().zip(before.iter().rev()) {
            h = layer(decoder, &h)?.add(given)?;
        }
        Ok(h)
    }
}

impl WeightPatch for Network {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.b.get().matmul(&self.hidden(base)?)?.scale(self.scaling)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        Ok(base.forward(x)?.add_low_rank(x, &self.hidden(base)?, &self.b.get(), self.scaling)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn the_change_is_made_from_the_weight() {
        let x = sample(&[5, 6], 3);
        for depth in [0, 1, 2] {
            let a = attached(&[chosen("peanut", json!({ "rank": 2, "depth": depth, "scaling": 0.5 }))], &[]);
            assert_eq!(a.adapter.trained_count(), 2 * (2 * 2 * 6 + 2 * 2 * 4 + 2 * depth * 2 * 4));
            close(
                &both_ways(&a, "layers.0.attn.q", &x).0,
                &x.matmul_t(&frozen("layers.0.attn.q")).unwrap(),
                1e-6,
            );
            stir(&a, 0.5);
            let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
            close(&fast, &defined, 1e-5);
            if depth == 0 {
                let get = |end: &str| {
                    let name = format!("layers.0.attn.q.peanut_{end}.weight");
                    a.adapter.params().iter().find(|p| p.name == name).unwrap().param.value()
                };
                let w = frozen("layers.0.attn.q");
                let h = get("A").matmul(&w).unwrap().unary(engraft_tensor::ops::Unary::Relu).unwrap();
                let change = get("B").matmul(&h).unwrap().scale(0.5).unwrap();
                close(&fast, &x.matmul_t(&w.add(&change).unwrap()).unwrap(), 1e-5);
            }
        }
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({}),
            json!({ "rank": 3, "depth": 2, "act_fn": "swish", "scaling": 0.5 }),
            json!({ "rank": 3, "act_fn": "gelu", "init_weights": false }),
            json!({ "rank": 3, "act_fn": "mish", "depth": 1 }),
        ] {
            survives_saving(&[chosen("peanut", settings)], &["head"]);
        }
        let good = config(&[chosen("peanut", json!({ "act_fn": "swish" }))], &[]);
        assert_eq!(good["act_fn"], json!("swish"), "the name stays, though silu is the same");
        assert!(from_file(&with(good, json!({ "act_fn": "maxout" }))).is_err());
    }
}
