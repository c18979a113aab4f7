//! Prompt tuning: trained rows put before the embedded tokens.
//!
//! H₀ = [P; E], tokens counted from the first row of P. P starts as embeddings of the vocabulary (of a text, of given ids,
//! or drawn), repeated or cut to fit, or as noise: N(0, 1), as in `peft`, or uniform in ±0.5, as in the paper.
//!
//! Lester et al. 2021, arXiv:2104.08691. Rows that start from saved prompts (`from_prompts`): SPoT, see `transfer.rs`; of
//! models of another width (`projector`): TPT, see `projector.rs`.
//!
//! P [tokens, width], saved as `prompt_embeddings`. In an encoder–decoder model the rows come before the encoder's input;
//! `peft` makes as many again for the decoder and never reads them, so its files hold [2 · tokens, width].

use engraft_nn::{
    Base, Builder, Error, Init, Kind, ModelInfo, Pass, Patch, PromptPatch, Result, Role, Site, Sites, Stack,
    Value as Frozen,
};
use engraft_tensor::cpu::random::Key;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::prefix::{FORM, FORMS};
use super::projector::{self, PROJECTOR, Projector};
use super::transfer::{self, Transfer};
use crate::hybrid::{Alone, alone, hub_prompt};
use crate::read::{Reader, Tokens};
use crate::shared::fields::{choice, int};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, Named, peft};

pub(crate) const TOKENS_MAX: usize = 1 << 16;

pub(super) struct Prompt {
    pub tokens: usize,
    /// Times that the file holds `tokens` rows, of which the first are used; `None` is what `peft` makes for the model.
    pub submodules: Option<usize>,
    pub start: Start,
    /// Whether the file is one of CPT.
    pub context: bool,
}

/// Context-aware prompt tuning (Blau et al. 2024, arXiv:2410.17222): a prompt that was trained near to the examples it began
/// as, on their labels too. Its file is that of a prompt, with these keys of how it was made.
const CONTEXT: &str = "CPT";
const CONTEXT_KEYS: [&str; 8] = [
    "cpt_mask",
    "cpt_token_ids",
    "cpt_tokens_type_mask",
    "opt_loss_decay_factor",
    "opt_projection_epsilon",
    "opt_projection_format_epsilon",
    "opt_weighted_loss_type",
    "tokenizer_name_or_path",
];

/// How P starts.
#[derive(Clone)]
pub(crate) enum Start {
    /// As tokens drawn from the vocabulary, or from the first ids of it.
    Drawn(Option<usize>),
    /// As these tokens, repeated or cut to fit.
    Given(Vec<i64>),
    /// As the tokens of a text.
    Text(Tokens),
    /// As noise N(0, 1).
    Noise,
    /// As noise in ±0.5.
    Uniform,
    /// From saved prompts.
    Saved(Transfer),
    /// From the file, which says this of where its rows came from.
    Kept(Map<String, Value>),
}

static INFO: Info = Info {
    name: "prompt",
    title: "Prompt tuning",
    class: "prompt",
    sites: "prompt",
    paper: "arXiv:2104.08691",
    summary: "trained rows before the embedded input",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "PROMPT_TUNING",
    fields: &[
        int("tokens", (1, TOKENS_MAX as i64), Some("20"), "Number of rows."),
        Field {
            doc: "As in `peft`, or as in AdapterHub's library for encoders whose embeddings know positions: rows behind the embeddings, \
                  uniform in ±0.5 at the start, that move no token and of which the first stands for the sequence.",
            ..FORM
        },
        INIT,
        INIT_TEXT,
        INIT_IDS,
        INIT_BELOW,
        transfer::FROM,
        transfer::TARGET,
        transfer::SELECT,
        transfer::SIMILARITY,
        transfer::TOP,
        PROJECTOR,
    ],
};

/// How rows start, for all methods whose rows stand before the input.
pub(crate) const INIT: Field = choice(
    "init",
    &["vocabulary", "random", "uniform"],
    "\"vocabulary\"",
    "Start as embeddings of drawn tokens, or as noise: normal, or uniform in ±0.5.",
);
pub(crate) const INIT_TEXT: Field = Field {
    name: "init_text",
    kind: FieldKind::Tokens,
    default: None,
    doc: "Start as the embeddings of this text, repeated or cut to fit.",
};
pub(crate) const INIT_IDS: Field = Field {
    name: "init_ids",
    kind: FieldKind::IntList,
    default: None,
    doc: "Start as the embeddings of these tokens, repeated or cut to fit.",
};
pub(crate) const INIT_BELOW: Field = int(
    "init_below",
    (1, i64::MAX),
    None,
    "Draw only ids below this: many vocabularies begin with their commonest words (the paper takes 5000).",
);

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    if settings.get("form").is_some_and(|form| form == "adapterhub") {
        return of_adapter_hub(settings);
    }
    peft::own_settings(&INFO, settings, |r| {
        let tokens = r.count("tokens", 20, TOKENS_MAX);
        r.one_of("form", FORMS);
        let start = match (read_start(r), Transfer::read(r)) {
            (Start::Given(_) | Start::Text(_), Some(_)) => {
                r.problem("`from_prompts` and a text or ids both say how rows start; keep one of them");
                Start::Noise
            }
            (_, Some(transfer)) => Start::Saved(transfer),
            (start, None) => start,
        };
        Prompt { tokens, submodules: None, start, context: false }
    })
}

/// A prompt in AdapterHub's form.
fn of_adapter_hub(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, &[]);
    r.one_of("form", FORMS);
    let tokens = r.count("tokens", 20, TOKENS_MAX);
    let starts: Vec<&Field> =
        INFO.fields.iter().filter(|field| !["tokens", "form"].contains(&field.name)).collect();
    // A recipe gives the defaults too.
    let usual = |field: &Field| field.default.and_then(|text| serde_json::from_str(text).ok());
    let is_given = |field: &&&Field| {
        settings.get(field.name).is_some_and(|value| !value.is_null() && Some(value) != usual(field).as_ref())
    };
    let given: Vec<&str> = starts.iter().filter(is_given).map(|field| field.name).collect();
    if !given.is_empty() {
        let names = given.join(", ");
        r.problem(format!("`form`: rows in AdapterHub's form start as noise; leave out {names}"));
    }
    starts.iter().for_each(|field| r.ignore(&[field.name]));
    r.finish()?;
    Ok(hub_prompt(&INFO, tokens))
}

/// How rows start, as a recipe says it.
pub(crate) fn read_start(r: &mut Reader<'_>) -> Start {
    let is_below = r.value("init_below").is_some();
    let below = Some(r.count("init_below", 1, usize::MAX)).filter(|_| is_below);
    let noise = r.one_of("init", &[("vocabulary", None), ("random", Some(false)), ("uniform", Some(true))]);
    let start = match (r.tokens("init_text"), r.counts("init_ids"), noise) {
        (Some(_), Some(_), _) => {
            r.problem("`init_ids` and `init_text` both say which tokens to start as; keep one of them");
            Start::Noise
        }
        (Some(_), _, Some(_)) | (_, Some(_), Some(_)) => {
            r.problem("`init` says that rows start as noise, and `init_ids` or `init_text` as which tokens; keep one of them");
            Start::Noise
        }
        (Some(text), ..) => Start::Text(text),
        (_, Some(ids), _) if ids.is_empty() => {
            r.problem("`init_ids`: expected at least one token");
            Start::Noise
        }
        (_, Some(ids), _) => Start::Given(ids.into_iter().map(|id| id as i64).collect()),
        (.., Some(false)) => Start::Noise,
        (.., Some(true)) => Start::Uniform,
        (.., None) => Start::Drawn(below),
    };
    if below.is_some() && !matches!(start, Start::Drawn(_)) {
        r.problem("`init_below` says which tokens are drawn, and none are: leave it out");
    }
    start
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let context = peft::is_type(config, CONTEXT);
    if !context && !peft::is_type(config, INFO.peft_type) {
        return alone(config, &INFO, Alone::Prompt);
    }
    peft::file_without_targets(if context { CONTEXT } else { INFO.peft_type }, config, |r| {
        let (tokens, submodules) = read_prompt_keys(r);
        // The rows come from the file; how they started is only written back.
        let start = match context {
            true => {
                let kept =
                    CONTEXT_KEYS.map(|key| (key.to_owned(), r.value(key).cloned().unwrap_or(Value::Null)));
                Start::Kept(Map::from_iter(kept))
            }
            false => kept_start(r),
        };
        if context && config.get("task_type") != Some(&json!("CAUSAL_LM")) {
            r.problem("`task_type`: expected CAUSAL_LM, as peft has CPT for nothing else");
        }
        Prompt { tokens, submodules, start, context }
    })
}

/// How rows of a file started: only written back.
pub(crate) fn kept_start(r: &mut Reader<'_>) -> Start {
    Start::Kept(read_origin(r, &["RANDOM", "SAMPLE_VOCAB", "TEXT"]))
}

/// Says that a file must name its number of rows.
pub(crate) fn expect_tokens(r: &mut Reader<'_>) {
    if r.value("num_virtual_tokens").is_none() {
        r.problem("`num_virtual_tokens` is absent");
    }
}

/// The keys about where rows came from, as they are; `origins` are the words known for it.
pub(crate) fn read_origin(r: &mut Reader<'_>, origins: &[&str]) -> Map<String, Value> {
    let known = |v: &Value| v.as_str().is_some_and(|word| origins.contains(&word));
    if let Some(other) = r.value("prompt_tuning_init").filter(|v| !known(v)).cloned() {
        r.problem(format!("`prompt_tuning_init`: expected one of {}, found {other}", origins.join(", ")));
    }
    let keys =
        ["prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"];
    let kept = keys.map(|key| (key.to_owned(), r.value(key).cloned().unwrap_or(Value::Null)));
    let mut kept = Map::from_iter(kept);
    if kept["prompt_tuning_init"].is_null() {
        kept.insert("prompt_tuning_init".into(), "RANDOM".into());
    }
    kept
}

impl Start {
    /// The values of `count` rows, `tokens` of them before a sequence.
    pub fn of(&self, b: &Builder<'_>, tokens: usize, count: usize) -> Result<Init> {
        Ok(match self {
            Start::Noise => Init::Normal(1.0),
            Start::Uniform => Init::Uniform(0.5),
            Start::Kept(_) => Init::Zeros,
            Start::Saved(transfer) => transfer.of(count, b.info().width)?,
            Start::Given(ids) => rows_of(ids, count, b.sites(), "init_ids")?,
            Start::Text(text) => rows_of(&text.ids, count, b.sites(), "init_text")?,
            Start::Drawn(below) => {
                let vocabulary = b.info().vocabulary.max(1);
                let among = below.map_or(vocabulary, |below| below.min(vocabulary)) as u64;
                let key = Key { seed: b.seed(), stream: tokens as u64 };
                let ids: Vec<i64> =
                    (0..count as u64).map(|i| (u64::from(key.bits(i)) % among) as i64).collect();
                rows_of(&ids, count, b.sites(), "init")?
            }
        })
    }

    /// The saved prompts that trained layers make rows of, and the width inside these.
    fn projects(&self) -> Option<(&Transfer, usize)> {
        match self {
            Start::Saved(transfer) => transfer.projector.map(|inside| (transfer, inside)),
            _ => None,
        }
    }

    /// What a configuration says of where the rows came from; a text is by the tokenizer of `base_model`.
    pub fn origin(&self, base_model: &str) -> Map<String, Value> {
        let (origin, text) = match self {
            Start::Kept(kept) => return kept.clone(),
            Start::Drawn(_) => ("SAMPLE_VOCAB", None),
            Start::Text(text) => ("TEXT", Some(text.text.as_str())),
            Start::Given(_) | Start::Saved(_) | Start::Noise | Start::Uniform => ("RANDOM", None),
        };
        let own = json!({
            "prompt_tuning_init": origin, "prompt_tuning_init_text": text, "tokenizer_kwargs": null,
            // `peft` refuses a text without one.
            "tokenizer_name_or_path": text.map(|_| base_model),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// The keys that all methods with virtual tokens have in `peft`; gives their number and for how many halves of a model
/// the file holds rows.
pub(crate) fn read_prompt_keys(r: &mut Reader<'_>) -> (usize, Option<usize>) {
    r.ignore(&["token_dim", "num_attention_heads", "num_layers"]);
    let given = r.value("num_transformer_submodules").is_some();
    let submodules = r.count("num_transformer_submodules", 1, usize::MAX);
    if submodules > 2 {
        r.problem(format!("`num_transformer_submodules`: expected 1 or 2, found {submodules}"));
    }
    expect_tokens(r);
    // With none of them `peft` has an adapter that changes nothing.
    (r.whole("num_virtual_tokens", 1, TOKENS_MAX), given.then_some(submodules))
}

/// What a file of keys and values says of its model, where it does: its layers, and keys and values of one by width and heads. `peft`
/// cuts the rows by these, and fails where the model has others.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sizes([Option<usize>; 3]);

const SIZES: [&str; 3] = ["num_layers", "token_dim", "num_attention_heads"];

impl Sizes {
    pub fn read(r: &mut Reader<'_>) -> Sizes {
        let mut size = |key| r.value(key).is_some_and(|v| !v.is_null()).then(|| r.count(key, 1, usize::MAX));
        Sizes(SIZES.map(&mut size))
    }

    /// Every size that is not the model's, together.
    pub fn fit(&self, info: &ModelInfo) -> Result<()> {
        let own = [info.layers, info.kv_heads * info.head_dim, info.kv_heads];
        let told = ["layers", "numbers in the keys of a token", "heads of keys and values"];
        let sizes = SIZES.iter().zip(self.0).zip(own).zip(told);
        let wrong = sizes.filter_map(|(((key, found), own), what)| {
            let found = found.filter(|found| *found != own)?;
            Some(format!(
                "`{key}` is {found}, and this model has {own} {what}: the prefix was made for another model; use it with that one"
            ))
        });
        let wrong: Vec<String> = wrong.collect();
        if wrong.is_empty() { Ok(()) } else { Err(Error::Mismatch(wrong)) }
    }
}

/// For how many halves of a model `peft` makes rows.
pub(crate) fn submodules(sites: &Sites) -> usize {
    if sites.iter().any(|s| s.stack == Stack::Decoder) { 2 } else { 1 }
}

/// Where a prompt enters, of an encoder–decoder model the encoder, and the width there.
pub(crate) fn prompt_site<'s>(sites: &'s Sites, title: &str) -> Result<(&'s Site, usize)> {
    let found = sites.iter().find_map(|s| match s.kind {
        Kind::Prompt { width } => Some((s, width)),
        _ => None,
    });
    found.ok_or_else(|| Error::Unsupported(format!("{title} needs a model with an embedded input")))
}

/// In `peft`, adapters with virtual tokens keep the modules trained beside them one level higher than others do.
pub(crate) fn prompt_file_name(name: &str) -> String {
    if name == "prompt_embeddings" { name.into() } else { format!("base_model.{name}") }
}

fn example() -> Box<dyn Method> {
    Box::new(Prompt { tokens: 3, submodules: None, start: Start::Given(vec![5, 7]), context: false })
}

impl Method for Prompt {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("tokens·d")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let (site, width) = prompt_site(b.sites(), INFO.title)?;
        let count = self.tokens * self.submodules.unwrap_or_else(|| submodules(b.sites()));
        let source = match self.start.projects() {
            Some((transfer, inside)) => {
                Source::Projector(Projector::new(b, transfer, inside, [self.tokens, count, width])?)
            }
            None => {
                let init = self.start.of(b, self.tokens, count)?;
                Source::Rows(b.param("prompt_embeddings", &[count, width], init)?)
            }
        };
        b.patch(site.id, Patch::Prompt(Box::new(Rows { source, count: self.tokens })))
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "num_attention_heads": model.info.heads, "num_layers": model.info.layers,
            "num_transformer_submodules": self.submodules.unwrap_or_else(|| submodules(model.sites)),
            "num_virtual_tokens": self.tokens, "token_dim": model.info.width,
        });
        let mut map = own.as_object().cloned().unwrap_or_default();
        map.extend(self.start.origin(model.base_model));
        map
    }

    fn peft_type(&self) -> &'static str {
        if self.context { CONTEXT } else { INFO.peft_type }
    }

    fn trains_on(&self) -> Result<()> {
        if self.context {
            let message = "CPT trains on the labels of its own examples, which are part of the prompt, and keeps its rows near to \
                           them; here its files can be used and not trained on: train it in peft, or start a `prompt`";
            return Err(Error::Unsupported(message.into()));
        }
        Ok(())
    }

    fn file_name(&self, name: &str) -> String {
        prompt_file_name(name)
    }

    fn file_tensors(&self, mut tensors: Named, state: &Named) -> Result<Named> {
        if self.start.projects().is_some() {
            tensors.push(("prompt_embeddings".into(), projector::saved(state, self.tokens)?));
        }
        Ok(tensors)
    }
}

/// The embeddings of `ids`, which the setting `key` gave, repeated or cut to `count` rows.
fn rows_of(ids: &[i64], count: usize, sites: &Sites, key: &str) -> Result<Init> {
    let table = sites.iter().find_map(|s| match (&s.role, &s.value) {
        (Role::Embed, Frozen::Weight(w)) => Some(w),
        _ => None,
    });
    let Some(table) = table else {
        return Err(Error::Unsupported(
            "a prompt that starts as tokens needs a model with a token embedding; here, write `init = \"random\"`".into(),
        ));
    };
    let (rows, _) = table.shape();
    if let Some(id) = ids.iter().find(|id| **id >= rows as i64) {
        return Err(Error::Unsupported(format!(
            "`{key}`: expected ids below {rows}, the vocabulary; found {id}"
        )));
    }
    let ids: Vec<i64> = ids.iter().copied().cycle().take(count).collect();
    Ok(Init::Values(table.lookup(&Tensor::from_i64(ids, [count])?)?))
}

/// Where P comes from.
enum Source {
    Rows(Param),
    Projector(Projector),
}

struct Rows {
    source: Source,
    count: usize,
}

impl PromptPatch for Rows {
    fn count(&self) -> usize {
        self.count
    }

    fn rows(&self, _embedded: &Tensor, _cx: &Pass) -> Result<Tensor> {
        let rows = match &self.source {
            Source::Rows(rows) => rows.get(),
            Source::Projector(projector) => projector.rows()?,
        };
        // What `peft` makes for the decoder is carried along and not used.
        if rows.dim(0) == self.count { Ok(rows) } else { Ok(rows.narrow(0, 0, self.count)?) }
    }
}

#[cfg(test)]
mod tests;
