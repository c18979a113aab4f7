//! DeLoRA: a low-rank change whose components are normalised, so that one learned number bounds its length.
//!
//! W′ = W + (λ/r)·Σᵢ bᵢ·aᵢᵀ/(‖bᵢ‖·‖aᵢ‖) · diag(w), w the norms of the columns of W: rank-one parts of length one, the change of
//! each input scaled by what W does with it. Norms are at least 1e-4. A starts as Kaiming-uniform noise, B as zero, so W′ = W.
//! The forward folds w and the norms into thin factors: y = x·Wᵀ + (x·A′ᵀ)·B′ᵀ.
//!
//! Bini, Girrbach and Akata 2025, arXiv:2503.18225.
//!
//! `delora_A` [rank, in], `delora_B` [out, rank], `delora_lambda` `[1]`, and `delora_w_norm` `[in]`, fixed.

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Pattern, Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::matrices;
use crate::shared::sizes;
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1 << 16;
/// The shortest that a row of A or column of B counts as.
const SHORTEST: f32 = 1e-4;
/// What stands for the biases of the targets.
const OWN: &str = "delora_only";

struct Delora {
    rank: usize,
    lambda: f64,
    dropout: f32,
    rank_pattern: Vec<Pattern>,
    lambda_pattern: Vec<Pattern>,
    bias: Biases,
    init_weights: bool,
}

static INFO: Info = Info {
    name: "delora",
    title: "DeLoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2503.18225",
    summary: "W′ = W + (λ/r)·Σ of normalised rank-one parts, scaled by the columns' norms",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "DELORA",
    fields: &[
        int("rank", (1, 1024), Some("8"), "Number r of rank-one parts."),
        float("lambda", (0.0, 1e9), "15", "Start of the learned bound λ on the length of the change."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of A while training."),
        Field {
            name: "rank_pattern",
            kind: FieldKind::IntMap,
            default: Some("{}"),
            doc: "Other ranks for modules that a pattern matches.",
        },
        Field {
            name: "lambda_pattern",
            kind: FieldKind::FloatMap,
            default: Some("{}"),
            doc: "Other bounds for modules that a pattern matches.",
        },
        choice("bias", &["none", "all", OWN], "\"none\"", "Which biases of the model are trained too."),
        flag("init_weights", "true", "Start B as zero; otherwise B is drawn too."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, ["rank", "lambda", "dropout"]))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| read(r, ["r", "delora_lambda", "module_dropout"]))
}

/// Recipes and files differ in three names.
fn read(r: &mut Reader<'_>, [rank, lambda, dropout]: [&'static str; 3]) -> Delora {
    let delora = Delora {
        rank: r.count(rank, 8, RANK_MAX),
        lambda: r.float(lambda, 15.0),
        dropout: r.dropout(dropout),
        rank_pattern: r.patterns("rank_pattern"),
        lambda_pattern: r.patterns("lambda_pattern"),
        bias: Biases::read(r, OWN),
        init_weights: r.flag("init_weights", true),
    };
    for p in delora.rank_pattern.iter().filter_map(|p| p.not_a_count(RANK_MAX)) {
        r.problem(format!("`rank_pattern`: expected a whole number from 1 to {RANK_MAX}, found {p}"));
    }
    delora
}

fn example() -> Box<dyn Method> {
    Box::new(Delora {
        rank: 3,
        lambda: 2.0,
        dropout: 0.0,
        rank_pattern: vec![],
        lambda_pattern: vec![],
        bias: Biases::None,
        init_weights: true,
    })
}

impl Method for Delora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let rank = |path: &str| Pattern::find(&self.rank_pattern, path).map_or(self.rank, |r| r as usize);
        sizes::beyond_rank(targets, rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        for site in b.targets() {
            let (out, inn) = matrices::linear(site, INFO.title)?;
            let rank = Pattern::find(&self.rank_pattern, &site.path).map_or(self.rank, |r| r as usize);
            let lambda = Pattern::find(&self.lambda_pattern, &site.path).unwrap_or(self.lambda);
            let name = |end: &str| format!("{}.delora_{end}", site.path);
            let start_b = if self.init_weights { Init::Zeros } else { Init::kaiming(rank) };
            let columns = matrices::norms(&matrices::frozen(site)?, 0)?;
            let patch = Bounded {
                a: b.param(&name("A"), &[rank, inn], Init::kaiming(inn))?,
                b: b.param(&name("B"), &[out, rank], start_b)?,
                lambda: b.param(&name("lambda"), &[1], Init::Values(Tensor::full(lambda as f32, [1])))?,
                columns: b.fixed(&name("w_norm"), &[inn], Init::Values(columns))?,
                dropout: self.dropout,
            };
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "bias": self.bias.name(OWN), "delora_lambda": number(self.lambda), "init_weights": self.init_weights,
            "lambda_pattern": Pattern::table(&self.lambda_pattern), "layers_pattern": null, "layers_to_transform": null,
            "module_dropout": as_written(self.dropout), "r": self.rank, "rank_pattern": Pattern::table(&self.rank_pattern),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

struct Bounded {
    a: Param,
    b: Param,
    lambda: Param,
    /// Norms of the columns of W.
    columns: Param,
    dropout: f32,
}

/// Norms over `dim`, none below [`SHORTEST`]; taken below the root, whose slope at zero is not finite.
fn lengths(m: &Tensor, dim: usize) -> Result<Tensor> {
    let least = SHORTEST * SHORTEST;
    let squares = m.unary(Unary::Square)?.sum_dim(dim)?;
    Ok(squares
        .unary(Unary::Shift(-least))?
        .unary(Unary::Relu)?
        .unary(Unary::Shift(least))?
        .unary(Unary::Sqrt)?)
}

impl Bounded {
    /// A·diag(w) [rank, in] and B·diag((λ/r)/(‖a‖·‖b‖)) [out, rank].
    fn factors(&self) -> Result<(Tensor, Tensor)> {
        let (a, b) = (self.a.get(), self.b.get());
        let rank = a.dim(0);
        let product = lengths(&a, 1)?.reshape([1, rank])?.mul(&lengths(&b, 0)?)?;
        let scale = self.lambda.get().scale(1.0 / rank as f32)?.div(&product)?;
        Ok((a.mul(&self.columns.get())?, b.mul(&scale)?))
    }
}

impl WeightPatch for Bounded {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let (a, b) = self.factors()?;
        Ok(base.dense()?.add(&b.matmul(&a)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let (a, b) = self.factors()?;
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        Ok(base.forward(x)?.add_low_rank(&dropped, &a, &b, 1.0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn the_change_is_bounded_by_lambda() {
        let settings = json!({ "rank": 2, "lambda": 3, "lambda_pattern": { "1.attn.q": 0.5 }, "rank_pattern": { "v": 1 } });
        let a = attached(&[chosen("delora", settings)], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * (2 * (6 + 6) + 1) + 2 * ((6 + 4) + 1));
        let x = sample(&[5, 6], 3);
        close(
            &both_ways(&a, "layers.0.attn.q", &x).0,
            &x.matmul_t(&frozen("layers.0.attn.q")).unwrap(),
            1e-6,
        );
        for p in a.adapter.trainable().filter(|p| !p.name.ends_with("lambda")) {
            p.param.set(sample(p.param.value().shape(), 5).scale(7.0).unwrap()).unwrap();
        }
        let (sites, _) = toy();
        let merged = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
        for (path, lambda, rank) in
            [("layers.0.attn.q", 3.0, 2), ("layers.1.attn.q", 0.5, 2), ("layers.1.attn.v", 3.0, 1)]
        {
            let (fast, defined) = both_ways(&a, path, &x);
            close(&fast, &defined, 1e-5);
            let w = frozen(path);
            let value = &merged.iter().find(|m| m.site.path == path).unwrap().value;
            // The change per unit of each column of W is at most λ long, and exactly that with one part.
            let change = value.sub(&w).unwrap().div(&matrices::norms(&w, 0).unwrap()).unwrap();
            let length = change.unary(Unary::Square).unwrap().sum().unwrap().item().unwrap().sqrt();
            assert!(
                length <= lambda * 1.0001 && (rank > 1 || (length - lambda).abs() < 1e-4),
                "{path}: {length}"
            );
        }
    }

    #[test]
    fn a_factor_that_is_zero_has_a_finite_gradient() {
        let a = attached(&[chosen("delora", json!({ "rank": 2 }))], &[]);
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, "layers.0.attn.q"));
        let engraft_nn::Value::Weight(weight) = &site.value else { panic!() };
        let cx = Pass::new(engraft_nn::Layout::counted(&[5]).unwrap(), None);
        let patched = engraft_nn::Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx);
        let gradients = patched.forward(&sample(&[5, 6], 1)).unwrap().sum().unwrap().backward().unwrap();
        let b = a.adapter.params().iter().find(|p| p.name == "layers.0.attn.q.delora_B").unwrap();
        let gradient = gradients.get(&b.param).unwrap().to_vec().unwrap();
        assert!(gradient.iter().all(|v| v.is_finite()) && gradient.iter().any(|v| *v != 0.0), "{gradient:?}");
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({}),
            json!({ "rank": 3, "lambda": 2.5, "dropout": 0.1, "bias": "all" }),
            json!({ "rank_pattern": { "attn.q": 2 }, "lambda_pattern": { "v": 1.5 }, "init_weights": false, "bias": "delora_only" }),
        ] {
            survives_saving(&[chosen("delora", settings)], &["head"]);
        }
        let bad = json!({ "rank_pattern": { "q": 1.5 } });
        assert!(from_settings(bad.as_object().unwrap()).is_err());
    }
}
