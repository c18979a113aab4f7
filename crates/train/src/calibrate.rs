//! The base and the training data, as a method sees them before the first step.

use std::sync::Arc;

use engraft_method::Calibration;
use engraft_nn::{Adapter, Error as Nn, ModelInfo, Names, Pass, Result as NnResult, SiteId, Sites, Targets};
use engraft_tensor::{Gradients, Tensor, no_grad, on_pool};

use crate::batch::{Batch, Feed};
use crate::objective::Objective;
use crate::session::Session;
use crate::{Error, Result};

/// Lets every method of a new run set what it attached by what the base does with the data.
pub(crate) fn prepare(session: &Session) -> Result<()> {
    let mut base = Base { session, feed: session.feed()?, targets: Vec::new(), prefix: String::new() };
    for (number, (method, targets)) in session.methods.iter().enumerate() {
        base.prefix = engraft_method::prefix(&session.methods, number);
        base.targets = match targets.clone().or_else(|| method.default_targets(base.sites())) {
            Some(targets) => {
                let targets = Targets { train_also: session.train_also.clone(), ..targets };
                method.resolve(&targets, base.sites())?.sites
            }
            None => Vec::new(),
        };
        on_pool(|| method.prepare(&session.adapter, &base))?;
    }
    Ok(())
}

struct Base<'s> {
    session: &'s Session,
    feed: Feed<'s>,
    /// The sites of the method that is prepared.
    targets: Vec<SiteId>,
    /// What precedes the names of its tensors.
    prefix: String,
}

impl Base<'_> {
    fn batch(&self, number: u64, probe: &Arc<Adapter>) -> NnResult<(Batch, Pass)> {
        let batch = self.feed.micro(number).map_err(as_nn)?;
        let cx = Pass::new(batch.inputs.layout.clone(), Some(probe.clone()))
            .checkpointing(self.session.plan.train.gradient_checkpointing);
        Ok((batch, cx))
    }
}

fn as_nn(error: Error) -> Nn {
    match error {
        Error::Model(e) => e,
        other => Nn::Unsupported(other.to_string()),
    }
}

impl Calibration for Base<'_> {
    fn sites(&self) -> &Arc<Sites> {
        let sites = self.session.model.sites();
        match (self.session.adapter.names(), sites.older()) {
            (Names::Older, Some(older)) => older,
            _ => sites,
        }
    }

    fn info(&self) -> &ModelInfo {
        self.session.model.info()
    }

    fn seed(&self) -> u64 {
        self.session.plan.train.seed
    }

    fn targets(&self) -> &[SiteId] {
        &self.targets
    }

    fn prefix(&self) -> &str {
        &self.prefix
    }

    fn micro_batches(&self) -> u64 {
        self.feed.micro_batches_per_epoch()
    }

    fn labels(&self, number: u64) -> NnResult<usize> {
        let batch = self.feed.micro(number).map_err(as_nn)?;
        Ok(self.session.objective.count(&batch, false).max(1))
    }

    fn features(&self, number: u64, probe: &Arc<Adapter>) -> NnResult<(Tensor, Vec<i64>)> {
        if self.session.objective != Objective::SequenceClassification {
            let message = "a loss of features needs a class for every sequence, which this task has not; choose the task's own loss";
            return Err(Nn::Unsupported(message.into()));
        }
        let (batch, cx) = self.batch(number, probe)?;
        Ok((self.session.model.features(&batch.inputs, &cx)?.features, batch.labels))
    }

    fn forward(&self, number: u64, probe: &Arc<Adapter>) -> NnResult<()> {
        let (batch, cx) = self.batch(number, probe)?;
        no_grad(|| self.session.model.features(&batch.inputs, &cx)).map(|_| ())
    }

    fn backward(&self, number: u64, probe: &Arc<Adapter>) -> NnResult<Gradients> {
        let (batch, cx) = self.batch(number, probe)?;
        let objective = &self.session.objective;
        let labels = objective.count(&batch, false).max(1);
        let loss = objective.loss(&self.session.model, &batch, &cx).map_err(as_nn)?;
        Ok(loss.scale(1.0 / labels as f32)?.backward()?)
    }
}
