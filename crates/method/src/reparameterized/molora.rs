//! MoLoRA: several LoRAs at each matrix, mixed for each token by a soft router.
//!
//! y = x·Wᵀ + α/r·Σ_e g_e·(drop(x)·A_eᵀ)·B_eᵀ, g = softmax(x·Rᵀ) over all experts; A and R normal with deviation 0.02, B
//! zero, so the base is unchanged at the start. It does not merge.
//!
//! Zadouri et al. 2024, arXiv:2309.05444, equations 1 and 2.
//!
//! A [experts·rank, in], B [out, experts·rank], one expert after another; R [experts, in].

use engraft_nn::{Builder, Init, Result, Role, Site};
use serde_json::{Map, Value};

use crate::shared::fields::{alpha, dropout, int, rank};
use crate::shared::mixture::{EXPERTS_MAX, Mixture};
use crate::shared::sizes;
use crate::{Described, Entry, Info, Loaded, Method, peft};

struct MoLoRa(Mixture);

const USUAL: Mixture = Mixture { rank: 4, alpha: 16.0, dropout: 0.0, experts: 10 };

static INFO: Info = Info {
    name: "molora",
    title: "MoLoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2309.05444",
    summary: "y = x·Wᵀ + (α/r)·Σ g_e(x)·B_e·A_e·x: LoRAs mixed for each token by a soft router",
    mergeable: false,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_MOLORA",
    fields: &[
        rank("4"),
        alpha("16"),
        dropout("0"),
        int("experts", (1, EXPERTS_MAX as i64), Some("10"), "LoRAs at each matrix."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| MoLoRa(Mixture::read(r, ["rank", "alpha", "dropout"], &USUAL)))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| MoLoRa(Mixture::read(r, ["r", "lora_alpha", "lora_dropout"], &USUAL)))
}

fn example() -> Box<dyn Method> {
    Box::new(MoLoRa(Mixture { rank: 2, alpha: 4.0, dropout: 0.0, experts: 3 }))
}

impl Method for MoLoRa {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.0.rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.0.attach(b, INFO.title, |_| [Init::Normal(0.02), Init::Normal(0.02)], 0.0)
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        self.0.keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use serde_json::json;

    #[test]
    fn trained_numbers() {
        let count = |experts, rank| trained("molora", json!({ "experts": experts, "rank": rank }));
        // A and B of every expert, and a router, at q [6, 6] and v [4, 6] of two layers.
        let own = |experts: usize, rank: usize, out: usize| experts * (rank * (out + 6) + 6);
        assert_eq!(count(3, 2), 2 * (own(3, 2, 6) + own(3, 2, 4)));
        assert_eq!(count(5, 1), 2 * (own(5, 1, 6) + own(5, 1, 4)));
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("molora", json!({ "experts": 3, "dropout": 0.1 }))], &["head"]);
        let good = config(&[chosen("molora", json!({}))], &[]);
        assert_eq!((&good["experts"], &good["r"]), (&json!(10), &json!(4)));
        for bad in [json!({ "experts": 0 }), json!({ "r": 0 }), json!({ "lora_dropout": 2 })] {
            let key = bad.as_object().unwrap().keys().next().unwrap().clone();
            let Err(error) = from_file(&with(good.clone(), bad)) else { panic!("{key} passed") };
            assert!(error.to_string().contains(&key), "{error}");
        }
        let (sites, info) = toy();
        let table = [(chosen("molora", json!({})).0, Some(engraft_nn::Targets::names(["tok"])))];
        assert!(crate::attach(&table, &[], &sites, &info, 0).is_err());
    }
}
