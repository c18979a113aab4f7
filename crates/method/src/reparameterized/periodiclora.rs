//! PeriodicLoRA: LoRA in stages, each of which leaves what it learned and begins a new pair.
//!
//! W′ = W + α/r·Σ_k B_k·A_k. A run of T steps has `stages` of ⌈T/stages⌉; at the end of each but the last the pair is put
//! aside, A is drawn anew (Kaiming-uniform), B is zero again, and the optimizer forgets both. So the output does not jump,
//! and ΔW may reach `stages` times the rank. The learning rate goes on as the run's schedule has it.
//!
//! Meng et al. 2024, arXiv:2402.16141. It adds a finished pair to W; here W is never changed, so finished pairs stay
//! beside it and are saved as one LoRA whose rank is the sum: no rounding, and quantised bases serve as well.
//!
//! A [rank, in], B [out, rank]; in training also, in checkpoints only, those put aside: `lora_A.past`
//! [(stages − 1)·rank, in], `lora_B.past` [out, (stages − 1)·rank]. Stage k (from 1) draws A from the seed and
//! "NAME.stage.k", NAME that of the tensor.

use engraft_nn::{Adapter, Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::Tensor;
use engraft_tensor::ops::cat;
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::fields::{alpha, dropout, int, rank};
use crate::shared::low_rank::{Pair, RANK_MAX, added, changed, ending, linear, named, plain_lora};
use crate::shared::sizes;
use crate::{Described, Entry, Forget, Info, Loaded, Method, Step, peft};

const STAGES_MAX: usize = 1024;

struct PeriodicLoRa {
    rank: usize,
    alpha: f64,
    dropout: f32,
    stages: usize,
}

static INFO: Info = Info {
    name: "periodiclora",
    title: "PeriodicLoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2402.16141",
    summary: "W′ = W + (α/r)·Σ B_k·A_k: a LoRA that begins anew several times and keeps what it had",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_PERIODICLORA",
    fields: &[
        rank("8"),
        alpha("16"),
        dropout("0"),
        int("stages", (2, STAGES_MAX as i64), Some("4"), "Pairs that the run trains one after another."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>, [rank, alpha, dropout]: [&'static str; 3]) -> PeriodicLoRa {
    let method = PeriodicLoRa {
        rank: r.count(rank, 8, RANK_MAX),
        alpha: r.float(alpha, 16.0),
        dropout: r.dropout(dropout),
        stages: r.count("stages", 4, STAGES_MAX),
    };
    if method.stages < 2 {
        r.problem("`stages`: expected at least 2; one stage is the method `lora`");
    }
    method
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, ["rank", "alpha", "dropout"]))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| read(r, ["r", "lora_alpha", "lora_dropout"]))
}

fn example() -> Box<dyn Method> {
    Box::new(PeriodicLoRa { rank: 2, alpha: 4.0, dropout: 0.0, stages: 3 })
}

impl Method for PeriodicLoRa {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let aside = (self.stages - 1) * self.rank;
        for site in b.targets() {
            let (out, inn) = linear(site, INFO.title)?;
            let pair = Pair::new(b, &site.path, (out, inn), self.rank)?;
            let past = Pair {
                a: b.state(&format!("{}.lora_A.past", site.path), &[aside, inn], Init::Zeros)?,
                b: b.state(&format!("{}.lora_B.past", site.path), &[out, aside], Init::Zeros)?,
            };
            let scale = (self.alpha / self.rank as f64) as f32;
            b.patch(site.id, Patch::Weight(Box::new(Stages { pair, past, scale, dropout: self.dropout })))?;
        }
        Ok(())
    }

    fn after_step(&self, adapter: &Adapter, moments: &mut dyn Forget, step: Step) -> Result<()> {
        let length = step.total.div_ceil(self.stages as u64);
        if step.number >= step.total || !step.number.is_multiple_of(length) {
            return Ok(());
        }
        let stage = (step.number / length) as usize;
        for (stem, past_a) in ending(adapter, ".lora_A.past")? {
            let name = format!("{stem}.lora_A.weight");
            let (a, b) = (named(adapter, &name)?, named(adapter, &format!("{stem}.lora_B.weight"))?);
            let past_b = named(adapter, &format!("{stem}.lora_B.past"))?;
            past_a.set(put(&past_a.value(), &a.value(), 0, (stage - 1) * self.rank)?)?;
            past_b.set(put(&past_b.value(), &b.value(), 1, (stage - 1) * self.rank)?)?;
            let shape = a.value().shape().to_vec();
            let start =
                Init::kaiming(shape[1]).tensor(&shape, step.seed, &format!("{name}.stage.{stage}"))?;
            a.set(start)?;
            b.set(Tensor::zeros(b.value().shape().to_vec()))?;
            moments.forget(a);
            moments.forget(b);
        }
        Ok(())
    }

    /// All pairs become one.
    fn finish(&self, adapter: &Adapter) -> Result<()> {
        let pairs = ending(adapter, ".lora_A.past")?;
        let mut stages = 0;
        for (_, past_a) in &pairs {
            let numbers = past_a.value().to_vec()?;
            // A pair put aside is noise at least in A.
            let of_stage = self.rank * past_a.value().dim(1);
            let used = numbers.chunks(of_stage.max(1)).filter(|one| one.iter().any(|v| *v != 0.0)).count();
            stages = stages.max(used);
        }
        for (stem, past_a) in pairs {
            let past_b = named(adapter, &format!("{stem}.lora_B.past"))?;
            let a = named(adapter, &format!("{stem}.lora_A.weight"))?;
            let b = named(adapter, &format!("{stem}.lora_B.weight"))?;
            let (old_a, old_b, rank) = (past_a.value(), past_b.value(), stages * self.rank);
            a.replace(cat(&[&old_a.rows_between(0, rank)?, &a.value()], 0)?);
            b.replace(cat(&[&old_b.narrow(1, 0, rank)?, &b.value()], 1)?);
            past_a.replace(Tensor::zeros([0, old_a.dim(1)]));
            past_b.replace(Tensor::zeros([old_b.dim(0), 0]));
        }
        Ok(())
    }

    fn file_type(&self, adapter: &Adapter) -> &'static str {
        if joined(adapter).is_some() { "LORA" } else { INFO.peft_type }
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        if let Some(rank) = joined(model.adapter) {
            let alpha = self.alpha * rank as f64 / self.rank as f64;
            return plain_lora(rank, alpha, self.dropout, &[]);
        }
        let own = json!({
            "lora_alpha": number(self.alpha), "lora_dropout": as_written(self.dropout), "r": self.rank, "stages": self.stages,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// `part` in the place `at` of dimension `dim`.
fn put(whole: &Tensor, part: &Tensor, dim: usize, at: usize) -> Result<Tensor> {
    let end = at + part.dim(dim);
    let before = whole.narrow(dim, 0, at)?;
    Ok(cat(&[&before, part, &whole.narrow(dim, end, whole.dim(dim) - end)?], dim)?)
}

/// The rank of all pairs together, once they are one.
fn joined(adapter: &Adapter) -> Option<usize> {
    let pairs = ending(adapter, ".lora_A.past").ok()?;
    let (stem, _) = pairs.first().filter(|_| pairs.iter().all(|(_, past)| past.value().is_empty()))?;
    Some(named(adapter, &format!("{stem}.lora_A.weight")).ok()?.value().dim(0))
}

struct Stages {
    pair: Pair,
    past: Pair,
    scale: f32,
    dropout: f32,
}

impl WeightPatch for Stages {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let w = changed(base, &self.pair.a.get(), &self.pair.b.get(), self.scale)?;
        let (a, b) = (self.past.a.get(), self.past.b.get());
        if a.is_empty() { Ok(w) } else { Ok(w.add(&b.matmul(&a)?.scale(self.scale)?)?) }
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        // What is finished is added as to a merged weight, without dropout.
        let y = added(base.forward(x)?, x, &self.past.a.get(), &self.past.b.get(), self.scale)?;
        added(y, &dropped, &self.pair.a.get(), &self.pair.b.get(), self.scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::Param;
    use engraft_tensor::testing::{close, sample};

    #[derive(Default)]
    struct Forgotten(usize);

    impl Forget for Forgotten {
        fn forget(&mut self, _param: &Param) {
            self.0 += 1;
        }
    }

    #[test]
    fn stages_add_up_without_a_jump() {
        let (sites, info) = toy();
        let methods = [chosen("periodiclora", json!({ "rank": 1, "alpha": 2, "stages": 3 }))];
        let a = attached(&methods, &[]);
        assert_eq!(a.adapter.trained_count(), 2 * (6 + 6 + 4 + 6));
        let x = sample(&[5, 6], 3);
        let path = "layers.0.attn.q";
        let mut moments = Forgotten::default();
        let mut starts = vec![];
        for number in 1..=8 {
            stir(&a, 0.1 * number as f32);
            let before = both_ways(&a, path, &x).0;
            let step = Step { number, total: 8, seed: 0 };
            methods[0].0.after_step(&a.adapter, &mut moments, step).unwrap();
            let (fast, defined) = both_ways(&a, path, &x);
            close(&fast, &before, 1e-5);
            close(&fast, &defined, 1e-5);
            starts
                .push(named(&a.adapter, &format!("{path}.lora_A.weight")).unwrap().value().to_vec().unwrap());
        }
        // After steps 3 and 6, A and B at four matrices.
        assert_eq!(moments.0, 2 * 2 * 4);
        assert_ne!(starts[2], starts[5]);
        let before = both_ways(&a, path, &x).0;
        methods[0].0.finish(&a.adapter).unwrap();
        close(&both_ways(&a, path, &x).0, &before, 1e-5);
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(
            [&config["peft_type"], &config["r"], &config["lora_alpha"]],
            [&json!("LORA"), &json!(3), &json!(6)]
        );
        let loaded = crate::load_adapter(&config, tensors, &sites, &info).unwrap();
        let loaded = crate::Attached {
            adapter: loaded.adapter,
            dead_targets: vec![],
            dead_modules: vec![],
            without_targets: vec![],
        };
        close(&both_ways(&loaded, path, &x).0, &before, 1e-5);
    }

    #[test]
    fn a_run_that_stops_early_has_the_rank_it_came_to() {
        let (sites, info) = toy();
        let methods = [chosen("periodiclora", json!({ "rank": 2, "stages": 4 }))];
        let a = attached(&methods, &[]);
        for number in 1..=3 {
            let step = Step { number, total: 8, seed: 0 };
            methods[0].0.after_step(&a.adapter, &mut Forgotten::default(), step).unwrap();
        }
        methods[0].0.finish(&a.adapter).unwrap();
        let (config, _) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(4), &json!(32)));
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("periodiclora", json!({ "stages": 2, "dropout": 0.1 }))], &["head"]);
        let good = config(&[chosen("periodiclora", json!({}))], &[]);
        for bad in [json!({ "stages": 1 }), json!({ "r": 0 })] {
            let key = bad.as_object().unwrap().keys().next().unwrap().clone();
            let Err(error) = from_file(&with(good.clone(), bad)) else { panic!("{key} passed") };
            assert!(error.to_string().contains(&key), "{error}");
        }
    }
}
