//! PHM: Compacter's sums of Kronecker products as a change of weights.
//!
//! W′ = W + s·Σᵢ Aᵢ⊗(uᵢ·vᵢ), i = 1…N, with Aᵢ [N, N] that all layers share, uᵢ [out/N, r], vᵢ [r, in/N] of each target (the low-rank
//! parameterised hypercomplex multiplication). A starts normal with deviation 0.01, v Glorot-uniform, u as zero, so W′ = W.
//!
//! Karimi Mahabadi et al. 2021, arXiv:2106.04647, equations 4 and 5; there the layers of an adapter are such sums, here the
//! change of a weight is, which folds into it.
//!
//! phm_rule (A) [N, N, N]; phm_u [N, out/N, r], phm_v [N, r, in/N] a target.

use engraft_nn::{Builder, Init, Patch, Result, Role, Site};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::reparameterized::kadaptation::{Rules, Sum};
use crate::shared::fields::{float, int};
use crate::shared::sizes;
use crate::{Described, Entry, Info, Loaded, Method, peft};

const COUNT_MAX: usize = 1 << 10;

struct Phm {
    count: usize,
    rank: usize,
    scale: f64,
    dropout: f32,
}

static INFO: Info = Info {
    name: "phm",
    title: "PHM",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2106.04647",
    summary: "W′ = W + s·Σ Aᵢ⊗(uᵢ·vᵢ), with small Aᵢ that all layers share: Compacter's layers as a change of weights",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_PHM",
    fields: &[
        int(
            "n",
            (1, COUNT_MAX as i64),
            Some("4"),
            "Number N of products and size of their left factors, a divisor of the targets' inputs and outputs.",
        ),
        int("rank", (1, COUNT_MAX as i64), Some("1"), "Rank r of the right factors."),
        float("scale", (0.0, 1e9), "1", "Factor s on the sum."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of the sum while training."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn read(r: &mut Reader<'_>) -> Phm {
    Phm {
        count: r.count("n", 4, COUNT_MAX),
        rank: r.count("rank", 1, COUNT_MAX),
        scale: r.float("scale", 1.0),
        dropout: r.dropout("dropout"),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(Phm { count: 2, rank: 2, scale: 2.0, dropout: 0.0 })
}

impl Method for Phm {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let most = |(out, inn): (usize, usize)| (out / self.count).min(inn / self.count);
        sizes::beyond(targets, "rank", |_| self.rank, most, sizes::IDLE)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let n = self.count;
        // Before anything of n³ numbers is made.
        b.targets().iter().try_for_each(|site| Sum::sizes(site, INFO.title, n).map(|_| ()))?;
        let rule = b.param("phm_rule", &[n, n, n], Init::Normal(0.01))?;
        for site in b.targets() {
            let (rules, names) = (Rules::Whole(rule.clone()), ["phm_u", "phm_v"]);
            let sizes = [n, self.rank];
            let sum = Sum::attach(b, site, INFO.title, names, rules, sizes, self.scale, self.dropout)?;
            b.patch(site.id, Patch::Weight(Box::new(sum)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "dropout": as_written(self.dropout), "layers_pattern": null, "layers_to_transform": null, "n": self.count,
            "rank": self.rank, "scale": number(self.scale),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn the_rule_is_trained_by_every_layer() {
        let a = attached(&[chosen("phm", json!({ "n": 2, "rank": 2, "scale": 3.0 }))], &[]);
        assert_eq!(a.adapter.trained_count(), 8 + 2 * 2 * (2 * (3 + 3) + 2 * (2 + 3)));
        let (q, v) = ("layers.0.attn.q", "layers.1.attn.v");
        let x = sample(&[5, 6], 3);
        close(&both_ways(&a, q, &x).0, &x.matmul_t(&frozen(q)).unwrap(), 1e-6);
        stir(&a, 0.5);
        let rule = a.adapter.params().iter().find(|p| p.name == "phm_rule").unwrap().param.clone();
        let gradient = |y: engraft_tensor::Tensor| {
            let dy = sample(y.shape(), 4);
            y.mul(&dy).unwrap().sum().unwrap()
        };
        let (first, second) = (gradient(both_ways(&a, q, &x).0), gradient(both_ways(&a, v, &x).0));
        let of = |t: &engraft_tensor::Tensor| t.backward().unwrap().get(&rule).unwrap().clone();
        let both = gradient(both_ways(&a, q, &x).0).add(&gradient(both_ways(&a, v, &x).0)).unwrap();
        close(&of(&both), &of(&first).add(&of(&second)).unwrap(), 1e-5);
        let (fast, defined) = both_ways(&a, q, &x);
        close(&fast, &defined, 1e-5);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("phm", json!({ "n": 2, "dropout": 0.1 }))], &["head"]);
        let written = config(&[chosen("phm", json!({ "n": 2 }))], &[]);
        assert!(from_file(&with(written, json!({ "rank": 0 }))).is_err());
        let (sites, info) = toy();
        assert!(
            crate::attach(&[chosen("phm", json!({}))], &[], &sites, &info, 0).is_err(),
            "6 is no multiple of 4"
        );
    }
}
