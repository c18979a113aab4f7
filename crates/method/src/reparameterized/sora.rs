//! SoRA: a low-rank update whose ranks stand behind gates that a proximal step closes.
//!
//! W′ = W + α/r·B·(g ⊙ A), g one number a rank; A Kaiming-uniform, B zero, g standard normal, so W′ = W. After each update
//! of the optimizer g ← T_ξ(g), T_ξ(v) = sign(v)·max(|v| − ξ, 0), which is the step of a penalty λ·‖g‖₁ with ξ = λ times
//! the learning rate; the published code has ξ = λ, which is the default here. No weight decay reaches g. A closed gate may
//! open again: its gradient is not zero.
//!
//! Ding et al. 2023, arXiv:2311.11696, equations 7 to 9.
//!
//! A [rank, in], B [out, rank], g `[rank]` while in training. At the end ranks whose gate is zero are dropped and g is
//! multiplied into A: what is saved is a LoRA with ranks of its own for each matrix.

use engraft_nn::{Adapter, Base, Builder, Error, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::fields::{alpha, choice, dropout, float, rank};
use crate::shared::low_rank::{
    Pair, RANK_MAX, added, changed, ending, fold_gates, linear, other_ranks, plain_lora, rows_times,
};
use crate::shared::sizes;
use crate::{Described, Entry, Forget, Info, Loaded, Method, Step, peft};

struct SoRa {
    rank: usize,
    alpha: f64,
    dropout: f32,
    lambda: f64,
    threshold: Threshold,
}

/// What gates are moved towards zero by.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Threshold {
    /// λ.
    Lambda,
    /// λ times the learning rate.
    EtaLambda,
}

const THRESHOLDS: &[(&str, Threshold)] =
    &[("lambda", Threshold::Lambda), ("eta_lambda", Threshold::EtaLambda)];
const GATES: &str = "gates";

static INFO: Info = Info {
    name: "sora",
    title: "SoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2311.11696",
    summary: "W′ = W + (α/r)·B·(g ⊙ A); gates g that fall to zero take their ranks away",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_SORA",
    fields: &[
        rank("8"),
        alpha("16"),
        dropout("0"),
        float("lambda", (0.0, 1e6), "0.001", "Weight of the penalty on the gates."),
        choice(
            "threshold",
            &["lambda", "eta_lambda"],
            "\"lambda\"",
            "What gates are moved towards zero by in a step: lambda, or lambda times the learning rate.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>, [rank, alpha, dropout]: [&'static str; 3]) -> SoRa {
    SoRa {
        rank: r.count(rank, 8, RANK_MAX),
        alpha: r.float(alpha, 16.0),
        dropout: r.dropout(dropout),
        lambda: r.float("lambda", 1e-3),
        threshold: r.one_of("threshold", THRESHOLDS),
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, ["rank", "alpha", "dropout"]))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| read(r, ["r", "lora_alpha", "lora_dropout"]))
}

fn example() -> Box<dyn Method> {
    Box::new(SoRa { rank: 3, alpha: 6.0, dropout: 0.0, lambda: 1e-3, threshold: Threshold::Lambda })
}

impl Method for SoRa {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let pair = Pair::new(b, &site.path, linear(site, "SoRA")?, self.rank)?;
            let name = format!("{}.lora_gate", site.path);
            let gate = b.param_in_group(&name, &[self.rank], Init::Normal(1.0), GATES)?;
            let scale = (self.alpha / self.rank as f64) as f32;
            b.patch(site.id, Patch::Weight(Box::new(Gated { pair, gate, scale, dropout: self.dropout })))?;
        }
        Ok(())
    }

    fn decays(&self, group: &str) -> bool {
        group != GATES
    }

    fn after_step(&self, adapter: &Adapter, moments: &mut dyn Forget, _step: Step) -> Result<()> {
        let rate = match (self.threshold, moments.last()) {
            (Threshold::Lambda, _) => 1.0,
            (Threshold::EtaLambda, Some(update)) => update.learning_rate,
            (Threshold::EtaLambda, None) => {
                let text = "SoRA's `eta_lambda` needs an optimizer that shows its learning rate";
                return Err(Error::Unsupported(text.into()));
            }
        };
        for (_, gate) in ending(adapter, ".lora_gate")? {
            gate.set(soft_threshold(&gate.value(), (self.lambda * rate) as f32)?)?;
        }
        Ok(())
    }

    /// Closed ranks are dropped, open gates become part of A.
    fn finish(&self, adapter: &Adapter) -> Result<()> {
        for (stem, gate) in ending(adapter, ".lora_gate")? {
            fold_gates(adapter, stem, &gate.value())?;
            gate.replace(Tensor::zeros([0]));
        }
        Ok(())
    }

    fn file_type(&self, adapter: &Adapter) -> &'static str {
        if finished(adapter) { "LORA" } else { INFO.peft_type }
    }

    fn keeps(&self, adapter: &Adapter, name: &str) -> bool {
        !(name.ends_with(".lora_gate") && finished(adapter))
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        if !finished(model.adapter) {
            let own = json!({
                "lambda": number(self.lambda), "lora_alpha": number(self.alpha), "lora_dropout": as_written(self.dropout),
                "r": self.rank, "threshold": THRESHOLDS.iter().find(|t| t.1 == self.threshold).map(|t| t.0),
            });
            return own.as_object().cloned().unwrap_or_default();
        }
        let ranks = other_ranks(model.adapter, ".lora_gate", self.rank);
        plain_lora(self.rank, self.alpha, self.dropout, &ranks)
    }
}

/// Whether gates have become part of A.
fn finished(adapter: &Adapter) -> bool {
    ending(adapter, ".lora_gate").is_ok_and(|gates| gates.iter().all(|(_, gate)| gate.value().is_empty()))
}

/// sign(v)·max(|v| − ξ, 0).
fn soft_threshold(v: &Tensor, by: f32) -> Result<Tensor> {
    let above = v.unary(Unary::Shift(-by))?.unary(Unary::Relu)?;
    let below = v.scale(-1.0)?.unary(Unary::Shift(-by))?.unary(Unary::Relu)?;
    Ok(above.sub(&below)?)
}

struct Gated {
    pair: Pair,
    gate: Param,
    scale: f32,
    dropout: f32,
}

impl Gated {
    fn a(&self) -> Result<Tensor> {
        let gate = self.gate.get();
        if gate.is_empty() { Ok(self.pair.a.get()) } else { rows_times(&self.pair.a.get(), &gate) }
    }
}

impl WeightPatch for Gated {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        changed(base, &self.a()?, &self.pair.b.get(), self.scale)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        added(base.forward(x)?, &dropped, &self.a()?, &self.pair.b.get(), self.scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::low_rank::named;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    struct Rate(engraft_tensor::Gradients, Tensor);

    impl Forget for Rate {
        fn forget(&mut self, _param: &Param) {}

        fn last(&self) -> Option<crate::Update<'_>> {
            Some(crate::Update { gradients: &self.0, scale: &self.1, learning_rate: 0.1 })
        }
    }

    fn gate(a: &crate::Attached) -> Param {
        named(&a.adapter, "layers.0.attn.q.lora_gate").unwrap().clone()
    }

    #[test]
    fn gates_shrink_to_exact_zeros() {
        let v = Tensor::from_vec(vec![0.5, -0.5, 0.1, -0.1, 0.2, 0.0], [6]).unwrap();
        let shrunk = soft_threshold(&v, 0.2).unwrap().to_vec().unwrap();
        assert_eq!(shrunk[2..], [0.0; 4]);
        assert!((shrunk[0] - 0.3).abs() < 1e-6 && (shrunk[1] + 0.3).abs() < 1e-6);
        let start = Tensor::from_vec(vec![0.5, -0.1], [2]).unwrap();
        let at = Step { number: 1, total: 1, seed: 0 };
        for (threshold, expected) in [("lambda", 0.3), ("eta_lambda", 0.48)] {
            let settings = json!({ "rank": 2, "lambda": 0.2, "threshold": threshold });
            let methods = [chosen("sora", settings)];
            let a = attached(&methods, &[]);
            gate(&a).set(start.clone()).unwrap();
            methods[0]
                .0
                .after_step(&a.adapter, &mut Rate(Default::default(), Tensor::scalar(1.0)), at)
                .unwrap();
            let g = gate(&a).value().to_vec().unwrap();
            assert!((g[0] - expected).abs() < 1e-6 && (g[1] == 0.0) == (threshold == "lambda"), "{g:?}");
        }
        let method = &chosen("sora", json!({})).0;
        assert!(!method.decays(GATES) && method.decays(""));
    }

    #[test]
    fn what_is_left_is_a_lora_that_computes_the_same() {
        let (sites, info) = toy();
        let methods = [chosen("sora", json!({ "rank": 4, "alpha": 8 }))];
        let a = attached(&methods, &[]);
        // r(m + n + 1).
        assert_eq!(a.adapter.trained_count(), 2 * 4 * (6 + 6 + 1 + 4 + 6 + 1));
        stir(&a, 0.5);
        gate(&a).set(Tensor::from_vec(vec![0.0, 0.7, 0.0, -1.1], [4]).unwrap()).unwrap();
        named(&a.adapter, "layers.1.attn.v.lora_gate").unwrap().set(Tensor::zeros([4])).unwrap();
        let x = sample(&[5, 6], 3);
        let at = ["layers.0.attn.q", "layers.1.attn.v"];
        let gated = at.map(|path| {
            let (fast, defined) = both_ways(&a, path, &x);
            close(&fast, &defined, 1e-5);
            fast
        });
        close(&gated[1], &x.matmul_t(&frozen(at[1])).unwrap(), 1e-6);
        methods[0].0.finish(&a.adapter).unwrap();
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(config["peft_type"], "LORA");
        assert_eq!(config["rank_pattern"], json!({ at[0]: 2, at[1]: 1 }));
        assert_eq!(config["alpha_pattern"], json!({ at[0]: 4, at[1]: 2 }));
        let loaded = crate::load_adapter(&config, tensors, &sites, &info).unwrap();
        assert_eq!(loaded.methods[0].0.info().name, "lora");
        let loaded = crate::Attached {
            adapter: loaded.adapter,
            dead_targets: vec![],
            dead_modules: vec![],
            without_targets: vec![],
        };
        for (path, gated) in at.iter().zip(gated) {
            close(&both_ways(&a, path, &x).0, &gated, 1e-6);
            close(&both_ways(&loaded, path, &x).0, &gated, 1e-6);
        }
    }

    #[test]
    fn beside_another_method_it_becomes_a_lora_too() {
        let (sites, info) = toy();
        let methods = [chosen("ia3", json!({})), chosen("sora", json!({ "rank": 2 }))];
        let a = attached(&methods, &[]);
        stir(&a, 0.5);
        let x = sample(&[5, 6], 3);
        named(&a.adapter, "1.layers.0.attn.q.lora_gate").unwrap().set(Tensor::full(0.0, [2])).unwrap();
        let before = both_ways(&a, "layers.1.attn.v", &x).0;
        methods[1].0.finish(&a.adapter).unwrap();
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(config["methods"][1]["rank_pattern"], json!({ "layers.0.attn.q": 1 }));
        assert!(tensors.iter().all(|(name, _)| !name.contains("gate")));
        let loaded = crate::load_adapter(&config, tensors, &sites, &info).unwrap();
        let loaded = crate::Attached {
            adapter: loaded.adapter,
            dead_targets: vec![],
            dead_modules: vec![],
            without_targets: vec![],
        };
        close(&both_ways(&loaded, "layers.1.attn.v", &x).0, &before, 1e-6);
        let twice = [chosen("sora", json!({})), chosen("sora", json!({}))];
        let a = attached(&twice, &[]);
        let at = Step { number: 1, total: 1, seed: 0 };
        let mut moments = Rate(Default::default(), Tensor::scalar(1.0));
        assert!(twice[0].0.after_step(&a.adapter, &mut moments, at).is_err());
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("sora", json!({ "threshold": "eta_lambda", "dropout": 0.1 }))], &["head"]);
        let good = config(&[chosen("sora", json!({}))], &[]);
        for bad in [json!({ "threshold": "hard" }), json!({ "r": 0 }), json!({ "lambda": "much" })] {
            let key = bad.as_object().unwrap().keys().next().unwrap().clone();
            let Err(error) = from_file(&with(good.clone(), bad)) else { panic!("{key} passed") };
            assert!(error.to_string().contains(&key), "{error}");
        }
        let (sites, info) = toy();
        let table = [(chosen("sora", json!({})).0, Some(engraft_nn::Targets::names(["tok"])))];
        assert!(crate::attach(&table, &[], &sites, &info, 0).is_err());
    }
}
