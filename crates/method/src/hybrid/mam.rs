//! MAM adapters, mix and match: a prefix in every attention and a scaled bottleneck adapter beside every MLP.
//!
//! K′ = [P_k; K], V′ = [P_v; V], P made by a network of an inner width; MLP′(x) = MLP(x) + s·W_u·ReLU(W_d·u), u the stream
//! before the MLP. s = 4, the bottleneck half as wide as the model; W_u starts as zero, the prefix does not.
//!
//! He et al. 2022, arXiv:2110.04366; form, file and sizes are those of AdapterHub's `MAMConfig`. The paper's design for
//! classifiers: 16 tokens, a bottleneck of 16, s = 2.
//!
//! Tensors as in `unipelt`, without gates and LoRAs.

use engraft_nn::Result;
use serde_json::{Map, Value, json};

use super::prefix::{INNER_MAX, Prefix};
use super::union::{Adapters, Union};
use crate::prompts::prompt::TOKENS_MAX;
use crate::shared::fields::{extra_tokens, float, int};
use crate::{Entry, Info, Loaded, Method, read::Reader};

static INFO: Info = Info {
    name: "mam",
    title: "MAM adapter",
    class: "hybrid",
    sites: "keys and values, sublayer",
    paper: "arXiv:2110.04366",
    summary: "a prefix in every attention, a scaled adapter beside every MLP",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_MAM",
    fields: &[
        extra_tokens("30"),
        int(
            "projection",
            (0, INNER_MAX as i64),
            Some("800"),
            "Inner width of the network that makes the prefix; 0 trains it as it is.",
        ),
        float("reduction", (1.0, 1e6), "2", "Width of the model over width of the bottleneck."),
        float("scaling", (0.0, 1e6), "4", "Factor on what the adapter adds."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn mam(prefix: Prefix, reduction: f64, scaling: f64) -> Result<Box<dyn Method>> {
    let settings = json!({ "form": "parallel", "reduction": reduction, "scaling": scaling });
    let adapters = Adapters::from_settings(settings, false)?;
    Ok(Box::new(Union::new(&INFO, Some(prefix), Some(adapters), None)))
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let prefix = Prefix::new(r.count("tokens", 30, TOKENS_MAX), r.whole("projection", 800, INNER_MAX), false);
    let (reduction, scaling) = (r.reduction("reduction", 2.0), r.float("scaling", 4.0));
    r.finish()?;
    mam(prefix, reduction, scaling)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    Union::from_file(config, &INFO, false)
}

fn example() -> Box<dyn Method> {
    let parallel = json!({ "form": "parallel", "reduction": 4, "activation": "gelu" });
    let adapters = Adapters::from_settings(parallel, false);
    Box::new(Union::new(&INFO, Some(Prefix::new(3, 5, false)), adapters.ok(), None))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Layout, Pass, Patch};
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn its_parts_are_a_prefix_and_parallel_adapters() {
        let settings = json!({ "tokens": 3, "projection": 4, "reduction": 2 });
        let a = attached(&[chosen("mam", settings)], &[]);
        assert_eq!(a.adapter.trained_count(), 3 * 6 + 7 * 4 + 5 * 16 + 2 * (2 * 6 * 3 + 3 + 6));
        stir(&a, 0.5);
        // The prefix of the second layer is the last half of the network's columns.
        let (sites, _) = toy();
        let [Patch::KeyValue(p)] = a.adapter.at(site_id(&sites, "layers.1.attn")) else { panic!() };
        assert!(!p.moves());
        let cx = Pass::new(Layout::counted(&[5]).unwrap(), None);
        let rows = p.rows(&sample(&[5, 6], 1), &cx).unwrap();
        let get = |end: &str| {
            value_of(&a, &format!("layers.prefix_tuning.prefix_tunings.engraft.self_prefix.{end}"))
        };
        let inner = get("wte.weight").matmul_t(&get("control_trans.0.weight")).unwrap();
        let inner = inner.add(&get("control_trans.0.bias")).unwrap();
        let all = inner.unary(engraft_tensor::ops::Unary::Tanh).unwrap();
        let all =
            all.matmul_t(&get("control_trans.2.weight")).unwrap().add(&get("control_trans.2.bias")).unwrap();
        close(&rows.values.reshape([3, 4]).unwrap(), &all.narrow(1, 12, 4).unwrap(), 1e-6);
    }

    #[test]
    fn prefixes_of_adapter_hub_are_seen_from_everywhere() {
        let (sites, info) = toy();
        let methods = [chosen("mam", json!({ "tokens": 3, "projection": 4, "reduction": 2 }))];
        let a = attached(&methods, &[]);
        let (own, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        for (config, stays) in [(own.clone(), false), (with(own, json!({ "peft_type": null })), true)] {
            let loaded = crate::load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
            let [Patch::KeyValue(p)] = loaded.adapter.at(site_id(&sites, "layers.1.attn")) else { panic!() };
            assert_eq!(p.stays_in_view(), stays);
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("mam", json!({}))], &["head"]);
        survives_saving(&[chosen("mam", json!({ "projection": 0, "tokens": 2 }))], &[]);
        let good = config(&[chosen("mam", json!({}))], &[]);
        assert_eq!(good["config"]["configs"][1]["scaling"], json!(4.0));
        let mut bad = good;
        bad["config"]["configs"][0]["sharpness"] = json!(2);
        assert!(from_file(&bad).is_err());
    }
}
