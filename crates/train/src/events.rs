//! What happens in a run, as lines of `events.jsonl` and as calls to an [`Observer`]. The library prints nothing.

use std::collections::BTreeMap;

use serde::Serialize;

/// One event. Losses and norms that are not finite are written as `null`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// What the data hold, once at the start.
    Data(DataEvent),
    /// An optimizer step.
    Step(StepEvent),
    /// An evaluation; step 0 is the model before training.
    Eval(EvalEvent),
    /// A checkpoint was committed.
    Checkpoint {
        /// Steps done.
        step: u64,
    },
    /// Something that may spoil the run.
    Warning {
        /// Steps done.
        step: u64,
        /// What and what to do.
        message: String,
    },
    /// The run goes on from a checkpoint.
    Resume {
        /// Steps done.
        step: u64,
        /// Whether the machine and program are those that wrote it, so that the bits will be the same.
        exact: bool,
    },
    /// The run is over.
    End(EndEvent),
}

/// See [`Event::Data`].
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[allow(missing_docs)] // the counts of `engraft_data::Report`
pub struct DataEvent {
    pub rows: usize,
    pub examples: usize,
    pub tokens: usize,
    pub median_length: usize,
    pub length_99: usize,
    pub max_length: usize,
    pub truncated_rows: usize,
    pub truncated_tokens: usize,
    pub untrained_rows: usize,
    pub duplicates: usize,
    pub trained_share: f64,
    /// Share of places that padding would have taken.
    pub padding_share: f64,
    pub eval_examples: usize,
}

/// See [`Event::Step`].
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StepEvent {
    /// Steps done, from 1.
    pub step: u64,
    /// Passes over the data.
    pub epoch: f64,
    /// Mean loss over the labels of the step.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Tokens read.
    pub tokens: u64,
    /// Seconds the step took.
    pub seconds: f64,
    /// Peak memory of the process so far, in bytes, where the system says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
}

/// See [`Event::Eval`].
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct EvalEvent {
    /// Steps done.
    pub step: u64,
    /// Mean loss over the labels.
    pub loss: f64,
    /// By name: `accuracy`, `f1`, `matthews`, `perplexity`, `token_accuracy`.
    pub metrics: BTreeMap<String, f64>,
    /// Whether it is the best so far.
    pub best: bool,
    /// Seconds it took.
    pub seconds: f64,
}

/// See [`Event::End`].
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct EndEvent {
    /// "done", "early stop" or "interrupted".
    pub reason: String,
    /// Steps done.
    pub step: u64,
    /// Seconds of the whole run, earlier parts included.
    pub seconds: f64,
    /// The step whose adapter was written; absent when interrupted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_step: Option<u64>,
}

/// Watches a run. What prepares a method may run on another thread.
pub trait Observer: Send {
    /// Something happened. Called on the training thread; it should return soon.
    fn event(&mut self, event: &Event);

    /// An evaluation has done `done` of `total` batches.
    fn evaluating(&mut self, _done: usize, _total: usize) {}

    /// Before the first step `method` has looked at `done` batches of the data, of `total` where it knows how many.
    fn preparing(&mut self, _method: &str, _done: u64, _total: Option<u64>) {}

    /// All methods have looked.
    fn prepared(&mut self) {}
}

/// Watches nothing.
impl Observer for () {
    fn event(&mut self, _event: &Event) {}
}
