//! SIFT: the entries with the largest first gradient are trained.
//!
//! W′ = W + S; S has k = ⌊density·|W|⌋ + 1 values in each matrix, where |g| of the first backward is largest, zeros at the start.
//! The authors add the increments into W and set them to zero after each step; with values that stay apart nothing of them is
//! lost to the rounding of W.
//!
//! Song et al. 2024, arXiv:2312.11875, algorithm 1.
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

struct Sift {
    density: f64,
    batches: usize,
}

const BATCHES_MAX: usize = 1 << 20;

static INFO: Info = Info {
    name: "sift",
    title: "SIFT",
    class: "selective",
    sites: "weight",
    paper: "arXiv:2312.11875",
    summary: "trains the entries with the largest first gradient",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_SIFT",
    fields: &[
        float("density", (0.0, 1.0), "0.01", "Share of each matrix that is trained."),
        int(
            "batches",
            (1, BATCHES_MAX as i64),
            Some("1"),
            "Micro-batches of the first gradient; set it to `gradient_accumulation` to take those of a whole step.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| peft::own_settings(&INFO, settings, Sift::read),
    from_file: |config| peft::own_file(&INFO, config, Sift::read),
    example: || Box::new(Sift { density: 0.05, batches: 1 }),
};

impl Sift {
    fn read(r: &mut Reader<'_>) -> Self {
        Sift { density: r.share("density", 0.01), batches: r.count("batches", 1, BATCHES_MAX) }
    }

    fn mask(&self) -> Mask {
        Mask::own(Budget::EachAndOne(self.density))
    }
}

impl Method for Sift {
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
        choose(&self.mask(), adapter, base, Score::Gradient, Data::Batches(self.batches as u64))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "density": self.density, "batches": self.batches });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn trained_numbers() {
        // A share of each matrix and one more: [6, 6], two [4, 6] and [6, 8] of two layers.
        assert_eq!(trained("sift", json!({ "density": 0.2 })), 2 * (8 + 5 + 5 + 10));
    }

    #[test]
    fn the_first_gradient_decides() {
        let path = "layers.0.attn.v";
        let method = chosen("sift", json!({ "density": 0.2 })).0;
        let (base, adapter) = prepared(method.as_ref(), &[path]);
        let (x, dy) = base.seen(base.sites().get(base.targets()[0]), 0);
        let g = dy.t_matmul(&x).unwrap().to_vec().unwrap();
        let mut order: Vec<usize> = (0..24).collect();
        order.sort_by(|&a, &b| g[b].abs().total_cmp(&g[a].abs()));
        let mut expected: Vec<i64> = order[..5].iter().map(|&i| i as i64).collect();
        expected.sort_unstable();
        assert_eq!(param(&adapter, &format!("{path}.sparse_indices")).value().to_i64().unwrap(), expected);
    }

    #[test]
    fn what_is_not_chosen_keeps_its_bits() {
        let path = "layers.0.attn.v";
        let method = chosen("sift", json!({ "density": 0.2 })).0;
        let (base, adapter) = prepared(method.as_ref(), &[path]);
        let gradients = base.loss(0, &adapter).unwrap().backward().unwrap();
        let values = param(&adapter, &format!("{path}.sparse_values"));
        values
            .set(values.value().sub(&gradients.get(&values).unwrap().scale(0.1).unwrap()).unwrap())
            .unwrap();
        let merged = engraft_nn::merged_tensors(base.sites(), &adapter).unwrap()[0].value.to_vec().unwrap();
        let moved = merged.iter().zip(frozen(path).to_vec().unwrap()).filter(|(a, b)| **a != *b).count();
        assert_eq!(moved, 5, "⌊0.2·24⌋ + 1");
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("sift", json!({ "density": 0.1 }))], &["head"]);
        let written = config(&[chosen("sift", json!({}))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "batches": "many" }))).is_err());
    }
}
