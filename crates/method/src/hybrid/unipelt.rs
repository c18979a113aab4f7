//! UniPELT: a prefix, bottleneck adapters and LoRAs in every layer, each times a gate that the sequence opens.
//!
//! G_M = mean over the sequence's tokens of σ(w_M·x + c_M), x what part M reads:
//!   adapter after the MLP:  h ← h + G_A·W_u·φ(W_d·h)
//!   prefix:                 K′ = [G_P·P_k; K], V′ = [G_P·P_v; V], P made by a network of an inner width
//!   LoRA at q and v:        y = x·Wᵀ + G_L·(x·Aᵀ)·Bᵀ, the gate in the place of α/r
//! Gates are numbers of a sequence: other sequences and padding do not matter, and while text is generated they stay what
//! its beginning made them. A closed gate of the prefix is not its removal: rows of zeros take part of the softmax.
//!
//! Mao et al. 2022, arXiv:2110.07577; form, file and sizes are those of AdapterHub's `UniPELTConfig`.
//!
//! PATH.loras.NAME.lora_A [rank, in], .lora_B [out, rank], .gate.weight [1, in], .gate.bias; PATH.adapters.NAME as in
//! `bottleneck`, and .gate; PATH.prefix_tuning.prefix_gates.NAME, and TRUNK.prefix_tuning.prefix_tunings.NAME.self_prefix.

use engraft_nn::Result;
use serde_json::{Map, Value, json};

use super::lora::Lora;
use super::prefix::{INNER_MAX, Prefix};
use super::union::{Adapters, Union};
use crate::prompts::prompt::TOKENS_MAX;
use crate::shared::fields::{extra_tokens, float, int, rank};
use crate::{Entry, Info, Loaded, Method, read::Reader};

static INFO: Info = Info {
    name: "unipelt",
    title: "UniPELT",
    class: "hybrid",
    sites: "keys and values, sublayer, weight",
    paper: "arXiv:2110.07577",
    summary: "prefix, adapters and LoRAs, each weighed by a gate of the sequence",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_UNIPELT",
    fields: &[
        extra_tokens("10"),
        int(
            "projection",
            (0, INNER_MAX as i64),
            Some("512"),
            "Inner width of the network that makes the prefix; 0 trains it as it is.",
        ),
        float("reduction", (1.0, 1e6), "16", "Width of the model over width of the bottleneck."),
        rank("8"),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let prefix = Prefix::new(r.count("tokens", 10, TOKENS_MAX), r.whole("projection", 512, INNER_MAX), true);
    let adapters = Adapters::from_settings(json!({ "reduction": r.reduction("reduction", 16.0) }), true)?;
    let lora = Lora::new(r.count("rank", 8, 1024), true);
    r.finish()?;
    Ok(Box::new(Union::new(&INFO, Some(prefix), Some(adapters), Some(lora))))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    Union::from_file(config, &INFO, true)
}

fn example() -> Box<dyn Method> {
    let adapters = Adapters::from_settings(json!({ "reduction": 4, "activation": "gelu" }), true);
    let parts = (Prefix::new(3, 5, true), Lora::new(2, true));
    Box::new(Union::new(&INFO, Some(parts.0), adapters.ok(), Some(parts.1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Layout, Pass, Patch, Patched, Sublayer, Value as Frozen};
    use engraft_tensor::Tensor;
    use engraft_tensor::testing::{close, sample};

    const Q: &str = "layers.0.attn.q";

    fn small() -> crate::Attached {
        let a = attached(
            &[chosen("unipelt", json!({ "tokens": 3, "projection": 4, "reduction": 2, "rank": 2 }))],
            &[],
        );
        stir(&a, 0.5);
        a
    }

    /// Sets c of every gate whose name holds `part`, w zero: open at +40, shut at −40.
    fn set(a: &crate::Attached, part: &str, bias: f32) {
        for p in a.adapter.params().iter().filter(|p| p.name.contains(part)) {
            let shape = p.param.value().shape().to_vec();
            match p.name.rsplit('.').next() {
                Some("weight") if p.name.contains("gate") => p.param.set(Tensor::zeros(shape)).unwrap(),
                Some("bias") if p.name.contains("gate") => p.param.set(Tensor::full(bias, shape)).unwrap(),
                _ => {}
            }
        }
    }

    fn output(a: &crate::Attached, x: &Tensor) -> Tensor {
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, Q));
        let Frozen::Weight(weight) = &site.value else { panic!() };
        let cx = Pass::new(Layout::counted(&[2, 3]).unwrap(), None);
        engraft_nn::Base::forward(&Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx), x)
            .unwrap()
    }

    #[test]
    fn parameters_are_counted_as_its_parts_and_gates() {
        // prefix l·d + (d+1)·m + (m+1)·2·L·d_kv; a layer's adapter 2·d·k + k + d, LoRAs r·(6+6) + r·(6+4), gates 4·(d+1).
        let layer = 2 * 6 * 3 + 3 + 6 + 2 * (6 + 6) + 2 * (6 + 4) + 4 * 7;
        assert_eq!(small().adapter.trained_count(), 3 * 6 + 7 * 4 + 5 * 2 * 2 * 4 + 2 * layer);
    }

    #[test]
    fn shut_gates_take_their_part_away_and_open_ones_leave_it_whole() {
        let (a, x) = (small(), sample(&[5, 6], 3));
        set(&a, ".loras.", -40.0);
        close(&output(&a, &x), &x.matmul_t(&frozen(Q)).unwrap(), 1e-6);
        set(&a, ".loras.", 40.0);
        let get = |end: &str| value_of(&a, &format!("{Q}.loras.engraft.{end}"));
        let change = x.matmul_t(&get("lora_A")).unwrap().matmul_t(&get("lora_B")).unwrap();
        close(&output(&a, &x), &x.matmul_t(&frozen(Q)).unwrap().add(&change).unwrap(), 1e-5);
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, "layers.1.output_adapters"));
        let run = |a: &crate::Attached| {
            let cx = Pass::new(Layout::counted(&[2, 3]).unwrap(), None);
            let (u, mut g) = (sample(&[5, 6], 1), sample(&[5, 6], 2));
            for patch in a.adapter.at(site.id) {
                let Patch::Sublayer(p) = patch else { panic!() };
                let view = Sublayer { residual: &u, input: &u, output: g, norm: None };
                g = p.output(&view, site, &cx).unwrap();
            }
            g
        };
        set(&a, ".adapters.", -40.0);
        close(&run(&a), &sample(&[5, 6], 2), 1e-6);
        set(&a, ".adapters.", 40.0);
        let plain = attached(&[chosen("bottleneck", json!({ "reduction": 2 }))], &[]);
        for p in plain.adapter.params() {
            p.param.set(value_of(&a, &p.name)).unwrap();
        }
        close(&run(&a), &run(&plain), 1e-5);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("unipelt", json!({}))], &["head"]);
        survives_saving(&[chosen("unipelt", json!({ "projection": 0, "tokens": 2 }))], &[]);
        let good = config(&[chosen("unipelt", json!({}))], &[]);
        let part = |number: usize, change: Value| {
            let mut changed = good.clone();
            let own = with(changed["config"]["configs"][number].clone(), change);
            changed["config"]["configs"][number] = own;
            changed
        };
        for bad in [
            part(0, json!({ "non_linearity": "odd" })),
            part(0, json!({ "sharpness": 2 })),
            part(1, json!({ "ln_after": true })),
            part(2, json!({ "use_dora": true })),
            part(2, json!({ "attn_matrices": ["o"] })),
            part(2, json!({ "architecture": "reft" })),
        ] {
            assert!(from_file(&bad).is_err(), "{bad}");
        }
        let theirs = with(good, json!({ "peft_type": null }));
        assert!(from_file(&theirs).unwrap().is_some(), "AdapterHub's files have no peft_type");
    }
}
