//! The base and the training data, as a method sees them before the first step.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use engraft_method::{Calibration, look_first};
use engraft_nn::{Adapter, Error as Nn, ModelInfo, Names, Pass, Result as NnResult, SiteId, Sites, Targets};
use engraft_tensor::{Gradients, Tensor, no_grad, on_pool};

use crate::batch::{Batch, Feed};
use crate::events::Observer;
use crate::objective::Objective;
use crate::session::Session;
use crate::{Error, Result};

/// Lets every method of a new run set what it attached by what the base does with the data.
///
/// # Errors
/// [`Error::Interrupted`] once `stop` is set: nothing is kept, a resumed run looks again.
pub(crate) fn prepare(session: &Session, stop: &AtomicBool, observer: &mut dyn Observer) -> Result<()> {
    let mut base = Base {
        session,
        feed: session.feed()?,
        targets: Vec::new(),
        prefix: String::new(),
        stop,
        watched: Watched::new(observer),
    };
    for (number, (method, targets)) in session.methods.iter().enumerate() {
        base.watched.begin(method.info().title);
        base.prefix = engraft_method::prefix(&session.methods, number);
        base.targets = match targets.clone().or_else(|| method.default_targets(base.sites())) {
            Some(targets) => {
                let targets = Targets { train_also: session.train_also.clone(), ..targets };
                method.resolve(&targets, base.sites())?.sites
            }
            None => Vec::new(),
        };
        match on_pool(|| method.prepare(&session.adapter, &base)) {
            Err(_) if base.watched.stopped.load(Ordering::Relaxed) => return Err(Error::Interrupted),
            prepared => prepared?,
        }
    }
    base.watched.end();
    Ok(())
}

/// Counts the batches that a method looks at, and tells of each.
struct Watched<'s> {
    observer: Mutex<&'s mut dyn Observer>,
    method: &'static str,
    done: AtomicU64,
    /// Zero where the method did not say.
    total: AtomicU64,
    /// A look was refused, since the run is to stop.
    stopped: AtomicBool,
}

impl<'s> Watched<'s> {
    fn new(observer: &'s mut dyn Observer) -> Self {
        let (done, total) = (AtomicU64::new(0), AtomicU64::new(0));
        Watched { observer: Mutex::new(observer), method: "", done, total, stopped: AtomicBool::new(false) }
    }

    fn begin(&mut self, method: &'static str) {
        (self.method, *self.done.get_mut(), *self.total.get_mut()) = (method, 0, 0);
    }

    fn looked(&self) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        let total = Some(self.total.load(Ordering::Relaxed)).filter(|total| *total > 0);
        let mut observer = self.observer.lock().unwrap_or_else(PoisonError::into_inner);
        observer.preparing(self.method, done, total);
    }

    fn end(&mut self) {
        if *self.done.get_mut() > 0 {
            self.observer.get_mut().unwrap_or_else(PoisonError::into_inner).prepared();
        }
    }
}

struct Base<'s> {
    session: &'s Session,
    feed: Feed<'s>,
    /// The sites of the method that is prepared.
    targets: Vec<SiteId>,
    /// What precedes the names of its tensors.
    prefix: String,
    stop: &'s AtomicBool,
    watched: Watched<'s>,
}

impl Base<'_> {
    fn batch(&self, number: u64, probe: &Arc<Adapter>) -> NnResult<(Batch, Pass)> {
        if self.stop.load(Ordering::Relaxed) {
            self.watched.stopped.store(true, Ordering::Relaxed);
            return Err(as_nn(Error::Interrupted));
        }
        let batch = self.feed.micro(number).map_err(as_nn)?;
        let cx = Pass::new(batch.inputs.layout.clone(), Some(probe.clone()))
            .checkpointing(self.session.plan.train.gradient_checkpointing);
        // Under the adapter itself its methods look first, as in training.
        if Arc::ptr_eq(probe, &self.session.adapter) {
            let Session { methods, model, .. } = self.session;
            look_first(methods, probe, model.as_ref(), &batch.inputs, &cx)?;
        }
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

    fn expect(&self, batches: u64) {
        self.watched.total.fetch_add(batches, Ordering::Relaxed);
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
        let features = self.session.model.features(&batch.inputs, &cx)?.features;
        self.watched.looked();
        Ok((features, batch.labels))
    }

    fn forward(&self, number: u64, probe: &Arc<Adapter>) -> NnResult<()> {
        let (batch, cx) = self.batch(number, probe)?;
        no_grad(|| self.session.model.features(&batch.inputs, &cx))?;
        self.watched.looked();
        Ok(())
    }

    fn backward(&self, number: u64, probe: &Arc<Adapter>) -> NnResult<Gradients> {
        let (batch, cx) = self.batch(number, probe)?;
        let objective = &self.session.objective;
        let labels = objective.count(&batch, false).max(1);
        let loss = objective.loss(&self.session.model, &batch, &cx, 1.0 / labels as f32).map_err(as_nn)?;
        let gradients = loss.backward()?;
        self.watched.looked();
        Ok(gradients)
    }
}
