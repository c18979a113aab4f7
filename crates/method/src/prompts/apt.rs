//! APT, adaptive prefix tuning: a prefix in every layer whose rows are weighed by what the sequence says there, and whose
//! whole is weighed by a learned number.
//!
//! [P̂_k; P̂_v] = λᵢ·αᵢ ⊙ [P_k; P_v], αᵢ = σ(Wᵢ·h) a number for each row, h what the sequence's own keys are made of in layer
//! i: the mean of its tokens, or one of them (the paper leaves open which). αᵢ = 1, λᵢ = 1 is prefix tuning. Layers are those
//! of the stack that reads the input.
//!
//! Zhang et al. 2023, arXiv:2305.15212, equations 2 and 3; no code is known. W starts N(0, 0.02), λ as one, P N(0, 1).
//!
//! prompt_embeddings [tokens, layers·2·kv_heads·dim] as in prefix tuning; PATH.apt_gate.weight [tokens, width],
//! PATH.apt_scale `[1]`, PATH that of the attention.

use engraft_nn::{
    Builder, Error, Init, KeyValuePatch, KeyValues, Kind, Pass, Patch, Result, Role, Site, Stack,
};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::prompt::TOKENS_MAX;
use crate::read::Reader;
use crate::shared::fields::extra_tokens;
use crate::shared::sequences::{self, Summary};
use crate::{Described, Entry, Info, Loaded, Method, peft};

#[derive(Clone, Debug)]
struct Apt {
    tokens: usize,
    from: Summary,
}

static INFO: Info = Info {
    name: "apt",
    title: "Adaptive prefix tuning",
    class: "prompt",
    sites: "keys and values",
    paper: "arXiv:2305.15212",
    summary: "a prefix whose rows are weighed by what the sequence says in each layer",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_APT",
    fields: &[
        extra_tokens("20"),
        sequences::field(
            Some("\"mean\""),
            "Which token's state stands for a sequence, or their mean; tokens that are to be predicted are not read.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> Apt {
    Apt { tokens: r.count("tokens", 20, TOKENS_MAX), from: Summary::read(r).unwrap_or(Summary::Mean) }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn example() -> Box<dyn Method> {
    Box::new(Apt { tokens: 3, from: Summary::Mean })
}

impl Method for Apt {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("2·L·kv·tokens + L·(tokens·d + 1)")
    }

    fn by_layers(&self) -> bool {
        true
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let own = |s: &&Site| s.role == Role::Attention && s.stack != Stack::Decoder;
        let of = |s: &Site| match s.kind {
            Kind::KeyValue { heads, dim } => Some((s.id, s.path.clone(), heads, dim)),
            _ => None,
        };
        let places: Vec<_> = b.sites().iter().filter(own).filter_map(of).collect();
        if places.is_empty() {
            return Err(Error::Unsupported(
                "adaptive prefixes need attention to put them before, and this model has none".into(),
            ));
        }
        let width = b.info().width;
        let columns: usize = places.iter().map(|(_, _, heads, dim)| 2 * heads * dim).sum();
        let rows = b.param("prompt_embeddings", &[self.tokens, columns], Init::Normal(1.0))?;
        let mut first = 0;
        for (site, path, heads, dim) in places {
            let prefix = Prefix {
                rows: rows.clone(),
                gate: b.param(
                    &format!("{path}.apt_gate.weight"),
                    &[self.tokens, width],
                    Init::Normal(0.02),
                )?,
                scale: b.param(&format!("{path}.apt_scale"), &[1], Init::Ones)?,
                method: self.clone(),
                first,
                heads,
                dim,
            };
            b.patch(site, Patch::KeyValue(Box::new(prefix)))?;
            first += 2 * heads * dim;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "summary": self.from.name(), "tokens": self.tokens });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// The prefix of one layer.
struct Prefix {
    rows: Param,
    gate: Param,
    scale: Param,
    method: Apt,
    /// The column of its first key.
    first: usize,
    heads: usize,
    dim: usize,
}

impl KeyValuePatch for Prefix {
    fn count(&self) -> usize {
        self.method.tokens
    }

    fn rows(&self, input: &Tensor, cx: &Pass) -> Result<KeyValues> {
        let (tokens, width) = (self.method.tokens, self.heads * self.dim);
        let gates = self.method.from.of(input, cx)?.matmul_t(&self.gate.get())?.unary(Unary::Sigmoid)?;
        let sequences = gates.dim(0);
        let gates = gates.mul(&self.scale.get())?.reshape([sequences, tokens, 1])?;
        let rows = self.rows.get();
        let part = |first: usize| -> Result<Tensor> {
            let own = rows.narrow(1, first, width)?.reshape([1, tokens, width])?;
            Ok(gates.mul(&own)?.reshape([sequences * tokens, self.heads, self.dim])?)
        };
        Ok(KeyValues { keys: part(self.first)?, values: part(self.first + width)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::{close, sample};

    fn rows(a: &crate::Attached, path: &str, x: &Tensor) -> KeyValues {
        let (sites, _) = toy();
        let [Patch::KeyValue(p)] = a.adapter.at(site_id(&sites, path)) else { panic!("nothing at {path}") };
        p.rows(x, &Pass::new(Layout::counted(&[2, 3]).unwrap(), None)).unwrap()
    }

    #[test]
    fn open_gates_are_prefix_tuning() {
        let a = attached(&[chosen("apt", json!({ "tokens": 3 }))], &[]);
        // 2·L·l·d_kv + L·(l·d + 1).
        assert_eq!(a.adapter.trained_count(), 2 * 2 * 3 * 4 + 2 * (3 * 6 + 1));
        let plain = attached(&[chosen("prefix", json!({ "tokens": 3 }))], &[]);
        param(&plain.adapter, "prompt_embeddings").set(value_of(&a, "prompt_embeddings")).unwrap();
        for layer in 0..2 {
            // σ(0)·2 = 1.
            let gate = param(&a.adapter, &format!("layers.{layer}.attn.apt_gate.weight"));
            gate.set(Tensor::zeros([3, 6])).unwrap();
            param(&a.adapter, &format!("layers.{layer}.attn.apt_scale")).set(Tensor::full(2.0, [1])).unwrap();
            let path = format!("layers.{layer}.attn");
            let x = sample(&[5, 6], 1);
            let (found, expected) = (rows(&a, &path, &x), rows(&plain, &path, &x));
            for (found, expected) in [(found.keys, expected.keys), (found.values, expected.values)] {
                close(&found.rows_between(0, 3).unwrap(), &expected, 1e-6);
                close(&found.rows_between(3, 6).unwrap(), &expected, 1e-6);
            }
        }
    }

    #[test]
    fn rows_are_weighed_by_what_the_sequence_says() {
        let a = attached(&[chosen("apt", json!({ "tokens": 3 }))], &[]);
        stir(&a, 0.5);
        let x = sample(&[5, 6], 1);
        let found = rows(&a, "layers.1.attn", &x);
        let gate = value_of(&a, "layers.1.attn.apt_gate.weight");
        let mean = x.rows_between(2, 5).unwrap().sum_dim(0).unwrap().scale(1.0 / 3.0).unwrap();
        let gates = mean.matmul_t(&gate).unwrap().unary(Unary::Sigmoid).unwrap().reshape([3, 1]).unwrap();
        let gates = gates.mul(&value_of(&a, "layers.1.attn.apt_scale")).unwrap();
        let keys = value_of(&a, "prompt_embeddings").narrow(1, 8, 4).unwrap().mul(&gates).unwrap();
        close(&found.keys.rows_between(3, 6).unwrap().reshape([3, 4]).unwrap(), &keys, 1e-6);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("apt", json!({ "summary": "first" }))], &["head"]);
        let good = config(&[chosen("apt", json!({}))], &[]);
        for bad in [json!({ "tokens": 0 }), json!({ "summary": "middle" }), json!({ "odd": 1 })] {
            assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
