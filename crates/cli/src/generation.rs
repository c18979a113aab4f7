//! Token by token: the prompt once, then one token a forward, with keys and values kept.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use engraft_nn::{Inputs, KvCache, Layout, Task};
use engraft_tensor::{Tensor, no_grad};
use serde_json::Value;

use crate::engine::Engine;
use crate::failure::{Failure, Outcome};
use crate::sampling::Sampler;

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The model wrote a token that ends a text.
    Eos,
    /// As many tokens as were asked for.
    Length,
    /// The reader of the tokens wanted no more (a stop text).
    Stop,
}

impl End {
    /// The word in JSON.
    pub fn name(self) -> &'static str {
        match self {
            End::Eos => "eos",
            End::Length => "length",
            End::Stop => "stop",
        }
    }
}

/// Writes at most `most` tokens after `prompt`, handing each to `take`, which says whether to go on.
///
/// # Errors
/// A model that does not generate, an empty prompt, a token outside the vocabulary, logits that are not numbers.
pub fn generate(
    engine: &Engine,
    prompt: &[u32],
    most: usize,
    ends: &HashSet<u32>,
    sampler: &mut Sampler,
    take: &mut dyn FnMut(u32) -> Outcome<bool>,
) -> Outcome<End> {
    let info = engine.model.info();
    check(engine, prompt)?;
    let room = prompt.len().saturating_add(most).saturating_add(engine.virtual_rows());
    let cache = Arc::new(Mutex::new(KvCache::new(info.layers, 1, room)));
    let mut logits = next_logits(engine, prompt, 0, &cache)?;
    for written in 0..most {
        let Some(id) = sampler.next(&logits) else {
            return Err(Failure::running(format!(
                "the logits after {written} tokens are not finite numbers"
            )));
        };
        if ends.contains(&id) {
            return Ok(End::Eos);
        }
        if !take(id)? {
            return Ok(End::Stop);
        }
        if written + 1 < most {
            logits = next_logits(engine, &[id], prompt.len() + written, &cache)?;
        }
    }
    Ok(End::Length)
}

fn check(engine: &Engine, prompt: &[u32]) -> Outcome {
    let info = engine.model.info();
    if info.task != Task::CausalLm {
        let message =
            format!("{} does not generate text: its task is {}", engine.dir.display(), info.task.name());
        return Err(Failure::before_work(message));
    }
    if prompt.is_empty() {
        return Err(Failure::before_work("the prompt has no tokens; give it some text"));
    }
    match prompt.iter().find(|id| **id as usize >= info.vocabulary) {
        Some(id) => Err(Failure::before_work(format!(
            "the tokenizer gives token {id}, the model knows {}; take both from one revision",
            info.vocabulary
        ))),
        None => Ok(()),
    }
}

/// The logits after `ids`, which stand at positions from `first` on.
fn next_logits(engine: &Engine, ids: &[u32], first: usize, cache: &Arc<Mutex<KvCache>>) -> Outcome<Vec<f32>> {
    let positions = (first..first + ids.len()).map(|p| p as i32).collect();
    let tokens = Tensor::from_i64(ids.iter().map(|id| i64::from(*id)).collect(), [ids.len()])?;
    let inputs = Inputs::tokens(tokens, None, Layout::new(&[ids.len()], positions)?);
    let out = engine.cached_features(&inputs, cache)?;
    let last = out.features.rows() as i64 - 1;
    let logits = no_grad(|| {
        let row = out.features.gather(&Tensor::from_i64(vec![last], [1])?)?;
        engine.model.logits(&row, &out.pass.select(&[last])?)
    })?;
    Ok(logits.to_vec()?)
}

/// The tokens that end a text: `eos_token_id` of `generation_config.json`, of `config.json`, and the tokenizer's.
pub fn end_tokens(generation_config: Option<&Value>, config: &Value, tokenizer: Option<u32>) -> HashSet<u32> {
    let listed = |value: Option<&Value>| -> Vec<u32> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match value.and_then(|value| value.get("eos_token_id")) {
            Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
            Some(one) => id(one).into_iter().collect(),
            None => Vec::new(),
        }
    };
    let mut ids = listed(generation_config);
    if ids.is_empty() {
        ids = listed(Some(config));
    }
    ids.extend(tokenizer);
    ids.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_generation_config_names_the_end_before_the_model_config() {
        let sorted = |set: HashSet<u32>| {
            let mut ids: Vec<u32> = set.into_iter().collect();
            ids.sort_unstable();
            ids
        };
        let config = json!({ "eos_token_id": 2 });
        assert_eq!(sorted(end_tokens(Some(&json!({ "eos_token_id": [5, 7] })), &config, Some(9))), [5, 7, 9]);
        assert_eq!(sorted(end_tokens(Some(&json!({})), &config, None)), [2]);
        assert!(end_tokens(None, &json!({ "eos_token_id": null }), None).is_empty());
        assert!(end_tokens(None, &json!({ "eos_token_id": -1 }), None).is_empty());
    }
}
