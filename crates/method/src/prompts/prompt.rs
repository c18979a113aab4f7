//! Prompt tuning: trained rows put before the embedded tokens.
//!
//! H₀ = [P; E], tokens counted from the first row of P. P starts as embeddings of the vocabulary (given ids, or drawn)
//! or as noise N(0, 1).
//!
//! Lester et al. 2021, arXiv:2104.08691.
//!
//! P [tokens, width], saved as `prompt_embeddings`. In an encoder–decoder model the rows come before the encoder's input;
//! `peft` makes as many again for the decoder and never reads them, so its files hold [2 · tokens, width].

use engraft_nn::{
    Base, Builder, Error, Init, Kind, Pass, Patch, PromptPatch, Result, Role, Site, Sites, Stack,
    Value as Frozen,
};
use engraft_tensor::cpu::random::Key;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

pub(crate) const TOKENS_MAX: usize = 1 << 16;

struct Prompt {
    tokens: usize,
    /// Times that the file holds `tokens` rows, of which the first are used; `None` is what `peft` makes for the model.
    submodules: Option<usize>,
    start: Start,
}

/// How P starts.
#[derive(Clone)]
enum Start {
    /// As tokens drawn from the vocabulary.
    Drawn,
    /// As these tokens, repeated or cut to fit.
    Given(Vec<i64>),
    /// As noise.
    Noise,
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
        Field {
            name: "tokens",
            kind: FieldKind::Int { min: 1, max: TOKENS_MAX as i64 },
            default: Some("20"),
            doc: "Number of rows.",
        },
        Field {
            name: "init",
            kind: FieldKind::OneOf(&["vocabulary", "random"]),
            default: Some("\"vocabulary\""),
            doc: "Start as embeddings of drawn tokens, or as noise.",
        },
        Field {
            name: "init_ids",
            kind: FieldKind::IntList,
            default: None,
            doc: "Start as the embeddings of these tokens, repeated or cut to fit.",
        },
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let tokens = r.count("tokens", 20, TOKENS_MAX);
    let random = r.one_of("init", &[("vocabulary", false), ("random", true)]);
    let start = match r.counts("init_ids") {
        Some(ids) if !ids.is_empty() => Start::Given(ids.into_iter().map(|id| id as i64).collect()),
        _ if random => Start::Noise,
        _ => Start::Drawn,
    };
    r.finish()?;
    Ok(Box::new(Prompt { tokens, submodules: None, start }))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let (tokens, submodules) = read_prompt_keys(&mut r);
    r.ignore(&["prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"]);
    let drawn = r.text("prompt_tuning_init").is_some_and(|s| s == "SAMPLE_VOCAB");
    r.finish()?;
    // The rows come from the file; how they started is only written back.
    let start = if drawn { Start::Drawn } else { Start::Noise };
    Ok(Some(Loaded { method: Box::new(Prompt { tokens, submodules, start }), targets: None, train_also }))
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
    if r.value("num_virtual_tokens").is_none() {
        r.problem("`num_virtual_tokens` is absent");
    }
    (r.count("num_virtual_tokens", 1, TOKENS_MAX), given.then_some(submodules))
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
    Box::new(Prompt { tokens: 3, submodules: None, start: Start::Given(vec![5, 7]) })
}

impl Method for Prompt {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let (site, width) = prompt_site(b.sites(), INFO.title)?;
        let count = self.tokens * self.submodules.unwrap_or_else(|| submodules(b.sites()));
        let init = match &self.start {
            Start::Noise => Init::Normal(1.0),
            Start::Given(ids) => rows_of(ids, count, b.sites())?,
            Start::Drawn => {
                let key = Key { seed: b.seed(), stream: self.tokens as u64 };
                let vocabulary = b.info().vocabulary.max(1) as u64;
                let ids: Vec<i64> =
                    (0..count as u64).map(|i| (u64::from(key.bits(i)) % vocabulary) as i64).collect();
                rows_of(&ids, count, b.sites())?
            }
        };
        let param = b.param("prompt_embeddings", &[count, width], init)?;
        b.patch(site.id, Patch::Prompt(Box::new(Rows { param, count: self.tokens })))
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let init = if matches!(self.start, Start::Drawn) { "SAMPLE_VOCAB" } else { "RANDOM" };
        let own = json!({
            "num_attention_heads": model.info.heads, "num_layers": model.info.layers,
            "num_transformer_submodules": self.submodules.unwrap_or_else(|| submodules(model.sites)),
            "num_virtual_tokens": self.tokens, "prompt_tuning_init": init, "prompt_tuning_init_text": null,
            "token_dim": model.info.width, "tokenizer_kwargs": null, "tokenizer_name_or_path": null,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_name(&self, name: &str) -> String {
        prompt_file_name(name)
    }
}

/// The embeddings of `ids`, repeated or cut to `count` rows.
fn rows_of(ids: &[i64], count: usize, sites: &Sites) -> Result<Init> {
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
            "`init_ids`: expected ids below {rows}, the vocabulary; found {id}"
        )));
    }
    let ids: Vec<i64> = ids.iter().copied().cycle().take(count).collect();
    Ok(Init::Values(table.lookup(&Tensor::from_i64(ids, [count])?)?))
}

struct Rows {
    param: Param,
    count: usize,
}

impl PromptPatch for Rows {
    fn count(&self) -> usize {
        self.count
    }

    fn rows(&self, _embedded: &Tensor, _cx: &Pass) -> Result<Tensor> {
        let rows = self.param.get();
        // What `peft` makes for the decoder is carried along and not used.
        if rows.dim(0) == self.count { Ok(rows) } else { Ok(rows.narrow(0, 0, self.count)?) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::close;

    #[test]
    fn rows_start_as_the_tokens_they_are_given() {
        let a = attached(&[chosen("prompt", json!({ "tokens": 3, "init_ids": [5, 7] }))], &[]);
        let ids = Tensor::from_i64(vec![5, 7, 5], [3]).unwrap();
        close(&a.adapter.params()[0].param.value(), &frozen("tok").gather(&ids).unwrap(), 0.0);
        let drawn =
            attached(&[chosen("prompt", json!({ "tokens": 4 }))], &[]).adapter.params()[0].param.value();
        let table = frozen("tok").to_vec().unwrap();
        let known = |row: &[f32]| table.chunks(6).any(|r| r == row);
        assert!(drawn.to_vec().unwrap().chunks(6).all(known));
        let (sites, info) = toy();
        let outside = chosen("prompt", json!({ "init_ids": [11] }));
        assert!(crate::attach(&[outside], &[], &sites, &info, 0).is_err());
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("prompt", json!({}))], &["head"]);
        let written = config(&[chosen("prompt", json!({ "init": "random" }))], &[]);
        assert_eq!((&written["token_dim"], &written["num_virtual_tokens"]), (&json!(6), &json!(20)));
        assert_eq!(prompt_file_name("classifier.weight"), "base_model.classifier.weight");
        for bad in [
            json!({ "num_transformer_submodules": 3 }),
            json!({ "num_virtual_tokens": null }),
            json!({ "odd": 1 }),
        ] {
            assert!(from_file(&with(written.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
