//! One optimizer step, straight down.
//!
//! loss = Σ over micro-batches of the summed cross-entropy / number of labels of the whole step. From the first forward
//! to the update nothing is read from the device; the loss is read once, when the step is logged.

use std::collections::VecDeque;
use std::time::Instant;

use engraft_method::{Part, Step, look_first};
use engraft_nn::{Mode, Pass};
use engraft_tensor::{Gradients, Tensor, forbid_host_reads, on_pool};

use crate::batch::{Batch, Feed};
use crate::error::NotFinite;
use crate::events::StepEvent;
use crate::finite::first_not_finite;
use crate::objective::is_prompted;
use crate::optimizer::{Optimizer, Updated};
use crate::schedule::LearningRate;
use crate::session::Session;
use crate::watch::ZeroWatch;
use crate::{Error, Result};

/// Gradient norms kept for the message of a step that is not finite.
const NORMS: usize = 5;

/// Takes the steps of a run.
pub struct Trainer<'s> {
    session: &'s Session,
    feed: Feed<'s>,
    /// The rows of the two levels, for methods that have two.
    parts: Option<[Feed<'s>; 2]>,
    /// AdamW and its state.
    pub optimizer: Optimizer,
    rate: LearningRate,
    prompted: bool,
    watch: ZeroWatch,
    norms: VecDeque<f32>,
}

/// What a step gave.
pub struct Stepped {
    /// The line of the log.
    pub event: StepEvent,
    /// Alarms about gradients.
    pub warnings: Vec<String>,
}

impl<'s> Trainer<'s> {
    /// A trainer before its first step.
    pub fn new(session: &'s Session) -> Result<Self> {
        let plan = &session.plan;
        let methods: Vec<_> = session.methods.iter().map(|(m, _)| m.as_ref()).collect();
        Ok(Trainer {
            session,
            feed: session.feed()?,
            parts: session.levels()?,
            optimizer: Optimizer::new(&session.adapter, &methods, session.model.sites(), &plan.train),
            rate: LearningRate {
                peak: plan.train.learning_rate,
                schedule: plan.train.schedule,
                warmup: plan.warmup_steps,
                steps: plan.steps,
            },
            prompted: is_prompted(session.model.as_ref(), Some(&session.adapter)),
            watch: ZeroWatch::default(),
            norms: VecDeque::new(),
        })
    }

    /// Share of places that padding would take, 0 to 1.
    pub fn padding_share(&self) -> f64 {
        self.feed.padding_share()
    }

    /// Takes step `number`, from 1.
    ///
    /// # Errors
    /// [`Error::NotFinite`] where loss or gradients are not finite: nothing was updated then.
    pub fn step(&mut self, number: u64) -> Result<Stepped> {
        on_pool(|| self.step_here(number))
    }

    fn step_here(&mut self, number: u64) -> Result<Stepped> {
        let started = Instant::now();
        let session = self.session;
        let at = Step { number, total: session.plan.steps, seed: session.plan.train.seed };
        let batches = self.batches(at)?;
        let labels: usize = batches.iter().map(|b| session.objective.count(b, self.prompted)).sum();
        if labels == 0 {
            return Err(Error::Setup(format!(
                "step {number} has no label to learn from; check the data's labels"
            )));
        }

        let guard = forbid_host_reads();
        let mut gradients = Gradients::default();
        let mut total = Tensor::scalar(0.0);
        let share = 1.0 / labels as f32;
        for (micro, batch) in batches.iter().enumerate() {
            let loss = self.loss(batch, number, micro as u64, share)?;
            gradients.add(loss.backward()?)?;
            total = total.add(&loss.detach())?;
        }
        for (method, _) in &session.methods {
            if let Some(penalty) = method.penalty(&session.adapter, at)? {
                gradients.add(penalty.backward()?)?;
                total = total.add(&penalty.detach())?;
            }
        }
        let unreached = ZeroWatch::unreached(&self.optimizer, &gradients);
        for (method, _) in &session.methods {
            method.after_backward(&session.adapter, &mut gradients, at)?;
        }
        let (norm, scale) = self.optimizer.clip(&gradients);
        // A loss that is not finite stops the update too: 0 · loss is then NaN, and so is the scale.
        let scale = scale.add(&total.scale(0.0)?)?;
        let learning_rate = self.rate.at(number);
        self.optimizer.update(&gradients, &scale, learning_rate)?;
        drop(guard);

        let (loss, norm) = (total.item()?, norm.item()?);
        if !loss.is_finite() || !norm.is_finite() {
            return Err(self.not_finite(number, loss, norm, &batches, &gradients)?);
        }
        let optimizer = &mut self.optimizer;
        let mut updated = Updated { optimizer, gradients: &gradients, scale: &scale, learning_rate };
        for (method, _) in &session.methods {
            method.after_step(&session.adapter, &mut updated, at)?;
        }
        self.norms.push_back(norm);
        self.norms.drain(..self.norms.len().saturating_sub(NORMS));
        let warnings = self.watch.look(number, &self.optimizer, &gradients, &unreached)?;
        let event = StepEvent {
            step: number,
            epoch: number as f64 / self.feed.steps_per_epoch() as f64,
            loss: f64::from(loss),
            learning_rate,
            grad_norm: f64::from(norm),
            tokens: batches.iter().map(|b| b.tokens() as u64).sum(),
            seconds: started.elapsed().as_secs_f64(),
            memory_bytes: engraft_store::process::peak_memory_bytes(),
        };
        Ok(Stepped { event, warnings })
    }

    /// The micro-batches of a step, of the level whose turn it is.
    fn batches(&mut self, at: Step) -> Result<Vec<Batch>> {
        let level = self.session.methods.iter().map(|(m, _)| m.part(at)).find(|part| *part != Part::All);
        match (&mut self.parts, level) {
            (Some([lower, _]), Some(Part::Lower)) => lower.step(at.number.div_ceil(2)),
            (Some([_, upper]), Some(Part::Upper)) => upper.step(at.number.div_ceil(2)),
            _ => self.feed.step(at.number),
        }
    }

    /// The part of a micro-batch in the loss of a step, of whose labels each is `share`.
    fn loss(&self, batch: &Batch, step: u64, micro: u64, share: f32) -> Result<Tensor> {
        let (objective, model) = (self.session.objective, &self.session.model);
        let own = objective.count(batch, self.prompted) as f32 * share;
        let Some(weight) = self.session.methods.iter().find_map(|(m, _)| m.consistency()) else {
            return objective.loss(model, batch, &self.pass(batch, step, micro)?.sharing(own), share);
        };
        // Each pass draws as a micro-batch of its own would; terms that patches bring along come with the first.
        let first = self.pass(batch, step, 2 * micro)?.sharing(own);
        let second = self.pass(batch, step, 2 * micro + 1)?.sharing(0.0);
        objective.loss_of_two(model, batch, [&first, &second], weight, share)
    }

    /// The pass of a micro-batch, after the methods had their first look.
    fn pass(&self, batch: &Batch, step: u64, micro: u64) -> Result<Pass> {
        let session = self.session;
        let mode = Mode::Train { seed: session.plan.train.seed, step, micro };
        let layout = &batch.inputs.layout;
        let cx = Pass::new(layout.clone(), Some(session.adapter.clone()))
            .training(mode)
            .checkpointing(session.plan.train.gradient_checkpointing);
        look_first(&session.methods, &session.adapter, session.model.as_ref(), &batch.inputs, &cx)?;
        Ok(cx)
    }

    /// The error of a step that gave no number, with what is needed to find out why.
    fn not_finite(
        &self,
        step: u64,
        loss: f32,
        norm: f32,
        batches: &[Batch],
        gradients: &Gradients,
    ) -> Result<Error> {
        let mut tensors = Vec::new();
        for slot in &self.optimizer.slots {
            if let Some(gradient) = gradients.get(&slot.param)
                && gradient.to_vec()?.iter().any(|g| !g.is_finite())
            {
                tensors.push(slot.name.clone());
            }
        }
        let (what, value) = if loss.is_finite() { ("gradient norm", norm) } else { ("loss", loss) };
        let untrained = step == 1;
        Ok(Box::new(NotFinite {
            what,
            value,
            step,
            rows: batches.iter().flat_map(|b| b.rows.iter().copied()).collect(),
            file: self.session.plan.data.path.clone(),
            grad_norms: self.norms.iter().copied().collect(),
            tensors,
            kept: None,
            untrained,
            cause: if untrained { first_not_finite(self.session)? } else { None },
        })
        .into())
    }
}
