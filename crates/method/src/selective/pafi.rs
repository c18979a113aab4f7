//! PaFi: the entries with the smallest magnitude are trained.
//!
//! W′ = W + S; S has values at the k = ⌊density·P⌋ places where |W| is smallest, of all targets together or of each matrix,
//! zeros at the start. The mask needs no data and serves every task. Entries that are exactly zero (padding, pruned weights)
//! are taken last.
//!
//! Liao, Meng and Monz 2023, arXiv:2305.17040. Whether the ranking is global is not said there; it is here by default.
//!
//! `sparse_values` `[k]`, `sparse_indices` `I64` `[k]`: of all targets, or of each.

use std::sync::Arc;

use engraft_nn::{Adapter, Builder, Matcher, Result, Sites, Targets};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{choice, float};
use crate::shared::scores::{Data, Score, choose};
use crate::shared::sparse::{Budget, Mask};
use crate::{Calibration, Described, Entry, Info, Method, peft};

struct PaFi {
    density: f64,
    global: bool,
}

static INFO: Info = Info {
    name: "pafi",
    title: "PaFi",
    class: "selective",
    sites: "weight",
    paper: "arXiv:2305.17040",
    summary: "trains the entries of smallest magnitude",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_PAFI",
    fields: &[
        float("density", (0.0, 1.0), "0.005", "Share of the targets that is trained."),
        choice(
            "scope",
            &["global", "tensor"],
            "\"global\"",
            "Whether all targets compete, or the entries of each matrix.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| peft::own_settings(&INFO, settings, PaFi::read),
    from_file: |config| peft::own_file(&INFO, config, PaFi::read),
    example: || Box::new(PaFi { density: 0.05, global: true }),
};

impl PaFi {
    fn read(r: &mut Reader<'_>) -> Self {
        let density = r.share("density", 0.005);
        PaFi { density, global: r.one_of("scope", &[("global", true), ("tensor", false)]) }
    }

    fn mask(&self) -> Mask {
        Mask::own(if self.global { Budget::Global(self.density) } else { Budget::Each(self.density) })
    }
}

impl Method for PaFi {
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
        choose(&self.mask(), adapter, base, Score::Smallest, Data::Batches(0))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "density": self.density, "scope": if self.global { "global" } else { "tensor" } });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn the_smallest_of_all_targets_are_trained() {
        let paths = ["layers.0.attn.q", "layers.0.attn.v"];
        let method = chosen("pafi", json!({ "density": 0.1 })).0;
        let (_, adapter) = prepared(method.as_ref(), &paths);
        let all: Vec<f32> = paths.iter().flat_map(|path| frozen(path).to_vec().unwrap()).collect();
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.sort_by(|&a, &b| all[a].abs().total_cmp(&all[b].abs()));
        let mut expected: Vec<i64> = order[..6].iter().map(|&i| i as i64).collect();
        expected.sort_unstable();
        assert_eq!(param(&adapter, "sparse_indices").value().to_i64().unwrap(), expected);
        assert_eq!(adapter.trained_count(), 6, "⌊0.1·60⌋");
    }

    #[test]
    fn configurations() {
        for scope in ["global", "tensor"] {
            survives_saving(&[chosen("pafi", json!({ "density": 0.1, "scope": scope }))], &["head"]);
        }
        let written = config(&[chosen("pafi", json!({}))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "scope": "row" }))).is_err());
    }
}
