//! Mixtures of LoRAs with a soft router: Δy = α/r·Σ_e g_e·B_e·A_e·x, g = softmax(R·x) for every token.
//!
//! The experts lie one after another in one wide pair, so that a mixture is two products and a scaling between them:
//! A [experts·rank, in], B [out, experts·rank]; R [experts, in] is `lora_router.weight`.

use engraft_nn::{Base, Builder, Error, Init, Mode, Pass, Patch, Result, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::low_rank::{RANK_MAX, linear};

/// Most experts at one matrix.
pub(crate) const EXPERTS_MAX: usize = 1024;

/// The sizes of a mixture.
#[derive(Clone, Debug)]
pub(crate) struct Mixture {
    /// Rank of each expert.
    pub rank: usize,
    /// α.
    pub alpha: f64,
    /// Before A.
    pub dropout: f32,
    /// Number of experts.
    pub experts: usize,
}

impl Mixture {
    /// What recipe and file both say, under the names of either; defaults are those of the recipe.
    pub fn read(r: &mut Reader<'_>, [rank, alpha, dropout]: [&'static str; 3], usual: &Mixture) -> Mixture {
        Mixture {
            rank: r.count(rank, usual.rank, RANK_MAX),
            alpha: r.float(alpha, usual.alpha),
            dropout: r.dropout(dropout),
            experts: r.count("experts", usual.experts, EXPERTS_MAX),
        }
    }

    /// Its keys in a file.
    pub fn keys(&self) -> Map<String, Value> {
        let own = json!({
            "experts": self.experts, "lora_alpha": number(self.alpha), "lora_dropout": as_written(self.dropout), "r": self.rank,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    /// Attaches one at every target. `starts` says how A (of `in` columns) and R start; B is zero. `balance` weighs the
    /// penalty on experts that are used unevenly, averaged over the targets.
    pub fn attach(
        &self,
        b: &mut Builder<'_>,
        title: &str,
        starts: fn(usize) -> [Init; 2],
        balance: f64,
    ) -> Result<()> {
        let targets = b.targets();
        let balance = (balance / targets.len().max(1) as f64) as f32;
        for site in targets {
            let (out, inn) = linear(site, title)?;
            let (path, wide, [start_a, start_r]) = (&site.path, self.experts * self.rank, starts(inn));
            let experts = Experts {
                a: b.param(&format!("{path}.lora_A.weight"), &[wide, inn], start_a)?,
                b: b.param(&format!("{path}.lora_B.weight"), &[out, wide], Init::Zeros)?,
                router: b.param(&format!("{path}.lora_router.weight"), &[self.experts, inn], start_r)?,
                sizes: self.clone(),
                balance,
            };
            b.patch(site.id, Patch::Weight(Box::new(experts)))?;
        }
        Ok(())
    }
}

struct Experts {
    a: Param,
    b: Param,
    router: Param,
    sizes: Mixture,
    balance: f32,
}

impl Experts {
    /// Shares of the experts [tokens, experts].
    fn gates(&self, x: &Tensor, cx: &Pass) -> Result<Tensor> {
        let gates = x.matmul_t(&self.router.get())?.softmax()?;
        if self.balance == 0.0 || self.sizes.experts == 1 || matches!(cx.mode(), Mode::Eval) {
            return Ok(gates);
        }
        // The penalty comes into the loss here, where the gates are: a block that is run again brings it once.
        let uneven = unevenness(&gates)?.scale(self.balance * cx.share())?;
        Ok(gates.carrying(&uneven)?)
    }
}

/// The variance over the squared mean of what each expert gets: gates [tokens, experts] → `[]`.
pub(crate) fn unevenness(gates: &Tensor) -> Result<Tensor> {
    let experts = gates.width();
    let used = gates.sum_to(&[experts])?;
    let mean = used.mean()?;
    let off = used.sub(&mean)?.unary(Unary::Square)?.sum()?.scale(1.0 / (experts as f32 - 1.0))?;
    Ok(off.div(&mean.unary(Unary::Square)?.unary(Unary::Shift(1e-10))?)?)
}

impl WeightPatch for Experts {
    fn weight(&self, _base: &dyn Base) -> Result<Tensor> {
        let text =
            "a mixture of LoRAs depends on its input and cannot be folded into a weight; use it unmerged";
        Err(Error::Unsupported(text.into()))
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let Mixture { rank, alpha, dropout, experts } = self.sizes;
        let gates = self.gates(x, cx)?;
        let dropped = cx.dropout(x, dropout, site.id, 0)?;
        let (tokens, scale) = (x.dim(0), (alpha / rank as f64) as f32);
        let inner = dropped.matmul_t(&self.a.get())?.reshape([tokens, experts, rank])?;
        let inner = inner.mul(&gates.scale(scale)?.reshape([tokens, experts, 1])?)?;
        let change = inner.reshape([tokens, experts * rank])?.matmul_t(&self.b.get())?;
        Ok(base.forward(x)?.plus(&change)?)
    }

    fn mergeable(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Layout, Patched};
    use engraft_tensor::testing::{close, sample};

    const UP: &str = "layers.1.mlp.down";

    /// The output at a matrix, in training or outside.
    fn output(a: &crate::Attached, path: &str, x: &Tensor, trains: bool, share: f32) -> Tensor {
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, path));
        let engraft_nn::Value::Weight(weight) = &site.value else { panic!() };
        let mode = if trains { Mode::Train { seed: 3, step: 1, micro: 0 } } else { Mode::Eval };
        let cx = Pass::new(Layout::counted(&[x.dim(0)]).unwrap(), None).training(mode).sharing(share);
        Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx).forward(x).unwrap()
    }

    fn param(a: &crate::Attached, end: &str) -> Param {
        a.adapter.params().iter().find(|p| p.name == format!("{UP}.lora_{end}.weight")).unwrap().param.clone()
    }

    #[test]
    fn experts_are_mixed_by_their_shares() {
        let settings = serde_json::json!({ "rank": 2, "alpha": 6, "experts": 3, "balance": 0 });
        let a = attached(&[chosen("loramoe", settings)], &[]);
        // E·r(m + n) + E·n, at two matrices [6, 8].
        assert_eq!(a.adapter.trained_count(), 2 * (3 * 2 * (6 + 8) + 3 * 8));
        let x = sample(&[5, 8], 3);
        let base = x.matmul_t(&frozen(UP)).unwrap();
        close(&output(&a, UP, &x, false, 1.0), &base, 1e-6);
        stir(&a, 0.5);
        let gates = x.matmul_t(&param(&a, "router").value()).unwrap().softmax().unwrap();
        let ones = gates.sum_dim(1).unwrap().to_vec().unwrap();
        assert!(ones.iter().all(|s| (s - 1.0).abs() < 1e-6));
        let mut expected = base;
        for e in 0..3 {
            let of_e = param(&a, "A").value().rows_between(2 * e, 2 * e + 2).unwrap();
            let b = param(&a, "B").value().narrow(1, 2 * e, 2).unwrap();
            let one = x.matmul_t(&of_e).unwrap().matmul_t(&b).unwrap().scale(3.0).unwrap();
            expected = expected.add(&one.mul(&gates.narrow(1, e, 1).unwrap()).unwrap()).unwrap();
        }
        close(&output(&a, UP, &x, false, 1.0), &expected, 1e-5);
    }

    #[test]
    fn one_expert_is_a_lora() {
        let targets = || Some(engraft_nn::Targets::names(["mlp.down"]));
        let one = serde_json::json!({ "rank": 2, "alpha": 6, "experts": 1 });
        let a = attached(&[(chosen("molora", one).0, targets())], &[]);
        stir(&a, 0.5);
        let lora =
            attached(&[(chosen("lora", serde_json::json!({ "rank": 2, "alpha": 6 })).0, targets())], &[]);
        for end in ["A", "B"] {
            param(&lora, end).set(param(&a, end).value()).unwrap();
        }
        let x = sample(&[5, 8], 3);
        close(&output(&a, UP, &x, true, 1.0), &output(&lora, UP, &x, true, 1.0), 1e-6);
    }

    #[test]
    fn uneven_use_is_penalised_by_its_gradient() {
        let of = |balance: f64| {
            let settings = serde_json::json!({ "rank": 2, "experts": 3, "balance": balance });
            let a = attached(&[chosen("loramoe", settings)], &[]);
            stir(&a, 0.5);
            let x = sample(&[5, 8], 3);
            let router = param(&a, "router");
            let y = output(&a, UP, &x, true, 0.25);
            let gradients = y.sum().unwrap().backward().unwrap();
            let by_hand = unevenness(&x.matmul_t(&router.get()).unwrap().softmax().unwrap()).unwrap();
            let alone = by_hand.backward().unwrap().get(&router).unwrap().clone();
            (gradients.get(&router).unwrap().clone(), alone)
        };
        let ((with, alone), (without, _)) = (of(0.8), of(0.0));
        // Two targets share the weight, and the micro-batch is a quarter of its step.
        close(&with.sub(&without).unwrap(), &alone.scale(0.8 / 2.0 * 0.25).unwrap(), 1e-3);
        let even = Tensor::full(0.25, [7, 4]);
        assert!(unevenness(&even).unwrap().item().unwrap().abs() < 1e-12);
    }

    #[test]
    fn a_mixture_is_not_merged() {
        let a = attached(&[chosen("molora", serde_json::json!({}))], &[]);
        assert!(engraft_nn::merged_tensors(&toy().0, &a.adapter).is_err());
    }
}
