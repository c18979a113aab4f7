//! LoRAMoE: LoRAs at the feed-forward matrices, mixed for each token, with a penalty on experts that are used unevenly.
//!
//! y = x·Wᵀ + α/r·Σ_e g_e·(drop(x)·A_eᵀ)·B_eᵀ, g = softmax(x·Rᵀ); A and R Kaiming-uniform, B zero, so the base is unchanged
//! at the start. With u_e the sum of g_e over the tokens of a micro-batch, β·Var(u)/mean(u)², averaged over the matrices,
//! is part of what gradients are taken of; it is not in the loss that is shown. It does not merge.
//!
//! Dou et al. 2023, arXiv:2312.09979. Its groups of experts for kinds of data (δ) ask for data with kinds; here all data
//! are of one kind, which is δ = 0.
//!
//! A [experts·rank, in], B [out, experts·rank], one expert after another; R [experts, in].

use engraft_nn::{Builder, Init, Result, Role, Site, Sites, Targets};
use serde_json::{Map, Value};

use crate::read::{Reader, number};
use crate::shared::fields::{alpha, dropout, float, int, rank};
use crate::shared::mixture::{EXPERTS_MAX, Mixture};
use crate::shared::sizes;
use crate::{Described, Entry, Info, Loaded, Method, peft};

struct LoRaMoE {
    sizes: Mixture,
    balance: f64,
}

const USUAL: Mixture = Mixture { rank: 4, alpha: 32.0, dropout: 0.05, experts: 8 };
const ROLES: &[Role] = &[Role::Gate, Role::Up, Role::Down];

static INFO: Info = Info {
    name: "loramoe",
    title: "LoRAMoE",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2312.09979",
    summary: "LoRAs at the feed-forward matrices mixed for each token, their use kept even by a penalty",
    mergeable: false,
    identity_at_init: true,
    default_roles: Some(ROLES),
    peft_type: "ENGRAFT_LORAMOE",
    fields: &[
        rank("4"),
        alpha("32"),
        dropout("0.05"),
        int("experts", (1, EXPERTS_MAX as i64), Some("8"), "LoRAs at each matrix."),
        float("balance", (0.0, 1e6), "0.1", "Weight of the penalty on experts that are used unevenly."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>, names: [&'static str; 3]) -> LoRaMoE {
    let method = LoRaMoE { sizes: Mixture::read(r, names, &USUAL), balance: r.float("balance", 0.1) };
    if method.balance < 0.0 {
        r.problem(format!("`balance`: expected a number from 0, found {}", method.balance));
    }
    method
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, ["rank", "alpha", "dropout"]))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| read(r, ["r", "lora_alpha", "lora_dropout"]))
}

fn example() -> Box<dyn Method> {
    let sizes = Mixture { rank: 2, alpha: 4.0, dropout: 0.0, experts: 3 };
    Box::new(LoRaMoE { sizes, balance: 0.0 })
}

impl Method for LoRaMoE {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.sizes.rank)
    }

    /// Feed-forward parts without a gate have two matrices.
    fn default_targets(&self, sites: &Sites) -> Option<Targets> {
        let has = |role: &Role| sites.iter().any(|s| s.role == *role && s.is_weight());
        Some(Targets::roles(&ROLES.iter().copied().filter(has).collect::<Vec<_>>()))
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.sizes.attach(b, INFO.title, |inn| [Init::kaiming(inn), Init::kaiming(inn)], self.balance)
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let mut map = self.sizes.keys();
        map.insert("balance".into(), number(self.balance));
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use serde_json::json;

    #[test]
    fn trained_numbers() {
        // A and B of every expert, and a router, at [6, 8] of two layers.
        let count = |experts, rank| trained("loramoe", json!({ "experts": experts, "rank": rank }));
        assert_eq!([count(3, 2), count(5, 1)], [2 * 3 * (2 * (6 + 8) + 8), 2 * 5 * (6 + 8 + 8)]);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("loramoe", json!({ "experts": 3 }))], &["head"]);
        let good = config(&[chosen("loramoe", json!({}))], &[]);
        assert_eq!((&good["balance"], &good["target_modules"]), (&json!(0.1), &json!(["down"])));
        for bad in [json!({ "experts": 0 }), json!({ "balance": -1 }), json!({ "r": 0 })] {
            let key = bad.as_object().unwrap().keys().next().unwrap().clone();
            let Err(error) = from_file(&with(good.clone(), bad)) else { panic!("{key} passed") };
            assert!(error.to_string().contains(&key), "{error}");
        }
    }
}
