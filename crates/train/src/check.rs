//! `train --check`: two steps of everything, stopped between them and resumed, in a directory that is gone afterwards.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::events::{Event, Observer};
use crate::run::{Outcome, RunOptions, Status, train};
use crate::session::Session;
use crate::{Error, Result};

/// Batches of the evaluation data that a check looks at.
const EVAL_BATCHES: usize = 2;

/// Takes one step, saves, stops, resumes, takes the second, evaluates and writes the adapter, all below a new directory
/// in `parent` that is removed again.
///
/// # Errors
/// Whatever would stop the run itself.
pub fn check(mut session: Session, parent: &Path, observer: &mut dyn Observer) -> Result<Outcome> {
    session.plan.steps = 2;
    if let Some(eval) = &mut session.eval {
        eval.examples.truncate(EVAL_BATCHES * session.plan.train.batch_size);
    }
    let dir = tempfile::Builder::new().prefix(".engraft-check-").tempdir_in(parent);
    let dir = dir.map_err(|e| engraft_store::Error::io("create a directory in", parent, e))?;
    let options = RunOptions { out: dir.path().join("run"), ..RunOptions::default() };
    let mut stopping = StopAfterFirst { observer: &mut *observer, stop: options.stop.clone() };
    let first = train(&session, &options, &mut stopping)?;
    if first.status != Status::Interrupted {
        return Err(Error::Setup(format!("the check ended after step {} instead of stopping", first.step)));
    }
    let options = RunOptions { resume: true, exact: true, stop: Arc::default(), ..options };
    let outcome = train(&session, &options, observer)?;
    dir.close().map_err(|e| engraft_store::Error::io("remove the directory of the check in", parent, e))?;
    Ok(outcome)
}

/// Stops a run after its first step: what prepares the methods before it is not to be stopped.
struct StopAfterFirst<'a> {
    observer: &'a mut dyn Observer,
    stop: Arc<AtomicBool>,
}

impl Observer for StopAfterFirst<'_> {
    fn event(&mut self, event: &Event) {
        if matches!(event, Event::Data(_)) {
            self.stop.store(true, Ordering::Relaxed);
        }
        self.observer.event(event);
    }

    fn evaluating(&mut self, done: usize, total: usize) {
        self.observer.evaluating(done, total);
    }

    fn preparing(&mut self, method: &str, done: u64, total: Option<u64>) {
        self.observer.preparing(method, done, total);
    }

    fn prepared(&mut self) {
        self.observer.prepared();
    }
}
