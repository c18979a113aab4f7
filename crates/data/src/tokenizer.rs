//! Text to token ids and back, by `tokenizer.json` as Hugging Face writes it.
//!
//! The `tokenizers` crate does the algorithms. It panics on some malformed files (long merges, bad character maps),
//! so every call into it is fenced: a panic there is an error here. Truncation and padding that a file carries are
//! switched off: cutting is counted by the tasks, padding does not exist.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
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
            let added = self.inner.get_post_processor().map_or(0, |post| post.added_tokens(second.is_some()));
            let before = first.len() + second.as_ref().map_or(0, |second| second.len());
            let room = max_length.checked_sub(added).filter(|room| *room > 0).ok_or_else(|| {
                format!(
                    "max_length is {max_length}, but {added} special tokens are added; raise data.max_length"
                )
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
            let whole = self.inner.post_process(first, second, true)?;
            Ok((plain(&whole), before - kept))
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

    fn run<T>(&self, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
        fenced(call).map_err(|message| Error::Tokenizer { path: self.path.clone(), message })
    }
}

/// Runs `call` into the tokenizer library; its panic is an error in words.
fn fenced<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
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
mod tests {
    use super::*;

    const TEXTS: [&str; 3] = [
        "I am still waiting on my card?",
        "Naïve café — 東京 \u{1F600} don't  stop\n\nnow",
        "ROMEO: But, soft! what light",
    ];

    /// A tokenizer of the shared data; a line and `None` when that is not there.
    fn shared(part: &str) -> Option<Tokenizer> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(part);
        if !path.exists() {
            eprintln!("skipped: {part} of the shared data is not there");
            return None;
        }
        Some(Tokenizer::open(&path).unwrap())
    }

    // Ids and text as `transformers` 5.23 gives them.
    const MINILM: [&[u32]; 3] = [
        &[101, 1045, 2572, 2145, 3403, 2006, 2026, 4003, 1029, 102],
        &[101, 15743, 7668, 1517, 1879, 1755, 100, 2123, 1005, 1056, 2644, 2085, 102],
        &[101, 12390, 1024, 2021, 1010, 3730, 999, 2054, 2422, 102],
    ];
    const STORIES: [&[u32]; 3] = [
        &[1, 359, 261, 423, 349, 290, 421, 273, 275, 299, 353, 284, 422, 280, 295, 418, 450],
        &[
            1, 410, 458, 412, 198, 178, 360, 280, 412, 431, 485, 410, 481, 410, 233, 160, 180, 231, 189, 175,
            410, 243, 162, 155, 131, 279, 289, 439, 413, 410, 349, 414, 427, 13, 13, 416, 327,
        ],
        &[
            1, 410, 461, 441, 446, 459, 441, 467, 368, 323, 432, 384, 431, 413, 443, 263, 415, 294, 278, 333,
            415, 413,
        ],
    ];
    const GPT2: [&[u32]; 3] = [
        &[40, 716, 991, 4953, 319, 616, 2657, 30],
        &[
            26705, 38776, 40304, 851, 10545, 251, 109, 12859, 105, 30325, 222, 836, 470, 220, 2245, 198, 198,
            2197,
        ],
        &[33676, 4720, 25, 887, 11, 2705, 0, 644, 1657],
    ];

    #[test]
    fn ids_and_text_equal_transformers() {
        let parts =
            [("models/all-minilm-l6-v2", MINILM), ("models/stories260k", STORIES), ("tokenizers/gpt2", GPT2)];
        for (part, expected) in parts {
            let Some(tokenizer) = shared(part) else { continue };
            for (text, ids) in TEXTS.iter().zip(expected) {
                assert_eq!(tokenizer.encode(text, true).unwrap().ids, ids, "{part}");
                if !part.contains("minilm") {
                    assert_eq!(tokenizer.decode(ids, true).unwrap(), *text);
                }
                let mut stream = tokenizer.stream(true);
                let mut streamed: String = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
                streamed.push_str(&stream.finish().unwrap());
                assert_eq!(streamed, tokenizer.decode(ids, true).unwrap(), "{part}");
            }
        }
    }

    #[test]
    fn pairs_are_cut_longest_first_and_special_tokens_stay() {
        let Some(tokenizer) = shared("models/all-minilm-l6-v2") else { return };
        let (whole, lost) = tokenizer.encode_cut(TEXTS[0], Some(TEXTS[2]), 512).unwrap();
        assert_eq!((whole, lost), (tokenizer.encode_pair(TEXTS[0], TEXTS[2], true).unwrap(), 0));
        let (cut, lost) = tokenizer.encode_cut(TEXTS[0], Some(TEXTS[2]), 12).unwrap();
        assert_eq!(cut.ids, [101, 1045, 2572, 2145, 3403, 102, 12390, 1024, 2021, 1010, 3730, 102]);
        assert_eq!(cut.type_ids, [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]);
        assert_eq!(lost, 7);
        let error = tokenizer.encode_cut(TEXTS[0], None, 2).unwrap_err().to_string();
        assert!(error.contains("raise data.max_length"), "{error}");
        let long = "word ".repeat(600);
        assert_eq!(tokenizer.encode(&long, true).unwrap().ids.len(), 602, "no truncation from the file");
        assert_eq!(tokenizer.model_max_length, Some(512));
        assert_eq!((tokenizer.pad_id(), tokenizer.mask_id(), tokenizer.eos_id()), (Some(0), Some(103), None));
        assert_eq!(tokenizer.special_tokens(), ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]);
    }

    #[test]
    fn special_names_can_be_read_as_text() {
        let Some(tokenizer) = shared("models/all-minilm-l6-v2") else { return };
        assert_eq!(tokenizer.encode("a [SEP] b", false).unwrap().ids, [1037, 102, 1038]);
        let literal = tokenizer.encode_literal("a [SEP] b").unwrap().ids;
        assert!(literal.len() > 3 && !literal.contains(&102), "{literal:?}");
    }

    #[test]
    fn a_long_stream_gives_the_whole_text() {
        let Some(tokenizer) = shared("models/stories260k") else { return };
        let text = "Once 東京 upon a time \u{1F600}\u{1F600} there was é a cat. ".repeat(40);
        let ids = tokenizer.encode(&text, false).unwrap().ids;
        let mut stream = tokenizer.stream(true);
        let mut streamed = String::new();
        for id in &ids {
            let piece = stream.push(*id).unwrap();
            assert!(!piece.contains('\u{FFFD}'), "half a character: {piece:?}");
            streamed.push_str(&piece);
        }
        streamed.push_str(&stream.finish().unwrap());
        assert_eq!(streamed, text);
        let mut stream = tokenizer.stream(true);
        let broken: String = [233u32; 40].iter().map(|id| stream.push(*id).unwrap()).collect();
        assert!(broken.contains('\u{FFFD}'), "bytes that are no character are given, not held for ever");
        let mut stream = tokenizer.stream(true).after(&ids[..4]).unwrap();
        assert_eq!(stream.push(tokenizer.token_to_id("▁a").unwrap()).unwrap(), " a");
    }

    /// A byte-fallback tokenizer small enough to mutate, with most kinds of parts.
    const SMALL: &str = r#"{"version":"1.0","truncation":{"max_length":4,"strategy":"LongestFirst","stride":0,
"direction":"Right"},"padding":null,"added_tokens":[{"id":0,"content":"<s>","single_word":false,"lstrip":false,
"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"Sequence","normalizers":[{"type":"NFC"},
{"type":"Replace","pattern":{"Regex":"\\s+"},"content":" "}]},"pre_tokenizer":{"type":"Sequence","pretokenizers":[
{"type":"Split","pattern":{"Regex":"(?i:'s|'t)|\\p{L}+| ?\\p{N}{1,3}"},"behavior":"Isolated","invert":false},
{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}]},"post_processor":{"type":
"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],
"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"<s>":{"id":
"<s>","ids":[0],"tokens":["<s>"]}}},"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,
"use_regex":true},"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,
"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":{"<s>":0,"a":1,
"b":2,"c":3,"ab":4,"abc":5,"Ġ":6,"Ġa":7},"merges":["a b","ab c","Ġ a"]}}"#;

    #[test]
    fn mutants_of_a_tokenizer_are_errors_not_panics() {
        let path = Path::new("tokenizer.json");
        let sound = Tokenizer::from_bytes(path, SMALL.as_bytes()).unwrap();
        assert_eq!(sound.encode("abc a abc", true).unwrap().ids, [0, 5, 6, 1, 6, 5]);
        let words: [&[u8]; 8] = [b"null", b"-1", b"99999999999", b"\"\"", b"[]", b"{}", b"(((", b"\"a b c\""];
        let mut random = crate::rng::Random::new(11, 0, 0);
        let mut refused = 0;
        for _ in 0..2000 {
            let mut bytes = SMALL.as_bytes().to_vec();
            for _ in 0..=random.below(3) {
                let at = random.below(bytes.len() as u64) as usize;
                let end = bytes.len().min(at + 1 + random.below(12) as usize);
                match random.below(4) {
                    0 => bytes[at] = random.below(256) as u8,
                    1 => drop(bytes.drain(at..end)),
                    2 => drop(bytes.splice(at..end, words[random.below(8) as usize].iter().copied())),
                    _ => drop(bytes.splice(at..at, bytes[at..end].to_vec())),
                }
            }
            match Tokenizer::from_bytes(path, &bytes) {
                Err(_) => refused += 1,
                Ok(tokenizer) => {
                    // Any result will do; what matters is that the call comes back.
                    let encoding = tokenizer.encode("abc\u{FFFD} <s> 東 a", true).unwrap_or_default();
                    let _ = tokenizer.decode(&encoding.ids, false);
                    let _ = tokenizer.encode_cut("abc abc", Some("a"), 3);
                }
            }
        }
        assert!(refused > 500, "only {refused} of 2000 mutants refused: too mild");
        let error = Tokenizer::open(Path::new("/nowhere")).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }

    #[test]
    fn templates_and_special_tokens_come_from_every_known_place() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        write("tokenizer.json", SMALL);
        write(
            "tokenizer_config.json",
            r#"{"bos_token":{"content":"<s>"},"model_max_length":1e30,
                "chat_template":[{"name":"tool_use","template":"T"},{"name":"default","template":"D"}]}"#,
        );
        write("special_tokens_map.json", r#"{"bos_token":"wrong","eos_token":"<s>"}"#);
        let tokenizer = Tokenizer::open(directory.path()).unwrap();
        assert_eq!((tokenizer.bos.as_deref(), tokenizer.eos_id()), (Some("<s>"), Some(0)));
        assert_eq!(tokenizer.model_max_length, None);
        let names: Vec<&str> = tokenizer.templates.iter().map(|template| template.name.as_str()).collect();
        assert_eq!(names, ["default", "tool_use"]);
        write("chat_template.jinja", "J");
        assert_eq!(Tokenizer::open(directory.path()).unwrap().templates[0].source, "J");
        write("special_tokens_map.json", "[1");
        let error = Tokenizer::open(directory.path()).err().unwrap().to_string();
        assert!(error.contains("special_tokens_map.json: expected a JSON object"), "{error}");
    }
}
