//! LT-SFT, lottery-ticket sparse fine-tuning: tune all, keep the places that moved most, rewind, tune these alone.
//!
//! First stage: W′ = W + Δ, the whole Δ trained. Then the k = ⌊density·P⌋ entries of all targets together with the largest |Δ| are
//! taken, Δ goes back to zero, and in the second stage W′ = W + S with values at these places alone, zeros at the start. An L1
//! penalty λ·mean|W′ − W| acts in both. Both stages are one run with one learning-rate schedule.
//!
//! Ansell et al. 2022, arXiv:2110.07560, algorithm 1 with one iteration.
//!
//! `sparse_values` `[k]`, `sparse_indices` `I64` `[k]`, numbered through the targets. The values of two adapters add up.

use std::sync::Arc;

use engraft_nn::{Adapter, Builder, Init, Matcher, Pass, Result, Site, Sites, Targets};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::float;
use crate::shared::sparse::{Budget, Mask, shape};
use crate::shared::staged::{self, Change, DENSE};
use crate::{Described, Entry, Forget, Info, Method, Step, peft};

struct LtSft {
    density: f64,
    /// Share of the steps in the first stage; `None` where there is none.
    full: Option<f64>,
    l1: f64,
}

static INFO: Info = Info {
    name: "lt_sft",
    title: "LT-SFT",
    class: "selective",
    sites: "weight",
    paper: "arXiv:2110.07560",
    summary: "tunes all, rewinds, and tunes the entries that had moved most",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_LT_SFT",
    fields: &[
        float("density", (0.0, 1.0), "0.08", "Share of the targets that is trained in the second stage."),
        float("full_share", (0.0, 1.0), "0.5", "Share of the steps in which all is tuned."),
        float(
            "l1",
            (0.0, 1e9),
            "0",
            "Factor λ of the penalty λ·mean|W′ − W|; the authors take 0.1 for languages and 0 for tasks.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| {
        peft::own_settings(&INFO, settings, |r| LtSft {
            full: Some(r.share("full_share", 0.5)),
            ..LtSft::read(r)
        })
    },
    from_file: |config| peft::own_file(&INFO, config, LtSft::read),
    example: || Box::new(LtSft { density: 0.05, full: None, l1: 0.0 }),
};

impl LtSft {
    fn read(r: &mut Reader<'_>) -> Self {
        LtSft { density: r.share("density", 0.08), full: None, l1: r.float("l1", 0.0) }
    }

    fn mask(&self) -> Mask {
        Mask::own(Budget::Global(self.density))
    }

    fn settle(&self, adapter: &Adapter, rewind: bool) -> Result<()> {
        let of = |stem: &str| Ok(staged::own(adapter, &format!("{stem}.dense"))?.value());
        staged::settle_largest(&self.mask(), adapter, rewind, &of)
    }
}

struct Plain(Param);

impl Change for Plain {
    fn change(&self, _at: Option<(&Site, &Pass)>) -> Result<Tensor> {
        Ok(self.0.get())
    }
}

impl Method for LtSft {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let make = |b: &mut Builder<'_>, site: &Site| -> Result<Arc<dyn Change>> {
            let (out, inn) = shape(site)?;
            Ok(Arc::new(Plain(b.working(
                &format!("{}.dense", site.path),
                &[out, inn],
                Init::Zeros,
                DENSE,
            )?)))
        };
        let make: Option<&staged::Make<'_>> = if self.full.is_some() { Some(&make) } else { None };
        staged::attach(&self.mask(), b, make).map(|_| ())
    }

    fn default_targets(&self, _sites: &Sites) -> Option<Targets> {
        Some(Matcher::AllLinear.into())
    }

    fn penalty(&self, adapter: &Adapter, _step: Step) -> Result<Option<Tensor>> {
        if self.l1 == 0.0 {
            return Ok(None);
        }
        let dense = staged::is_dense(adapter)?;
        let of_stage = |p: &&engraft_nn::NamedParam| match dense {
            true => p.group == DENSE,
            false => p.name.ends_with("sparse_values"),
        };
        let (mut sum, mut count) = (Tensor::scalar(0.0), 0);
        for p in adapter.trainable().filter(of_stage) {
            sum = sum.add(&p.param.get().unary(Unary::Abs)?.sum()?)?;
        }
        for p in adapter.params().iter().filter(|p| p.group == DENSE) {
            count += p.param.value().len();
        }
        // What a file holds says nothing of the size of all targets: there the mean is of the values.
        let values = adapter.params().iter().filter(|p| p.name.ends_with("sparse_values"));
        let count = if count > 0 { count } else { values.map(|p| p.param.value().len()).sum() };
        Ok(Some(sum.scale(self.l1 as f32 / count.max(1) as f32)?))
    }

    fn after_step(&self, adapter: &Adapter, _moments: &mut dyn Forget, step: Step) -> Result<()> {
        match self.full {
            Some(share) if step.number == staged::last_dense(share, step) => self.settle(adapter, true),
            _ => Ok(()),
        }
    }

    /// A run that ends in its first stage (its best evaluation was there) keeps the largest changes as they are.
    fn finish(&self, adapter: &Adapter) -> Result<()> {
        if staged::is_dense(adapter)? { self.settle(adapter, false) } else { Ok(()) }
    }

    fn rests(&self) -> bool {
        self.full.is_some()
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "density": self.density, "l1": self.l1 });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Calibration;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    struct Nothing;
    impl Forget for Nothing {
        fn forget(&mut self, _param: &Param) {}
    }

    const PATHS: [&str; 2] = ["layers.0.attn.q", "layers.0.attn.v"];

    /// An adapter in its first stage with some Δ.
    fn moved(settings: Value) -> (Box<dyn Method>, Linears, Arc<Adapter>) {
        let method = chosen("lt_sft", settings).0;
        let (base, adapter) = prepared(method.as_ref(), &PATHS);
        for (number, path) in PATHS.iter().enumerate() {
            let dense = param(&adapter, &format!("{path}.dense"));
            dense.set(sample(dense.value().shape(), number as u64)).unwrap();
        }
        (method, base, adapter)
    }

    #[test]
    fn trained_numbers() {
        // Δ of all matrices in the first stage, ⌊0.1·264⌋ values in the second.
        assert_eq!(trained("lt_sft", json!({ "density": 0.1 })), 2 * (36 + 24 + 24 + 48) + 26);
    }

    #[test]
    fn the_first_stage_is_full_tuning() {
        let (_, base, adapter) = moved(json!({ "density": 0.1 }));
        let merged = engraft_nn::merged_tensors(base.sites(), &adapter).unwrap();
        close(&merged[0].value, &frozen(PATHS[0]).add(&sample(&[6, 6], 0)).unwrap(), 0.0);
        let gradients = base.loss(0, &adapter).unwrap().backward().unwrap();
        let (x, dy) = base.seen(base.sites().get(base.targets()[0]), 0);
        let dense = param(&adapter, &format!("{}.dense", PATHS[0]));
        close(gradients.get(&dense).unwrap(), &dy.t_matmul(&x).unwrap(), 1e-5);
        assert!(gradients.get(&param(&adapter, "sparse_values")).is_none());
        let saved: Vec<&str> = adapter.params().iter().filter(|p| p.saved).map(|p| p.name.as_str()).collect();
        assert_eq!(saved, ["sparse_values", "sparse_indices"], "Δ is not in the file");
    }

    #[test]
    fn the_second_stage_starts_from_the_base_at_the_places_that_moved_most() {
        let (method, base, adapter) = moved(json!({ "density": 0.1, "full_share": 0.25 }));
        let all: Vec<f32> =
            [sample(&[6, 6], 0), sample(&[4, 6], 1)].iter().flat_map(|t| t.to_vec().unwrap()).collect();
        for number in 1..=2 {
            assert!(staged::is_dense(&adapter).unwrap());
            method.after_step(&adapter, &mut Nothing, Step { number, total: 8, seed: 1 }).unwrap();
        }
        assert!(!staged::is_dense(&adapter).unwrap());
        let mut order: Vec<usize> = (0..60).collect();
        order.sort_by(|&a, &b| all[b].abs().total_cmp(&all[a].abs()));
        let mut expected: Vec<i64> = order[..6].iter().map(|&i| i as i64).collect();
        expected.sort_unstable();
        assert_eq!(param(&adapter, "sparse_indices").value().to_i64().unwrap(), expected);
        for merged in engraft_nn::merged_tensors(base.sites(), &adapter).unwrap() {
            close(&merged.value, &frozen(&merged.site.path), 0.0);
        }
        let gradients = base.loss(0, &adapter).unwrap().backward().unwrap();
        assert!(gradients.get(&param(&adapter, "sparse_values")).is_some());
        assert!(gradients.get(&param(&adapter, "layers.0.attn.q.dense")).is_none());
    }

    #[test]
    fn a_run_that_ends_early_keeps_its_largest_changes() {
        let (method, base, adapter) = moved(json!({ "density": 0.1 }));
        method.finish(&adapter).unwrap();
        let merged = engraft_nn::merged_tensors(base.sites(), &adapter).unwrap();
        let (w, change) = (frozen(PATHS[0]).to_vec().unwrap(), sample(&[6, 6], 0).to_vec().unwrap());
        let value = merged[0].value.to_vec().unwrap();
        assert!((0..36).all(|i| value[i] == w[i] || value[i] == w[i] + change[i]));
        assert!((0..36).any(|i| value[i] != w[i]));
    }

    #[test]
    fn the_penalty_is_the_mean_change() {
        let (method, _, adapter) = moved(json!({ "density": 0.1, "l1": 0.5 }));
        let step = Step { number: 1, total: 8, seed: 1 };
        let found = method.penalty(&adapter, step).unwrap().unwrap().item().unwrap();
        let sum: f32 = [sample(&[6, 6], 0), sample(&[4, 6], 1)]
            .iter()
            .flat_map(|t| t.to_vec().unwrap())
            .map(f32::abs)
            .sum();
        assert!((found - 0.5 * sum / 60.0).abs() < 1e-6);
        let (method, _, adapter) = moved(json!({ "density": 0.1 }));
        assert!(method.penalty(&adapter, step).unwrap().is_none());
    }

    #[test]
    fn configurations() {
        let a = (ENTRY.example)();
        survives_saving(&[(a, None)], &["head"]);
        let written = config(&[chosen("lt_sft", json!({ "density": 0.1 }))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "density": 0 }))).is_err());
    }
}
