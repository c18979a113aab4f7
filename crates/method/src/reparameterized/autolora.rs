//! AutoLoRA: ranks found by learning a share for each, on rows that the factors do not see.
//!
//! Search: W′ = W + α·B·(a ⊙ A), a = softmax(â) over the r ranks of a matrix; â starts at zero, so a = 1/r and the scale is
//! LoRA's. Odd steps move A and B on the rows that are not held out, even steps move â on those that are, each with its
//! own gradient at the other's present value (first order). After the share `search` of the run the ranks with a ≥ 1/r
//! stay; A is drawn anew, B is zero, the optimizer forgets both, and the rest of the run trains W′ = W + α/r·B·A with these
//! ranks on all rows.
//!
//! Zhang et al. 2024, arXiv:2403.09113; it searches and retrains in two runs.
//!
//! A [rank, in], B [out, rank], â `[rank]`; in checkpoints also p and q `[rank]`, of which the gate of a rank is a·p + q:
//! α and zero in the search, zero and α/r for the ranks that stay. What is saved is a LoRA with ranks of its own for each
//! matrix. The new A is drawn from the seed and "NAME.settled", NAME that of the tensor.

use engraft_nn::{Adapter, Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Gradients, Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::bilevel::{keep_level, turn};
use crate::shared::fields::{alpha, dropout, float, rank};
use crate::shared::low_rank::{
    Pair, RANK_MAX, added, changed, ending, fold_gates, linear, named, other_ranks, plain_lora, rows_times,
};
use crate::shared::sizes;
use crate::{Described, Entry, Forget, Info, Loaded, Method, Part, Step, peft};

struct AutoLoRa {
    rank: usize,
    alpha: f64,
    dropout: f32,
    search: f64,
    held_out: f64,
    rate: f64,
}

const SHARES: &str = "shares";
const END: &str = ".lora_shares";

static INFO: Info = Info {
    name: "autolora",
    title: "AutoLoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2403.09113",
    summary: "W′ = W + α·B·(softmax(â) ⊙ A): shares learned on held-out rows say which ranks stay",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_AUTOLORA",
    fields: &[
        rank("8"),
        alpha("16"),
        dropout("0"),
        float(
            "search",
            (0.0, 1.0),
            "0.5",
            "Share of the run that searches; the rest trains the ranks found.",
        ),
        float("held_out", (0.001, 0.999), "0.3", "Share of the training rows that shares are learned on."),
        float("share_rate", (0.0, 1e6), "10", "Factor on the learning rate of the shares."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>, [rank, alpha, dropout]: [&'static str; 3]) -> AutoLoRa {
    let method = AutoLoRa {
        rank: r.count(rank, 8, RANK_MAX),
        alpha: r.float(alpha, 16.0),
        dropout: r.dropout(dropout),
        search: r.float("search", 0.5),
        held_out: r.float("held_out", 0.3),
        rate: r.float("share_rate", 10.0),
    };
    if method.alpha <= 0.0 {
        r.problem(format!("`{alpha}`: expected a number above 0, found {}", method.alpha));
    }
    if !(0.0..=1.0).contains(&method.search) {
        r.problem(format!("`search`: expected a number from 0 to 1, found {}", method.search));
    }
    if !(method.held_out > 0.0 && method.held_out < 1.0) {
        r.problem(format!("`held_out`: expected a number between 0 and 1, found {}", method.held_out));
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
    Box::new(AutoLoRa { rank: 3, alpha: 6.0, dropout: 0.0, search: 0.5, held_out: 0.3, rate: 10.0 })
}

impl Method for AutoLoRa {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let pair = Pair::new(b, &site.path, linear(site, INFO.title)?, self.rank)?;
            let (path, size) = (&site.path, [self.rank]);
            let all = Init::Values(Tensor::full(self.alpha as f32, size));
            let gates = Gates {
                shares: b.param_in_group(&format!("{path}{END}"), &size, Init::Zeros, SHARES)?,
                p: b.state(&format!("{path}.lora_gates.p"), &size, all)?,
                q: b.state(&format!("{path}.lora_gates.q"), &size, Init::Zeros)?,
            };
            let scale = (self.alpha / self.rank as f64) as f32;
            b.patch(site.id, Patch::Weight(Box::new(Shared { pair, gates, scale, dropout: self.dropout })))?;
        }
        Ok(())
    }

    fn learning_rate_factor(&self, group: &str) -> f32 {
        if group == SHARES { self.rate as f32 } else { 1.0 }
    }

    fn decays(&self, group: &str) -> bool {
        group != SHARES
    }

    fn held_out(&self) -> f64 {
        self.held_out
    }

    fn part(&self, step: Step) -> Part {
        if step.number <= self.searched(step.total) { turn(step.number) } else { Part::All }
    }

    fn after_backward(&self, adapter: &Adapter, gradients: &mut Gradients, step: Step) -> Result<()> {
        keep_level(adapter, gradients, END, self.part(step));
        Ok(())
    }

    fn after_step(&self, adapter: &Adapter, moments: &mut dyn Forget, step: Step) -> Result<()> {
        if step.number != self.searched(step.total) {
            return Ok(());
        }
        for (stem, shares) in ending(adapter, END)? {
            let gates = Gates::of(adapter, stem, shares)?;
            let name = format!("{stem}.lora_A.weight");
            let (a, b) = (named(adapter, &name)?, named(adapter, &format!("{stem}.lora_B.weight"))?);
            gates.settle((self.alpha / self.rank as f64) as f32)?;
            let shape = a.value().shape().to_vec();
            a.set(Init::kaiming(shape[1]).tensor(&shape, step.seed, &format!("{name}.settled"))?)?;
            b.set(Tensor::zeros(b.value().shape().to_vec()))?;
            moments.forget(a);
            moments.forget(b);
        }
        Ok(())
    }

    /// Gates become part of A; ranks without one are dropped.
    fn finish(&self, adapter: &Adapter) -> Result<()> {
        for (stem, shares) in ending(adapter, END)? {
            let gates = Gates::of(adapter, stem, shares)?;
            fold_gates(adapter, stem, &gates.all()?.scale((self.rank as f64 / self.alpha) as f32)?)?;
            shares.replace(Tensor::zeros([0]));
        }
        Ok(())
    }

    fn file_type(&self, adapter: &Adapter) -> &'static str {
        if finished(adapter) { "LORA" } else { INFO.peft_type }
    }

    fn keeps(&self, adapter: &Adapter, name: &str) -> bool {
        !(name.ends_with(END) && finished(adapter))
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        if finished(model.adapter) {
            let ranks = other_ranks(model.adapter, END, self.rank);
            return plain_lora(self.rank, self.alpha, self.dropout, &ranks);
        }
        let own = json!({
            "held_out": number(self.held_out), "lora_alpha": number(self.alpha), "lora_dropout": as_written(self.dropout),
            "r": self.rank, "search": number(self.search), "share_rate": number(self.rate),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl AutoLoRa {
    /// Steps of the search.
    fn searched(&self, total: u64) -> u64 {
        (total as f64 * self.search).round() as u64
    }
}

/// Whether gates have become part of A.
fn finished(adapter: &Adapter) -> bool {
    ending(adapter, END).is_ok_and(|all| all.iter().all(|(_, shares)| shares.value().is_empty()))
}

/// What multiplies the ranks of one matrix.
struct Gates {
    shares: Param,
    p: Param,
    q: Param,
}

impl Gates {
    fn of(adapter: &Adapter, stem: &str, shares: &Param) -> Result<Gates> {
        let of = |end: &str| named(adapter, &format!("{stem}.lora_gates.{end}")).cloned();
        Ok(Gates { shares: shares.clone(), p: of("p")?, q: of("q")? })
    }

    /// a·p + q.
    fn all(&self) -> Result<Tensor> {
        Ok(self.shares.get().softmax()?.mul(&self.p.get())?.add(&self.q.get())?)
    }

    /// Ranks with a ≥ 1/r get the gate `scale`, the others zero.
    fn settle(&self, scale: f32) -> Result<()> {
        let shares = self.shares.value().softmax()?.to_vec()?;
        // Equal shares are 1/r up to rounding.
        let least = (1.0 - 1e-5) / shares.len() as f32;
        let kept = shares.iter().map(|a| if *a >= least { scale } else { 0.0 }).collect();
        self.q.set(Tensor::from_vec(kept, [shares.len()])?)?;
        Ok(self.p.set(Tensor::zeros([shares.len()]))?)
    }
}

/// α·B·(gates ⊙ A)/α: the gates hold the scale.
struct Shared {
    pair: Pair,
    gates: Gates,
    /// Once the gates are part of A.
    scale: f32,
    dropout: f32,
}

impl Shared {
    fn factors(&self) -> Result<(Tensor, Tensor, f32)> {
        let (a, b) = (self.pair.a.get(), self.pair.b.get());
        if self.gates.shares.value().is_empty() {
            return Ok((a, b, self.scale));
        }
        Ok((rows_times(&a, &self.gates.all()?)?, b, 1.0))
    }
}

impl WeightPatch for Shared {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let (a, b, scale) = self.factors()?;
        changed(base, &a, &b, scale)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        let (a, b, scale) = self.factors()?;
        added(base.forward(x)?, &dropped, &a, &b, scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    const Q: &str = "layers.0.attn.q";

    #[derive(Default)]
    struct Forgotten(usize);

    impl Forget for Forgotten {
        fn forget(&mut self, _param: &Param) {
            self.0 += 1;
        }
    }

    #[test]
    fn equal_shares_are_a_lora() {
        let a = attached(&[chosen("autolora", json!({ "rank": 4, "alpha": 8 }))], &[]);
        // r(m + n + 1).
        assert_eq!(a.adapter.trained_count(), 2 * 4 * (6 + 6 + 1 + 4 + 6 + 1));
        let lora = attached(&[chosen("lora", json!({ "rank": 4, "alpha": 8 }))], &[]);
        for end in ["lora_A.weight", "lora_B.weight"] {
            let value = sample(named(&lora.adapter, &format!("{Q}.{end}")).unwrap().value().shape(), 5);
            named(&lora.adapter, &format!("{Q}.{end}")).unwrap().set(value.clone()).unwrap();
            named(&a.adapter, &format!("{Q}.{end}")).unwrap().set(value).unwrap();
        }
        let x = sample(&[5, 6], 3);
        close(&both_ways(&a, Q, &x).0, &both_ways(&lora, Q, &x).0, 1e-5);
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, Q, &x);
        close(&fast, &defined, 1e-5);
    }

    #[test]
    fn ranks_with_a_fair_share_stay() {
        let (sites, info) = toy();
        let methods = [chosen("autolora", json!({ "rank": 4, "alpha": 8 }))];
        let (a, method) = (attached(&methods, &[]), &methods[0].0);
        stir(&a, 0.5);
        let shares = Tensor::from_vec(vec![1.0, -1.0, 1.1, -2.0], [4]).unwrap();
        named(&a.adapter, &format!("{Q}{END}")).unwrap().set(shares).unwrap();
        named(&a.adapter, &format!("layers.1.attn.v{END}")).unwrap().set(Tensor::zeros([4])).unwrap();
        let mut moments = Forgotten::default();
        let at = |number| Step { number, total: 10, seed: 0 };
        assert_eq!(
            [1, 2, 5, 6].map(|n| method.part(at(n))),
            [Part::Lower, Part::Upper, Part::Lower, Part::All]
        );
        (1..=10).for_each(|n| method.after_step(&a.adapter, &mut moments, at(n)).unwrap());
        assert_eq!(moments.0, 2 * 4);
        let x = sample(&[5, 6], 3);
        close(&both_ways(&a, Q, &x).0, &x.matmul_t(&frozen(Q)).unwrap(), 1e-6);
        stir(&a, 0.5);
        let before = both_ways(&a, Q, &x).0;
        method.finish(&a.adapter).unwrap();
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!((&config["peft_type"], &config["rank_pattern"][Q]), (&json!("LORA"), &json!(2)));
        assert_eq!(config["rank_pattern"].get("layers.1.attn.v"), None, "equal shares all stay");
        let loaded = crate::load_adapter(&config, tensors, &sites, &info).unwrap();
        let loaded = crate::Attached {
            adapter: loaded.adapter,
            dead_targets: vec![],
            dead_modules: vec![],
            without_targets: vec![],
        };
        close(&both_ways(&a, Q, &x).0, &before, 1e-5);
        close(&both_ways(&loaded, Q, &x).0, &before, 1e-5);
    }

    #[test]
    fn a_run_that_stops_in_the_search_keeps_all_it_has() {
        let methods = [chosen("autolora", json!({ "rank": 4, "alpha": 8 }))];
        let a = attached(&methods, &[]);
        stir(&a, 0.5);
        let x = sample(&[5, 6], 3);
        let before = both_ways(&a, Q, &x).0;
        methods[0].0.finish(&a.adapter).unwrap();
        close(&both_ways(&a, Q, &x).0, &before, 1e-5);
    }

    #[test]
    fn each_level_moves_its_own_numbers() {
        let methods = [chosen("autolora", json!({ "rank": 2 }))];
        let a = attached(&methods, &["head"]);
        for (number, upper) in [(1, false), (2, true)] {
            let mut gradients = Gradients::default();
            a.adapter.trainable().for_each(|p| gradients.set(&p.param, p.param.value()));
            let step = Step { number, total: 10, seed: 0 };
            methods[0].0.after_backward(&a.adapter, &mut gradients, step).unwrap();
            for p in a.adapter.trainable() {
                assert_eq!(gradients.get(&p.param).is_some(), p.name.ends_with(END) == upper, "{}", p.name);
            }
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("autolora", json!({ "search": 0.7 }))], &["head"]);
        let good = config(&[chosen("autolora", json!({}))], &[]);
        for bad in [json!({ "search": 2 }), json!({ "held_out": 0 }), json!({ "lora_alpha": 0 })] {
            let key = bad.as_object().unwrap().keys().next().unwrap().clone();
            let Err(error) = from_file(&with(good.clone(), bad)) else { panic!("{key} passed") };
            assert!(error.to_string().contains(&key), "{error}");
        }
    }
}
