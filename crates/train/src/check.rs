//! `train --check`: two steps of everything, stopped between them and resumed, in a directory that is gone afterwards.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::events::Observer;
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
    let options = RunOptions {
        out: dir.path().join("run"),
        stop: Arc::new(AtomicBool::new(true)),
        ..RunOptions::default()
    };
    let first = train(&session, &options, observer)?;
    if first.status != Status::Interrupted {
        return Err(Error::Setup(format!("the check ended after step {} instead of stopping", first.step)));
    }
    let options = RunOptions { resume: true, exact: true, stop: Arc::default(), ..options };
    let outcome = train(&session, &options, observer)?;
    dir.close().map_err(|e| engraft_store::Error::io("remove the directory of the check in", parent, e))?;
    Ok(outcome)
}
