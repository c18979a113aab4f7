//! Prefix tuning: trained keys and values before those of the tokens, in every attention.
//!
//! K′ = [P_k; K], V′ = [P_v; V]; tokens are counted from the first row of the prefix, whose keys are used as they are.
//! Not an identity at the start: even zero keys take part of the softmax.
//!
//! Li & Liang 2021, arXiv:2101.00190, trained directly as in P-tuning v2 (Liu et al. 2022, arXiv:2110.07602).
//!
//! One P [tokens, layers·2·kv_heads·dim], in the order key of layer 0, value of layer 0, key of layer 1 …

use engraft_nn::{Builder, Error, Init, KeyValuePatch, KeyValues, Kind, Patch, Result};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::prompt::{TOKENS_MAX, prompt_file_name, read_prompt_keys};
use crate::read::Reader;
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

struct Prefix {
    tokens: usize,
    zero: bool,
    /// The file holds what `peft`'s projection made of its rows.
    projected: bool,
}

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
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let tokens = r.count("tokens", 20, TOKENS_MAX);
    let zero = r.one_of("init", &[("random", false), ("zero", true)]);
    r.finish()?;
    Ok(Box::new(Prefix { tokens, zero, projected: false }))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let tokens = read_prompt_keys(&mut r);
    // Saved are the projected rows: all that a forward needs.
    let projected = r.flag("prefix_projection", false);
    r.ignore(&["encoder_hidden_size"]);
    let zero = r.text("init_weights").is_some_and(|s| s == "zero");
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(Prefix { tokens, zero, projected }), targets: None, train_also }))
}

fn example() -> Box<dyn Method> {
    Box::new(Prefix { tokens: 3, zero: false, projected: false })
}

impl Method for Prefix {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let sites = b.sites().of_kind(|k| matches!(k, Kind::KeyValue { .. }));
        let places: Vec<_> = sites
            .filter_map(|s| match s.kind {
                Kind::KeyValue { heads, dim } => Some((s.id, heads, dim)),
                _ => None,
            })
            .collect();
        if places.is_empty() {
            return Err(Error::Unsupported("prefix tuning needs a model with attention".into()));
        }
        let columns = places.iter().map(|(_, heads, dim)| 2 * heads * dim).sum();
        let init = if self.zero { Init::Zeros } else { Init::Normal(1.0) };
        let param = b.param("prompt_embeddings", &[self.tokens, columns], init)?;
        let mut first = 0;
        for (id, heads, dim) in places {
            let rows = Rows { param: param.clone(), count: self.tokens, heads, dim, first };
            b.patch(id, Patch::KeyValue(Box::new(rows)))?;
            first += 2 * heads * dim;
        }
        Ok(())
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let width = model.info.kv_heads * model.info.head_dim;
        let own = json!({
            "encoder_hidden_size": width, "init_weights": if self.zero { json!("zero") } else { Value::Null },
            "num_attention_heads": model.info.kv_heads, "num_layers": model.info.layers, "num_transformer_submodules": 1,
            "num_virtual_tokens": self.tokens, "prefix_projection": self.projected, "token_dim": width,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn trains_on(&self) -> Result<()> {
        if self.projected {
            let message = "`prefix_projection` is true: the file holds what the projection made, not the projection, so this adapter can be used but not trained on; start a new one with method `prefix`";
            return Err(Error::Unsupported(message.into()));
        }
        Ok(())
    }

    fn file_name(&self, name: &str) -> String {
        prompt_file_name(name)
    }
}

/// The part of one layer: columns `first..` of the parameter.
struct Rows {
    param: Param,
    count: usize,
    heads: usize,
    dim: usize,
    first: usize,
}

impl Rows {
    fn part(&self, number: usize) -> Result<Tensor> {
        let width = self.heads * self.dim;
        let columns = self.param.get().narrow(1, self.first + number * width, width)?;
        Ok(columns.reshape([self.count, self.heads, self.dim])?)
    }
}

impl KeyValuePatch for Rows {
    fn count(&self) -> usize {
        self.count
    }

    fn rows(&self) -> Result<KeyValues> {
        Ok(KeyValues { keys: self.part(0)?, values: self.part(1)? })
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
            let rows = p.rows().unwrap();
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
    }
}
