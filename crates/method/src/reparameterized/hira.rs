//! HiRA: a frozen weight times one plus a product of two thin matrices, element by element, so that the change has a high
//! rank although few numbers are trained.
//!
//! W′ = W + W ⊙ (B·A). A starts as Kaiming-uniform noise, B as zero, so W′ = W.
//! Only W′ itself gives the forward cheaply: rank by rank it would cost r products with W.
//!
//! Huang et al. 2025, ICLR, openreview TwJrTz9cRS.
//!
//! A [rank, in], B [out, rank]; of a convolution A [rank, channels, height, width], B [out, rank, 1, 1]; of a table with
//! `rows` rows `hira_embedding_A` [rank, rows] and `hira_embedding_B` [width, rank], W′ = W + W ⊙ (B·A)ᵀ.

use engraft_nn::{Base, Builder, Init, Kind, Mode, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written};
use crate::shared::fields::{choice, float, int};
use crate::shared::sizes;
use crate::{Described, Entry, Info, Loaded, Method, peft};

#[derive(Clone)]
struct Hira {
    rank: usize,
    dropout: f32,
    start: Start,
    /// `peft` 0.21 reads ranks of single modules and gives every module the same one; kept as it was in the file.
    rank_pattern: Value,
    /// Says nothing in `peft`, which writes it as it was given.
    fan_in_fan_out: bool,
}

/// How A and B start.
#[derive(Clone, Copy, PartialEq)]
enum Start {
    /// A Kaiming-uniform, B zero.
    Kaiming,
    /// A normal with deviation 1/r, B zero.
    Gaussian,
    /// Both random: the adapter changes the model from the start.
    Random,
}

const STARTS: &[(&str, Start)] =
    &[("kaiming", Start::Kaiming), ("gaussian", Start::Gaussian), ("random", Start::Random)];

static INFO: Info = Info {
    name: "hira",
    title: "HiRA",
    class: "reparameterized",
    sites: "weight",
    paper: "ICLR 2025, OpenReview TwJrTz9cRS",
    summary: "W′ = W + W ⊙ (B·A)",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "HIRA",
    fields: &[
        int("rank", (1, 1024), Some("32"), "Inner size r of the product."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of the changed part while training."),
        choice(
            "init",
            &["kaiming", "gaussian", "random"],
            "\"kaiming\"",
            "How A starts; random starts B too.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let hira = Hira {
        rank: r.count("rank", 32, 1024),
        dropout: r.dropout("dropout"),
        start: r.one_of("init", STARTS),
        rank_pattern: json!({}),
        fan_in_fan_out: false,
    };
    r.finish()?;
    Ok(Box::new(hira))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    let start = match r.value("init_weights").cloned() {
        None | Some(Value::Bool(true)) => Start::Kaiming,
        Some(Value::Bool(false)) => Start::Random,
        Some(Value::String(s)) if s == "gaussian" => Start::Gaussian,
        Some(other) => {
            r.problem(format!("`init_weights`: expected true, false or \"gaussian\", found {other}"));
            Start::Kaiming
        }
    };
    let hira = Hira {
        rank: r.count("r", 32, 1 << 16),
        dropout: r.dropout("hira_dropout"),
        start,
        rank_pattern: r.value("rank_pattern").cloned().unwrap_or_else(|| json!({})),
        fan_in_fan_out: r.flag("fan_in_fan_out", false),
    };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(hira), targets, train_also }))
}

fn example() -> Box<dyn Method> {
    Box::new(Hira {
        rank: 3,
        dropout: 0.0,
        start: Start::Kaiming,
        rank_pattern: json!({}),
        fan_in_fan_out: false,
    })
}

impl Method for Hira {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let (a, ones, out, table) = match site.kind {
                Kind::Linear { out, inn, .. } => (vec![inn], vec![], out, false),
                Kind::Convolution { out, shape: [_, window @ ..], .. } => {
                    (window.to_vec(), vec![1, 1], out, false)
                }
                Kind::Embedding { rows, width } => (vec![rows], vec![], width, true),
                _ => continue,
            };
            let (init_a, init_b) = self.starts(a.iter().product(), table);
            let middle = if table { "hira_embedding_" } else { "hira_" };
            let name = |factor: &str| format!("{}.{middle}{factor}", site.path);
            let factors = Factors {
                a: b.param(&name("A"), &[&[self.rank][..], &a].concat(), init_a)?,
                b: b.param(&name("B"), &[&[out, self.rank][..], &ones].concat(), init_b)?,
                dropout: self.dropout,
                table,
            };
            b.patch(site.id, Patch::Weight(Box::new(factors)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let start = match self.start {
            Start::Kaiming => json!(true),
            Start::Gaussian => json!("gaussian"),
            Start::Random => json!(false),
        };
        let own = json!({
            "fan_in_fan_out": self.fan_in_fan_out, "hira_dropout": as_written(self.dropout), "init_weights": start, "layers_pattern": null,
            "layers_to_transform": null, "r": self.rank, "rank_pattern": self.rank_pattern,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Hira {
    fn starts(&self, inn: usize, table: bool) -> (Init, Init) {
        match self.start {
            Start::Random => (Init::Normal(1.0), Init::Normal(1.0)),
            _ if table => (Init::Zeros, Init::Normal(1.0)),
            Start::Kaiming => (Init::kaiming(inn), Init::Zeros),
            Start::Gaussian => (Init::Normal(1.0 / self.rank as f32), Init::Zeros),
        }
    }
}

struct Factors {
    a: Param,
    b: Param,
    dropout: f32,
    /// Of a table, whose rows are the columns of B·A.
    table: bool,
}

impl Factors {
    /// B·A, in the shape of W.
    fn product(&self) -> Result<Tensor> {
        let (a, b) = (self.a.get(), self.b.get());
        let (rank, out) = (a.dim(0), b.dim(0));
        let product = b.reshape([out, rank])?.matmul(&a.reshape([rank, a.len() / rank.max(1)])?)?;
        Ok(if self.table { product.t()? } else { product })
    }
}

impl WeightPatch for Factors {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.mul(&self.product()?.unary(Unary::Shift(1.0))?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        if self.dropout == 0.0 || cx.mode() == Mode::Eval {
            return Ok(x.matmul_t(&self.weight(base)?)?);
        }
        let changed = base.dense()?.mul(&self.product()?)?;
        Ok(base.forward(x)?.plus(&cx.dropout(x, self.dropout, site.id, 0)?.matmul_t(&changed)?)?)
    }

    fn lookup(&self, ids: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let factor = self.a.get().t()?.gather(ids)?.matmul_t(&self.b.get())?; // [tokens, width]
        Ok(base.lookup(ids)?.mul(&factor.unary(Unary::Shift(1.0))?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Targets;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn the_change_is_the_weight_times_the_product() {
        let a = attached(&[chosen("hira", json!({ "rank": 2 }))], &[]);
        assert_eq!(names(&a)[..2], ["layers.0.attn.q.hira_A", "layers.0.attn.q.hira_B"]);
        assert_eq!(a.adapter.trained_count(), 2 * (2 * (6 + 6) + 2 * (6 + 4)));
        let x = sample(&[5, 6], 3);
        let w = frozen("layers.0.attn.q");
        close(&both_ways(&a, "layers.0.attn.q", &x).0, &x.matmul_t(&w).unwrap(), 1e-6);
        stir(&a, 0.5);
        let get = |end: &str| {
            let name = format!("layers.0.attn.q.{end}");
            a.adapter.params().iter().find(|p| p.name == name).unwrap().param.value()
        };
        let changed = w.add(&w.mul(&get("hira_B").matmul(&get("hira_A")).unwrap()).unwrap()).unwrap();
        let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
        close(&fast, &defined, 1e-6);
        close(&defined, &x.matmul_t(&changed).unwrap(), 1e-6);
    }

    #[test]
    fn tables() {
        let methods = [(chosen("hira", json!({ "rank": 2 })).0, Some(Targets::names(["tok"])))];
        let a = attached(&methods, &[]);
        assert_eq!(names(&a), ["tok.hira_embedding_A", "tok.hira_embedding_B"]);
        let ids = Tensor::from_i64(vec![3, 0, 10, 3], [4]).unwrap();
        close(&both_ways(&a, "tok", &ids).0, &frozen("tok").gather(&ids).unwrap(), 0.0);
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, "tok", &ids);
        close(&fast, &defined, 1e-6);
        survives_saving(&methods, &[]);
    }

    #[test]
    fn dropout_acts_on_the_change_alone() {
        let a = attached(&[chosen("hira", json!({ "rank": 2, "dropout": 0.5 }))], &[]);
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, "layers.0.attn.q"));
        let engraft_nn::Value::Weight(weight) = &site.value else { panic!() };
        let x = sample(&[5, 6], 3);
        let mode = Mode::Train { seed: 1, step: 1, micro: 0 };
        let cx = Pass::new(engraft_nn::Layout::counted(&[5]).unwrap(), None).training(mode);
        let run = || {
            let patched = engraft_nn::Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx);
            patched.forward(&x).unwrap()
        };
        let straight = x.matmul_t(&frozen("layers.0.attn.q")).unwrap();
        close(&run(), &straight, 1e-6);
        stir(&a, 0.5);
        assert_ne!(run().to_vec().unwrap(), both_ways(&a, "layers.0.attn.q", &x).0.to_vec().unwrap());
    }

    #[test]
    fn configurations() {
        for settings in
            [json!({}), json!({ "rank": 3, "dropout": 0.1, "init": "gaussian" }), json!({ "init": "random" })]
        {
            survives_saving(&[chosen("hira", settings)], &["head"]);
        }
        let good = config(&[chosen("hira", json!({}))], &[]);
        assert_eq!((&good["r"], &good["init_weights"]), (&json!(32), &json!(true)));
        // `peft` writes what it was given, whatever the matrices are.
        let (sites, info) = toy();
        let a = attached(&[chosen("hira", json!({}))], &[]);
        let tensors =
            crate::save_adapter(&a.adapter, &[chosen("hira", json!({}))], &[], "b", &sites, &info).unwrap().1;
        for given in [true, false] {
            let given = with(good.clone(), json!({ "fan_in_fan_out": given }));
            let loaded = crate::load_adapter(&given, tensors.clone(), &sites, &info).unwrap();
            let again =
                crate::save_adapter(&loaded.adapter, &loaded.methods, &[], "b", &sites, &info).unwrap().0;
            assert_eq!(again["fan_in_fan_out"], given["fan_in_fan_out"]);
        }
        for bad in [json!({ "r": 0 }), json!({ "init_weights": "pissa" }), json!({ "hira_dropout": 2 })] {
            assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
