//! What is not finite: a saved adapter's numbers, and why a first loss is not (before anything was trained, no learning rate is to
//! blame).

use engraft_nn::Adapter;
use engraft_store::{Limits, Weights};
use serde_json::Value;

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
    Ok(not_finite(&session.adapter).map(|(name, _)| format!("{name} of the adapter")))
}

/// The first tensor of an adapter that is not finite, and the first such number in it.
fn not_finite(adapter: &Adapter) -> Option<(&str, f32)> {
    adapter.params().iter().find_map(|p| {
        let values = p.param.value().to_vec().ok()?;
        values.into_iter().find(|v| !v.is_finite()).map(|value| (p.name.as_str(), value))
    })
}

/// What to say of a saved adapter with numbers that give none: in a tensor, or in its configuration one beyond 32 bits.
pub(crate) fn without_numbers(config: &Value, adapter: &Adapter) -> Vec<String> {
    let tensor = not_finite(adapter).map(|(name, value)| {
        format!("`{name}` holds {value}: what the adapter computes with it is no number either")
    });
    let beyond = |value: &Value| value.as_f64().filter(|number| !(*number as f32).is_finite());
    let keys = config.as_object().into_iter().flatten();
    let setting = keys.filter_map(|(key, value)| Some((key, beyond(value)?))).map(|(key, number)| {
        format!("`{key}` is {number:e}, which is beyond the numbers of 32 bits: what the adapter computes with it is no number")
    });
    tensor.into_iter().chain(setting).collect()
}
