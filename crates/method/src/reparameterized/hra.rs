//! HRA: a frozen weight times a chain of Householder reflections.
//!
//! W′ = W·H, H = (I − 2u₁u₁ᵀ)…(I − 2u_ru_rᵀ) with unit vectors uᵢ = Uᵢ/‖Uᵢ‖, the columns of U. Neighbours start equal, in
//! pairs that undo each other, so W′ = W. With `gram_schmidt` the columns of U are made orthonormal, Q, and H = I − 2·Q·Qᵀ,
//! which is never I: such an adapter changes the model from the start, and its columns start apart.
//! `orthogonality` adds λ·Σ‖I − UᵀU‖² to the loss, which draws the columns towards orthonormal ones.
//! Rows are turned instead of W: x·Hᵀ is x and two thin products, whatever r (see `shared::orthogonal::reflections`).
//!
//! Yuan, Liu and Xu 2024, arXiv:2405.17484.
//!
//! U [in, rank].

use engraft_nn::{Adapter, Base, Builder, Init, Kind, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::{Unary, cat};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::sizes;
use crate::shared::{matrices, orthogonal};
use crate::{Described, Entry, Info, Loaded, Method, Step, peft};

#[derive(Clone, Copy)]
struct Hra {
    rank: usize,
    gram_schmidt: bool,
    bias: Biases,
    /// Whether columns start in pairs that undo each other.
    paired: bool,
    /// λ of the penalty; of training alone, so that a file has none.
    orthogonality: f64,
}

/// What stands for the biases of the targets.
const OWN: &str = "hra_only";

static INFO: Info = Info {
    name: "hra",
    title: "HRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2405.17484",
    summary: "W′ = W·H, H a chain of r Householder reflections",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "HRA",
    fields: &[
        int(
            "rank",
            (1, 1024),
            Some("8"),
            "Number r of reflections; an odd one changes the model from the start.",
        ),
        flag("gram_schmidt", "false", "Make the vectors orthonormal; changes the model from the start."),
        float(
            "orthogonality",
            (0.0, 1e9),
            "0",
            "Weight λ of a penalty on vectors that are not orthonormal, such as 1e-4.",
        ),
        choice("bias", &["none", "all", OWN], "\"none\"", "Which biases of the model are trained too."),
        flag("init_weights", "true", "Start in pairs that undo each other; otherwise all vectors are drawn."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| Hra {
        rank: r.count("rank", 8, 1024),
        gram_schmidt: r.flag("gram_schmidt", false),
        bias: Biases::read(r, OWN),
        paired: r.flag("init_weights", true),
        orthogonality: r.float("orthogonality", 0.0),
    })
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| Hra {
        rank: r.count("r", 8, 1 << 16),
        gram_schmidt: r.flag("apply_GS", false),
        bias: Biases::read(r, OWN),
        paired: r.flag("init_weights", true),
        orthogonality: 0.0,
    })
}

fn example() -> Box<dyn Method> {
    Box::new(Hra { rank: 4, gram_schmidt: false, bias: Biases::None, paired: true, orthogonality: 0.0 })
}

impl Method for Hra {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        for site in b.targets() {
            let inn = match site.kind {
                // A convolution is a matrix on its windows.
                Kind::Convolution { inn, .. } => inn,
                _ => matrices::linear(site, INFO.title)?.1,
            };
            let name = format!("{}.hra_u", site.path);
            if self.gram_schmidt && self.rank > inn {
                let message = format!(
                    "`rank` is {}, and only {inn} vectors of its input can be orthonormal",
                    self.rank
                );
                return Err(engraft_nn::Error::Site { path: site.path.clone(), message });
            }
            let u = b.param(&name, &[inn, self.rank], self.start(inn, b.seed(), &name)?)?;
            b.patch(site.id, Patch::Weight(Box::new(Chain { u, gram_schmidt: self.gram_schmidt })))?;
        }
        Ok(())
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let beyond = |_: &Site, (_, inn)| self.rank > inn;
        let Some((site, (_, inn), more)) = sizes::first_of(targets, beyond) else { return vec![] };
        vec![format!(
            "`rank` is {}, and {inn} reflections make every rotation of the inputs of {}{more}: those beyond cost time \
             and add nothing",
            self.rank, site.path
        )]
    }

    fn penalty(&self, adapter: &Adapter, _step: Step) -> Result<Option<Tensor>> {
        if self.orthogonality == 0.0 {
            return Ok(None);
        }
        let mut sum = Tensor::scalar(0.0);
        for p in adapter.trainable().filter(|p| p.name.ends_with(".hra_u")) {
            let u = p.param.get();
            let off = u.t_matmul(&u)?.sub(&orthogonal::identity(u.dim(1))?.reshape([u.dim(1), u.dim(1)])?)?;
            sum = sum.add(&off.unary(Unary::Square)?.sum()?)?;
        }
        Ok(Some(sum.scale(self.orthogonality as f32)?))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "apply_GS": self.gram_schmidt, "bias": self.bias.name(OWN), "init_weights": self.paired, "layers_pattern": null,
            "layers_to_transform": null, "r": self.rank,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Hra {
    /// Equal neighbours where that is asked for and can be had.
    fn start(&self, inn: usize, seed: u64, name: &str) -> Result<Init> {
        if !self.paired || self.gram_schmidt || !self.rank.is_multiple_of(2) {
            return Ok(Init::kaiming(self.rank));
        }
        let half = self.rank / 2;
        let one = Init::kaiming(half).tensor(&[inn, half, 1], seed, name)?;
        Ok(Init::Values(cat(&[&one, &one], 2)?))
    }
}

struct Chain {
    u: Param,
    gram_schmidt: bool,
}

impl Chain {
    /// The unit vectors as rows [rank, in].
    fn units(&self) -> Result<Tensor> {
        let u = self.u.get();
        if self.gram_schmidt {
            return Ok(u.orthonormal()?.t()?);
        }
        let rows = u.t()?;
        Ok(rows.div(&matrices::norms(&rows, 1)?)?)
    }
}

impl WeightPatch for Chain {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let (mut w, units) = (base.dense()?, self.units()?);
        for i in 0..units.dim(0) {
            let u = units.rows_between(i, i + 1)?;
            w = w.sub(&w.matmul_t(&u)?.scale(2.0)?.matmul(&u)?)?;
        }
        Ok(w)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let units = self.units()?;
        let (a, b) = match self.gram_schmidt {
            true => (units.clone(), units.t()?.scale(-2.0)?),
            false => orthogonal::reflections(&units)?,
        };
        base.forward(&x.clone().add_low_rank(x, &a, &b, 1.0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn pairs_undo_each_other_and_turning_keeps_lengths() {
        let a = attached(&[chosen("hra", json!({ "rank": 4 }))], &[]);
        assert_eq!(names(&a)[0], "layers.0.attn.q.hra_u");
        assert_eq!(a.adapter.trained_count(), 2 * 2 * 4 * 6);
        let x = sample(&[5, 6], 3);
        let w = frozen("layers.0.attn.q");
        close(&both_ways(&a, "layers.0.attn.q", &x).0, &x.matmul_t(&w).unwrap(), 1e-5);
        for settings in
            [json!({ "rank": 4 }), json!({ "rank": 3 }), json!({ "rank": 4, "gram_schmidt": true })]
        {
            let a = attached(&[chosen("hra", settings.clone())], &[]);
            stir(&a, 0.5);
            let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
            close(&fast, &defined, 1e-5);
            assert!(
                fast.sub(&x.matmul_t(&w).unwrap()).unwrap().to_vec().unwrap().iter().any(|v| v.abs() > 0.05)
            );
            // Rows of W keep their lengths and their angles: W′·W′ᵀ = W·Wᵀ.
            let (sites, _) = toy();
            let merged = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
            let q = &merged.iter().find(|m| m.site.path == "layers.0.attn.q").unwrap().value;
            close(&q.matmul_t(q).unwrap(), &w.matmul_t(&w).unwrap(), 1e-5);
        }
    }

    #[test]
    fn a_penalty_draws_the_vectors_towards_orthonormal_ones() {
        let methods = [chosen("hra", json!({ "rank": 2, "orthogonality": 0.5 }))];
        let a = attached(&methods, &[]);
        let step = Step { number: 1, total: 1, seed: 0 };
        let penalty = || methods[0].0.penalty(&a.adapter, step).unwrap().unwrap();
        for p in a.adapter.trainable() {
            p.param.set(sample(&[6, 2], 3).orthonormal().unwrap()).unwrap();
        }
        assert!(penalty().item().unwrap() < 1e-9);
        // Twice as long: UᵀU = 4·I, so ‖I − UᵀU‖² = 2·3² at each of four layers.
        for p in a.adapter.trainable() {
            p.param.set(p.param.value().scale(2.0).unwrap()).unwrap();
        }
        assert!((penalty().item().unwrap() - 0.5 * 4.0 * 18.0).abs() < 1e-3);
        // The gradient is 4λ·U(UᵀU − I) = 6·U.
        let gradients = penalty().backward().unwrap();
        let first = &a.adapter.params()[0].param;
        close(gradients.get(first).unwrap(), &first.value().scale(6.0).unwrap(), 1e-5);
        let without = chosen("hra", json!({}));
        assert!(without.0.penalty(&a.adapter, step).unwrap().is_none());
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({}),
            json!({ "rank": 3, "bias": "all", "init_weights": false }),
            json!({ "rank": 4, "gram_schmidt": true, "bias": "hra_only" }),
        ] {
            survives_saving(&[chosen("hra", settings)], &["head"]);
        }
        let (sites, info) = toy();
        let many = [chosen("hra", json!({ "rank": 8, "gram_schmidt": true }))];
        assert!(crate::attach(&many, &[], &sites, &info, 0).is_err(), "8 orthonormal vectors of 6 numbers");
        let table = [(chosen("hra", json!({})).0, Some(engraft_nn::Targets::names(["tok"])))];
        let error = crate::attach(&table, &[], &sites, &info, 0).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("an embedding"), "{error}");
        let good = config(&[chosen("hra", json!({}))], &[]);
        assert!(from_file(&with(good, json!({ "bias": "some" }))).is_err());
    }
}
