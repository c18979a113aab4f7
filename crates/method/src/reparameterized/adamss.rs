//! AdaMSS: the outputs of a weight fall into subspaces, and each learns a low-rank change of its own.
//!
//! With the r largest singular values, W ≈ U·Σ·V, a bias as a last column of W. The rows of U are put into K clusters
//! (k-means); cluster i has nᵢ outputs, and W′ = W + ΔW with the rows ΔWᵢ = Bᵢ·Aᵢ·V of its outputs. V [r, in] stays, Aᵢ
//! [rᵢ, r] and Bᵢ [nᵢ, rᵢ] are trained, rᵢ = min(nᵢ, `subspace_rank`). Aᵢ starts as the strongest right singular vectors of its
//! rows of U, Bᵢ as zero, so W′ = W. All clusters together are two thin factors, A·V and the Bᵢ in their places.
//!
//! With `use_asa` subspaces are dropped while training: averages of |w·g| and of its changes (as in AdaLoRA), multiplied and
//! averaged over A and over B, are the importance of a subspace; every `mask_interval` steps those that are less important
//! than the most important so many (a number that falls from all to `asa_target_subspaces`) rest from then on.
//!
//! "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", NeurIPS 2025, in `peft`'s form. Its files
//! have V but not the clusters, which are found anew from the base: from the draws of PyTorch's generator that
//! `torch.svd_lowrank` begins with and those of NumPy's that scikit-learn's k-means begins with. Both come out here as there,
//! since distances between rows of U do not depend on the signs of its columns; but an output that is as near to one
//! centre as to another, to rounding, may come into the other cluster. All of them are where r reaches the number of outputs:
//! then `peft` itself does not give the same clusters everywhere, and such targets are refused. Where the sizes of the clusters
//! are not those of the file, that is an error. As in `peft`, "the most important so many" leaves out the last of them.
//!
//! In each module adamss_A.0, adamss_A.1, … and adamss_B.0, …, and adamss_newB (V) [r, in], or [r, in + 1] where it has a bias.

use std::collections::HashMap;
use std::sync::Arc;

use engraft_nn::{Adapter, Builder, Error, Init, Patch, Result, Role, Site, Value as Frozen};
use engraft_tensor::ops::{Unary, cat};
use engraft_tensor::{Gradients, Param, Tensor, linalg};
use serde_json::{Map, Value, json};

use crate::assemble::Named;
use crate::read::{Reader, number};
use crate::shared::clusters::clusters;
use crate::shared::fields::{flag, float, int};
use crate::shared::kept::Kept;
use crate::shared::matrices;
use crate::shared::sizes;
use crate::shared::torch_random::{Generator, Seed};
use crate::{Described, Entry, Forget, Info, Loaded, Method, Step, peft};

mod allocation;
mod patch;

use allocation::{Allocation, MARKS, drop_least, marks, tracked};
use patch::{OnBias, OnWeight, Subspaces};

const MOST: usize = 1 << 16;
/// `peft`'s rounds of subspace iteration and of k-means, and the seed of the latter.
const ROUNDS: usize = 2;
const ITERATIONS: usize = 10;
const SEED: u64 = 123_456_789;

struct AdaMss {
    rank: usize,
    subspaces: usize,
    subspace_rank: usize,
    /// The share of the largest singular value that those of a subspace must exceed to count for its rank.
    threshold: Option<f64>,
    /// The same number where it is not used.
    unused_threshold: f64,
    seed: Seed,
    init_weights: bool,
    use_asa: bool,
    asa: Allocation,
    /// Shapes of A and B in a file.
    shapes: HashMap<String, Vec<usize>>,
    /// The marks of a schedule as they were read.
    active: Kept<Arc<Vec<bool>>>,
}

static INFO: Info = Info {
    name: "adamss",
    title: "AdaMSS",
    class: "reparameterized",
    sites: "weight, vector",
    paper: "NeurIPS 2025, poster 119606",
    summary: "outputs in clusters of similar singular vectors, each with a low-rank change Bᵢ·Aᵢ·V of its own",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ADAMSS",
    fields: &[
        int(
            "rank",
            (1, MOST as i64),
            Some("100"),
            "Singular directions r that changes may use; less than a target has outputs.",
        ),
        int("num_subspaces", (1, MOST as i64), Some("5"), "Clusters of outputs."),
        int("subspace_rank", (1, MOST as i64), Some("1"), "Rank of the change of a cluster."),
        flag("use_dynamic_rank", "false", "Give clusters with few large singular values a smaller rank."),
        float(
            "svd_threshold",
            (0.0, 1.0),
            "0.1",
            "Share of the largest squared singular value above which others count for such a rank.",
        ),
        int(
            "random_seed",
            (0, u32::MAX as i64),
            Some("0"),
            "Seed of the decomposition, as PyTorch draws from it.",
        ),
        flag("use_asa", "false", "Drop unimportant clusters while training."),
        int(
            "asa_target_subspaces",
            (1, 1 << 30),
            Some("50"),
            "Clusters of all targets together that are left at the end.",
        ),
        int("init_warmup", (0, 1 << 40), Some("50"), "Steps before clusters are dropped."),
        int("final_warmup", (0, 1 << 40), Some("1000"), "Step after which none are dropped."),
        int("mask_interval", (1, 1 << 40), Some("100"), "Steps between two choices."),
        float("asa_importance_beta", (0.0, 1.0), "0.85", "How slowly the average of the importance changes."),
        float("asa_uncertainty_beta", (0.0, 1.0), "0.85", "How slowly the average of its changes changes."),
        float("asa_schedule_exponent", (1e-6, 1e3), "3", "Power with which the number of clusters falls."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, "rank"))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| {
        let start = r.value("init_weights").cloned();
        let init_weights = config.get("init_weights").is_none() || start.is_some_and(|start| start != false);
        AdaMss { init_weights, ..read(r, "r") }
    })
}

fn read(r: &mut Reader<'_>, rank: &'static str) -> AdaMss {
    let (dynamic, unused_threshold) = (r.flag("use_dynamic_rank", false), r.float("svd_threshold", 0.1));
    let mss = AdaMss {
        rank: r.count(rank, 100, MOST),
        subspaces: r.count("num_subspaces", 5, MOST),
        subspace_rank: r.count("subspace_rank", 1, MOST),
        threshold: dynamic.then_some(unused_threshold),
        unused_threshold,
        seed: r.torch_seed("random_seed", 0),
        init_weights: true,
        use_asa: r.flag("use_asa", false),
        asa: Allocation {
            target: r.whole("asa_target_subspaces", 50, 1 << 30),
            first: r.at_least("init_warmup", 50, 0),
            last: r.at_least("final_warmup", 1000, 0),
            interval: r.at_least("mask_interval", 100, 0),
            importance: r.float("asa_importance_beta", 0.85),
            uncertainty: r.float("asa_uncertainty_beta", 0.85),
            exponent: r.float("asa_schedule_exponent", 3.0),
        },
        shapes: HashMap::new(),
        active: Kept::new(),
    };
    let Allocation { target, first, last, interval, exponent, .. } = mss.asa;
    if mss.use_asa && first >= last {
        r.problem(format!("`init_warmup` must be smaller than `final_warmup`, found {first} and {last}"));
    }
    if mss.use_asa && (target == 0 || interval == 0 || exponent <= 0.0) {
        r.problem("`asa_target_subspaces`, `mask_interval` and `asa_schedule_exponent` must be above 0");
    }
    mss
}

fn example() -> Box<dyn Method> {
    let map = json!({ "rank": 5, "num_subspaces": 3, "subspace_rank": 2, "use_asa": true, "asa_target_subspaces": 4,
        "init_warmup": 1, "final_warmup": 9, "mask_interval": 2 });
    let map = map.as_object().cloned().unwrap_or_default();
    Box::new(read(&mut Reader::settings(&map, INFO.fields), "rank"))
}

impl Method for AdaMss {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let cut = "it is cut to that there";
        let rank = sizes::beyond(targets, "rank", |_| self.rank, |(out, inn)| out.min(inn), cut);
        let clusters = sizes::beyond(targets, "num_subspaces", |_| self.subspaces, |(out, _)| out, cut);
        [rank, clusters].concat()
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let mut count = 0;
        for site in b.targets() {
            let (out, inn) = matrices::linear(site, INFO.title)?;
            let bias = b.sites().bias_of(&site.path);
            let mut whole = matrices::frozen(site)?;
            if let Some(Frozen::Vector(bias)) = bias.map(|bias| &bias.value) {
                whole = cat(&[&whole, &bias.reshape([out, 1])?], 1)?;
            }
            let patch = Arc::new(self.subspaces(b, site, &whole, inn)?);
            count += patch.a.len();
            b.patch(site.id, Patch::Weight(Box::new(OnWeight(patch.clone()))))?;
            if let Some(bias) = bias {
                b.patch(bias.id, Patch::Vector(Box::new(OnBias(patch))))?;
            }
        }
        if self.use_asa {
            b.state(MARKS, &[count], Init::Ones)?;
        }
        Ok(())
    }

    fn rests(&self) -> bool {
        self.use_asa
    }

    /// Subspaces that were dropped have no gradient.
    fn after_backward(&self, adapter: &Adapter, gradients: &mut Gradients, _step: Step) -> Result<()> {
        let Some(marks) = marks(adapter) else { return Ok(()) };
        let active = self.active(marks)?;
        for (factors, _) in tracked(adapter).iter().zip(active.iter()).filter(|(_, active)| !**active) {
            factors.iter().for_each(|f| gradients.remove(&f.param));
        }
        Ok(())
    }

    fn after_step(&self, adapter: &Adapter, moments: &mut dyn Forget, step: Step) -> Result<()> {
        let now = step.number - 1;
        let Some(marks) = marks(adapter).filter(|_| (self.asa.first..=self.asa.last).contains(&now)) else {
            return Ok(());
        };
        let update = moments
            .last()
            .ok_or_else(|| Error::Unsupported("AdaMSS needs an optimizer that shows its updates".into()))?;
        let all = tracked(adapter);
        for factor in all.iter().flatten() {
            // What rests has none.
            if let Some(gradient) = update.gradients.get(&factor.param) {
                let gradient = gradient.mul(&update.scale.reshape([])?)?;
                self.asa.smooth(factor, &factor.param.value().mul(&gradient)?.unary(Unary::Abs)?)?;
            }
        }
        if now.is_multiple_of(self.asa.interval) {
            let left = drop_least(&all, &self.active(marks)?, self.asa.left(now, all.len()))?;
            marks.set(Tensor::from_vec(left, [all.len()])?)?;
            // Read here, so that the next step need not.
            self.active(marks)?;
            for average in all.iter().flatten().flat_map(|f| &f.averages) {
                average.set(Tensor::zeros(average.value().shape()))?;
            }
        }
        Ok(())
    }

    fn read_shapes(&mut self, tensors: &Named) {
        let factors = tensors.iter().filter(|(name, _)| name.contains(".adamss_"));
        self.shapes = factors.map(|(name, t)| (name.clone(), t.shape().to_vec())).collect();
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let start = if self.init_weights { json!("orthogonal") } else { Value::Null };
        let own = json!({
            "asa_importance_beta": self.asa.importance, "asa_schedule_exponent": number(self.asa.exponent),
            "asa_target_subspaces": self.asa.target, "asa_uncertainty_beta": self.asa.uncertainty,
            "final_warmup": self.asa.last, "init_warmup": self.asa.first, "init_weights": start, "layers_pattern": null,
            "layers_to_transform": null, "mask_interval": self.asa.interval, "num_subspaces": self.subspaces,
            "r": self.rank, "random_seed": self.seed.written(), "subspace_rank": self.subspace_rank,
            "svd_threshold": self.unused_threshold, "use_asa": self.use_asa, "use_dynamic_rank": self.threshold.is_some(),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl AdaMss {
    /// What is attached at a target whose weight, with its bias, is `whole`.
    fn subspaces(&self, b: &mut Builder<'_>, site: &Site, whole: &Tensor, inn: usize) -> Result<Subspaces> {
        let refuse = |message: String| Error::Site { path: site.path.clone(), message };
        let (out, columns) = (whole.dim(0), whole.width());
        let (least, r) = (out.min(columns), self.rank.min(out).min(columns));
        if r >= out && self.subspaces > 1 {
            let message = format!(
                "its {out} outputs cannot be told apart by {} singular directions; choose a `rank` below {out}, or one subspace",
                self.rank
            );
            return Err(refuse(message));
        }
        let drawn = Tensor::from_vec(Generator::new(self.seed).normal(1.0, least * r), [least, r])?;
        let svd = linalg::svd_lowrank_from(whole, &drawn, ROUNDS)?;
        let count = self.subspaces.min(out);
        let labels = clusters(&svd.u.to_vec()?, r, count, ITERATIONS, SEED);
        let (mut a, mut bs, mut order) = (Vec::new(), Vec::new(), Vec::new());
        let v = b.fixed(&format!("{}.adamss_newB", site.path), &[r, columns], Init::Values(svd.vt))?;
        for i in 0..count {
            let rows: Vec<i64> = (0..out).filter(|&o| labels[o] == i).map(|o| o as i64).collect();
            let name = |letter: char| format!("{}.adamss_{letter}.{i}", site.path);
            let of_file = |letter: char| self.shapes.get(&format!("base_model.model.{}", name(letter)));
            if of_file('B').is_some_and(|shape| shape.first() != Some(&rows.len())) {
                let message = format!(
                    "subspace {i} of the file has {:?} outputs and {} here; the adapter was made on other weights, or with clusters \
                     that rounding decides: merge it in peft where it was made",
                    of_file('B').and_then(|shape| shape.first()).copied().unwrap_or_default(),
                    rows.len()
                );
                return Err(refuse(message));
            }
            if rows.is_empty() {
                return Err(refuse(format!(
                    "subspace {i} has no outputs; choose fewer than {count} `num_subspaces`"
                )));
            }
            let own = linalg::svd(&svd.u.gather(&Tensor::from_i64(rows.clone(), [rows.len()])?)?)?;
            let rank = match of_file('A') {
                Some(shape) => shape.first().copied().unwrap_or_default(),
                None => self.rank_of(&own.s, rows.len()),
            };
            if rank > own.s.len() {
                return Err(refuse(format!(
                    "`subspace_rank` {rank} exceeds its {} directions; choose a smaller one",
                    own.s.len()
                )));
            }
            a.push(b.param(&name('A'), &[rank, r], Init::Values(own.vt.rows_between(0, rank)?))?);
            let start = if self.init_weights { Init::Zeros } else { Init::Normal(0.01) };
            bs.push(b.param(&name('B'), &[rows.len(), rank], start)?);
            if self.use_asa {
                for (letter, shape) in [('A', [rank, r]), ('B', [rows.len(), rank])] {
                    b.state(&format!("{}.importance", name(letter)), &shape, Init::Zeros)?;
                    b.state(&format!("{}.uncertainty", name(letter)), &shape, Init::Zeros)?;
                }
            }
            order.extend(rows);
        }
        let mut place = vec![0; out];
        order.iter().enumerate().for_each(|(at, &output)| place[output as usize] = at as i64);
        Ok(Subspaces { v, a, b: bs, place: Tensor::from_i64(place, [out])?, inn })
    }

    /// Which subspaces are still trained.
    fn active(&self, marks: &Param) -> Result<Arc<Vec<bool>>> {
        self.active.read(marks, |marks| {
            let marks = marks.to_vec()?;
            Ok(Arc::new(marks.into_iter().map(|mark| mark != 0.0).collect()))
        })
    }

    /// The rank of a subspace of `outputs` whose rows of U have these singular values.
    fn rank_of(&self, values: &[f32], outputs: usize) -> usize {
        let most = outputs.min(self.subspace_rank);
        let Some(threshold) = self.threshold else { return most };
        // `peft` looks at the singular values of the rows' products with each other, the squares of these.
        let squares = values.iter().map(|&s| f64::from(s) * f64::from(s));
        let first = squares.clone().next().unwrap_or(0.0);
        squares.filter(|s| *s > threshold * first).count().clamp(1, most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    fn small() -> Value {
        json!({ "rank": 3, "num_subspaces": 2, "subspace_rank": 1 })
    }

    #[test]
    fn each_subspace_changes_its_own_outputs() {
        let a = attached(&[chosen("adamss", small())], &[]);
        // Σ rᵢ·r + nᵢ·rᵢ: two subspaces of rank 1, of 6 and 4 outputs, in two layers.
        assert_eq!(a.adapter.trained_count(), 2 * ((2 * 3 + 6) + (2 * 3 + 4)));
        let x = sample(&[5, 6], 3);
        let (q, v) = ("layers.0.attn.q", "layers.1.attn.v");
        for path in [q, v] {
            close(&both_ways(&a, path, &x).0, &x.matmul_t(&frozen(path)).unwrap(), 1e-6);
        }
        stir(&a, 0.5);
        for path in [q, v] {
            let (fast, defined) = both_ways(&a, path, &x);
            close(&fast, &defined, 1e-5);
        }
        // q has a bias, the last column of what is taken apart; v has none.
        let projection = value_of(&a, &format!("{q}.adamss_newB"));
        assert_eq!(
            (projection.shape(), value_of(&a, &format!("{v}.adamss_newB")).shape()),
            (&[3, 7][..], &[3, 6][..])
        );
        let change = merged(&a, q).sub(&frozen(q)).unwrap().to_vec().unwrap();
        let bias =
            vector(&a, &format!("{q}.bias")).sub(&frozen(&format!("{q}.bias"))).unwrap().to_vec().unwrap();
        let of = |letter: char, i: usize| value_of(&a, &format!("{q}.adamss_{letter}.{i}"));
        let expected: Vec<Tensor> =
            (0..2).map(|i| of('B', i).matmul(&of('A', i)).unwrap().matmul(&projection).unwrap()).collect();
        let mut rows: Vec<Vec<f32>> = expected
            .iter()
            .flat_map(|t| t.to_vec().unwrap().chunks(7).map(<[f32]>::to_vec).collect::<Vec<_>>())
            .collect();
        for (output, found) in change.chunks(6).enumerate() {
            let whole: Vec<f32> = found.iter().chain([&bias[output]]).copied().collect();
            let off = |row: &Vec<f32>| row.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-5);
            let at = rows.iter().position(off).expect("a row of one of the subspaces");
            rows.remove(at);
        }
    }

    #[test]
    fn configurations() {
        for extra in [
            json!({}),
            json!({ "use_dynamic_rank": true, "svd_threshold": 0.4, "subspace_rank": 3, "random_seed": 4 }),
            json!({ "use_asa": true, "asa_target_subspaces": 4, "init_warmup": 2, "final_warmup": 6, "mask_interval": 1 }),
            json!({ "num_subspaces": 1, "rank": 100 }),
        ] {
            survives_saving(&[chosen("adamss", with(small(), extra))], &["head"]);
        }
        let good = config(&[chosen("adamss", small())], &[]);
        assert_eq!((&good["r"], &good["init_weights"]), (&json!(3), &json!("orthogonal")));
        for bad in [
            json!({ "r": 0 }),
            json!({ "use_asa": true, "init_warmup": 1000 }),
            json!({ "num_subspaces": 0 }),
        ] {
            assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
        }
        let (sites, info) = toy();
        for refused in [
            json!({ "rank": 6 }),
            json!({ "num_subspaces": 2 }),
            json!({ "rank": 2, "subspace_rank": 3, "num_subspaces": 1 }),
        ] {
            let methods = [chosen("adamss", refused.clone())];
            assert!(crate::attach(&methods, &[], &sites, &info, 0).is_err(), "{refused}");
        }
    }
}
