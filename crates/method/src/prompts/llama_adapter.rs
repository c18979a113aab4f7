//! LLaMA-Adapter: prompts in the attention of the top layers, in a softmax of their own behind a gate that starts closed.
//!
//! o = softmax(q·Kᵀ/√d)·V + g·softmax(q·K_pᵀ/√d)·V_p, K_p = P·W_kᵀ, V_p = P·W_vᵀ (`shared/gated_prompts.rs`). The paper's g is
//! tanh of a number a head. `peft`'s is one number a layer, and for GPT-2 its prompts go past the output projection: the
//! files differ and are not interchangeable.
//!
//! Zhang et al. 2024, arXiv:2303.16199, equations 2 to 6; the two forms are those of the authors' program and of `peft`.
//!
//! `adaption_prompt` [1, tokens, width], N(0, 1), and `adaption_gate` `[1]` or `[heads]`, zero, in each attention.

use engraft_nn::{Builder, Result, Site, Sites};
use serde_json::{Map, Value, json};

use super::prompt::TOKENS_MAX;
use crate::read::Reader;
use crate::shared::fields::{choice, int};
use crate::shared::gated_prompts::{GATES, Gate, attach, attentions, top};
use crate::{Described, Entry, Info, Loaded, Method, peft};

const LAYERS_MAX: usize = 1 << 16;

struct LlamaAdapter {
    tokens: usize,
    /// How many attentions, from the top; all but the lowest two if absent.
    layers: Option<usize>,
    gate: Gate,
    /// The last part of an attention's path; any if absent.
    module: Option<String>,
}

/// `peft_type` of prompts behind the paper's gates.
const OWN_TYPE: &str = "ENGRAFT_LLAMA_ADAPTER";

static INFO: Info = Info {
    name: "llama_adapter",
    title: "LLaMA-Adapter",
    class: "prompt",
    sites: "keys and values",
    paper: "arXiv:2303.16199",
    summary: "prompts in the attention of the top layers, in a softmax of their own behind a gate that starts closed",
    mergeable: false,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ADAPTION_PROMPT",
    fields: &[
        int("tokens", (1, TOKENS_MAX as i64), Some("10"), "Rows of the prompt of a layer."),
        int(
            "adapter_layers",
            (1, LAYERS_MAX as i64),
            None,
            "How many layers have a prompt, from the top; all but the lowest two if absent.",
        ),
        choice(
            "gate",
            &["scalar", "tanh"],
            "\"scalar\"",
            "One number a layer, as in peft, or tanh of a number a head, as in the paper.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| LlamaAdapter {
        tokens: r.count("tokens", 10, TOKENS_MAX),
        layers: read_layers(r),
        gate: r.one_of("gate", GATES),
        module: None,
    })
}

/// `adapter_layers`, where it is there.
pub(super) fn read_layers(r: &mut Reader<'_>) -> Option<usize> {
    let given = r.value("adapter_layers").is_some();
    let layers = r.count("adapter_layers", 1, LAYERS_MAX);
    given.then_some(layers)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let own = peft::is_type(config, OWN_TYPE);
    let Some(map) = config.as_object().filter(|_| own || peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let layers = read_layers(&mut r);
    if layers.is_none() || r.value("adapter_len").is_none() {
        r.problem("`adapter_len` and `adapter_layers`: expected both, found one or none");
    }
    let tokens = r.count("adapter_len", 10, TOKENS_MAX);
    let gate = if own { r.one_of("gate", GATES) } else { Gate::Scalar };
    let module = r.text("target_modules");
    r.finish()?;
    Ok(Some(Loaded {
        method: Box::new(LlamaAdapter { tokens, layers, gate, module }),
        targets: None,
        train_also,
    }))
}

fn example() -> Box<dyn Method> {
    Box::new(LlamaAdapter { tokens: 3, layers: Some(1), gate: Gate::Tanh, module: None })
}

impl Method for LlamaAdapter {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("adapter_layers·(tokens·d + 1)")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for place in self.chosen(b.sites())? {
            attach(b, place, self.tokens, self.gate, &|_| None)?;
        }
        Ok(())
    }

    fn peft_type(&self) -> &'static str {
        if self.gate == Gate::Scalar { INFO.peft_type } else { OWN_TYPE }
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let chosen = self.chosen(model.sites).unwrap_or_default();
        let module = chosen.first().map(|s| s.module());
        let own =
            json!({ "adapter_layers": chosen.len(), "adapter_len": self.tokens, "target_modules": module });
        let mut map = own.as_object().cloned().unwrap_or_default();
        if self.gate != Gate::Scalar {
            let name = GATES.iter().find(|g| g.1 == self.gate).map(|g| g.0);
            map.insert("gate".into(), json!(name));
        }
        map
    }
}

impl LlamaAdapter {
    /// The attentions that have a prompt, in model order.
    fn chosen<'s>(&self, sites: &'s Sites) -> Result<Vec<&'s Site>> {
        let mut places = attentions(sites);
        if let Some(module) = &self.module {
            places.retain(|s| s.module() == module || s.path.ends_with(&format!(".{module}")));
        }
        let layers = self.layers.unwrap_or_else(|| usual_layers(places.len()));
        top(&places, layers, INFO.title)
    }
}

/// All but the lowest two.
pub(super) fn usual_layers(there: usize) -> usize {
    there.saturating_sub(2).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Patch;
    use engraft_tensor::testing::close;

    #[test]
    fn keys_and_values_are_the_prompt_s_by_the_frozen_projections() {
        let a = attached(
            &[chosen("llama_adapter", json!({ "tokens": 3, "gate": "tanh", "adapter_layers": 1 }))],
            &[],
        );
        assert_eq!(names(&a), ["layers.1.attn.adaption_prompt", "layers.1.attn.adaption_gate"]);
        // K·d + H in each layer.
        assert_eq!(a.adapter.trained_count(), 3 * 6 + 3);
        stir(&a, 0.5);
        let (sites, _) = toy();
        let [Patch::KeyValue(p)] = a.adapter.at(site_id(&sites, "layers.1.attn")) else {
            panic!("no prompt")
        };
        let prompt = value_of(&a, "layers.1.attn.adaption_prompt").reshape([3, 6]).unwrap();
        let cx = engraft_nn::Pass::new(engraft_nn::Layout::counted(&[1]).unwrap(), None);
        let rows = p.rows(&frozen("tok").rows_between(0, 1).unwrap(), &cx).unwrap();
        let keys = prompt.matmul_t(&frozen("layers.1.attn.k")).unwrap();
        let keys = keys.add(&frozen("layers.1.attn.k.bias")).unwrap();
        close(&rows.keys.reshape([3, 4]).unwrap(), &keys, 1e-6);
        let values = prompt.matmul_t(&frozen("layers.1.attn.v")).unwrap();
        close(&rows.values.reshape([3, 4]).unwrap(), &values, 1e-6);
        let gate = value_of(&a, "layers.1.attn.adaption_gate");
        let opened = gate.unary(engraft_tensor::ops::Unary::Tanh).unwrap();
        close(&p.gate().unwrap(), &opened, 0.0);
    }

    #[test]
    fn a_closed_gate_is_one_number_or_one_a_head() {
        let a = attached(&[chosen("llama_adapter", json!({ "adapter_layers": 2 }))], &[]);
        assert_eq!(value_of(&a, "layers.0.attn.adaption_gate").shape(), [1]);
        let (sites, info) = toy();
        let [Patch::KeyValue(p)] = a.adapter.at(site_id(&sites, "layers.0.attn")) else {
            panic!("no prompt")
        };
        assert_eq!(p.gate().unwrap().to_vec().unwrap(), [0.0; 3]);
        let many = [chosen("llama_adapter", json!({ "adapter_layers": 3 }))];
        let error = crate::attach(&many, &[], &sites, &info, 0).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("at most 2"), "{error}");
    }

    #[test]
    fn configurations() {
        for settings in [json!({}), json!({ "gate": "tanh", "tokens": 4 })] {
            survives_saving(&[chosen("llama_adapter", settings)], &["head"]);
        }
        let written = config(&[chosen("llama_adapter", json!({}))], &[]);
        assert_eq!(
            (&written["peft_type"], &written["adapter_layers"], &written["target_modules"]),
            (&json!("ADAPTION_PROMPT"), &json!(1), &json!("attn"))
        );
        for bad in [json!({ "adapter_len": 0 }), json!({ "adapter_layers": null }), json!({ "gate": "tanh" })]
        {
            assert!(from_file(&with(written.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
