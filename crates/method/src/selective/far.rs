//! FAR, freeze and reconfigure: of the feed-forward layers only the nodes that learn most are trained.
//!
//! First stage (priming): W′ = W + Δ, the whole Δ of the feed-forward matrices trained. The h′ = max(1, ⌊nodes·h⌋) rows i of each
//! matrix with the largest ‖Δᵢ‖₁ are its learning nodes; in the second stage these rows, and their biases, are trained and all
//! others stay. The authors permute the nodes so that trained and frozen ones lie together; the product here adds the rows of
//! S where they are, which gives the same numbers and needs no permutation undone. Whether the primed change is kept is not
//! said in the paper: `rewind` decides, and by default it is.
//!
//! Vucetic et al. 2022, arXiv:2205.01541.
//!
//! `sparse_values` [h′·in], `sparse_indices` `I64` [h′·in]: whole rows; `far_bias` [h′], of matrices that have a bias.

use std::sync::Arc;

use engraft_nn::{Adapter, Builder, Error, Init, Pass, Patch, Result, Role, Site, VectorPatch};
use engraft_tensor::ops::Pattern;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{flag, float};
use crate::shared::scores::Best;
use crate::shared::sparse::{Budget, Mask, shape, whole_rows};
use crate::shared::staged::{self, Change, DENSE};
use crate::{Described, Entry, Forget, Info, Method, Step, peft};

struct Far {
    nodes: f64,
    /// Share of the steps in the first stage; `None` where there is none.
    priming: Option<f64>,
    rewind: bool,
}

static INFO: Info = Info {
    name: "far",
    title: "FAR",
    class: "selective",
    sites: "weight, vector",
    paper: "arXiv:2205.01541",
    summary: "trains the feed-forward nodes that move most in a priming stage",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Gate, Role::Up, Role::Down]),
    peft_type: "ENGRAFT_FAR",
    fields: &[
        float("nodes", (0.0, 1.0), "0.1", "Share of the nodes of each matrix that go on learning."),
        float("priming_share", (0.0, 1.0), "0.1", "Share of the steps in which all nodes learn."),
        flag("rewind", "false", "Put the nodes back to the pretrained numbers after priming."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| {
        peft::own_settings(&INFO, settings, |r| Far {
            priming: Some(r.share("priming_share", 0.1)),
            ..Far::read(r)
        })
    },
    from_file: |config| peft::own_file(&INFO, config, Far::read),
    example: || Box::new(Far { nodes: 0.2, priming: None, rewind: false }),
};

impl Far {
    fn read(r: &mut Reader<'_>) -> Self {
        Far { nodes: r.share("nodes", 0.1), priming: None, rewind: r.flag("rewind", false) }
    }

    fn mask(&self) -> Mask {
        Mask::own(Budget::WholeRows(self.nodes))
    }

    fn settle(&self, adapter: &Adapter) -> Result<()> {
        let (mut places, mut values) = (Vec::new(), Vec::new());
        for (stem, dense) in staged::matrices(adapter) {
            let change = dense.value();
            let (inn, numbers) = (change.width(), change.to_vec()?);
            let own = |part: &str| format!("{stem}.{part}");
            let count = staged::own(adapter, &own("sparse_values"))?.value().len();
            let scores: Vec<f32> = numbers.chunks(inn).map(|row| row.iter().map(|v| v.abs()).sum()).collect();
            let mut best = Best::new(count / inn);
            best.offer(&stem, 0, &scores)?;
            let kept = whole_rows(&best.places(), inn);
            let at: Vec<f32> =
                kept.iter().map(|&p| if self.rewind { 0.0 } else { numbers[p as usize] }).collect();
            places.push((
                own("sparse_indices"),
                Tensor::from_i64(kept.iter().map(|&p| p as i64).collect(), [count])?,
            ));
            values.push((own("sparse_values"), Tensor::from_vec(at, [count])?));
        }
        staged::settle(adapter, places.into_iter().chain(values))
    }
}

struct Plain(Param);

impl Change for Plain {
    fn change(&self, _at: Option<(&Site, &Pass)>) -> Result<Tensor> {
        Ok(self.0.get())
    }
}

/// Biases of the learning nodes: b′ = b + v at their rows, once these are known.
struct NodeBias {
    stage: Option<Param>,
    values: Param,
    /// The places of the matrix, whole rows of `inn`.
    places: Param,
    inn: usize,
}

impl VectorPatch for NodeBias {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        if self.stage.as_ref().map_or(Ok(false), staged::first_stage)? {
            return Ok(v.clone());
        }
        let places = self.places.value().to_i64()?;
        let rows = places.chunks(self.inn).map(|row| row[0] as u64 / self.inn as u64);
        let pattern = Arc::new(Pattern::new(rows, (1, v.len()), 0)?);
        let moved = v.reshape([1, v.len()])?.scatter_sparse(&self.values.get(), &pattern)?;
        Ok(moved.reshape([v.len()])?)
    }
}

impl Method for Far {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let feeds = |s: &&Site| matches!(s.role, Role::Gate | Role::Up | Role::Down);
        if let Some(other) = b.targets().into_iter().find(|s| !feeds(s)) {
            let message = "FAR has nodes of feed-forward layers; choose roles gate, up and down as targets";
            return Err(Error::Site { path: other.path.clone(), message: message.into() });
        }
        let make = |b: &mut Builder<'_>, site: &Site| -> Result<Arc<dyn Change>> {
            let (out, inn) = shape(site)?;
            Ok(Arc::new(Plain(b.working(
                &format!("{}.dense", site.path),
                &[out, inn],
                Init::Zeros,
                DENSE,
            )?)))
        };
        let make: Option<&staged::Make<'_>> = if self.priming.is_some() { Some(&make) } else { None };
        let (stage, masks) = staged::attach(&self.mask(), b, make)?;
        for (site, places) in masks {
            let Some(bias) = b.sites().bias_of(&site.path) else { continue };
            let inn = shape(site)?.1;
            let count = places.value().len() / inn;
            let values = b.param(&format!("{}.far_bias", site.path), &[count], Init::Zeros)?;
            b.patch(
                bias.id,
                Patch::Vector(Box::new(NodeBias { stage: stage.clone(), values, places, inn })),
            )?;
        }
        Ok(())
    }

    fn after_step(&self, adapter: &Adapter, _moments: &mut dyn Forget, step: Step) -> Result<()> {
        match self.priming {
            Some(share) if step.number == staged::last_dense(share, step) => self.settle(adapter),
            _ => Ok(()),
        }
    }

    fn finish(&self, adapter: &Adapter) -> Result<()> {
        if staged::is_dense(adapter)? { self.settle(adapter) } else { Ok(()) }
    }

    fn rests(&self) -> bool {
        self.priming.is_some()
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "nodes": self.nodes, "rewind": self.rewind });
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

    const PATH: &str = "layers.0.mlp.down";

    /// After priming by some Δ.
    fn primed(rewind: bool) -> (Linears, Arc<Adapter>, Tensor) {
        let method = chosen("far", json!({ "nodes": 0.4, "priming_share": 0.25, "rewind": rewind })).0;
        let (base, adapter) = prepared(method.as_ref(), &[PATH]);
        let change = sample(&[6, 8], 3);
        param(&adapter, &format!("{PATH}.dense")).set(change.clone()).unwrap();
        method.after_step(&adapter, &mut Nothing, Step { number: 1, total: 8, seed: 1 }).unwrap();
        assert!(staged::is_dense(&adapter).unwrap());
        method.after_step(&adapter, &mut Nothing, Step { number: 2, total: 8, seed: 1 }).unwrap();
        (base, adapter, change)
    }

    #[test]
    fn the_rows_that_moved_most_go_on() {
        for rewind in [false, true] {
            let (base, adapter, change) = primed(rewind);
            let rows = change.to_vec().unwrap();
            let moved = |r: &usize| rows[r * 8..(r + 1) * 8].iter().map(|v| v.abs()).sum::<f32>();
            let mut order: Vec<usize> = (0..6).collect();
            order.sort_by(|a, b| moved(b).total_cmp(&moved(a)));
            let kept = &order[..2];
            let merged = engraft_nn::merged_tensors(base.sites(), &adapter).unwrap();
            let weight = merged.iter().find(|m| m.site.path == PATH).unwrap();
            let found = weight.value.sub(&frozen(PATH)).unwrap().to_vec().unwrap();
            for row in 0..6 {
                for column in 0..8 {
                    let i = row * 8 + column;
                    let expected = if kept.contains(&row) && !rewind { rows[i] } else { 0.0 };
                    assert!((found[i] - expected).abs() < 1e-6);
                }
            }
            // Of the others neither weights nor biases have gradients.
            let bias = param(&adapter, &format!("{PATH}.far_bias"));
            bias.set(Tensor::full(1.0, [2])).unwrap();
            let merged = engraft_nn::merged_tensors(base.sites(), &adapter).unwrap();
            let bias = merged.iter().find(|m| m.site.path == format!("{PATH}.bias")).unwrap();
            let shifted = bias.value.sub(&frozen(&format!("{PATH}.bias"))).unwrap().to_vec().unwrap();
            assert!((0..6).all(|r| (shifted[r] > 0.5) == kept.contains(&r)), "{shifted:?} {kept:?}");
        }
    }

    #[test]
    fn counts_rows_and_biases() {
        let a = attached(&[((ENTRY.example)(), None)], &[]);
        assert_eq!(
            a.adapter.trained_count(),
            2 * (8 + 1),
            "max(1, ⌊0.2·6⌋) rows of 8 with their bias, in two layers"
        );
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, PATH, &sample(&[5, 8], 1));
        close(&fast, &defined, 1e-5);
        let other = [(chosen("far", json!({})).0, Some(engraft_nn::Targets::names(["attn.q"])))];
        let (sites, info) = toy();
        assert!(crate::attach(&other, &[], &sites, &info, 0).is_err(), "attention has no nodes");
    }

    #[test]
    fn configurations() {
        survives_saving(&[((ENTRY.example)(), None)], &["head"]);
        let written = config(&[chosen("far", json!({}))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "nodes": 1.5 }))).is_err());
    }
}
