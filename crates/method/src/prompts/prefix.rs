//! Prefix tuning: trained keys and values before those of the tokens, in every attention.
//!
//! K′ = [P_k; K], V′ = [P_v; V]; tokens are counted from the first row of the prefix, whose keys are used as they are.
//! Not an identity at the start: even zero keys take part of the softmax.
//!
//! Li & Liang 2021, arXiv:2101.00190, trained directly as in P-tuning v2 (Liu et al. 2022, arXiv:2110.07602).
//!
//! One P [tokens, layers·2·kv_heads·dim], in the order key of layer 0, value of layer 0, key of layer 1 … In the decoder of
//! an encoder–decoder model `peft` has layer i read parts 4i and 4i + 1 of the 2·layers parts, counted round, and so does
//! this, with a file in `peft`'s form. Prefixes elsewhere (`at`) have a form of their own, in model order.

use engraft_nn::{
    Builder, Error, Init, KeyValuePatch, KeyValues, Kind, Pass, Patch, Result, Role, Site, Sites, Stack,
};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::prompt::{TOKENS_MAX, prompt_file_name, read_prompt_keys, submodules};
use crate::read::Reader;
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

struct Prefix {
    tokens: usize,
    zero: bool,
    /// The file holds what `peft`'s projection, of this inner width, made of its rows.
    projected: Option<usize>,
    /// Which attentions of an encoder–decoder model; the decoder's own where nothing is said.
    at: Option<Vec<Place>>,
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
        Field {
            name: "tokens",
            kind: FieldKind::Int { min: 1, max: TOKENS_MAX as i64 },
            default: Some("20"),
            doc: "Number of extra keys and values in a layer.",
        },
        Field {
            name: "init",
            kind: FieldKind::OneOf(&["random", "zero"]),
            default: Some("\"random\""),
            doc: "Start as noise or as zeros.",
        },
        Field {
            name: "at",
            kind: FieldKind::TextList,
            default: None,
            doc: "Which attentions of an encoder-decoder model: encoder, decoder, cross; decoder if absent.",
        },
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let tokens = r.count("tokens", 20, TOKENS_MAX);
    let zero = r.one_of("init", &[("random", false), ("zero", true)]);
    let at = read_places(&mut r);
    r.finish()?;
    Ok(Box::new(Prefix { tokens, zero, projected: None, at }))
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
    let Some(map) = config.as_object().filter(|_| own || peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let (tokens, _) = read_prompt_keys(&mut r);
    let at = if own { read_places(&mut r) } else { None };
    // Saved are the projected rows: all that a forward needs.
    let inner = r.count("encoder_hidden_size", 1, usize::MAX);
    let projected = r.flag("prefix_projection", false).then_some(inner);
    let zero = r.text("init_weights").is_some_and(|s| s == "zero");
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(Prefix { tokens, zero, projected, at }), targets: None, train_also }))
}

fn example() -> Box<dyn Method> {
    Box::new(Prefix { tokens: 3, zero: false, projected: None, at: None })
}

impl Method for Prefix {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        absent(self.at.as_deref().unwrap_or_default(), b.sites())?;
        let all = b.sites().of_kind(|k| matches!(k, Kind::KeyValue { .. }));
        let wanted = all.filter(|s| Place::of(s).is_none_or(|place| self.places().contains(&place)));
        let places: Vec<(&Site, usize, usize)> = wanted
            .filter_map(|s| match s.kind {
                Kind::KeyValue { heads, dim } => Some((s, heads, dim)),
                _ => None,
            })
            .collect();
        let Some((first, ..)) = places.first() else {
            let message =
                "prefix tuning needs attention to put its prefix before, and this model has none there";
            return Err(Error::Unsupported(message.into()));
        };
        let round = first.stack != Stack::Only && !self.is_own_form();
        let columns: usize = places.iter().map(|(_, heads, dim)| 2 * heads * dim).sum();
        let init = if self.zero { Init::Zeros } else { Init::Normal(1.0) };
        let param = b.param("prompt_embeddings", &[self.tokens, columns], init)?;
        let mut before = 0;
        for (i, &(site, heads, dim)) in places.iter().enumerate() {
            let width = heads * dim;
            let keys = if round { 4 * i * width % columns } else { before };
            let values = if round { (4 * i + 1) * width % columns } else { before + width };
            let rows = Rows { param: param.clone(), count: self.tokens, heads, dim, keys, values };
            b.patch(site.id, Patch::KeyValue(Box::new(rows)))?;
            before += 2 * width;
        }
        Ok(())
    }

    fn peft_type(&self) -> &'static str {
        if self.is_own_form() { OWN_TYPE } else { INFO.peft_type }
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let width = model.info.kv_heads * model.info.head_dim;
        let submodules = submodules(model.sites);
        let own = json!({
            "encoder_hidden_size": self.projected.unwrap_or(width), "init_weights": if self.zero { json!("zero") } else { Value::Null },
            "num_attention_heads": model.info.kv_heads, "num_layers": model.info.layers,
            "num_transformer_submodules": submodules, "num_virtual_tokens": self.tokens,
            "prefix_projection": self.projected.is_some(), "token_dim": width,
        });
        let mut map = own.as_object().cloned().unwrap_or_default();
        if self.is_own_form() {
            let names =
                PLACES.iter().filter(|(_, place)| self.places().contains(place)).map(|(name, _)| *name);
            map.insert("at".into(), names.collect());
        }
        map
    }

    fn trains_on(&self) -> Result<()> {
        if self.projected.is_some() {
            let message = "`prefix_projection` is true: the file holds what the projection made, not the projection, so this adapter can be used but not trained on; start a new one with method `prefix`";
            return Err(Error::Unsupported(message.into()));
        }
        Ok(())
    }

    fn file_name(&self, name: &str) -> String {
        prompt_file_name(name)
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
}

/// The part of one layer.
struct Rows {
    param: Param,
    count: usize,
    heads: usize,
    dim: usize,
    /// First column of the keys, and of the values.
    keys: usize,
    values: usize,
}

impl Rows {
    fn part(&self, first: usize) -> Result<Tensor> {
        let columns = self.param.get().narrow(1, first, self.heads * self.dim)?;
        Ok(columns.reshape([self.count, self.heads, self.dim])?)
    }
}

impl KeyValuePatch for Rows {
    fn count(&self) -> usize {
        self.count
    }

    fn rows(&self, _input: &Tensor, _cx: &Pass) -> Result<KeyValues> {
        Ok(KeyValues { keys: self.part(self.keys)?, values: self.part(self.values)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::close;

    #[test]
    fn columns_are_key_and_value_of_each_layer_in_turn() {
        let a = attached(&[chosen("prefix", json!({ "tokens": 3 }))], &[]);
        let all = a.adapter.params()[0].param.value();
        assert_eq!(all.shape(), [3, 2 * 2 * 4]);
        let (sites, _) = toy();
        for (layer, first) in [(0, 0), (1, 8)] {
            let [Patch::KeyValue(p)] = a.adapter.at(site_id(&sites, &format!("layers.{layer}.attn"))) else {
                panic!()
            };
            let cx = Pass::new(engraft_nn::Layout::counted(&[1]).unwrap(), None);
            let rows = p.rows(&a.adapter.params()[0].param.value(), &cx).unwrap();
            assert_eq!((p.count(), rows.keys.shape()), (3, [3, 2, 2].as_slice()));
            close(&rows.keys.reshape([3, 4]).unwrap(), &all.narrow(1, first, 4).unwrap(), 0.0);
            close(&rows.values.reshape([3, 4]).unwrap(), &all.narrow(1, first + 4, 4).unwrap(), 0.0);
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("prefix", json!({ "init": "zero" }))], &["head"]);
        let written = config(&[chosen("prefix", json!({}))], &[]);
        assert_eq!((&written["token_dim"], &written["num_layers"]), (&json!(4), &json!(2)));
        let one = |projected: bool| {
            let changed = with(written.clone(), json!({ "prefix_projection": projected }));
            from_file(&changed).unwrap().unwrap().method
        };
        assert!(one(false).trains_on().is_ok());
        assert!(one(true).trains_on().is_err(), "the projection is not in the file");
        let wrong = json!({ "at": ["decoder", "head"] });
        assert!(from_settings(wrong.as_object().unwrap()).is_err());
        let places = json!({ "at": ["cross", "encoder"] });
        assert!(from_settings(places.as_object().unwrap()).is_ok());
    }

    #[test]
    fn attentions_that_a_model_does_not_have_are_refused() {
        let (one_stack, info) = toy();
        for place in ["encoder", "decoder", "cross"] {
            let wanted = [chosen("prefix", json!({ "at": [place] }))];
            let error =
                crate::attach(&wanted, &[], &one_stack, &info, 7).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(place) && error.contains("leave `at` out"), "{error}");
        }
        let mut both = Sites::default();
        let kind = || Kind::KeyValue { heads: 2, dim: 2 };
        both.set_stack(Stack::Encoder);
        both.add("encoder", Role::Attention, Some(0), kind());
        assert!(absent(&[Place::Encoder], &both).is_ok());
        let error = absent(&[Place::Encoder, Place::Cross], &both).unwrap_err().to_string();
        assert!(error.contains("`at` names cross,") && error.contains("it has encoder"), "{error}");
    }
}
