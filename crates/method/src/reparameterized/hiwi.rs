//! HiWi: a bottleneck that works on the model's own numbers, biases or rows of weights, instead of on what passes them.
//!
//! b′ = b + U·f(D·b), or W′ = W + f(W·Dᵀ)·Uᵀ, which does the same to every row of W. f is an activation. D starts as
//! Kaiming-uniform noise, U as zero, so nothing changes. Once merged nothing of D and U is left: with biases an adapter costs
//! one new vector a layer, whatever r.
//! Rows see a changed W as y = x·Wᵀ + (x·U)·f(D·Wᵀ), thin products all of them.
//!
//! Liao, Meng and Monz 2023, arXiv:2305.16742.
//!
//! `hiwi_down.weight` [rank, n] and `hiwi_up.weight` [n, rank] in the layer's module, n the length of the bias or of a row.

use engraft_nn::{Base, Builder, Error, Init, Pass, Patch, Result, Role, Site, VectorPatch, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{choice, int};
use crate::shared::matrices;
use crate::shared::sizes;
use crate::{Described, Entry, Info, Loaded, Method, peft};

#[derive(Clone, Copy)]
struct Hiwi {
    rank: usize,
    of: Of,
    activation: Unary,
}

/// What the bottleneck works on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Of {
    Bias,
    Weight,
}

const PLACES: &[(&str, Of)] = &[("bias", Of::Bias), ("weight", Of::Weight)];
const ACTIVATIONS: &[(&str, Unary)] =
    &[("relu", Unary::Relu), ("gelu", Unary::Gelu), ("silu", Unary::Silu), ("tanh", Unary::Tanh)];

static INFO: Info = Info {
    name: "hiwi",
    title: "HiWi",
    class: "reparameterized",
    sites: "weight, vector",
    paper: "arXiv:2305.16742",
    summary: "b′ = b + U·f(D·b): a bottleneck on biases, or on the rows of weights",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Up, Role::Down]),
    peft_type: "ENGRAFT_HIWI",
    fields: &[
        int("rank", (1, 4096), Some("16"), "Width r of the bottleneck."),
        choice(
            "of",
            &["bias", "weight"],
            "\"bias\"",
            "What it works on: the biases of the targets, or the rows of their weights.",
        ),
        choice(
            "activation",
            &["relu", "gelu", "silu", "tanh"],
            "\"relu\"",
            "The activation between the two matrices.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

/// The keys, which are the same in recipes and files.
fn read(r: &mut Reader<'_>) -> Hiwi {
    Hiwi {
        rank: r.count("rank", 16, 1 << 16),
        of: r.one_of("of", PLACES),
        activation: r.one_of("activation", ACTIVATIONS),
    }
}

fn example() -> Box<dyn Method> {
    // Weights are everywhere, and tanh is smooth, so that finite differences show the whole gradient.
    Box::new(Hiwi { rank: 3, of: Of::Weight, activation: Unary::Tanh })
}

impl Method for Hiwi {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let read = |(out, inn)| if self.of == Of::Bias { out } else { inn };
        sizes::beyond(targets, "rank", |_| self.rank, read, "a bottleneck is no wider than what it reads")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let mut without = Vec::new();
        for site in b.targets() {
            let (out, inn) = matrices::linear(site, INFO.title)?;
            match (self.of, b.sites().bias_of(&site.path)) {
                (Of::Bias, None) => without.push(site.path.as_str()),
                (Of::Bias, Some(bias)) => {
                    let bottleneck = self.bottleneck(b, site, out)?;
                    b.patch(bias.id, Patch::Vector(Box::new(bottleneck)))?;
                }
                (Of::Weight, _) => {
                    let bottleneck = self.bottleneck(b, site, inn)?;
                    b.patch(site.id, Patch::Weight(Box::new(bottleneck)))?;
                }
            }
        }
        match without.first() {
            None => Ok(()),
            Some(path) => Err(Error::Unsupported(format!(
                "HiWi works on biases, and {} of its targets have none, {path} among them; set `of` to \"weight\", or choose targets \
                 that have one",
                without.len()
            ))),
        }
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let place = PLACES.iter().find(|p| p.1 == self.of).map_or("", |p| p.0);
        let activation = ACTIVATIONS.iter().find(|a| a.1 == self.activation).map_or("", |a| a.0);
        let own = json!({ "activation": activation, "of": place, "rank": self.rank });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Hiwi {
    fn bottleneck(&self, b: &mut Builder<'_>, site: &Site, n: usize) -> Result<Bottleneck> {
        let name = |end: &str| format!("{}.hiwi_{end}.weight", site.path);
        Ok(Bottleneck {
            down: b.param(&name("down"), &[self.rank, n], Init::kaiming(n))?,
            up: b.param(&name("up"), &[n, self.rank], Init::Zeros)?,
            activation: self.activation,
        })
    }
}

struct Bottleneck {
    down: Param,
    up: Param,
    activation: Unary,
}

impl Bottleneck {
    /// rows + f(rows·Dᵀ)·Uᵀ.
    fn rows(&self, rows: &Tensor) -> Result<Tensor> {
        let hidden = rows.matmul_t(&self.down.get())?.unary(self.activation)?;
        Ok(rows.add(&hidden.matmul_t(&self.up.get())?)?)
    }
}

impl VectorPatch for Bottleneck {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        Ok(self.rows(&v.reshape([1, v.len()])?)?.reshape([v.len()])?)
    }
}

impl WeightPatch for Bottleneck {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        self.rows(&base.dense()?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        // f(D·Wᵀ) [rank, out]: the rows of D are multiplied as any others.
        let hidden = base.forward(&self.down.get())?.unary(self.activation)?;
        Ok(base.forward(x)?.add_low_rank(x, &self.up.get().t()?, &hidden.t()?, 1.0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn biases_and_rows_go_through_the_bottleneck() {
        let down = || Some(engraft_nn::Targets::roles(&[Role::Down]));
        let a = attached(&[(chosen("hiwi", json!({ "rank": 3 })).0, down())], &[]);
        assert_eq!(
            names(&a)[..2],
            ["layers.0.mlp.down.hiwi_down.weight", "layers.0.mlp.down.hiwi_up.weight"]
        );
        assert_eq!(a.adapter.trained_count(), 2 * 2 * 3 * 6);
        let bias = frozen("layers.0.mlp.down.bias");
        close(&vector(&a, "layers.0.mlp.down.bias"), &bias, 0.0);
        stir(&a, 0.5);
        let get = |number: usize| a.adapter.params()[number].param.value();
        let hidden = get(0).matmul(&bias.reshape([6, 1]).unwrap()).unwrap().unary(Unary::Relu).unwrap();
        let expected = bias.add(&get(1).matmul(&hidden).unwrap().reshape([6]).unwrap()).unwrap();
        close(&vector(&a, "layers.0.mlp.down.bias"), &expected, 1e-6);

        let settings = json!({ "rank": 3, "of": "weight", "activation": "gelu" });
        let a = attached(&[(chosen("hiwi", settings).0, down())], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * 2 * 3 * 8);
        let x = sample(&[5, 8], 3);
        close(
            &both_ways(&a, "layers.0.mlp.down", &x).0,
            &x.matmul_t(&frozen("layers.0.mlp.down")).unwrap(),
            1e-6,
        );
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, "layers.0.mlp.down", &x);
        close(&fast, &defined, 1e-5);
    }

    #[test]
    fn configurations() {
        let down = || Some(engraft_nn::Targets::roles(&[Role::Down]));
        for settings in [json!({}), json!({ "rank": 3, "of": "weight", "activation": "silu" })] {
            survives_saving(&[(chosen("hiwi", settings).0, down())], &["head"]);
        }
        let (sites, info) = toy();
        let values = [(chosen("hiwi", json!({})).0, Some(engraft_nn::Targets::roles(&[Role::V])))];
        let error = crate::attach(&values, &[], &sites, &info, 0).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("set `of` to \"weight\""), "{error}");
    }
}
