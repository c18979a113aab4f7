//! Prefix tuning: trained keys and values before those of the tokens, in every attention.
//!
//! K′ = [P_k; K], V′ = [P_v; V]; tokens are counted from the first row of the prefix, whose keys are used as they are.
//! Not an identity at the start: even zero keys take part of the softmax.
//!
//! Li & Liang 2021, arXiv:2101.00190, section 4. Without `projection` P is trained directly, which is P-tuning v2 (Liu et al.
//! 2022, arXiv:2110.07602); with it P = tanh(R·W₁ᵀ + b₁)·W₂ᵀ + b₂ is, R [tokens, kv_heads·dim], and only P is saved.
//!
//! One P [tokens, layers·2·kv_heads·dim], in the order key of layer 0, value of layer 0, key of layer 1 … In the decoder of
//! an encoder–decoder model `peft` has layer i read parts 4i and 4i + 1 of the 2·layers parts, counted round, and so does
//! this, with a file in `peft`'s form. Prefixes elsewhere (`at`) have a form of their own, in model order. P or R N(0, 1),
//! the two layers uniform in ±1/√in, as PyTorch's; W₂ and b₂ are kept by parts, so that each attention makes its own alone.

use std::sync::Arc;

use engraft_nn::{
    Builder, Error, Init, KeyValuePatch, KeyValues, Kind, Mode, Pass, Patch, Result, Role, Site, SiteId,
    Sites, Stack,
};
use engraft_tensor::ops::{Unary, cat};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::prompt::{Sizes, TOKENS_MAX, prompt_file_name, read_prompt_keys, submodules};
use crate::hybrid::{Alone, alone, hub_prefix};
use crate::read::{Reader, as_written};
use crate::shared::fields::{choice, extra_tokens, float, int};
use crate::shared::network::{Lookup, Network, Part, layer, named};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, Named, peft};

const INNER_MAX: usize = 1 << 14;

struct Prefix {
    tokens: usize,
    zero: bool,
    /// Width inside the projection.
    projection: Option<usize>,
    dropout: f32,
    /// Whether only P is left of a projection.
    saved: bool,
    /// Which attentions of an encoder–decoder model; the decoder's own where nothing is said.
    at: Option<Vec<Place>>,
    /// What its file says of its model.
    sizes: Sizes,
}

/// An attention of an encoder–decoder model.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Encoder,
    Decoder,
    Cross,
}

const PLACES: &[(&str, Place)] =
    &[("encoder", Place::Encoder), ("decoder", Place::Decoder), ("cross", Place::Cross)];

impl Place {
    /// Where a key-and-value site lies; none in models of one stack.
    fn of(site: &Site) -> Option<Place> {
        match (site.stack, site.role) {
            (Stack::Only, _) => None,
            (_, Role::CrossAttention) => Some(Place::Cross),
            (Stack::Encoder, _) => Some(Place::Encoder),
            (Stack::Decoder, _) => Some(Place::Decoder),
        }
    }
}

/// `peft_type` where `peft` knows no such prefix.
const OWN_TYPE: &str = "ENGRAFT_PREFIX";

static INFO: Info = Info {
    name: "prefix",
    title: "Prefix tuning",
    class: "prompt",
    sites: "keys and values",
    paper: "arXiv:2101.00190",
    summary: "trained keys and values before those of the tokens, in every layer",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "PREFIX_TUNING",
    fields: &[
        extra_tokens("20"),
        FORM,
        choice("init", &["random", "zero"], "\"random\"", "Start as noise or as zeros."),
        int(
            "projection",
            (1, INNER_MAX as i64),
            None,
            "Width inside two layers that make the rows (the paper takes 512); trained directly, as in P-tuning v2, if absent.",
        ),
        float("dropout", (0.0, 0.999), "0", "Dropout on keys and values while training."),
        Field {
            name: "at",
            kind: FieldKind::TextList,
            default: None,
            doc: "Which attentions of an encoder-decoder model: encoder, decoder, cross; decoder if absent, in AdapterHub's form all.",
        },
    ],
};

/// Whose form an adapter has.
pub(super) const FORM: Field = choice(
    "form",
    &["peft", "adapterhub"],
    "\"peft\"",
    "As in `peft`, where tokens are counted from the first of these rows on, or as in AdapterHub's library, where they stay.",
);

/// The words of [`FORM`], and whether they mean AdapterHub's.
pub(super) const FORMS: &[(&str, bool)] = &[("peft", false), ("adapterhub", true)];

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let tokens = r.count("tokens", 20, TOKENS_MAX);
    let zero = r.one_of("init", &[("random", false), ("zero", true)]);
    let at = read_places(&mut r);
    let given = r.value("projection").is_some();
    let projection = Some(r.count("projection", 1, INNER_MAX)).filter(|_| given);
    let dropout = r.dropout("dropout");
    if r.one_of("form", FORMS) {
        let at = of_adapter_hub(&mut r, zero, at.as_deref());
        r.finish()?;
        return Ok(hub_prefix(&INFO, (tokens, projection.unwrap_or(0)), dropout, at));
    }
    r.finish()?;
    Ok(Box::new(Prefix { tokens, zero, projection, dropout, saved: false, at, sizes: Sizes::default() }))
}

/// Whether a prefix in AdapterHub's form lies before an encoder's attention and before what a decoder reads of it.
fn of_adapter_hub(r: &mut Reader<'_>, zero: bool, at: Option<&[Place]>) -> [bool; 2] {
    if zero {
        r.problem("`init`: a prefix in AdapterHub's form starts as noise; leave it out");
    }
    let Some(at) = at else { return [true; 2] };
    if !at.contains(&Place::Decoder) {
        r.problem(
            "`at`: a prefix in AdapterHub's form lies before the decoder's own attention too; name decoder",
        );
    }
    [Place::Encoder, Place::Cross].map(|place| at.contains(&place))
}

/// `at`, in the order of [`PLACES`].
fn read_places(r: &mut Reader<'_>) -> Option<Vec<Place>> {
    let names = r.texts("at")?;
    for name in names.iter().filter(|name| !PLACES.iter().any(|(known, _)| known == *name)) {
        r.problem(format!("`at`: expected encoder, decoder or cross, found {name}"));
    }
    if names.is_empty() {
        r.problem("`at`: expected at least one of encoder, decoder and cross");
    }
    let asked = PLACES.iter().filter(|(known, _)| names.iter().any(|name| name == known));
    Some(asked.map(|(_, place)| *place).collect())
}

/// The attentions that a model does not have, and those that it has.
fn absent(asked: &[Place], sites: &Sites) -> Result<()> {
    let has =
        |place| sites.of_kind(|k| matches!(k, Kind::KeyValue { .. })).any(|s| Place::of(s) == Some(place));
    let names = |wanted: &dyn Fn(Place) -> bool| -> Vec<&str> {
        PLACES.iter().filter(|(_, place)| wanted(*place)).map(|(name, _)| *name).collect()
    };
    let missing = names(&|place| asked.contains(&place) && !has(place));
    if missing.is_empty() {
        return Ok(());
    }
    let there = names(&has);
    let help = match there.is_empty() {
        true => "it has one stack, all of whose attentions are meant; leave `at` out".to_owned(),
        false => format!("it has {}", there.join(", ")),
    };
    Err(Error::Unsupported(format!(
        "`at` names {}, which this model does not have: {help}",
        missing.join(", ")
    )))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let own = peft::is_type(config, OWN_TYPE);
    if !own && !peft::is_type(config, INFO.peft_type) {
        return alone(config, &INFO, Alone::Prefix);
    }
    peft::file_without_targets(if own { OWN_TYPE } else { INFO.peft_type }, config, |r| {
        let (tokens, _) = read_prompt_keys(r);
        let sizes = Sizes::read(r);
        let at = if own { read_places(r) } else { None };
        // Saved are the projected rows: all that a forward needs.
        let inner = r.count("encoder_hidden_size", 1, usize::MAX);
        let projection = r.flag("prefix_projection", false).then_some(inner);
        let zero = r.text("init_weights").is_some_and(|s| s == "zero");
        let dropout = if own { r.dropout("dropout") } else { 0.0 };
        Prefix { tokens, zero, projection, dropout, saved: projection.is_some(), at, sizes }
    })
}

fn example() -> Box<dyn Method> {
    Box::new(Prefix {
        tokens: 3,
        zero: false,
        projection: Some(4),
        dropout: 0.0,
        saved: false,
        at: None,
        sizes: Sizes::default(),
    })
}

impl Method for Prefix {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("2·L·kv·tokens")
    }

    fn by_layers(&self) -> bool {
        true
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.sizes.fit(b.info())?;
        absent(self.at.as_deref().unwrap_or_default(), b.sites())?;
        let places = Places::of(b.sites(), self.places())?;
        let source = self.source(b, &places.widths())?;
        places.attach(b, source, self.tokens, self.dropout, !self.is_own_form())
    }

    fn peft_type(&self) -> &'static str {
        if self.is_own_form() { OWN_TYPE } else { INFO.peft_type }
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let width = model.info.kv_heads * model.info.head_dim;
        let submodules = submodules(model.sites);
        let own = json!({
            "encoder_hidden_size": self.projection.unwrap_or(width), "init_weights": if self.zero { json!("zero") } else { Value::Null },
            "num_attention_heads": model.info.kv_heads, "num_layers": model.info.layers,
            "num_transformer_submodules": submodules, "num_virtual_tokens": self.tokens,
            "prefix_projection": self.projection.is_some(), "token_dim": width,
        });
        let mut map = own.as_object().cloned().unwrap_or_default();
        if self.is_own_form() {
            let names =
                PLACES.iter().filter(|(_, place)| self.places().contains(place)).map(|(name, _)| *name);
            map.insert("at".into(), names.collect());
            map.insert("dropout".into(), json!(as_written(self.dropout)));
        }
        map
    }

    fn trains_on(&self) -> Result<()> {
        if self.saved {
            let message = "`prefix_projection` is true: the file holds what the projection made, not the projection, so this adapter can be used but not trained on; start a new one with method `prefix`";
            return Err(Error::Unsupported(message.into()));
        }
        Ok(())
    }

    fn file_name(&self, name: &str) -> String {
        prompt_file_name(name)
    }

    fn file_tensors(&self, mut tensors: Named, state: &Named) -> Result<Named> {
        if self.projection.is_some() && !self.saved {
            let get = named(state);
            let count =
                state.iter().filter(|(name, _)| name.starts_with(LAST) && name.ends_with(".bias")).count();
            let parts = (0..count).map(|part| projected(&get, part)).collect::<Result<Vec<_>>>()?;
            tensors.push(("prompt_embeddings".into(), cat(&parts.iter().collect::<Vec<_>>(), 1)?));
        }
        Ok(tensors)
    }
}

impl Prefix {
    /// Whether `peft` has no such prefix.
    fn is_own_form(&self) -> bool {
        self.places() != [Place::Decoder]
    }

    fn places(&self) -> &[Place] {
        self.at.as_deref().unwrap_or(&[Place::Decoder])
    }

    /// Where the parts of P, of these widths, come from.
    fn source(&self, b: &mut Builder<'_>, widths: &[usize]) -> Result<Source> {
        let (Some(inner), false) = (self.projection, self.saved) else {
            let init = if self.zero { Init::Zeros } else { Init::Normal(1.0) };
            let whole = b.param("prompt_embeddings", &[self.tokens, widths.iter().sum()], init)?;
            return Ok(Source::whole(vec![whole], widths));
        };
        let width = widths.first().copied().unwrap_or(0);
        let mut parts = Part::embedding(ROWS, self.tokens, width);
        parts.extend(Part::layer(FIRST, (width, inner)));
        for (part, &width) in widths.iter().enumerate() {
            let last = Part::layer(&format!("{LAST}.{part}"), (inner, width));
            parts.extend(if self.zero { Part::zeros(last) } else { last });
        }
        Ok(Source::Projection(Network::new(b, parts)?))
    }
}

const ROWS: &str = "prompt_encoder.embedding";
const FIRST: &str = "prompt_encoder.transform.0";
const LAST: &str = "prompt_encoder.transform.2";

/// Part `part` of tanh(R·W₁ᵀ + b₁)·W₂ᵀ + b₂.
fn projected(get: &Lookup<'_>, part: usize) -> Result<Tensor> {
    let inside = layer(get, FIRST, &get(&format!("{ROWS}.weight"))?)?.unary(Unary::Tanh)?;
    layer(get, &format!("{LAST}.{part}"), &inside)
}

/// Attentions that have a prefix, in model order, with their heads and the width of one.
pub(super) struct Places<'s>(Vec<(&'s Site, usize, usize)>);

impl<'s> Places<'s> {
    /// Those of the decoder in a model that has one, as `peft` has them.
    pub fn of_decoder(sites: &'s Sites) -> Result<Places<'s>> {
        Places::of(sites, &[Place::Decoder])
    }

    fn of(sites: &'s Sites, wanted: &[Place]) -> Result<Places<'s>> {
        let wanted = |s: &Site| Place::of(s).is_none_or(|place| wanted.contains(&place));
        let found = sites.iter().filter(|s| wanted(s)).filter_map(|s| match s.kind {
            Kind::KeyValue { heads, dim } => Some((s, heads, dim)),
            _ => None,
        });
        let places: Vec<_> = found.collect();
        if places.is_empty() {
            let message =
                "prefix tuning needs attention to put its prefix before, and this model has none there";
            return Err(Error::Unsupported(message.into()));
        }
        Ok(Places(places))
    }

    /// The widths of the parts of P: keys and values in turn.
    pub fn widths(&self) -> Vec<usize> {
        self.0.iter().flat_map(|(_, heads, dim)| [heads * dim; 2]).collect()
    }

    /// Puts `count` rows of `source` everywhere; `as_peft` in the order in which `peft` reads them in a decoder.
    pub fn attach(
        &self,
        b: &mut Builder<'_>,
        source: Source,
        count: usize,
        dropout: f32,
        as_peft: bool,
    ) -> Result<()> {
        let (source, parts) = (Arc::new(source), 2 * self.0.len());
        for (i, &(site, heads, dim)) in self.0.iter().enumerate() {
            let round = site.stack != Stack::Only && as_peft;
            let first = if round { 4 * i % parts } else { 2 * i };
            let rows = Rows { source: source.clone(), first, count, heads, dim, dropout, site: site.id };
            b.patch(site.id, Patch::KeyValue(Box::new(rows)))?;
        }
        Ok(())
    }
}

/// Where the rows come from.
pub(super) enum Source {
    /// The rows of P in pieces, one below the other, and the columns at which its parts begin.
    Whole(Vec<Param>, Vec<usize>),
    Projection(Network),
}

impl Source {
    /// P in pieces, of parts of these widths.
    pub fn whole(pieces: Vec<Param>, widths: &[usize]) -> Source {
        let starts = widths.iter().scan(0, |at, width| Some(std::mem::replace(at, *at + width)));
        Source::Whole(pieces, starts.collect())
    }
}

/// The keys and values of one attention.
struct Rows {
    source: Arc<Source>,
    /// The part that is its keys; the next one is its values.
    first: usize,
    count: usize,
    heads: usize,
    dim: usize,
    dropout: f32,
    site: SiteId,
}

impl Rows {
    /// [count, heads, dim], or as much for each sequence where some is dropped.
    fn part(&self, part: usize, cx: &Pass) -> Result<Tensor> {
        let rows = match &*self.source {
            Source::Whole(pieces, starts) => {
                let width = self.heads * self.dim;
                let own = pieces.iter().map(|piece| Ok(piece.get().narrow(1, starts[part], width)?));
                match &own.collect::<Result<Vec<Tensor>>>()?[..] {
                    [one] => one.clone(),
                    several => cat(&several.iter().collect::<Vec<_>>(), 0)?,
                }
            }
            Source::Projection(network) => projected(&|name| network.get(name), part)?,
        };
        let mut all = self.count;
        let mut rows = rows;
        if self.dropout > 0.0 && cx.mode() != Mode::Eval {
            all *= cx.layout().sequences().len();
            let index = (0..all).map(|row| (row % self.count) as i64).collect();
            rows = rows.gather(&Tensor::from_i64(index, [all])?)?;
            rows = cx.dropout(&rows, self.dropout, self.site, (part % 2) as u8)?;
        }
        Ok(rows.reshape([all, self.heads, self.dim])?)
    }
}

impl KeyValuePatch for Rows {
    fn count(&self) -> usize {
        self.count
    }

    fn rows(&self, _input: &Tensor, cx: &Pass) -> Result<KeyValues> {
        Ok(KeyValues { keys: self.part(self.first, cx)?, values: self.part(self.first + 1, cx)? })
    }
}

#[cfg(test)]
mod tests;
