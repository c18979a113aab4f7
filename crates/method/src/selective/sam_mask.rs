//! SAM, the second-order approximation method: the entries that promise the largest gain are trained.
//!
//! The loss around W is gᵀΔ + ½·ΔᵀHΔ; with H = h·I the best change of one entry gains g²/2h, so that those with the largest |g|
//! are chosen. As in the authors' code, g is the signed sum of gradients over a burn-in in which nothing is updated, and
//! k = max(1, ⌊density·|W|⌋) entries of each matrix are taken. W′ = W + S with zeros at the start.
//!
//! Fu et al. 2023, arXiv:2211.15583, equations 3 to 8. Called `sam_mask` here, since `sam` alone means sharpness-aware
//! minimisation to most.
//!
//! `sparse_values` `[k]`, `sparse_indices` `I64` `[k]` of each target.

use std::sync::Arc;

use engraft_nn::{Adapter, Builder, Matcher, Result, Sites, Targets};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{float, int};
use crate::shared::scores::{Data, Score, choose};
use crate::shared::sparse::{Budget, Mask};
use crate::{Calibration, Described, Entry, Info, Method, peft};

struct SamMask {
    density: f64,
    burn_in: usize,
}

const BURN_IN_MAX: usize = 1 << 20;

static INFO: Info = Info {
    name: "sam_mask",
    title: "SAM (second-order approximation)",
    class: "selective",
    sites: "weight",
    paper: "arXiv:2211.15583",
    summary: "trains the entries with the largest summed gradient, by a second-order argument",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_SAM_MASK",
    fields: &[
        float("density", (0.0, 1.0), "0.005", "Share of each matrix that is trained."),
        int(
            "burn_in",
            (1, BURN_IN_MAX as i64),
            Some("500"),
            "Micro-batches whose gradients are summed before training; at most those of an epoch.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| peft::own_settings(&INFO, settings, SamMask::read),
    from_file: |config| peft::own_file(&INFO, config, SamMask::read),
    example: || Box::new(SamMask { density: 0.05, burn_in: 2 }),
};

impl SamMask {
    fn read(r: &mut Reader<'_>) -> Self {
        SamMask { density: r.share("density", 0.005), burn_in: r.count("burn_in", 500, BURN_IN_MAX) }
    }

    fn mask(&self) -> Mask {
        Mask::own(Budget::Each(self.density))
    }
}

impl Method for SamMask {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.mask().attach(b)
    }

    fn default_targets(&self, _sites: &Sites) -> Option<Targets> {
        Some(Matcher::AllLinear.into())
    }

    fn prepare(&self, adapter: &Arc<Adapter>, base: &dyn Calibration) -> Result<()> {
        // The base stays as it is: what an epoch has shown it shows again.
        let batches = (self.burn_in as u64).min(base.micro_batches());
        choose(&self.mask(), adapter, base, Score::Gradient, Data::Batches(batches))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "density": self.density, "burn_in": self.burn_in });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn trained_numbers() {
        // A share of each matrix: [6, 6], two [4, 6] and [6, 8] of two layers.
        assert_eq!(trained("sam_mask", json!({ "density": 0.2 })), 2 * (7 + 4 + 4 + 9));
    }

    #[test]
    fn gradients_are_summed_with_their_signs() {
        let paths = ["layers.0.attn.q", "layers.0.attn.v"];
        let method = chosen("sam_mask", json!({ "density": 0.2, "burn_in": 3 })).0;
        let (base, adapter) = prepared(method.as_ref(), &paths);
        for (path, id) in paths.iter().zip(base.targets()) {
            let g = |n: u64| {
                let (x, dy) = base.seen(base.sites().get(*id), n);
                dy.t_matmul(&x).unwrap()
            };
            let sum = g(0).add(&g(1)).unwrap().add(&g(2)).unwrap().to_vec().unwrap();
            let mut order: Vec<usize> = (0..sum.len()).collect();
            order.sort_by(|&a, &b| sum[b].abs().total_cmp(&sum[a].abs()));
            let mut expected: Vec<i64> = order[..sum.len() / 5].iter().map(|&i| i as i64).collect();
            expected.sort_unstable();
            assert_eq!(
                param(&adapter, &format!("{path}.sparse_indices")).value().to_i64().unwrap(),
                expected
            );
            assert!(
                param(&adapter, &format!("{path}.sparse_values"))
                    .value()
                    .to_vec()
                    .unwrap()
                    .iter()
                    .all(|v| *v == 0.0)
            );
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("sam_mask", json!({ "density": 0.1 }))], &["head"]);
        let a = attached(&[chosen("sam_mask", json!({ "density": 0.0001 }))], &[]);
        assert!(a.adapter.trainable().all(|p| p.param.value().len() == 1), "at least one of each");
    }
}
