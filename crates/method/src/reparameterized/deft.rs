//! DEFT: a subspace of the outputs is taken out of the weight, and something learned put in its place.
//!
//! W′ = (I − Q·Vᵀ)·W + s·Q·R with thin P and R. `relu`: Q = P and V = max(P, 0); `qr`: Q = V an orthonormal basis of P, so that
//! Q·Qᵀ projects. s = α/r, or 1 without α. P starts as small noise and R as Vᵀ·W/s, so W′ = W.
//! `para` (PaRa) only takes out: W′ = (I − Q·Vᵀ)·W, from the start.
//! Rows see it as y = y₀ − (y₀·V)·Qᵀ + s·(drop(x)·Rᵀ)·Qᵀ with y₀ = x·Wᵀ.
//!
//! DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models, NeurIPS 2025; the two forms of Q are those of `peft`.
//!
//! `deft_P` [out, rank], `deft_R` [rank, in]; rank at most out.

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor, no_grad};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::matrices;
use crate::shared::sizes;
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

/// What stands for the biases of the targets.
const OWN: &str = "deft_only";

struct Deft {
    rank: usize,
    basis: Basis,
    alpha: Option<f64>,
    para: bool,
    dropout: f32,
    init_scale: f64,
    bias: Biases,
    init_weights: bool,
}

/// What Q and V are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Basis {
    Relu,
    Qr,
}

const BASES: &[(&str, Basis)] = &[("relu", Basis::Relu), ("qr", Basis::Qr)];

static INFO: Info = Info {
    name: "deft",
    title: "DEFT",
    class: "reparameterized",
    sites: "weight",
    paper: "NeurIPS 2025",
    summary: "W′ = (I − Q·Vᵀ)·W + s·Q·R: a subspace taken out and replaced",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "DEFT",
    fields: &[
        int("rank", (1, 1024), Some("8"), "Dimension r of the subspace."),
        choice(
            "decomposition_method",
            &["relu", "qr"],
            "\"relu\"",
            "How the projection is made of P: P·relu(P)ᵀ, or orthogonal by QR.",
        ),
        Field {
            name: "alpha",
            kind: FieldKind::Float { min: 0.0, max: 1e9 },
            default: None,
            doc: "What is put in is scaled by alpha/rank; left out, not at all.",
        },
        flag("para", "false", "PaRa: only take the subspace out; changes the model from the start."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of R while training."),
        choice("bias", &["none", "all", OWN], "\"none\"", "Which biases of the model are trained too."),
        flag("init_weights", "true", "Start R so that nothing changes; otherwise it is drawn."),
        float("init_scale", (0.0, 1e9), "1", "Factor on the deviation 0.02 of an R that is drawn."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, ["rank", "dropout"]))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.ignore(&["fan_in_fan_out"]);
    let deft = read(&mut r, ["r", "deft_dropout"]);
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(deft), targets, train_also }))
}

/// Recipes and files differ in two names.
fn read(r: &mut Reader<'_>, [rank, dropout]: [&'static str; 2]) -> Deft {
    let alpha = r.value("alpha").is_some().then(|| r.float("alpha", 0.0));
    Deft {
        rank: r.count(rank, 8, 1 << 16),
        basis: r.one_of("decomposition_method", BASES),
        alpha,
        para: r.flag("para", false),
        dropout: r.dropout(dropout),
        init_scale: r.float("init_scale", 1.0),
        bias: Biases::read(r, OWN),
        init_weights: r.flag("init_weights", true),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(Deft {
        rank: 3,
        basis: Basis::Qr,
        alpha: Some(6.0),
        para: false,
        dropout: 0.0,
        init_scale: 1.0,
        bias: Biases::None,
        init_weights: true,
    })
}

impl Method for Deft {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond(targets, "rank", |_| self.rank, |(out, _)| out, "it is cut to that there")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        for site in b.targets() {
            let (out, inn) = matrices::linear(site, INFO.title)?;
            let rank = self.rank.min(out);
            let p = b.param(&format!("{}.deft_P", site.path), &[out, rank], Init::Normal(0.02))?;
            // As in peft, an alpha of 0 is none, and a negative one takes away.
            let scale = self.alpha.filter(|a| *a != 0.0).map_or(1.0, |alpha| (alpha / rank as f64) as f32);
            let mut patch = Replaced { p, r: None, basis: self.basis, scale, dropout: self.dropout };
            if !self.para {
                let start = match self.init_weights {
                    true => {
                        let (_, v) = no_grad(|| patch.bases())?;
                        Init::Values(v.t_matmul(&matrices::frozen(site)?)?.scale(1.0 / scale)?)
                    }
                    false => Init::Normal((0.02 * self.init_scale) as f32),
                };
                patch.r = Some(b.param(&format!("{}.deft_R", site.path), &[rank, inn], start)?);
            }
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let method = BASES.iter().find(|m| m.1 == self.basis).map_or("", |m| m.0);
        let own = json!({
            "alpha": self.alpha.map(number), "bias": self.bias.name(OWN), "decomposition_method": method,
            "deft_dropout": as_written(self.dropout), "fan_in_fan_out": false, "init_scale": number(self.init_scale),
            "init_weights": self.init_weights, "layers_pattern": null, "layers_to_transform": null, "para": self.para,
            "r": self.rank,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

struct Replaced {
    p: Param,
    /// What is put in; `None` where the subspace is only taken out.
    r: Option<Param>,
    basis: Basis,
    scale: f32,
    dropout: f32,
}

impl Replaced {
    /// Q and V, both [out, rank].
    fn bases(&self) -> Result<(Tensor, Tensor)> {
        let p = self.p.get();
        Ok(match self.basis {
            Basis::Relu => (p.clone(), p.unary(Unary::Relu)?),
            Basis::Qr => {
                let q = p.orthonormal()?;
                (q.clone(), q)
            }
        })
    }
}

impl WeightPatch for Replaced {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let (w, (q, v)) = (base.dense()?, self.bases()?);
        let kept = w.sub(&q.matmul(&v.t_matmul(&w)?)?)?;
        match &self.r {
            Some(r) => Ok(kept.add(&q.matmul(&r.get())?.scale(self.scale)?)?),
            None => Ok(kept),
        }
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let (y, (q, v)) = (base.forward(x)?, self.bases()?);
        let kept = y.clone().add_low_rank(&y, &v.t()?, &q, -1.0)?;
        match &self.r {
            Some(r) => {
                let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
                Ok(kept.add_low_rank(&dropped, &r.get(), &q, self.scale)?)
            }
            None => Ok(kept),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn a_subspace_is_taken_out_and_replaced() {
        let x = sample(&[5, 6], 3);
        let w = frozen("layers.0.attn.q");
        for settings in [
            json!({ "rank": 2 }),
            json!({ "rank": 2, "decomposition_method": "qr", "alpha": 5 }),
            json!({ "rank": 5, "decomposition_method": "qr" }),
        ] {
            let a = attached(&[chosen("deft", settings.clone())], &[]);
            assert_eq!(names(&a)[..2], ["layers.0.attn.q.deft_P", "layers.0.attn.q.deft_R"]);
            let rank = settings["rank"].as_u64().unwrap() as usize;
            let of_v = rank.min(4);
            assert_eq!(a.adapter.trained_count(), 2 * (rank * 12 + of_v * 10));
            close(&both_ways(&a, "layers.0.attn.q", &x).0, &x.matmul_t(&w).unwrap(), 1e-5);
            stir(&a, 0.5);
            let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
            close(&fast, &defined, 1e-5);
        }
    }

    #[test]
    fn para_leaves_nothing_along_its_basis() {
        let a = attached(
            &[chosen("deft", json!({ "rank": 2, "para": true, "decomposition_method": "qr" }))],
            &[],
        );
        assert_eq!(
            names(&a),
            [
                "layers.0.attn.q.deft_P",
                "layers.0.attn.v.deft_P",
                "layers.1.attn.q.deft_P",
                "layers.1.attn.v.deft_P"
            ]
        );
        stir(&a, 0.5);
        let (sites, _) = toy();
        let merged = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
        let q = &merged.iter().find(|m| m.site.path == "layers.0.attn.q").unwrap().value;
        let along = a.adapter.params()[0].param.value().t_matmul(q).unwrap();
        close(
            &along.add(&Tensor::full(1.0, along.shape())).unwrap(),
            &Tensor::full(1.0, along.shape()),
            1e-5,
        );
        let (fast, defined) = both_ways(&a, "layers.0.attn.q", &sample(&[5, 6], 3));
        close(&fast, &defined, 1e-5);
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({}),
            json!({ "rank": 3, "decomposition_method": "qr", "alpha": 12, "dropout": 0.1, "bias": "all" }),
            json!({ "para": true, "init_weights": false, "init_scale": 0.5, "bias": "deft_only" }),
        ] {
            survives_saving(&[chosen("deft", settings)], &["head"]);
        }
        let good = config(&[chosen("deft", json!({}))], &[]);
        assert!(good["alpha"].is_null());
        assert!(from_file(&with(good, json!({ "decomposition_method": "svd" }))).is_err());
    }
}
