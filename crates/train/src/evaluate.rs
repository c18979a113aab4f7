//! Loss and metrics of a model, with or without an adapter, on a data set.

use std::collections::BTreeMap;
use std::sync::Arc;

use engraft_data::{Dataset, Example};
use engraft_method::{Chosen, look_first};
use engraft_nn::{Adapter, Model, Output, Pass, Task};
use engraft_tensor::{Tensor, no_grad, on_pool, ops};
use serde::Serialize;

use crate::batch::{Batch, Masking, Packing};
use crate::metrics::Confusion;
use crate::objective::{Objective, parts};
use crate::target::Shift;
use crate::{Error, Result};

/// What is evaluated.
pub struct Evaluated<'a> {
    /// The model.
    pub model: &'a Arc<dyn Model>,
    /// The adapter, or none for the base alone.
    pub adapter: Option<&'a Arc<Adapter>>,
    /// The adapter's methods.
    pub methods: &'a [Chosen],
    /// Rows a batch.
    pub batch_size: usize,
    /// Draws masks, for masked language models; the same ones in every evaluation.
    pub masking: Option<Masking>,
    /// How the labels of targets become decoder inputs.
    pub shift: Option<Shift>,
    /// What the tasks of the data are called; empty where there is one.
    pub tasks: Vec<&'a str>,
}

/// The result of an evaluation.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean loss over the labels.
    pub loss: f64,
    /// Number of labels.
    pub labels: u64,
    /// By name, see [`crate::EvalEvent::metrics`]; `loss` is not among them. Where the data have several tasks, each has its own
    /// as TASK.NAME, TASK.loss too, and mean_NAME is the mean over these.
    pub metrics: BTreeMap<String, f64>,
}

impl Evaluation {
    /// The metric called `name`, or the loss.
    pub fn metric(&self, name: &str) -> Option<f64> {
        if name == "loss" { Some(self.loss) } else { self.metrics.get(name).copied() }
    }
}

/// Evaluates `data`; `progress` is told (batches done, all batches).
///
/// # Errors
/// Data without labels, and whatever the model refuses.
pub fn evaluate(
    of: &Evaluated<'_>,
    data: &Dataset,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Evaluation> {
    let objective = Objective::of(of.model.info().task)?;
    let (mut all, mut by_task) = (Tally::default(), vec![Tally::default(); of.tasks.len()]);
    // Rows of one task and of like length share a batch, longest first: the order changes no result but the time.
    let mut order: Vec<usize> = (0..data.examples.len()).collect();
    let task = |i: usize| data.examples[i].task.unwrap_or(0);
    order.sort_by_key(|&i| (task(i), std::cmp::Reverse(data.examples[i].ids.len())));
    let of_task = order.chunk_by(|&a, &b| of.tasks.is_empty() || task(a) == task(b));
    let batches: Vec<&[usize]> = of_task.flat_map(|rows| rows.chunks(of.batch_size.max(1))).collect();
    for (number, indices) in batches.iter().enumerate() {
        let found = on_pool(|| of.predict(objective, &of.pack(data, indices)?))?;
        all.add(&found);
        if let Some(own) = by_task.get_mut(indices.first().map_or(0, |&i| task(i))) {
            own.add(&found);
        }
        progress(number + 1, batches.len());
    }
    if all.labels == 0 {
        return Err(Error::Setup("the evaluation data hold no label to compare with".into()));
    }
    let mut metrics = all.metrics(objective);
    metrics.extend(metrics_by_task(objective, &of.tasks, &by_task));
    Ok(Evaluation { loss: all.mean_loss(), labels: all.labels, metrics })
}

/// What was counted so far.
#[derive(Clone, Default)]
struct Tally {
    loss: f64,
    labels: u64,
    confusion: Confusion,
}

impl Tally {
    fn add(&mut self, found: &Answers) {
        self.loss += found.loss;
        self.labels += found.predicted.len() as u64;
        found.predicted.iter().for_each(|&(label, predicted)| self.confusion.add(label, predicted));
    }

    fn mean_loss(&self) -> f64 {
        self.loss / self.labels as f64
    }

    fn metrics(&self, objective: Objective) -> BTreeMap<String, f64> {
        metrics(objective, self.mean_loss(), &self.confusion)
    }
}

/// What each task that has labels reaches, as TASK.NAME, and mean_NAME over these tasks.
fn metrics_by_task(objective: Objective, names: &[&str], tallies: &[Tally]) -> BTreeMap<String, f64> {
    let (mut found, mut sums) = (BTreeMap::new(), BTreeMap::<String, f64>::new());
    let tasks: Vec<(&&str, &Tally)> = names.iter().zip(tallies).filter(|(_, own)| own.labels > 0).collect();
    for (name, own) in &tasks {
        for (metric, value) in own.metrics(objective).into_iter().chain([("loss".into(), own.mean_loss())]) {
            found.insert(format!("{}.{metric}", name.replace(char::is_whitespace, "_")), value);
            *sums.entry(format!("mean_{metric}")).or_default() += value;
        }
    }
    found.extend(sums.into_iter().map(|(metric, sum)| (metric, sum / tasks.len() as f64)));
    found
}

fn metrics(objective: Objective, loss: f64, confusion: &Confusion) -> BTreeMap<String, f64> {
    let named = |list: &[(&str, f64)]| list.iter().map(|(name, value)| (name.to_string(), *value)).collect();
    match objective {
        // `best_metric = "accuracy"` of a language model means its tokens.
        Objective::CausalLm | Objective::MaskedLm | Objective::Seq2Seq => {
            let accuracy = confusion.accuracy();
            named(&[("perplexity", loss.exp()), ("accuracy", accuracy), ("token_accuracy", accuracy)])
        }
        Objective::SequenceClassification | Objective::TokenClassification => named(&[
            ("accuracy", confusion.accuracy()),
            ("f1", confusion.macro_f1()),
            ("matthews", confusion.matthews()),
        ]),
    }
}

/// The answers to one batch.
pub(crate) struct Answers {
    /// Summed loss.
    pub loss: f64,
    /// (label, prediction) of every labelled row, in order.
    pub predicted: Vec<(i64, i64)>,
}

impl Evaluated<'_> {
    fn pack(&self, data: &Dataset, indices: &[usize]) -> Result<Batch> {
        let example = |&i: &usize| match self.masking {
            Some(masking) => masking.apply(&data.examples[i], i, 0),
            None => data.examples[i].clone(),
        };
        let examples: Vec<Example> = indices.iter().map(example).collect();
        Batch::pack(&examples, self.packing(data))
    }

    /// What examples of `data` are packed with.
    pub(crate) fn packing<'d>(&self, data: &'d Dataset) -> Packing<'d> {
        let writes = self.model.info().task == Task::CausalLm;
        Packing { images: data.images.as_deref(), shift: self.shift, writes }
    }

    pub(crate) fn predict(&self, objective: Objective, batch: &Batch) -> Result<Answers> {
        no_grad(|| {
            let out = self.features(batch)?;
            let found = objective.labelled(out.pass.layout(), &batch.labels);
            let mut answers = Answers { loss: 0.0, predicted: Vec::new() };
            for part in parts(objective, self.model.as_ref(), &out, found)? {
                let logits = part.logits(self.model.as_ref())?;
                let labels = Tensor::from_i64(part.labels.clone(), [part.labels.len()])?;
                let losses = ops::cross_entropy(&logits, &labels)?.to_vec()?;
                answers.loss += losses.iter().map(|&l| f64::from(l)).sum::<f64>();
                let width = logits.width();
                let predicted = logits.to_vec()?.chunks(width).map(argmax).collect::<Vec<_>>();
                answers.predicted.extend(part.labels.into_iter().zip(predicted));
            }
            Ok(answers)
        })
    }

    fn features(&self, batch: &Batch) -> Result<Output> {
        let cx = Pass::new(batch.inputs.layout.clone(), self.adapter.cloned());
        if let Some(adapter) = self.adapter {
            look_first(self.methods, adapter, self.model.as_ref(), &batch.inputs, &cx)?;
        }
        Ok(self.model.features(&batch.inputs, &cx)?)
    }
}

/// Index of the largest value; the first of equals.
fn argmax(row: &[f32]) -> i64 {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best as i64
}
