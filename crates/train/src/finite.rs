//! Why a first loss is not finite: before anything was trained, no learning rate is to blame.

use engraft_store::{Limits, Weights};

use crate::Result;
use crate::session::Session;

/// The first tensor that is not finite, of the model's files or of the adapter that training starts from; `None` where all
/// are. Reads every weight, so it is for a run that has failed.
pub(crate) fn first_not_finite(session: &Session) -> Result<Option<String>> {
    let weights = Weights::open(&session.model_dir, &Limits::default())?;
    for (name, raw) in weights.iter() {
        // What is not a number in the file's own type (a table of indices) cannot be other than finite.
        if raw.to_f32().is_ok_and(|values| values.iter().any(|v| !v.is_finite())) {
            return Ok(Some(format!("{name} in {}", session.model_dir.display())));
        }
    }
    for p in session.adapter.params() {
        if p.param.value().to_vec().is_ok_and(|values| values.iter().any(|v| !v.is_finite())) {
            return Ok(Some(format!("{} of the adapter", p.name)));
        }
    }
    Ok(None)
}
