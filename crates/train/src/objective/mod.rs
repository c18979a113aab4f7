//! What a run minimises, one objective a file. Each says which rows of the features have which label; the loss of
//! those rows is the same for all: cross-entropy, summed, so that the trainer can divide by the labels of the whole step.

mod causal_lm;
mod masked_lm;
mod seq2seq;
mod sequence_classification;
mod token_classification;

use std::sync::Arc;

use engraft_nn::{Adapter, Kind, Layout, Model, Output, Pass, Task};
use engraft_tensor::device::temporary_elements;
use engraft_tensor::{Tensor, Terms, ops};

use crate::batch::{Batch, labelled};
use crate::{Error, Result};

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

    /// The loss of a batch summed over its labels, each weighing `share`; a scalar on the device, from which backward starts.
    pub fn loss(self, model: &Arc<dyn Model>, batch: &Batch, cx: &Pass, share: f32) -> Result<Tensor> {
        let mut terms = Terms::default();
        for part in self.parts(model.as_ref(), batch, cx)? {
            terms.add(|| part.loss(model.as_ref(), share))?;
        }
        Ok(terms.total())
    }

    /// The loss of the first of two passes and `weight` times ½·[KL(sg p₂ ‖ p₁) + KL(sg p₁ ‖ p₂)], both summed over the labels,
    /// each of which weighs `share`.
    pub fn loss_of_two(
        self,
        model: &Arc<dyn Model>,
        batch: &Batch,
        passes: [&Pass; 2],
        weight: f32,
        share: f32,
    ) -> Result<Tensor> {
        let [first, second] = passes.map(|cx| self.parts(model.as_ref(), batch, cx));
        let mut terms = Terms::default();
        for (part, other) in first?.iter().zip(&second?) {
            terms.add(|| part.loss_with(other, model.as_ref(), weight, share))?;
        }
        Ok(terms.total())
    }

    fn parts(self, model: &dyn Model, batch: &Batch, cx: &Pass) -> Result<Vec<Part>> {
        let out = model.features(&batch.inputs, cx)?;
        let found = self.labelled(out.pass.layout(), &batch.labels);
        parts(self, model, &out, found)
    }
}

/// Labelled rows whose logits are computed together: all logits of a batch never exist at once.
pub(crate) struct Part {
    pub features: Tensor,
    pub pass: Pass,
    pub labels: Vec<i64>,
}

impl Part {
    /// Logits `[rows, outputs]`.
    pub fn logits(&self, model: &dyn Model) -> Result<Tensor> {
        Ok(model.logits(&self.features, &self.pass)?)
    }

    fn loss(&self, model: &dyn Model, share: f32) -> engraft_nn::Result<Tensor> {
        cross_entropy(&model.logits(&self.features, &self.pass)?, &self.labels, share)
    }

    /// The loss with the divergence of the same rows in another pass.
    fn loss_with(
        &self,
        other: &Part,
        model: &dyn Model,
        weight: f32,
        share: f32,
    ) -> engraft_nn::Result<Tensor> {
        let logits = model.logits(&self.features, &self.pass)?;
        let apart = divergence(&logits, &model.logits(&other.features, &other.pass)?)?;
        Ok(cross_entropy(&logits, &self.labels, share)?.add(&apart.scale(weight * share)?)?)
    }
}

fn cross_entropy(logits: &Tensor, labels: &[i64], share: f32) -> engraft_nn::Result<Tensor> {
    let labels = Tensor::from_i64(labels.to_vec(), [labels.len()])?;
    Ok(ops::cross_entropy(logits, &labels)?.sum()?.scale(share)?)
}

/// ½·[KL(sg p₂ ‖ p₁) + KL(sg p₁ ‖ p₂)] summed over rows, p the softmax of logits [rows, outputs].
///
/// As Σp₁ = Σp₂, the logarithms' denominators cancel: it is ½·Σ(p₁ − p₂)·(z₁ − z₂). With p₁ − p₂ held fixed, the gradients
/// ½(p₁ − p₂) and ½(p₂ − p₁) are those of the two divergences with respect to their second distributions.
fn divergence(first: &Tensor, second: &Tensor) -> engraft_nn::Result<Tensor> {
    let shares = |logits: &Tensor| logits.detach().softmax();
    let apart = shares(first)?.sub(&shares(second)?)?;
    Ok(apart.mul(&first.sub(second)?)?.sum()?.scale(0.5)?)
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
        return Ok(vec![Part { features, pass, labels: found.labels }]);
    }
    let size = (temporary_elements() / model.info().outputs.max(1)).max(64);
    let part = |(rows, labels): (&[i64], &[i64])| -> Result<Part> {
        let index = Tensor::from_i64(rows.to_vec(), [rows.len()])?;
        let (features, pass) = (out.features.gather(&index)?, out.pass.select(rows)?);
        Ok(Part { features, pass, labels: labels.to_vec() })
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

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_tensor::Param;
    use engraft_tensor::testing::sample;

    #[test]
    fn the_divergence_is_that_of_two_fixed_teachers() {
        let logits = [sample(&[3, 5], 1), sample(&[3, 5], 2).scale(2.0).unwrap()].map(Param::new);
        let [x, y] = [&logits[0], &logits[1]].map(|p| p.get());
        let found = divergence(&x, &y).unwrap();
        let p = |t: &Tensor| t.detach().softmax().unwrap().to_vec().unwrap();
        let (a, b) = (p(&x), p(&y));
        let kl = |p: &[f32], q: &[f32]| p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum::<f32>();
        assert!((found.item().unwrap() - 0.5 * (kl(&b, &a) + kl(&a, &b))).abs() < 1e-5);
        let gradients = found.backward().unwrap();
        for (param, student, teacher) in [(&logits[0], &a, &b), (&logits[1], &b, &a)] {
            // Of KL(t ‖ softmax z) with respect to z: softmax z − t.
            for ((g, s), t) in
                gradients.get(param).unwrap().to_vec().unwrap().iter().zip(student).zip(teacher)
            {
                assert!((g - 0.5 * (s - t)).abs() < 1e-6);
            }
        }
        assert_eq!(divergence(&x, &x).unwrap().item().unwrap(), 0.0);
    }
}
