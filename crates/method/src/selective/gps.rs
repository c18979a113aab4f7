//! GPS, gradient-based parameter selection: of every neuron the inputs with the largest gradient are trained.
//!
//! W′ = W + S; S has K values in each row of W, where |Σ g| is largest, zeros at the start; the biases of the targets are trained
//! too. g is the gradient of a supervised contrastive loss of the features, so that a head that has learned nothing yet has no
//! say: with z = f/‖f‖ and P(i) the other sequences of i's class in the batch,
//! L = meanᵢ 1/|P(i)|·Σ_{p ∈ P(i)} (log Σ_{a ≠ i} exp(zᵢ·z_a/τ) − zᵢ·z_p/τ). Or it is that of the task's own loss.
//!
//! Zhang et al. 2024, arXiv:2312.10136, equations 3 to 6; the loss: Khosla et al. 2020, arXiv:2004.11362.
//!
//! `sparse_values` [K·out], `sparse_indices` `I64` [K·out] of each target, and the new biases under their own names.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use engraft_nn::{Adapter, Builder, Error, Matcher, ModelInfo, Result, Site, SiteId, Sites, Targets, Task};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Gradients, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, number};
use crate::shared::fields::{choice, float, int};
use crate::shared::scores::{Data, Score, choose};
use crate::shared::sizes;
use crate::shared::sparse::{Budget, Mask};
use crate::{Ahead, Calibration, Described, Entry, Info, Method, peft};

const INPUTS_MAX: usize = 1 << 20;
const BATCHES_MAX: usize = 1 << 20;

struct Gps {
    inputs: usize,
    contrastive: bool,
    temperature: f64,
    batches: usize,
}

static INFO: Info = Info {
    name: "gps",
    title: "GPS",
    class: "selective",
    sites: "weight, vector",
    paper: "arXiv:2312.10136",
    summary: "trains the inputs with the largest gradient of every neuron, and biases",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_GPS",
    fields: &[
        int("inputs", (1, INPUTS_MAX as i64), Some("1"), "Entries trained in every row (K)."),
        choice(
            "loss",
            &["contrastive", "task"],
            "\"contrastive\"",
            "Whose gradient chooses: a contrastive loss of the features, which needs a class for every sequence, or the task's.",
        ),
        float("temperature", (1e-3, 1e3), "0.1", "τ of the contrastive loss."),
        int(
            "batches",
            (1, BATCHES_MAX as i64),
            Some("16"),
            "Micro-batches that the gradient is summed over.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| peft::own_settings(&INFO, settings, Gps::read),
    from_file: |config| peft::own_file(&INFO, config, Gps::read),
    example: || Box::new(Gps { inputs: 2, contrastive: true, temperature: 0.1, batches: 1 }),
};

impl Gps {
    fn read(r: &mut Reader<'_>) -> Self {
        let gps = Gps {
            inputs: r.count("inputs", 1, INPUTS_MAX),
            contrastive: r.one_of("loss", &[("contrastive", true), ("task", false)]),
            temperature: r.float("temperature", 0.1),
            batches: r.count("batches", 16, BATCHES_MAX),
        };
        if gps.temperature <= 0.0 {
            r.problem(format!("`temperature`: expected a number above 0, found {}", gps.temperature));
        }
        gps
    }

    fn mask(&self) -> Mask {
        Mask::own(Budget::Rows(self.inputs))
    }
}

impl Method for Gps {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond(targets, "inputs", |_| self.inputs, |(_, inn)| inn, "every one is trained there")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.mask().attach(b)?;
        for site in b.targets() {
            if let Some(bias) = b.sites().bias_of(&site.path).filter(|bias| !b.replaced(bias.id)) {
                b.replace(bias.id)?;
            }
        }
        Ok(())
    }

    fn default_targets(&self, _sites: &Sites) -> Option<Targets> {
        Some(Matcher::AllLinear.into())
    }

    fn suits(&self, run: &Ahead) -> Result<()> {
        let classes = matches!(run.task, Task::SequenceClassification | Task::ImageClassification);
        match self.contrastive && !classes {
            true => Err(Error::Unsupported(format!(
                "`loss` = \"contrastive\" needs a class for every sequence, which the task {} has not; set `loss = \"task\"`",
                run.task.name()
            ))),
            false => Ok(()),
        }
    }

    fn prepare(&self, adapter: &Arc<Adapter>, base: &dyn Calibration) -> Result<()> {
        let data = Data::Batches(self.batches as u64);
        if !self.contrastive {
            return choose(&self.mask(), adapter, base, Score::Gradient, data);
        }
        let base = Contrastive { base, temperature: self.temperature as f32, pairs: AtomicUsize::new(0) };
        choose(&self.mask(), adapter, &base, Score::Gradient, data)?;
        if base.pairs.load(Relaxed) == 0 {
            let message = "no batch has two sequences of one class to compare; set a larger batch_size, or `loss = \"task\"`";
            return Err(Error::Unsupported(message.into()));
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let loss = if self.contrastive { "contrastive" } else { "task" };
        let own = json!({ "inputs": self.inputs, "loss": loss, "temperature": number(self.temperature), "batches": self.batches });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// The base with a contrastive loss of its features in place of the task's.
struct Contrastive<'b> {
    base: &'b dyn Calibration,
    temperature: f32,
    /// Sequences that had another of their class beside them.
    pairs: AtomicUsize,
}

impl Calibration for Contrastive<'_> {
    fn sites(&self) -> &Arc<Sites> {
        self.base.sites()
    }
    fn info(&self) -> &ModelInfo {
        self.base.info()
    }
    fn seed(&self) -> u64 {
        self.base.seed()
    }
    fn targets(&self) -> &[SiteId] {
        self.base.targets()
    }
    fn prefix(&self) -> &str {
        self.base.prefix()
    }
    fn micro_batches(&self) -> u64 {
        self.base.micro_batches()
    }
    fn expect(&self, batches: u64) {
        self.base.expect(batches);
    }
    fn forward(&self, number: u64, probe: &Arc<Adapter>) -> Result<()> {
        self.base.forward(number, probe)
    }
    fn backward(&self, number: u64, probe: &Arc<Adapter>) -> Result<Gradients> {
        let (features, classes) = self.base.features(number, probe)?;
        match loss(&features, &classes, self.temperature)? {
            Some((loss, pairs)) => {
                self.pairs.fetch_add(pairs, Relaxed);
                Ok(loss.backward()?)
            }
            None => Ok(Gradients::default()),
        }
    }
}

/// The supervised contrastive loss of features [n, width], and how many of them have another of their class; `None` where none
/// has.
fn loss(features: &Tensor, classes: &[i64], temperature: f32) -> Result<Option<(Tensor, usize)>> {
    let n = classes.len();
    let (mut positive, mut has, mut others) = (vec![0.0; n * n], vec![0.0; n], vec![1.0; n * n]);
    for i in 0..n {
        others[i * n + i] = 0.0;
        let same: Vec<usize> = (0..n).filter(|&p| p != i && classes[p] == classes[i]).collect();
        has[i] = if same.is_empty() { 0.0 } else { 1.0 };
        same.iter().for_each(|&p| positive[i * n + p] = 1.0 / same.len() as f32);
    }
    let pairs = has.iter().filter(|v| **v > 0.0).count();
    if pairs == 0 {
        return Ok(None);
    }
    let squares = features.unary(Unary::Square)?.sum_to(&[n, 1])?;
    let z = features.div(&squares.unary(Unary::Shift(1e-12))?.unary(Unary::Sqrt)?)?;
    let similar = z.matmul_t(&z)?.scale(1.0 / temperature)?;
    // Similarities lie within ±1/τ; the largest one is on the diagonal, and taken off it keeps the exponentials small.
    let shifted = similar.unary(Unary::Shift(-1.0 / temperature))?;
    let square = |values: Vec<f32>| Tensor::from_vec(values, [n, n]);
    let sums = shifted.unary(Unary::Exp)?.mul(&square(others)?)?.sum_to(&[n, 1])?;
    let all = sums.unary(Unary::Log)?.mul(&Tensor::from_vec(has, [n, 1])?)?.sum()?;
    let near = shifted.mul(&square(positive)?)?.sum()?;
    Ok(Some((all.sub(&near)?.scale(1.0 / pairs as f32)?, pairs)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{check_gradients, sample};

    #[test]
    fn every_row_has_as_many_entries_and_biases_are_trained() {
        let method = chosen("gps", json!({ "inputs": 2, "loss": "task", "batches": 2 })).0;
        let path = "layers.0.attn.q";
        let (base, adapter) = prepared(method.as_ref(), &[path]);
        let places = param(&adapter, &format!("{path}.sparse_indices")).value().to_i64().unwrap();
        let g = |n: u64| {
            let (x, dy) = base.seen(base.sites().get(base.targets()[0]), n);
            dy.t_matmul(&x).unwrap()
        };
        let g = g(0).add(&g(1)).unwrap().to_vec().unwrap();
        for row in 0..6 {
            let mut order: Vec<usize> = (0..6).collect();
            order.sort_by(|&a, &b| g[row * 6 + b].abs().total_cmp(&g[row * 6 + a].abs()));
            let mut expected: Vec<i64> = order[..2].iter().map(|&c| (row * 6 + c) as i64).collect();
            expected.sort_unstable();
            assert_eq!(places[2 * row..2 * row + 2], expected);
        }
        assert_eq!(adapter.trained_count(), 2 * 6 + 6, "K·out and the bias");
    }

    #[test]
    fn the_contrastive_loss_is_its_definition() {
        let (f, classes, tau) = (sample(&[5, 3], 1), [0, 1, 0, 2, 0], 0.5f64);
        let values: Vec<Vec<f64>> =
            f.to_vec().unwrap().chunks(3).map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect();
        let unit = |row: &Vec<f64>| {
            let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            row.iter().map(|v| v / norm).collect::<Vec<f64>>()
        };
        let z: Vec<Vec<f64>> = values.iter().map(unit).collect();
        let dot = |i: usize, j: usize| z[i].iter().zip(&z[j]).map(|(a, b)| a * b).sum::<f64>() / tau;
        let mut expected = 0.0;
        for i in [0, 2, 4] {
            let all: f64 = (0..5).filter(|&a| a != i).map(|a| dot(i, a).exp()).sum();
            let same: Vec<usize> = [0, 2, 4].into_iter().filter(|&p| p != i).collect();
            expected += same.iter().map(|&p| all.ln() - dot(i, p)).sum::<f64>() / same.len() as f64 / 3.0;
        }
        let (found, pairs) = loss(&f, &classes, tau as f32).unwrap().unwrap();
        assert!((f64::from(found.item().unwrap()) - expected).abs() < 1e-5 && pairs == 3);
        check_gradients(std::slice::from_ref(&f), |v| match loss(&v[0], &classes, 0.5) {
            Ok(Some((loss, _))) => Ok(loss),
            other => panic!("{}", other.is_ok()),
        })
        .unwrap();
        assert!(loss(&f, &[0, 1, 2, 3, 4], 0.5).unwrap().is_none(), "nothing to compare");
    }

    #[test]
    fn what_has_no_classes_is_refused() {
        let method = chosen("gps", json!({})).0;
        let base = Linears::new(&["layers.0.attn.q"]);
        let adapter = base.adapter(&|b| method.attach(b));
        let error = method.prepare(&adapter, &base).err().unwrap().to_string();
        assert!(error.contains("class"), "{error}");
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("gps", json!({}))], &["head"]);
        let written = config(&[chosen("gps", json!({}))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "temperature": -1.0 }))).is_err());
    }
}
