//! CARTRIDGE: a cache of keys and values that is trained itself, but for its first tokens.
//!
//! K′ = [P_k; K], V′ = [P_v; V] as in prefix tuning, with P = [F; T]: F stays as it is, since many models look at their first
//! token whatever it says and training goes astray where that one moves; T is trained. A corpus that many questions are asked
//! about is read once, into P, in place of being read again with each of them. Not an identity at the start.
//!
//! Eyuboglu et al. 2025, arXiv:2506.06266, in `peft`'s form: its file holds P in one piece, `prompt_embeddings`
//! [tokens, layers·2·kv_heads·dim], in the order key of layer 0, value of layer 0, key of layer 1 … Here F [frozen, …] and
//! T [tokens − frozen, …], N(0, 1), as `peft` draws them; a cache that the model itself made of a text is put in with `peft`
//! (`initialize_kv_prefix_from_text`) and trained on here (`from`).

use engraft_nn::{Builder, Init, Result};
use engraft_tensor::ops::cat;
use serde_json::{Map, Value, json};

use super::prefix::{Places, Source};
use super::prompt::{Sizes, TOKENS_MAX, prompt_file_name, read_prompt_keys, submodules};
use crate::read::Reader;
use crate::shared::fields::{extra_tokens, int};
use crate::{Described, Entry, Info, Loaded, Method, Named, peft};

/// P in the file, and T.
const WHOLE: &str = "prompt_embeddings";
/// F.
const FROZEN: &str = "frozen_embedding";

struct Cartridge {
    tokens: usize,
    frozen: usize,
    /// What its file says of its model.
    sizes: Sizes,
}

static INFO: Info = Info {
    name: "cartridge",
    title: "CARTRIDGE",
    class: "prompt",
    sites: "keys and values",
    paper: "arXiv:2506.06266",
    summary: "a trained cache of keys and values before those of the tokens, whose first tokens stay as they are",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "CARTRIDGE",
    fields: &[
        extra_tokens("20"),
        int(
            "num_frozen_tokens",
            (0, TOKENS_MAX as i64),
            Some("1"),
            "How many of them, the first ones, stay as they start.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| {
        let tokens = r.count("tokens", 20, TOKENS_MAX);
        read(r, tokens)
    })
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::file_without_targets(INFO.peft_type, config, |r| {
        let (tokens, _) = read_prompt_keys(r);
        read(r, tokens)
    })
}

fn read(r: &mut Reader<'_>, tokens: usize) -> Cartridge {
    let frozen = r.whole("num_frozen_tokens", 1, TOKENS_MAX);
    // With all of them `peft` has nothing to train, and files that it can read.
    if frozen > tokens || frozen == tokens && !r.is_file() {
        r.problem(format!("`num_frozen_tokens`: expected less than the {tokens} tokens, found {frozen}"));
    }
    let sizes = if r.is_file() { Sizes::read(r) } else { Sizes::default() };
    Cartridge { tokens, frozen, sizes }
}

fn example() -> Box<dyn Method> {
    Box::new(Cartridge { tokens: 3, frozen: 1, sizes: Sizes::default() })
}

impl Method for Cartridge {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("2·L·kv·(tokens − num_frozen_tokens)")
    }

    fn by_layers(&self) -> bool {
        true
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.sizes.fit(b.info())?;
        let places = Places::of_decoder(b.sites())?;
        let widths = places.widths();
        let width = widths.iter().sum();
        let frozen = match self.frozen {
            0 => None,
            frozen => Some(b.fixed(FROZEN, &[frozen, width], Init::Normal(1.0))?),
        };
        let trained = match self.tokens - self.frozen {
            0 => None,
            count => Some(b.param(WHOLE, &[count, width], Init::Normal(1.0))?),
        };
        let parts = frozen.into_iter().chain(trained).collect();
        places.attach(b, Source::whole(parts, &widths), self.tokens, 0.0, true)
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let width = model.info.kv_heads * model.info.head_dim;
        let own = json!({
            "num_attention_heads": model.info.kv_heads, "num_frozen_tokens": self.frozen, "num_layers": model.info.layers,
            "num_transformer_submodules": submodules(model.sites), "num_virtual_tokens": self.tokens, "token_dim": width,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_name(&self, name: &str) -> String {
        if name == FROZEN { name.into() } else { prompt_file_name(name) }
    }

    fn file_tensors(&self, tensors: Named, _state: &Named) -> Result<Named> {
        let is_part = |name: &str| name == FROZEN || name == WHOLE;
        let (mut parts, mut file): (Named, Named) = tensors.into_iter().partition(|(name, _)| is_part(name));
        parts.sort_by_key(|(name, _)| name != FROZEN);
        let parts: Vec<_> = parts.iter().map(|(_, part)| part).collect();
        file.push((WHOLE.into(), cat(&parts, 0)?));
        Ok(file)
    }

    fn own_tensors(&self, tensors: Named) -> Result<Named> {
        let mut own = Named::new();
        for (key, value) in tensors {
            if key != WHOLE || value.shape().first() != Some(&self.tokens) || self.frozen == 0 {
                own.push((key, value));
                continue;
            }
            own.push((FROZEN.into(), value.rows_between(0, self.frozen)?));
            if self.frozen < self.tokens {
                own.push((key, value.rows_between(self.frozen, self.tokens)?));
            }
        }
        Ok(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Pass, Patch};
    use engraft_tensor::Tensor;
    use engraft_tensor::testing::close;

    #[test]
    fn the_first_tokens_stay_and_lie_before_the_others_in_the_file() {
        let methods = [chosen("cartridge", json!({ "tokens": 5, "num_frozen_tokens": 2 }))];
        let a = attached(&methods, &[]);
        // (tokens − frozen)·layers·2·kv_heads·dim.
        assert_eq!(a.adapter.trained_count(), 3 * 2 * 2 * 4);
        let (frozen, trained) = (value_of(&a, FROZEN), value_of(&a, WHOLE));
        let (sites, info) = toy();
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!((&config["peft_type"], &config["num_frozen_tokens"]), (&json!("CARTRIDGE"), &json!(2)));
        let [(key, whole)] = &tensors[..] else { panic!("one tensor") };
        assert_eq!(key, WHOLE);
        close(whole, &cat(&[&frozen, &trained], 0).unwrap(), 0.0);
        let loaded = crate::load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
        assert_eq!(loaded.adapter.trained_count(), a.adapter.trained_count());
        let cx = Pass::new(engraft_nn::Layout::counted(&[1]).unwrap(), None);
        let [Patch::KeyValue(p)] = loaded.adapter.at(site_id(&sites, "layers.1.attn")) else {
            panic!("no rows")
        };
        let rows = p.rows(&Tensor::zeros([1, 6]), &cx).unwrap();
        close(&rows.values.reshape([5, 4]).unwrap(), &whole.narrow(1, 12, 4).unwrap(), 0.0);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("cartridge", json!({ "tokens": 4 }))], &["head"]);
        survives_saving(&[chosen("cartridge", json!({ "tokens": 4, "num_frozen_tokens": 0 }))], &[]);
        survives_saving(&[chosen("cartridge", json!({})), chosen("lora", json!({ "rank": 2 }))], &[]);
        for bad in [json!({ "tokens": 3, "num_frozen_tokens": 3 }), json!({ "tokens": 0 })] {
            assert!(from_settings(bad.as_object().unwrap()).is_err(), "{bad}");
        }
        let written = config(&[chosen("cartridge", json!({ "tokens": 4 }))], &[]);
        assert!(from_file(&with(written.clone(), json!({ "num_frozen_tokens": 4 }))).is_ok());
        assert!(from_file(&with(written, json!({ "num_frozen_tokens": 5 }))).is_err());
    }
}
