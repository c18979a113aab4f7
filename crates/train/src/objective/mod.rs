//! What a run minimises, one objective a file. Each says which rows of the features have which label; the loss of
//! those rows is the same for all: cross-entropy, summed, so that the trainer can divide by the labels of the whole step.

mod causal_lm;
mod masked_lm;
mod seq2seq;
mod sequence_classification;
mod token_classification;

use std::sync::Arc;

use engraft_nn::{Adapter, Kind, Layout, Model, Output, Pass, Task};
use engraft_tensor::{Tensor, checkpoint, ops};

use crate::batch::{Batch, labelled};
use crate::{Error, Result};

/// Elements of logits that exist at once, in rows × outputs: 32 MiB.
pub(crate) const CHUNK_ELEMENTS: usize = 8 << 20;

/// The objective of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// The next token.
    CausalLm,
    /// The hidden tokens.
    MaskedLm,
    /// The next token of the target.
    Seq2Seq,
    /// A class a sequence, or a picture.
    SequenceClassification,
    /// A class a token.
    TokenClassification,
}

/// Rows of the features that have a label, ascending, and the labels.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Labelled {
    pub rows: Vec<i64>,
    pub labels: Vec<i64>,
}

impl Objective {
    /// The objective that trains `task`.
    ///
    /// # Errors
    /// Embeddings have no objective.
    pub fn of(task: Task) -> Result<Objective> {
        match task {
            Task::CausalLm => Ok(Objective::CausalLm),
            Task::MaskedLm => Ok(Objective::MaskedLm),
            Task::Seq2Seq => Ok(Objective::Seq2Seq),
            Task::SequenceClassification | Task::ImageClassification => Ok(Objective::SequenceClassification),
            Task::TokenClassification => Ok(Objective::TokenClassification),
            Task::Embedding => Err(Error::Setup(
                "sentence embeddings are computed, not trained; set task = \"sequence-classification\" to train classes"
                    .into(),
            )),
        }
    }

    /// Whether labels are the next token's.
    pub fn shifted(self) -> bool {
        self == Objective::CausalLm
    }

    /// Labels of a batch that take part in the loss. `prompted` says that virtual tokens come first.
    pub fn count(self, batch: &Batch, prompted: bool) -> usize {
        match self {
            Objective::CausalLm => causal_lm::count(&batch.inputs.layout, &batch.labels, prompted),
            _ => labelled(&batch.labels),
        }
    }

    /// Which rows of the features have which label.
    pub(crate) fn labelled(self, layout: &Layout, labels: &[i64]) -> Labelled {
        match self {
            Objective::CausalLm => causal_lm::rows(layout, labels),
            Objective::MaskedLm => masked_lm::rows(layout, labels),
            Objective::Seq2Seq => seq2seq::rows(layout, labels),
            Objective::TokenClassification => token_classification::rows(layout, labels),
            Objective::SequenceClassification => sequence_classification::rows(labels),
        }
    }

    /// The loss of a batch summed over its labels, a scalar on the device.
    pub fn loss(self, model: &Arc<dyn Model>, batch: &Batch, cx: &Pass) -> Result<Tensor> {
        let out = model.features(&batch.inputs, cx)?;
        let found = self.labelled(out.pass.layout(), &batch.labels);
        let mut total: Option<Tensor> = None;
        for part in parts(self, model.as_ref(), &out, found)? {
            let single = part.is_whole;
            let loss = if single { part.loss(model, &part.features)? } else { part.checkpointed(model)? };
            total = Some(match total {
                None => loss,
                Some(sum) => sum.add(&loss)?,
            });
        }
        Ok(total.unwrap_or_else(|| Tensor::scalar(0.0)))
    }
}

/// Labelled rows whose logits are computed together.
pub(crate) struct Part {
    pub features: Tensor,
    pub pass: Pass,
    pub labels: Vec<i64>,
    is_whole: bool,
}

impl Part {
    /// Logits `[rows, outputs]`.
    pub fn logits(&self, model: &dyn Model) -> Result<Tensor> {
        Ok(model.logits(&self.features, &self.pass)?)
    }

    fn loss(&self, model: &Arc<dyn Model>, features: &Tensor) -> Result<Tensor> {
        Ok(summed(model, features, &self.pass, &self.labels)?)
    }

    /// The loss, with logits that backward computes again: all logits of a batch never exist at once.
    fn checkpointed(self, model: &Arc<dyn Model>) -> Result<Tensor> {
        let (model, pass, labels) = (model.clone(), self.pass, self.labels);
        Ok(checkpoint(&[&self.features], move |v| {
            summed(&model, &v[0], &pass, &labels).map_err(|e| match e {
                engraft_nn::Error::Tensor(e) => e,
                other => engraft_tensor::Error::Backward(other.to_string()),
            })
        })?)
    }
}

fn summed(
    model: &Arc<dyn Model>,
    features: &Tensor,
    pass: &Pass,
    labels: &[i64],
) -> engraft_nn::Result<Tensor> {
    let labels = Tensor::from_i64(labels.to_vec(), [labels.len()])?;
    Ok(ops::cross_entropy(&model.logits(features, pass)?, &labels)?.sum()?)
}

/// The labelled rows in parts whose logits fit the bound.
pub(crate) fn parts(
    objective: Objective,
    model: &dyn Model,
    out: &Output,
    found: Labelled,
) -> Result<Vec<Part>> {
    if objective == Objective::SequenceClassification {
        let (features, pass) = (out.features.clone(), out.pass.clone());
        return Ok(vec![Part { features, pass, labels: found.labels, is_whole: true }]);
    }
    let size = (CHUNK_ELEMENTS / model.info().outputs.max(1)).max(64);
    let is_whole = found.rows.len() <= size;
    let part = |(rows, labels): (&[i64], &[i64])| -> Result<Part> {
        let index = Tensor::from_i64(rows.to_vec(), [rows.len()])?;
        let (features, pass) = (out.features.gather(&index)?, out.pass.select(rows)?);
        Ok(Part { features, pass, labels: labels.to_vec(), is_whole })
    };
    found.rows.chunks(size).zip(found.labels.chunks(size)).map(part).collect()
}

/// Whether the adapter puts virtual tokens before the text.
pub fn is_prompted(model: &dyn Model, adapter: Option<&Adapter>) -> bool {
    let prompt = |id: &engraft_nn::SiteId| matches!(model.sites().get(*id).kind, Kind::Prompt { .. });
    adapter.is_some_and(|adapter| adapter.sites().iter().any(prompt))
}

/// Real tokens with a label: (row, label) of every one.
pub(crate) fn real_rows(layout: &Layout, labels: &[i64]) -> Labelled {
    let mut found = Labelled::default();
    let mut at = 0;
    for (sequence, &virtual_count) in layout.sequences().iter().zip(layout.virtual_counts()) {
        for row in sequence.start + virtual_count..sequence.end {
            if let Some(&label) = labels.get(at).filter(|&&l| l != engraft_data::IGNORED) {
                found.rows.push(row as i64);
                found.labels.push(label);
            }
            at += 1;
        }
    }
    found
}
