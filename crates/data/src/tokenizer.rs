//! Text to token ids and back, by `tokenizer.json` as Hugging Face writes it.
//!
//! The `tokenizers` crate does the algorithms. It panics on some malformed files (long merges, bad character maps),
//! so every call into it is fenced: a panic there is an error here. Truncation and padding that a file carries are
//! switched off: cutting is counted by the tasks, padding does not exist.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::utils::truncation::truncate_encodings;
use tokenizers::utils::truncation::{TruncationDirection, TruncationParams, TruncationStrategy};
use tokenizers::{EncodeInput, PostProcessor};

use crate::decode::DecodeStream;
use crate::error::{Error, Result};
use crate::read::read_limited;

/// The largest `tokenizer.json`, in bytes.
pub const FILE_LIMIT: u64 = 128 << 20;
/// The largest file beside it (configuration, special tokens, template), in bytes.
const SIDE_LIMIT: u64 = 4 << 20;

/// Text as token ids.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Encoding {
    /// Token ids, `[tokens]`.
    pub ids: Vec<u32>,
    /// Segment of each token (0 the first text, 1 the second), `[tokens]`.
    pub type_ids: Vec<u32>,
    /// The bytes of its text that each token stands for, `[tokens]`; `(0, 0)` for added special tokens.
    pub offsets: Vec<(usize, usize)>,
}

/// One named chat template of a tokenizer.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTemplate {
    /// `default`, `tool_use` …
    pub name: String,
    /// The Jinja source.
    pub source: String,
}

/// A tokenizer and what the files beside it say of special tokens and chat.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    /// The same, reading special tokens in the text as plain text.
    literal: tokenizers::Tokenizer,
    special: HashSet<u32>,
    /// The token that begins a text, if the tokenizer has one.
    pub bos: Option<String>,
    /// The token that ends a text.
    pub eos: Option<String>,
    /// The padding token.
    pub pad: Option<String>,
    /// The unknown token.
    pub unk: Option<String>,
    /// The mask token of masked language models.
    pub mask: Option<String>,
    /// The most tokens that the tokenizer's files allow, if they say so.
    pub model_max_length: Option<usize>,
    /// The chat templates, `default` first.
    pub templates: Vec<NamedTemplate>,
}

impl Tokenizer {
    /// Opens the tokenizer of a model directory: `tokenizer.json`, and if there `tokenizer_config.json`,
    /// `special_tokens_map.json`, `chat_template.jinja`, `chat_template.json`, `additional_chat_templates/*.jinja`.
    ///
    /// # Errors
    /// A file that cannot be read, is too large, is not JSON, or that the tokenizer library rejects.
    pub fn open(directory: &Path) -> Result<Tokenizer> {
        let path = directory.join("tokenizer.json");
        let bytes = read_limited(&path, FILE_LIMIT, "check that this is the tokenizer's file")?;
        let mut tokenizer = Tokenizer::from_bytes(&path, &bytes)?;
        let config = side_file(&directory.join("tokenizer_config.json"))?.unwrap_or_default();
        let map = side_file(&directory.join("special_tokens_map.json"))?.unwrap_or_default();
        let named = |key: &str| special_token(&config, key).or_else(|| special_token(&map, key));
        tokenizer.bos = named("bos_token");
        tokenizer.eos = named("eos_token");
        tokenizer.pad = named("pad_token");
        tokenizer.unk = named("unk_token");
        tokenizer.mask = named("mask_token");
        // Files without a limit say 1e30.
        tokenizer.model_max_length = config
            .get("model_max_length")
            .and_then(Value::as_f64)
            .filter(|limit| (1.0..1e9).contains(limit))
            .map(|limit| limit as usize);
        tokenizer.templates = templates(directory, &config)?;
        Ok(tokenizer)
    }

    /// A tokenizer from the contents of a `tokenizer.json`; `path` is only for messages.
    ///
    /// # Errors
    /// What the tokenizer library rejects, or panics at.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Tokenizer> {
        let fail = |message: String| Error::Tokenizer { path: path.into(), message };
        let inner = fenced(|| {
            let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
            inner.with_truncation(None)?;
            inner.with_padding(None);
            Ok(inner)
        })
        .map_err(|reason| fail(format!("not a usable tokenizer.json: {reason}; download it again")))?;
        let mut literal = inner.clone();
        literal.set_encode_special_tokens(true);
        let special = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| *id)
            .collect();
        let (bos, eos, pad, unk, mask) = (None, None, None, None, None);
        let (model_max_length, templates) = (None, Vec::new());
        let path = path.to_path_buf();
        Ok(Tokenizer { path, inner, literal, special, bos, eos, pad, unk, mask, model_max_length, templates })
    }

    /// The ids of `text`; with `add_special` also the tokens that the model expects around it.
    ///
    /// # Errors
    /// What the tokenizer library rejects, or panics at.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Encoding> {
        Ok(plain(&self.run(|| self.inner.encode(text, add_special))?))
    }

    /// The ids of two texts read together, as for entailment.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_pair(&self, text: &str, pair: &str, add_special: bool) -> Result<Encoding> {
        let input: EncodeInput = (text, pair).into();
        Ok(plain(&self.run(|| self.inner.encode(input, add_special))?))
    }

    /// The ids of `text` where even the names of special tokens are read as plain text; no tokens are added.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_literal(&self, text: &str) -> Result<Encoding> {
        Ok(plain(&self.run(|| self.literal.encode(text, false))?))
    }

    /// The ids of a text or a pair with special tokens, at most `max_length` of them, and how many were cut off.
    ///
    /// The longer text loses its end first; the special tokens stay, as in `transformers`' `longest_first`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; also when `max_length` has no room beside the special tokens.
    pub fn encode_cut(&self, text: &str, pair: Option<&str>, max_length: usize) -> Result<(Encoding, usize)> {
        self.run(|| {
            let first = self.inner.encode(text, false)?;
            let second = pair.map(|pair| self.inner.encode(pair, false)).transpose()?;
            let (whole, lost) = self.finish(first, second, max_length)?;
            Ok((plain(&whole), lost))
        })
    }

    /// The ids of a text given as words, at most `max_length` with special tokens: the ids, the word (from 0) that each
    /// token is of (none for special tokens), and how many tokens were cut off.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_cut`].
    pub fn encode_words(
        &self,
        words: &[String],
        max_length: usize,
    ) -> Result<(Encoding, Vec<Option<u32>>, usize)> {
        self.run(|| {
            let input: EncodeInput = tokenizers::InputSequence::from(words.to_vec()).into();
            let first = self.inner.encode(input, false)?;
            let (whole, lost) = self.finish(first, None, max_length)?;
            Ok((plain(&whole), whole.get_word_ids().to_vec(), lost))
        })
    }

    /// The text of `ids`; with `skip_special` without special tokens. Ids the tokenizer does not have give nothing.
    ///
    /// # Errors
    /// What the tokenizer library rejects, or panics at.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.run(|| self.inner.decode(ids, skip_special))
    }

    /// A decoder that gives text as ids arrive, never half a character.
    pub fn stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// The id of the token named `token`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.run(|| Ok(self.inner.token_to_id(token))).ok().flatten()
    }

    /// The name of the token `id`.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.run(|| Ok(self.inner.id_to_token(id))).ok().flatten()
    }

    /// One past the largest id, added tokens included.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }

    /// The ids of special tokens (those that are cut from text by `skip_special`).
    pub fn special_ids(&self) -> &HashSet<u32> {
        &self.special
    }

    /// The names of the special tokens.
    pub fn special_tokens(&self) -> Vec<String> {
        let mut ids: Vec<u32> = self.special.iter().copied().collect();
        ids.sort_unstable();
        ids.into_iter().filter_map(|id| self.id_to_token(id)).collect()
    }

    /// The id of [`Tokenizer::eos`].
    pub fn eos_id(&self) -> Option<u32> {
        self.eos.as_deref().and_then(|token| self.token_to_id(token))
    }

    /// The id of [`Tokenizer::bos`].
    pub fn bos_id(&self) -> Option<u32> {
        self.bos.as_deref().and_then(|token| self.token_to_id(token))
    }

    /// The id of [`Tokenizer::mask`].
    pub fn mask_id(&self) -> Option<u32> {
        self.mask.as_deref().and_then(|token| self.token_to_id(token))
    }

    /// The id of [`Tokenizer::pad`].
    pub fn pad_id(&self) -> Option<u32> {
        self.pad.as_deref().and_then(|token| self.token_to_id(token))
    }

    /// The tokenizer's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Special tokens put around a text, or a pair of texts.
    pub fn added(&self, pair: bool) -> usize {
        self.inner.get_post_processor().map_or(0, |post| post.added_tokens(pair))
    }

    /// Cuts to `max_length` and puts the special tokens around; also the number of tokens cut off.
    fn finish(
        &self,
        first: tokenizers::Encoding,
        second: Option<tokenizers::Encoding>,
        max_length: usize,
    ) -> tokenizers::Result<(tokenizers::Encoding, usize)> {
        let added = self.added(second.is_some());
        let before = first.len() + second.as_ref().map_or(0, |second| second.len());
        let room = max_length.checked_sub(added).filter(|room| *room > 0).ok_or_else(|| {
            format!("max_length is {max_length}, but {added} special tokens are added; raise data.max_length")
        })?;
        let cut = TruncationParams {
            direction: TruncationDirection::Right,
            max_length: room,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
        };
        let (first, second) =
            if before > room { truncate_encodings(first, second, &cut)? } else { (first, second) };
        let kept = first.len() + second.as_ref().map_or(0, |second| second.len());
        Ok((self.inner.post_process(first, second, true)?, before - kept))
    }

    fn run<T>(&self, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
        fenced(call).map_err(|message| Error::Tokenizer { path: self.path.clone(), message })
    }
}

/// Runs `call` into the tokenizer library; its panic is an error in words.
fn fenced<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match crate::fence::fenced(call) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => {
            let reason = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no reason given");
            Err(format!("the tokenizer library failed inside ({reason}); the file is malformed"))
        }
    }
}

fn plain(encoding: &tokenizers::Encoding) -> Encoding {
    Encoding {
        ids: encoding.get_ids().to_vec(),
        type_ids: encoding.get_type_ids().to_vec(),
        offsets: encoding.get_offsets().to_vec(),
    }
}

/// A JSON object beside the tokenizer; `None` when the file is not there.
fn side_file(path: &Path) -> Result<Option<Map<String, Value>>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = read_limited(path, SIDE_LIMIT, "check that this is the tokenizer's file")?;
    let object = serde_json::from_slice(&bytes).map_err(|error| Error::Tokenizer {
        path: path.into(),
        message: format!("expected a JSON object: {error}"),
    })?;
    Ok(Some(object))
}

/// A special token is written as a string or as `{"content": …}`.
fn special_token(map: &Map<String, Value>, key: &str) -> Option<String> {
    match map.get(key)? {
        Value::String(token) => Some(token.clone()),
        Value::Object(token) => token.get("content")?.as_str().map(str::to_owned),
        _ => None,
    }
}

/// The templates of `chat_template.jinja` (which wins), `additional_chat_templates/`, `chat_template.json` and the
/// configuration, where `chat_template` is a string or a list of `{name, template}`.
fn templates(directory: &Path, config: &Map<String, Value>) -> Result<Vec<NamedTemplate>> {
    let mut found: Vec<NamedTemplate> = Vec::new();
    let mut add = |name: &str, source: String| {
        if !found.iter().any(|template| template.name == name) {
            found.push(NamedTemplate { name: name.into(), source });
        }
    };
    let file = directory.join("chat_template.jinja");
    if file.exists() {
        add("default", template_file(&file)?);
    }
    let folder = directory.join("additional_chat_templates");
    if let Ok(entries) = std::fs::read_dir(&folder) {
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        files.sort();
        for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "jinja")) {
            add(&file.file_stem().unwrap_or_default().to_string_lossy(), template_file(file)?);
        }
    }
    let beside = side_file(&directory.join("chat_template.json"))?.unwrap_or_default();
    for value in [beside.get("chat_template"), config.get("chat_template")].into_iter().flatten() {
        match value {
            Value::String(source) => add("default", source.clone()),
            Value::Array(list) => {
                for item in list {
                    let text = |key: &str| item.get(key).and_then(Value::as_str);
                    if let (Some(name), Some(source)) = (text("name"), text("template")) {
                        add(name, source.to_owned());
                    }
                }
            }
            _ => {}
        }
    }
    found.sort_by_key(|template| template.name != "default");
    Ok(found)
}

fn template_file(path: &Path) -> Result<String> {
    let bytes = read_limited(path, crate::template::SOURCE_LIMIT, "check that this is a chat template")?;
    String::from_utf8(bytes)
        .map_err(|error| Error::Template { message: format!("{} is not UTF-8: {error}", path.display()) })
}

#[cfg(test)]
mod tests;
