//! Token by token: what is given once, then one token a forward, with keys and values kept.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use engraft_data::{DecodeStream, Tokenizer};
use engraft_nn::{Inputs, KvCache, Layout, Task};
use engraft_store::{Limits, read_config};
use engraft_tensor::{Tensor, on_pool};
use serde_json::Value;

use crate::beam::{Search, search};
use crate::engine::Engine;
use crate::failure::{Failure, Outcome};
use crate::sampling::{Choice, Sampler};

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

/// What is gone on from, or what an encoder reads.
#[derive(Clone, Copy)]
pub struct Prompt<'p> {
    /// Its tokens.
    pub ids: &'p [u32],
    /// The task that it is of, for adapters of several.
    pub task: Option<usize>,
}

/// Texts being written side by side after the same prompt: one, or the beams of a search.
pub struct Decoding<'a> {
    engine: &'a Engine,
    /// What an encoder reads; none for models that go on from the prompt itself.
    source: Option<Vec<u32>>,
    task: Option<usize>,
    sequences: usize,
    /// Tokens that each text has in the cache.
    length: usize,
    cache: Arc<Mutex<KvCache>>,
}

impl<'a> Decoding<'a> {
    /// Room for `most` tokens in each of `sequences` texts after `prompt`; gives the tokens that are to be fed first: the
    /// prompt, or, where an encoder reads the prompt, the decoder's start.
    ///
    /// # Errors
    /// A model that does not generate, an empty prompt, a token outside the vocabulary.
    pub fn new(
        engine: &'a Engine,
        Prompt { ids: prompt, task }: Prompt<'_>,
        sequences: usize,
        most: usize,
    ) -> Outcome<(Self, Vec<u32>)> {
        check(engine, prompt)?;
        let info = engine.model.info();
        let (source, first) = match info.task {
            Task::Seq2Seq => (Some(prompt.to_vec()), vec![start_token(engine)?]),
            _ => (None, prompt.to_vec()),
        };
        let room = first.len().saturating_add(most).saturating_add(engine.virtual_rows());
        let cache = Arc::new(Mutex::new(KvCache::new(info.layers, sequences, room)));
        Ok((Decoding { engine, source, task, sequences, length: 0, cache }, first))
    }

    /// Feeds the next tokens of each text, as many to each, and gives the logits `[vocabulary]` after the last of them.
    pub fn feed(&mut self, ids: &[&[u32]]) -> Outcome<Vec<Vec<f32>>> {
        let each = ids.first().map_or(0, |ids| ids.len());
        let positions = self.length..self.length + each;
        let tokens = ids.concat();
        let columns = (0..self.sequences).flat_map(|_| positions.clone().map(|p| p as i32)).collect();
        let layout = Layout::new(&vec![each; self.sequences], columns)?;
        let tokens = as_tensor(&tokens)?;
        let of_task = |layout: Layout| match self.task {
            Some(task) => layout.with_tasks(vec![task; self.sequences]),
            None => layout,
        };
        let inputs = match &self.source {
            None => Inputs::tokens(tokens, None, of_task(layout)),
            Some(source) => {
                let lengths = vec![source.len(); self.sequences];
                let copies = as_tensor(&source.repeat(self.sequences))?;
                let layout_read = of_task(Layout::counted(&lengths)?);
                Inputs::tokens(copies, None, layout_read).with_target(tokens, layout)
            }
        };
        let logits = on_pool(|| self.engine.last_logits(&inputs, &self.cache))?;
        self.length += each;
        let values = logits.to_vec()?;
        Ok(values.chunks(logits.width()).map(<[f32]>::to_vec).collect())
    }

    /// Lets text i go on from text `order[i]`.
    pub fn reorder(&mut self, order: &[usize]) -> Outcome {
        let mut cache = self.cache.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        Ok(cache.reorder(order)?)
    }
}

fn as_tensor(ids: &[u32]) -> Outcome<Tensor> {
    Ok(Tensor::from_i64(ids.iter().map(|id| i64::from(*id)).collect(), [ids.len()])?)
}

/// Writes at most `most` tokens after `prompt`, handing each to `take`, which says whether to go on.
///
/// # Errors
/// As [`Decoding::new`], and logits that are not numbers.
pub fn generate(
    engine: &Engine,
    prompt: Prompt<'_>,
    most: usize,
    ends: &HashSet<u32>,
    sampler: &mut Sampler,
    take: &mut dyn FnMut(u32) -> Outcome<bool>,
) -> Outcome<End> {
    let (mut decoding, mut next) = Decoding::new(engine, prompt, 1, most)?;
    for written in 0..most {
        let logits = decoding.feed(&[&next])?;
        let Some(id) = logits.first().and_then(|logits| sampler.next(logits)) else {
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
        next = vec![id];
    }
    Ok(End::Length)
}

/// How a whole text is written.
#[derive(Clone, Copy, Debug)]
pub struct Writing {
    /// Most tokens.
    pub most: usize,
    /// A beam search, or none to take the most probable token each time.
    pub by: Option<Search>,
}

/// A text that was written.
pub struct Written {
    /// Without the token that ends it.
    pub text: String,
    /// Number of tokens, that one aside.
    pub tokens: usize,
    /// Why it ends.
    pub end: End,
    /// That of a beam search.
    pub score: Option<f64>,
}

/// The most probable text after `prompt`.
///
/// # Errors
/// As [`generate`].
pub fn write(
    engine: &Engine,
    tokenizer: &Tokenizer,
    prompt: Prompt<'_>,
    writing: Writing,
    ends: &HashSet<u32>,
) -> Outcome<Written> {
    let mut tokens = Vec::new();
    let (end, score) = match writing.by {
        None => {
            let mut sampler = Sampler::new(Choice { temperature: 0.0, top_k: 0, top_p: 1.0 }, 0);
            let end = generate(engine, prompt, writing.most, ends, &mut sampler, &mut |id| {
                tokens.push(id);
                Ok(true)
            })?;
            (end, None)
        }
        Some(by) => {
            let found = search(engine, prompt, writing.most, ends, by)?;
            let Some(best) = found.into_iter().next() else {
                return Err(Failure::running("the search found no text; raise --max-tokens"));
            };
            tokens = best.tokens;
            let ended = tokens.last().is_some_and(|id| ends.contains(id));
            tokens.truncate(tokens.len() - usize::from(ended));
            (if ended { End::Eos } else { End::Length }, Some(best.score))
        }
    };
    let mut stream = answer_stream(engine, tokenizer, prompt.ids)?;
    let mut text = String::new();
    for id in &tokens {
        text.push_str(&stream.push(*id)?);
    }
    text.push_str(&stream.finish()?);
    Ok(Written { text, tokens: tokens.len(), end, score })
}

/// Tokens to text as they come. An encoder–decoder model's answer does not go on from its prompt.
pub fn answer_stream<'t>(
    engine: &Engine,
    tokenizer: &'t Tokenizer,
    prompt: &[u32],
) -> Outcome<DecodeStream<'t>> {
    let stream = tokenizer.stream(true);
    Ok(if engine.model.info().task == Task::CausalLm { stream.after(prompt)? } else { stream })
}

fn check(engine: &Engine, prompt: &[u32]) -> Outcome {
    let info = engine.model.info();
    if !matches!(info.task, Task::CausalLm | Task::Seq2Seq) {
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

/// What a decoder begins with.
fn start_token(engine: &Engine) -> Outcome<u32> {
    let vocabulary = engine.model.info().vocabulary;
    let id = engraft_train::decoder_start(&engine.config).filter(|id| (*id as usize) < vocabulary);
    id.ok_or_else(|| {
        Failure::before_work(format!(
            "config.json of {} names no decoder_start_token_id or pad_token_id below {vocabulary}",
            engine.dir.display()
        ))
    })
}

/// The tokens that end the texts of the model in `dir`.
pub fn ends_of(dir: &Path, tokenizer: &Tokenizer, limits: &Limits) -> engraft_store::Result<HashSet<u32>> {
    let path = dir.join("generation_config.json");
    let of_generation = if path.is_file() { Some(read_config(&path, limits)?) } else { None };
    let config = read_config(&dir.join("config.json"), limits)?;
    Ok(end_tokens(of_generation.as_ref(), &config, tokenizer.eos_id()))
}

/// `eos_token_id` of `generation_config.json`, of `config.json`, and the tokenizer's.
fn end_tokens(generation_config: Option<&Value>, config: &Value, tokenizer: Option<u32>) -> HashSet<u32> {
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
