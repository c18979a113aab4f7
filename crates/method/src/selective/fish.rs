//! FISH mask: the entries with the largest Fisher information are trained.
//!
//! W′ = W + S; S has values at the k = ⌊density·P⌋ places of all targets together where F̂ = Σₓ (∂ log p(y|x)/∂W)² is largest, the
//! sum running over single training sequences with their own labels; zeros at the start. The square is taken of each
//! sequence's gradient, also where several are in a batch: squares of a batch's mean gradient are another thing.
//!
//! Sung, Nair and Raffel 2021, arXiv:2111.09839, equations 3 to 6.
//!
//! `sparse_values` `[k]`, `sparse_indices` `I64` `[k]`, numbered through the targets.

use std::sync::Arc;

use engraft_nn::{Adapter, Builder, Matcher, Result, Sites, Targets};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{float, int};
use crate::shared::scores::{Data, Score, choose};
use crate::shared::sparse::{Budget, Mask};
use crate::{Calibration, Described, Entry, Info, Method, peft};

struct Fish {
    density: f64,
    samples: usize,
}

const SAMPLES_MAX: usize = 1 << 30;

static INFO: Info = Info {
    name: "fish",
    title: "FISH mask",
    class: "selective",
    sites: "weight",
    paper: "arXiv:2111.09839",
    summary: "trains the entries with the largest Fisher information",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_FISH",
    fields: &[
        float("density", (0.0, 1.0), "0.005", "Share of the targets that is trained."),
        int(
            "samples",
            (1, SAMPLES_MAX as i64),
            Some("1024"),
            "Training sequences that the information is summed over, one epoch at most.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| peft::own_settings(&INFO, settings, Fish::read),
    from_file: |config| peft::own_file(&INFO, config, Fish::read),
    example: || Box::new(Fish { density: 0.05, samples: 4 }),
};

impl Fish {
    fn read(r: &mut Reader<'_>) -> Self {
        Fish { density: r.share("density", 0.005), samples: r.count("samples", 1024, SAMPLES_MAX) }
    }

    fn mask(&self) -> Mask {
        Mask::own(Budget::Global(self.density))
    }
}

impl Method for Fish {
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
        choose(&self.mask(), adapter, base, Score::Fisher, Data::Sequences(self.samples))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "density": self.density, "samples": self.samples });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn trained_numbers() {
        // All linear layers but the head have 2·(36 + 24 + 24 + 48) entries.
        assert_eq!(trained("fish", json!({ "density": 0.1 })), 26);
    }

    #[test]
    fn squares_are_taken_a_sequence() {
        let path = "layers.0.attn.q";
        let method = chosen("fish", json!({ "density": 0.2, "samples": 2 })).0;
        let (base, adapter) = prepared(method.as_ref(), &[path]);
        let (x, dy) = base.seen(base.sites().get(base.targets()[0]), 0);
        let mut information = [0.0f32; 36];
        for rows in Linears::SEQUENCES {
            let part = |t: &engraft_tensor::Tensor| t.rows_between(rows.start, rows.end).unwrap();
            let g = part(&dy).t_matmul(&part(&x)).unwrap().to_vec().unwrap();
            information.iter_mut().zip(g).for_each(|(f, g)| *f += g * g);
        }
        let mut order: Vec<usize> = (0..36).collect();
        order.sort_by(|&a, &b| information[b].total_cmp(&information[a]));
        let mut expected: Vec<i64> = order[..7].iter().map(|&i| i as i64).collect();
        expected.sort_unstable();
        assert_eq!(param(&adapter, "sparse_indices").value().to_i64().unwrap(), expected);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("fish", json!({ "density": 0.1 }))], &["head"]);
        let written = config(&[chosen("fish", json!({}))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "samples": 0 }))).is_err());
    }
}
