//! SparseAdapter: bottleneck adapters of which most entries are taken out before training, by a score at the start.
//!
//! A(x) as in `bottleneck`, with W_d ⊙ m and W_u ⊙ m; m keeps the share 1 − sparsity of all entries, those of the highest
//! score over all adapters together:
//!   snip          |w·g|, g the gradient of the loss on the first batches
//!   magnitude     |w|
//!   random        drawn
//!   erdos_renyi   drawn, in each matrix as many as in proportion to (rows + columns)/(rows·columns) of its entries
//! Large-Sparse: a bottleneck `widen` times as wide, of which 1/widen is kept, has as many numbers as the plain one.
//!
//! He et al. 2022, arXiv:2210.04284. Both matrices start N(0, 0.02) (Houlsby: 0.01): at W_u = 0 every score is zero.
//!
//! The tensors of `bottleneck` with zeros where m is, and NAME.mask, m in bits. What is taken out gets no gradient.

use std::sync::Arc;

use engraft_nn::{Adapter, Builder, Init, Kind, Result};
use engraft_tensor::{Gradients, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, number};
use crate::shared::bits::{Bits, MASK, pack, unpack};
use crate::shared::branches::Branches;
use crate::shared::fields::{choice, float, int};
use crate::shared::low_rank::{ending, named};
use crate::{Calibration, Described, Entry, Info, Loaded, Method, Step, Stored, layers, peft};

struct SparseAdapter {
    inner: Box<dyn Method>,
    form: &'static str,
    reduction: f64,
    widen: usize,
    sparsity: f64,
    score: Score,
    batches: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Score {
    Snip,
    Magnitude,
    Random,
    ErdosRenyi,
}

const SCORES: &[(&str, Score)] = &[
    ("snip", Score::Snip),
    ("magnitude", Score::Magnitude),
    ("random", Score::Random),
    ("erdos_renyi", Score::ErdosRenyi),
];
const FORMS: &[(&str, &str)] = &[("pfeiffer", "pfeiffer"), ("houlsby", "houlsby")];

static INFO: Info = Info {
    name: "sparse_adapter",
    title: "SparseAdapter",
    class: "additive",
    sites: "sublayer",
    paper: "arXiv:2210.04284",
    summary: "bottleneck adapters of which only the entries with the highest scores at the start are trained",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_SPARSE_ADAPTER",
    fields: &[
        choice(
            "form",
            &["pfeiffer", "houlsby"],
            "\"pfeiffer\"",
            "After the MLP, or after attention and MLP.",
        ),
        float("reduction", (1.0, 1e6), "16", "Width of the model over width of the bottleneck."),
        float("sparsity", (0.0, 0.9999), "0.8", "Share of the entries that are taken out."),
        int(
            "widen",
            (1, 1024),
            Some("1"),
            "Makes the bottleneck so many times as wide and keeps one in so many entries, whatever `sparsity` says.",
        ),
        choice(
            "score",
            &["snip", "magnitude", "random", "erdos_renyi"],
            "\"snip\"",
            "What makes an entry worth training.",
        ),
        int("batches", (1, 1 << 30), Some("1"), "Micro-batches that snip reads."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> Result<SparseAdapter> {
    let (form, reduction) = (r.one_of("form", FORMS), r.reduction("reduction", 16.0));
    let (widen, sparsity) = (r.count("widen", 1, 1024), r.float("sparsity", 0.8));
    if !(0.0..1.0).contains(&sparsity) {
        r.problem(format!("`sparsity`: expected a number of at least 0 and less than 1, found {sparsity}"));
    }
    let inner = adapters(form, reduction / widen as f64)?;
    let sparsity = if widen > 1 { 1.0 - 1.0 / widen as f64 } else { sparsity };
    let (score, batches) = (r.one_of("score", SCORES), r.at_least("batches", 1, 1));
    Ok(SparseAdapter { inner, form, reduction, widen, sparsity, score, batches })
}

/// The adapters themselves.
fn adapters(form: &str, reduction: f64) -> Result<Box<dyn Method>> {
    let settings = json!({ "form": form, "reduction": reduction });
    (super::bottleneck::ENTRY.from_settings)(&settings.as_object().cloned().unwrap_or_default())
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let method = read(&mut r)?;
    r.finish()?;
    Ok(Box::new(method))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let method = read(&mut r)?;
    let targets = layers::read(&mut r, &method);
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(method), targets, train_also }))
}

fn example() -> Box<dyn Method> {
    let inner = adapters("houlsby", 4.0).unwrap_or_else(|_| (super::bottleneck::ENTRY.example)());
    Box::new(SparseAdapter {
        inner,
        form: "houlsby",
        reduction: 4.0,
        widen: 1,
        sparsity: 0.5,
        score: Score::Random,
        batches: 1,
    })
}

impl Method for SparseAdapter {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some(
            "L·(2·d·r + r + d), r = ⌊d·widen/reduction⌋; of the matrices a share of `sparsity` is taken out before the first step",
        )
    }

    fn by_layers(&self) -> bool {
        true
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.inner.attach(b)?;
        let paths: Vec<String> = b
            .sites()
            .of_kind(|k| matches!(k, Kind::Sublayer { .. }))
            .map(|s| format!("{}.adapters.engraft", s.path))
            .collect();
        for path in paths {
            for end in ["adapter_down.0.weight", "adapter_up.weight"] {
                let name = format!("{path}.{end}");
                if let Some(weight) = b.trained(&format!("{}{name}", b.prefix())) {
                    Bits::new(b, &name, weight.value().shape())?;
                }
            }
        }
        Ok(())
    }

    fn prepare(&self, adapter: &Arc<Adapter>, base: &dyn Calibration) -> Result<()> {
        let masks: Vec<_> =
            ending(adapter, MASK)?.into_iter().filter(|(stem, _)| stem.starts_with(base.prefix())).collect();
        let mut scores = Vec::new();
        let gradients = match self.score {
            Score::Snip => Some(self.gradients(adapter, base)?),
            _ => None,
        };
        for (stem, _) in &masks {
            let weight = named(adapter, stem)?;
            let values = weight.value().to_vec()?;
            let own: Vec<f32> = match &gradients {
                Some(gradients) => {
                    let found = gradients.get(weight).map(Tensor::to_vec).transpose()?;
                    let g = found.unwrap_or_else(|| vec![0.0; values.len()]);
                    values.iter().zip(g).map(|(w, g)| (w * g).abs()).collect()
                }
                None if self.score == Score::Magnitude => values.iter().map(|w| w.abs()).collect(),
                None => {
                    let key = Init::key(base.seed(), &format!("{stem}{MASK}"));
                    (0..values.len() as u64).map(|i| key.uniform(i)).collect()
                }
            };
            scores.push(own);
        }
        let shapes: Vec<Vec<usize>> = masks
            .iter()
            .map(|(stem, _)| Ok(named(adapter, stem)?.value().shape().to_vec()))
            .collect::<Result<_>>()?;
        for (((stem, bytes), keep), shape) in masks.iter().zip(self.chosen(&scores, &shapes)).zip(&shapes) {
            let weight = named(adapter, stem)?;
            bytes.set(pack(&keep)?)?;
            weight.set(weight.value().mul(&unpack(&bytes.value(), shape)?)?)?;
        }
        Ok(())
    }

    fn after_backward(&self, adapter: &Adapter, gradients: &mut Gradients, _step: Step) -> Result<()> {
        for (stem, bytes) in ending(adapter, MASK)? {
            let weight = named(adapter, stem)?;
            if let Some(gradient) = gradients.get(weight) {
                let masked = gradient.mul(&unpack(&bytes.value(), gradient.shape())?)?;
                gradients.set(weight, masked);
            }
        }
        Ok(())
    }

    /// Without the masks, which have done their work.
    fn branches(&self) -> Option<Box<dyn Branches>> {
        self.inner.branches()
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let score = SCORES.iter().find(|s| s.1 == self.score).map_or("snip", |s| s.0);
        let own = json!({
            "batches": self.batches, "form": self.form, "reduction": number(self.reduction), "score": score,
            "sparsity": self.sparsity, "widen": self.widen,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_name(&self, name: &str) -> String {
        self.inner.file_name(name)
    }

    fn stored_as(&self, key: &str) -> Stored {
        if key.ends_with(MASK) { Stored::U8 } else { Stored::F32 }
    }
}

impl SparseAdapter {
    fn gradients(&self, adapter: &Arc<Adapter>, base: &dyn Calibration) -> Result<Gradients> {
        let mut all = base.backward(0, adapter)?;
        for number in 1..self.batches.min(base.micro_batches()) {
            all.add(base.backward(number, adapter)?)?;
        }
        Ok(all)
    }

    /// Which entries of each matrix are kept.
    fn chosen(&self, scores: &[Vec<f32>], shapes: &[Vec<usize>]) -> Vec<Vec<bool>> {
        let total: usize = scores.iter().map(Vec::len).sum();
        let kept = total - (self.sparsity * total as f64).floor() as usize;
        if self.score == Score::ErdosRenyi {
            let counts = shares(kept, shapes);
            return scores.iter().zip(counts).map(|(own, count)| highest(own, count)).collect();
        }
        let all = highest(&scores.concat(), kept);
        let mut first = 0;
        let cut = |own: &Vec<f32>| {
            first += own.len();
            all[first - own.len()..first].to_vec()
        };
        scores.iter().map(cut).collect()
    }
}

/// The `count` highest of these, the earliest of equal ones.
fn highest(scores: &[f32], count: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let mut keep = vec![false; scores.len()];
    order.into_iter().take(count).for_each(|i| keep[i] = true);
    keep
}

/// `kept` entries dealt out to matrices in proportion to rows + columns; a matrix that would get more than it has gets all.
fn shares(kept: usize, shapes: &[Vec<usize>]) -> Vec<usize> {
    let size = |s: &[usize]| s.iter().product::<usize>();
    let mut full = vec![false; shapes.len()];
    loop {
        let rest =
            kept.saturating_sub((0..shapes.len()).filter(|&i| full[i]).map(|i| size(&shapes[i])).sum());
        let sum: usize =
            (0..shapes.len()).filter(|&i| !full[i]).map(|i| shapes[i].iter().sum::<usize>()).sum();
        let share = |i: usize| rest as f64 * shapes[i].iter().sum::<usize>() as f64 / sum.max(1) as f64;
        match (0..shapes.len()).find(|&i| !full[i] && share(i) > size(&shapes[i]) as f64) {
            Some(i) => full[i] = true,
            None => {
                let of = |i: usize| if full[i] { size(&shapes[i]) } else { share(i).floor() as usize };
                return (0..shapes.len()).map(of).collect();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    /// The masks of an adapter that was prepared, by weight.
    fn masks(settings: Value) -> Vec<(Tensor, Vec<f32>)> {
        let method = chosen("sparse_adapter", settings).0;
        let (_, adapter) = prepared(method.as_ref(), &[]);
        let found = ending(&adapter, MASK).unwrap();
        assert!(!found.is_empty());
        let of = |(stem, bytes): (&str, &engraft_tensor::Param)| {
            let weight = named(&adapter, stem).unwrap().value();
            let mask = unpack(&bytes.value(), weight.shape()).unwrap().to_vec().unwrap();
            (weight, mask)
        };
        found.into_iter().map(of).collect()
    }

    fn ones(masks: &[(Tensor, Vec<f32>)]) -> usize {
        masks.iter().flat_map(|(_, mask)| mask).filter(|m| **m == 1.0).count()
    }

    #[test]
    fn trained_numbers() {
        // What the masks take out is attached, and rests at zero.
        let count = trained("sparse_adapter", json!({ "reduction": 2 }));
        assert_eq!(count, 2 * ((3 * 6 + 3) + (6 * 3 + 6)));
    }

    #[test]
    fn what_is_taken_out_is_zero_and_counted() {
        for score in ["random", "magnitude"] {
            let found = masks(json!({ "reduction": 2, "score": score, "sparsity": 0.7 }));
            // Two layers, two matrices [3, 6] each: 72 entries.
            assert_eq!(ones(&found), 72 - 50);
            for (weight, mask) in &found {
                let kept =
                    weight.to_vec().unwrap().into_iter().zip(mask).all(|(w, m)| (w != 0.0) == (*m == 1.0));
                assert!(kept, "{score}");
            }
        }
        let wide = masks(json!({ "reduction": 2, "widen": 2, "score": "random" }));
        assert_eq!(ones(&wide), 72, "as many as in adapters of half the width");
    }

    #[test]
    fn larger_matrices_are_sparser_in_an_erdos_renyi_mask() {
        let shapes = [vec![10, 10], vec![100, 10], vec![2, 2]];
        let counts = shares(150, &shapes);
        assert_eq!(counts, [22, 123, 4]);
        assert_eq!(shares(0, &shapes), [0, 0, 0]);
        assert!(ones(&masks(json!({ "reduction": 2, "score": "erdos_renyi" }))) <= 72 - 57);
    }

    #[test]
    fn entries_that_are_taken_out_get_no_gradient() {
        let method = chosen("sparse_adapter", json!({ "reduction": 2, "score": "random" })).0;
        let (_, adapter) = prepared(method.as_ref(), &[]);
        let loss = adapter
            .trainable()
            .fold(Tensor::scalar(0.0), |sum, p| sum.add(&p.param.get().sum().unwrap()).unwrap());
        let mut gradients = loss.backward().unwrap();
        method.after_backward(&adapter, &mut gradients, Step { number: 1, total: 1, seed: 0 }).unwrap();
        for (stem, bytes) in ending(&adapter, MASK).unwrap() {
            let weight = named(&adapter, stem).unwrap();
            let mask = unpack(&bytes.value(), weight.value().shape()).unwrap();
            let gradient = gradients.get(weight).unwrap().to_vec().unwrap();
            assert_eq!(gradient, mask.to_vec().unwrap(), "{stem}");
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("sparse_adapter", json!({ "form": "houlsby" }))], &["head"]);
        survives_saving(&[chosen("sparse_adapter", json!({ "widen": 2 }))], &[]);
        let good = config(&[chosen("sparse_adapter", json!({}))], &[]);
        for bad in [json!({ "sparsity": 1.0 }), json!({ "score": "grasp" }), json!({ "form": "parallel" })] {
            assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
