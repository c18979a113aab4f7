//! LLaMA-Adapter V2: gated prompts in the top layers, trained norms, and a factor and a shift for each linear layer.
//!
//! Prompts are those of the first version behind tanh of a number a head (`shared/gated_prompts.rs`); they pass the factors and
//! shifts of keys and values. Every linear layer of a block gives s ⊙ (x·Wᵀ + b₀ + b), and the norms are trained whole. The
//! early fusion of pictures is not there: no model here reads both.
//!
//! Gao et al. 2023, arXiv:2304.15010, section 3.1 and equation 3.
//!
//! `adaption_prompt` [1, tokens, width], N(0, 1), and `adaption_gate` `[heads]`, zero, in each attention; `adapter_scale` `[out]`, one,
//! and `adapter_bias` `[out]`, zero, at each linear layer; new values of the norms under their own names.

use std::collections::HashMap;
use std::sync::Arc;

use engraft_nn::{
    Base, Builder, Init, Kind, Pass, Patch, Result, Role, Site, Sites, VectorPatch, WeightPatch,
};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::llama_adapter::{read_layers, usual_layers};
use super::prompt::TOKENS_MAX;
use crate::shared::fields::int;
use crate::shared::gated_prompts::{Gate, Tuned, attach, attentions, top};
use crate::{Described, Entry, Info, Loaded, Method, peft};

/// The linear layers of a block.
const LINEARS: &[Role] = &[
    Role::Q,
    Role::K,
    Role::V,
    Role::O,
    Role::Qkv,
    Role::Gate,
    Role::Up,
    Role::Down,
    Role::CrossQ,
    Role::CrossK,
    Role::CrossV,
    Role::CrossO,
];

struct LlamaAdapterV2 {
    tokens: usize,
    /// How many attentions, from the top; all but the lowest two if absent.
    layers: Option<usize>,
}

static INFO: Info = Info {
    name: "llama_adapter_v2",
    title: "LLaMA-Adapter V2",
    class: "prompt",
    sites: "keys and values, weight, vector",
    paper: "arXiv:2304.15010",
    summary: "gated prompts in the top layers; trained norms; y = s ⊙ (x·Wᵀ + b₀ + b) at every linear layer",
    mergeable: false,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_LLAMA_ADAPTER_V2",
    fields: &[
        int("tokens", (1, TOKENS_MAX as i64), Some("10"), "Rows of the prompt of a layer."),
        int(
            "adapter_layers",
            (1, 1 << 16),
            None,
            "How many layers have a prompt, from the top; all but the lowest two if absent.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| LlamaAdapterV2 {
        tokens: r.count("tokens", 10, TOKENS_MAX),
        layers: read_layers(r),
    })
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::file_without_targets(INFO.peft_type, config, |r| {
        let layers = read_layers(r);
        if layers.is_none() || r.value("adapter_len").is_none() {
            r.problem("`adapter_len` and `adapter_layers`: expected both, found one or none");
        }
        let tokens = r.count("adapter_len", 10, TOKENS_MAX);
        r.one_of("gate", &[("tanh", ())]);
        r.ignore(&["target_modules"]);
        LlamaAdapterV2 { tokens, layers }
    })
}

fn example() -> Box<dyn Method> {
    Box::new(LlamaAdapterV2 { tokens: 2, layers: Some(1) })
}

impl Method for LlamaAdapterV2 {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("2·o + n + adapter_layers·(tokens·d + heads)")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let sites = b.sites();
        let mut tuned = HashMap::new();
        for site in sites.iter() {
            match site.kind {
                Kind::Vector { .. } if site.role == Role::Norm && !b.replaced(site.id) => {
                    b.replace(site.id)?
                }
                Kind::Linear { out, .. } if LINEARS.contains(&site.role) => {
                    tuned.insert(site.id, tune(b, site, out)?);
                }
                _ => {}
            }
        }
        for place in self.chosen(sites)? {
            let of = |site: &Site| -> Option<Tuned> {
                let affine: Affine = tuned.get(&site.id)?.clone();
                Some(Arc::new(move |y| affine.apply(y)))
            };
            attach(b, place, self.tokens, Gate::Tanh, &of)?;
        }
        Ok(())
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let chosen = self.chosen(model.sites).unwrap_or_default();
        let own = json!({
            "adapter_layers": chosen.len(), "adapter_len": self.tokens, "gate": "tanh",
            "target_modules": chosen.first().map(|s| s.module()),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl LlamaAdapterV2 {
    /// The attentions that have a prompt, in model order.
    fn chosen<'s>(&self, sites: &'s Sites) -> Result<Vec<&'s Site>> {
        let places = attentions(sites);
        let layers = self.layers.unwrap_or_else(|| usual_layers(places.len()));
        top(&places, layers, INFO.title)
    }
}

/// The factor and the shift of a linear layer. Where the layer has a bias, the shift goes there, so that all of it merges.
fn tune(b: &mut Builder<'_>, site: &Site, out: usize) -> Result<Affine> {
    let scale = b.param(&format!("{}.adapter_scale", site.path), &[out], Init::Ones)?;
    let shift = b.param(&format!("{}.adapter_bias", site.path), &[out], Init::Zeros)?;
    let affine = Affine { scale, shift };
    let bias = b.sites().bias_of(&site.path).map(|bias| bias.id);
    b.patch(site.id, Patch::Weight(Box::new(OfWeight { affine: affine.clone(), shifts: bias.is_none() })))?;
    if let Some(bias) = bias {
        b.patch(bias, Patch::Vector(Box::new(OfBias(affine.clone()))))?;
    }
    Ok(affine)
}

#[derive(Clone)]
struct Affine {
    scale: Param,
    shift: Param,
}

impl Affine {
    /// s ⊙ (y + b), y [rows, out] or `[out]`.
    fn apply(&self, y: &Tensor) -> Result<Tensor> {
        Ok(y.add(&self.shift.get())?.mul(&self.scale.get())?)
    }
}

struct OfWeight {
    affine: Affine,
    /// Whether the shift is added here: the layer has no bias that has it.
    shifts: bool,
}

impl WeightPatch for OfWeight {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let scale = self.affine.scale.get();
        Ok(base.dense()?.mul(&scale.reshape([scale.len(), 1])?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let y = base.forward(x)?;
        if self.shifts { self.affine.apply(&y) } else { Ok(y.mul(&self.affine.scale.get())?) }
    }

    fn mergeable(&self) -> bool {
        !self.shifts
    }

    fn lacks_bias(&self) -> bool {
        self.shifts
    }
}

struct OfBias(Affine);

impl VectorPatch for OfBias {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        self.0.apply(v)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn a_layer_is_scaled_and_shifted_whether_it_has_a_bias_or_not() {
        let a = attached(&[chosen("llama_adapter_v2", json!({ "tokens": 2, "adapter_layers": 1 }))], &[]);
        // Factor and shift of every output, norms whole, one prompt with a gate of three heads.
        assert_eq!(a.adapter.trained_count(), 2 * 2 * (6 + 4 + 4 + 6) + 2 * 2 * 6 + 2 * 6 + 3);
        stir(&a, 0.5);
        let x = sample(&[5, 6], 3);
        let value = |path: &str, end: &str| value_of(&a, &format!("{path}.{end}"));
        for (path, has_bias) in [("layers.0.attn.q", true), ("layers.1.attn.v", false)] {
            let mut y = x.matmul_t(&frozen(path)).unwrap();
            if has_bias {
                y = y.add(&frozen(&format!("{path}.bias"))).unwrap();
            }
            let expected =
                y.add(&value(path, "adapter_bias")).unwrap().mul(&value(path, "adapter_scale")).unwrap();
            let mut found = both_ways(&a, path, &x).0;
            if has_bias {
                found = found.add(&vector(&a, &format!("{path}.bias"))).unwrap();
            }
            close(&found, &expected, 1e-5);
        }
    }

    #[test]
    fn the_prompt_s_values_are_scaled_and_shifted_too() {
        let a = attached(&[chosen("llama_adapter_v2", json!({ "tokens": 2 }))], &[]);
        stir(&a, 0.5);
        let (sites, _) = toy();
        let [Patch::KeyValue(p)] = a.adapter.at(site_id(&sites, "layers.1.attn")) else {
            panic!("no prompt")
        };
        let cx = Pass::new(engraft_nn::Layout::counted(&[1]).unwrap(), None);
        let found = p.rows(&Tensor::zeros([1, 6]), &cx).unwrap().values.reshape([2, 4]).unwrap();
        let prompt = value_of(&a, "layers.1.attn.adaption_prompt").reshape([2, 6]).unwrap();
        close(&found, &both_ways(&a, "layers.1.attn.v", &prompt).0, 1e-5);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("llama_adapter_v2", json!({}))], &["head"]);
        let written = config(&[chosen("llama_adapter_v2", json!({ "adapter_layers": 2 }))], &[]);
        assert_eq!(written["adapter_layers"], json!(2));
        for bad in [json!({ "gate": "scalar" }), json!({ "adapter_layers": 0 }), json!({ "odd": 1 })] {
            assert!(from_file(&with(written.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
