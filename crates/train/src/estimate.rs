//! What a run will take, before it runs: parameters, bytes by part; seconds and memory from a few trial steps.
//!
//! Activations are counted as the inputs and outputs of every linear layer of the blocks for the tokens of the largest
//! micro-batch, 4 bytes each (with gradient checkpointing: of one block, and the inputs of the others), and three times
//! the logits that exist at once. The tape keeps no more than that, and often less: a trial measures what it is.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use engraft_nn::{Base, Kind, Value};
use engraft_tensor::device::temporary_elements;
use serde::Serialize;

use crate::Result;
use crate::session::Session;
use crate::trainer::Trainer;

/// The sizes of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Estimate {
    /// Adapted places by module name, such as `q_proj` → 24.
    pub sites: BTreeMap<String, usize>,
    /// Trained numbers.
    pub trained: usize,
    /// Numbers of the base.
    pub base_parameters: usize,
    /// Memory of the base beside the mapped files.
    pub base_bytes: u64,
    /// Adapter, gradients and moments.
    pub adapter_bytes: u64,
    /// Activations of the largest micro-batch.
    pub activation_bytes: u64,
    /// Bytes of one checkpoint on disk.
    pub checkpoint_bytes: u64,
    /// Bytes that must be free on the disk for the run to begin.
    pub begin_bytes: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens of the largest micro-batch.
    pub largest_batch_tokens: usize,
}

impl Estimate {
    /// Memory in all.
    pub fn total_bytes(&self) -> u64 {
        self.base_bytes + self.adapter_bytes + self.activation_bytes
    }
}

/// The sizes of the run that `session` would make.
pub fn estimate(session: &Session) -> Estimate {
    let sites = session.model.sites();
    let mut by_module: BTreeMap<String, usize> = BTreeMap::new();
    for id in session.adapter.sites() {
        *by_module.entry(sites.get(id).module().to_owned()).or_default() += 1;
    }
    let mut seen = BTreeSet::new();
    let of_value = |site: &engraft_nn::Site| match &site.value {
        Value::Weight(w) => w.shape().0 * w.shape().1,
        Value::Vector(v) => v.len(),
        Value::None => 0,
    };
    let base_parameters =
        sites.iter().filter(|s| s.tensor.is_none() || seen.insert(s.tensor.clone())).map(of_value).sum();
    let trained = session.adapter.trained_count();
    let all: usize = session.adapter.params().iter().map(|p| p.param.value().len()).sum();
    let tokens = largest_batch(session).map_or(0, |(_, tokens)| tokens);
    Estimate {
        sites: by_module,
        trained: session.trained_count(),
        base_parameters,
        base_bytes: session.model_bytes.resident() as u64,
        adapter_bytes: (4 * all + 12 * trained) as u64,
        activation_bytes: activations(session, tokens, session.plan.train.gradient_checkpointing),
        checkpoint_bytes: crate::checkpoint::bytes(&session.adapter),
        begin_bytes: crate::run::bytes_to_begin(&session.adapter),
        steps: session.plan.steps,
        largest_batch_tokens: tokens,
    }
}

/// Epochs that are looked through for the largest micro-batch.
const EPOCHS: u64 = 8;

/// The step whose micro-batch has the most tokens, and how many.
fn largest_batch(session: &Session) -> Option<(u64, usize)> {
    let feed = session.feed().ok()?;
    let steps = session.plan.steps.min(EPOCHS * feed.steps_per_epoch());
    let (step, tokens) = feed.largest(steps)?;
    Some((step, tokens * rows_a_sequence(session)))
}

/// Rows that the model makes of a picture; 1 for text.
fn rows_a_sequence(session: &Session) -> usize {
    let info = session.model.info();
    let Some(images) = &session.train.images else { return 1 };
    let (Some((down, across)), Some(trained), Ok([_, height, width])) =
        (info.any_size, info.picture, images.shape())
    else {
        return info.max_positions;
    };
    let patches = |height, width| (height / down) * (width / across);
    (info.max_positions + patches(height, width)).saturating_sub(patches(trained.height, trained.width))
}

/// Bytes of what is kept for the tokens of one micro-batch.
pub(crate) fn activations(session: &Session, tokens: usize, checkpointing: bool) -> u64 {
    let info = session.model.info();
    let mut blocks = 0u64;
    for site in session.model.sites().iter().filter(|s| s.layer.is_some()) {
        if let Kind::Linear { out, inn, .. } = site.kind {
            blocks += (out + inn) as u64;
        }
    }
    if checkpointing {
        blocks = blocks / info.layers.max(1) as u64 + (info.layers * info.width) as u64;
    }
    let logits =
        3 * info.outputs.saturating_mul(tokens).min(temporary_elements().max(64 * info.outputs)) as u64;
    4 * (blocks * tokens as u64 + logits)
}

/// What trial steps took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Trial {
    /// Seconds a step, the middle one of those taken.
    pub step_seconds: f64,
    /// Seconds of the whole run, without evaluation.
    pub run_seconds: f64,
    /// The most memory that the process held, in bytes, in a step of the largest micro-batch among others; `None` where the
    /// system does not say.
    pub peak_bytes: Option<u64>,
}

/// Takes the step of the largest micro-batch to see how much memory it takes, and `steps` others to see how long they take.
/// The adapter moves: for sessions that are thrown away.
///
/// # Errors
/// As training itself.
pub fn trial(session: &Session, steps: u64) -> Result<Trial> {
    let mut trainer = Trainer::new(session)?;
    if let Some((largest, _)) = largest_batch(session) {
        trainer.step(largest)?;
    }
    let mut seconds = Vec::new();
    for number in 1..=steps.clamp(1, session.plan.steps.max(1)) {
        let started = Instant::now();
        trainer.step(number)?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let step_seconds = seconds[seconds.len() / 2];
    Ok(Trial {
        step_seconds,
        run_seconds: step_seconds * session.plan.steps as f64,
        peak_bytes: engraft_store::process::peak_memory_bytes(),
    })
}
