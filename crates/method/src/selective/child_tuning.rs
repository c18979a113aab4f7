//! Child-tuning: a part of the network, the child, receives gradients.
//!
//! F (task-free): W′ = P, P starting as W; before every update g ← g ⊙ m/p with m ~ Bernoulli(p) drawn anew for each entry and
//! step, so that E[g] stays. D (task-driven): W′ = W + S; S has values at the share p of all entries of the targets where the
//! Fisher information, Σ g² over the batches of one epoch before training, is largest. The authors' optimizer decays what was
//! not chosen as well; here it keeps its bits.
//!
//! Xu et al. 2021, arXiv:2109.05687, equations 2 to 6.
//!
//! F: P as the weights themselves. D: `sparse_values` `[k]`, `sparse_indices` `I64` `[k]`, numbered through the targets.

use std::sync::Arc;

use engraft_nn::{Adapter, Builder, Init, Matcher, Patch, Replacement, Result, Sites, Targets};
use engraft_tensor::Gradients;
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{choice, float};
use crate::shared::scores::{Data, Score, choose};
use crate::shared::sparse::{Budget, Mask, shape};
use crate::{Calibration, Described, Entry, Info, Method, Step, peft};

struct ChildTuning {
    driven: bool,
    share: f64,
}

/// The parameters whose gradients are masked.
const GROUP: &str = "child";

static INFO: Info = Info {
    name: "child_tuning",
    title: "Child-tuning",
    class: "selective",
    sites: "weight",
    paper: "arXiv:2109.05687",
    summary: "gradients reach the entries with the largest Fisher information (D) or random ones in every step (F)",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_CHILD_TUNING",
    fields: &[
        choice(
            "variant",
            &["D", "F"],
            "\"D\"",
            "D: a fixed child, chosen by the task; F: another random one in every step.",
        ),
        float("share", (0.0, 1.0), "0.3", "Share of the entries in the child: p_D or p_F."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| peft::own_settings(&INFO, settings, ChildTuning::read),
    from_file: |config| peft::own_file(&INFO, config, ChildTuning::read),
    example: || Box::new(ChildTuning { driven: true, share: 0.3 }),
};

impl ChildTuning {
    fn read(r: &mut Reader<'_>) -> Self {
        ChildTuning {
            driven: r.one_of("variant", &[("D", true), ("F", false)]),
            share: r.share("share", 0.3),
        }
    }

    fn mask(&self) -> Mask {
        Mask::own(Budget::Global(self.share))
    }
}

impl Method for ChildTuning {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        if self.driven {
            return self.mask().attach(b);
        }
        for site in b.targets() {
            let (out, inn) = shape(site)?;
            let engraft_nn::Value::Weight(weight) = &site.value else { continue };
            let start = Init::Values(engraft_nn::Base::dense(weight.as_ref())?);
            let param = b.param_in_group(&format!("{}.weight", site.path), &[out, inn], start, GROUP)?;
            b.patch(site.id, Patch::Weight(Box::new(Replacement(param))))?;
        }
        Ok(())
    }

    fn default_targets(&self, _sites: &Sites) -> Option<Targets> {
        Some(Matcher::AllLinear.into())
    }

    fn prepare(&self, adapter: &Arc<Adapter>, base: &dyn Calibration) -> Result<()> {
        if !self.driven {
            return Ok(());
        }
        choose(&self.mask(), adapter, base, Score::Squares, Data::Epoch)
    }

    fn after_backward(&self, adapter: &Adapter, gradients: &mut Gradients, step: Step) -> Result<()> {
        for p in adapter.params().iter().filter(|p| p.group == GROUP && !self.driven) {
            if let Some(gradient) = gradients.get(&p.param) {
                // Dropout is this mask, the factor 1/p included.
                let masked = gradient.dropout(
                    (1.0 - self.share) as f32,
                    step.seed,
                    Init::key(step.seed, &p.name).stream ^ step.number,
                )?;
                gradients.set(&p.param, masked);
            }
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "variant": if self.driven { "D" } else { "F" }, "share": self.share });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::close;

    #[test]
    fn trained_numbers() {
        let count = |variant| trained("child_tuning", json!({ "variant": variant, "share": 0.25 }));
        let all = 2 * (36 + 24 + 24 + 48);
        assert_eq!([count("F"), count("D")], [all, all / 4]);
    }

    #[test]
    fn the_mean_of_masked_gradients_is_the_gradient() {
        let path = "layers.0.attn.q";
        let method = chosen("child_tuning", json!({ "variant": "F", "share": 0.4 })).0;
        let (base, adapter) = prepared(method.as_ref(), &[path]);
        let weight = param(&adapter, &format!("{path}.weight"));
        close(&weight.value(), &frozen(path), 0.0);
        let plain = base.loss(0, &adapter).unwrap().backward().unwrap().get(&weight).unwrap().clone();
        let (mut sum, mut kept, steps) = (engraft_tensor::Tensor::zeros([6, 6]), 0, 2000);
        for number in 1..=steps {
            let mut gradients = Gradients::default();
            gradients.set(&weight, plain.clone());
            method.after_backward(&adapter, &mut gradients, Step { number, total: steps, seed: 3 }).unwrap();
            let masked = gradients.get(&weight).unwrap();
            let values = masked.to_vec().unwrap();
            kept += values.iter().filter(|v| **v != 0.0).count();
            for (m, g) in values.iter().zip(plain.to_vec().unwrap()) {
                assert!(*m == 0.0 || (m - g / 0.4).abs() < 1e-5 * g.abs().max(1e-3));
            }
            sum = sum.add(masked).unwrap();
        }
        let share = kept as f64 / (36 * steps) as f64;
        assert!((share - 0.4).abs() < 0.01, "{share}");
        // The deviation of a mean of 2000 is √(0.6/0.4/2000) = 0.027 of the gradient.
        close(&sum.scale(1.0 / steps as f32).unwrap(), &plain, 0.12);
    }

    #[test]
    fn the_whole_network_as_its_child_is_plain_tuning() {
        let path = "layers.0.attn.q";
        let method = chosen("child_tuning", json!({ "variant": "D", "share": 1.0 })).0;
        let (base, adapter) = prepared(method.as_ref(), &[path]);
        let values = param(&adapter, "sparse_values");
        let gradient = base.loss(1, &adapter).unwrap().backward().unwrap().get(&values).unwrap().clone();
        let (x, dy) = base.seen(base.sites().get(base.targets()[0]), 1);
        close(&gradient.reshape([6, 6]).unwrap(), &dy.t_matmul(&x).unwrap(), 1e-5);
        let all: Vec<i64> = (0..36).collect();
        assert_eq!(param(&adapter, "sparse_indices").value().to_i64().unwrap(), all);
    }

    #[test]
    fn the_driven_child_has_the_largest_squares_of_an_epoch() {
        let path = "layers.0.attn.v";
        let method = chosen("child_tuning", json!({ "share": 0.25 })).0;
        let (base, adapter) = prepared(method.as_ref(), &[path]);
        let mut information = [0.0f32; 24];
        for number in 0..base.micro_batches() {
            let (x, dy) = base.seen(base.sites().get(base.targets()[0]), number);
            let g = dy.t_matmul(&x).unwrap().to_vec().unwrap();
            information.iter_mut().zip(g).for_each(|(f, g)| *f += g * g);
        }
        let mut order: Vec<usize> = (0..24).collect();
        order.sort_by(|&a, &b| information[b].total_cmp(&information[a]));
        let mut expected: Vec<i64> = order[..6].iter().map(|&i| i as i64).collect();
        expected.sort_unstable();
        assert_eq!(param(&adapter, "sparse_indices").value().to_i64().unwrap(), expected);
    }

    #[test]
    fn configurations() {
        for variant in ["D", "F"] {
            survives_saving(&[chosen("child_tuning", json!({ "variant": variant }))], &["head"]);
        }
        let written = config(&[chosen("child_tuning", json!({}))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "share": 0 }))).is_err());
    }
}
