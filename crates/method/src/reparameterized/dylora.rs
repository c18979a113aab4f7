//! DyLoRA: a LoRA whose leading ranks are good by themselves, so that its rank is chosen after training.
//!
//! In each step one rank b is drawn from `min_rank`..=`rank` for all matrices, and W′ = W + α/b·B[:, :b]·A[:b]. Mode `full`
//! trains all b ranks, mode `frozen` the b-th alone. A Kaiming-uniform, B zero, so W′ = W. Outside training b is
//! `eval_rank`, by default the whole rank.
//!
//! Valipour et al. 2023, arXiv:2210.07558, algorithm 1. The scale is that of a LoRA of rank b, as in its published code.
//!
//! A [rank, in], B [out, rank]. The file keeps all ranks, so that training can go on; `eval_r` in its configuration says
//! which are used, and may be chosen anew wherever the adapter is. [`sliced_dylora`] makes a plain LoRA of the first ranks.
//!
//! b = `min_rank` + w mod (`rank` − `min_rank` + 1), w word number `step` of stream 0x64796c6f7261 ("dylora") of the seed.

use engraft_nn::{Base, Builder, Error, Mode, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::Tensor;
use engraft_tensor::cpu::random::Key;
use engraft_tensor::ops::cat;
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::fields::{alpha, choice, dropout, int, rank};
use crate::shared::low_rank::{Pair, RANK_MAX, added, changed, linear, plain_lora};
use crate::shared::sizes;
use crate::{Described, Entry, Info, Loaded, Method, Named, peft};

#[derive(Clone, Debug)]
struct DyLoRa {
    rank: usize,
    min_rank: usize,
    /// Outside training; the whole rank where nothing is said.
    eval_rank: Option<usize>,
    alpha: f64,
    dropout: f32,
    mode: Trains,
}

/// Which of the drawn ranks are trained.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trains {
    Full,
    Frozen,
}

const MODES: &[(&str, Trains)] = &[("full", Trains::Full), ("frozen", Trains::Frozen)];
const STREAM: u64 = 0x6479_6c6f_7261;

static INFO: Info = Info {
    name: "dylora",
    title: "DyLoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2210.07558",
    summary: "LoRA trained at a rank drawn anew in each step; any leading part of it is a LoRA of that rank",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_DYLORA",
    fields: &[
        rank("8"),
        alpha("16"),
        dropout("0"),
        int("min_rank", (1, 1024), Some("1"), "The least rank that is drawn."),
        int("eval_rank", (1, 1024), None, "The rank outside training; by default the whole rank."),
        choice(
            "mode",
            &["full", "frozen"],
            "\"full\"",
            "Whether a step trains all ranks up to the drawn one, or that one alone.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>, [rank, min, eval, alpha, dropout]: [&'static str; 5]) -> DyLoRa {
    let eval_rank = r.value(eval).is_some();
    let method = DyLoRa {
        rank: r.count(rank, 8, RANK_MAX),
        min_rank: r.count(min, 1, RANK_MAX),
        eval_rank: eval_rank.then(|| r.count(eval, 1, RANK_MAX)),
        alpha: r.float(alpha, 16.0),
        dropout: r.dropout(dropout),
        mode: r.one_of("mode", MODES),
    };
    let named = [(min, Some(method.min_rank)), (eval, method.eval_rank)];
    for (key, found) in named.into_iter().filter_map(|(key, n)| Some((key, n?))) {
        if found > method.rank {
            r.problem(format!("`{key}`: expected at most the rank {}, found {found}", method.rank));
        }
    }
    method
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, ["rank", "min_rank", "eval_rank", "alpha", "dropout"]))
}

fn read_file(config: &Value) -> Result<Option<(DyLoRa, Loaded)>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    let method = read(&mut r, ["r", "min_r", "eval_r", "lora_alpha", "lora_dropout"]);
    r.finish()?;
    Ok(Some((method.clone(), Loaded { method: Box::new(method), targets, train_also })))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    Ok(read_file(config)?.map(|(_, loaded)| loaded))
}

fn example() -> Box<dyn Method> {
    Box::new(DyLoRa {
        rank: 4,
        min_rank: 2,
        eval_rank: Some(3),
        alpha: 6.0,
        dropout: 0.0,
        mode: Trains::Full,
    })
}

/// A plain LoRA, in `peft`'s form, of the first `rank` ranks of a saved DyLoRA.
///
/// # Errors
/// It is no DyLoRA, or has fewer ranks.
pub fn sliced_dylora(config: &Value, tensors: &Named, rank: usize) -> Result<(Value, Named)> {
    let Some((method, _)) = read_file(config)? else {
        return Err(Error::Unsupported(
            "only the ranks of a DyLoRA are ordered so that some may be cut".into(),
        ));
    };
    if rank == 0 || rank > method.rank {
        return Err(Error::Unsupported(format!("the adapter has ranks 1 to {}, not {rank}", method.rank)));
    }
    let own = method.own_keys();
    let mut map: Map<String, Value> = config.as_object().cloned().unwrap_or_default();
    map.retain(|key, _| !own.contains_key(key));
    // What targets need is there already.
    for (key, value) in plain_lora(rank, method.alpha, method.dropout, &[]) {
        map.entry(key).or_insert(value);
    }
    map.insert("peft_type".into(), json!("LORA"));
    let cut = |(name, t): &(String, Tensor)| {
        Ok((
            name.clone(),
            match name {
                n if n.ends_with(".lora_A.weight") => t.rows_between(0, rank)?,
                n if n.ends_with(".lora_B.weight") => t.narrow(1, 0, rank)?,
                _ => t.clone(),
            },
        ))
    };
    Ok((Value::Object(map), tensors.iter().map(cut).collect::<Result<_>>()?))
}

impl DyLoRa {
    /// The rank of a step.
    fn drawn(&self, seed: u64, step: u64) -> usize {
        let choices = (self.rank - self.min_rank + 1) as u32;
        self.min_rank + (Key { seed, stream: STREAM }.bits(step) % choices) as usize
    }

    fn own_keys(&self) -> Map<String, Value> {
        let own = json!({
            "eval_r": self.eval_rank, "lora_alpha": number(self.alpha), "lora_dropout": as_written(self.dropout),
            "min_r": self.min_rank, "mode": MODES.iter().find(|m| m.1 == self.mode).map(|m| m.0), "r": self.rank,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Method for DyLoRa {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn chosen_in_use(&self) -> &'static [(&'static str, &'static str)] {
        &[("eval_rank", "eval_r")]
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let pair = Pair::new(b, &site.path, linear(site, "DyLoRA")?, self.rank)?;
            b.patch(site.id, Patch::Weight(Box::new(Leading { pair, method: self.clone() })))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        self.own_keys()
    }
}

struct Leading {
    pair: Pair,
    method: DyLoRa,
}

impl Leading {
    /// The first `rank` ranks, and their scale; where `last_only` no gradient reaches those before the last.
    fn factors(&self, rank: usize, last_only: bool) -> Result<(Tensor, Tensor, f32)> {
        let (a, b) = (self.pair.a.get(), self.pair.b.get());
        let scale = (self.method.alpha / rank as f64) as f32;
        if !last_only || rank == 1 {
            return Ok((a.rows_between(0, rank)?, b.narrow(1, 0, rank)?, scale));
        }
        let (fixed_a, fixed_b) = (a.detach().rows_between(0, rank - 1)?, b.detach().narrow(1, 0, rank - 1)?);
        let a = cat(&[&fixed_a, &a.rows_between(rank - 1, rank)?], 0)?;
        Ok((a, cat(&[&fixed_b, &b.narrow(1, rank - 1, 1)?], 1)?, scale))
    }
}

impl WeightPatch for Leading {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let (a, b, scale) = self.factors(self.method.eval_rank.unwrap_or(self.method.rank), false)?;
        changed(base, &a, &b, scale)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let (rank, last_only) = match cx.mode() {
            Mode::Eval => (self.method.eval_rank.unwrap_or(self.method.rank), false),
            Mode::Train { seed, step, .. } => {
                (self.method.drawn(seed, step), self.method.mode == Trains::Frozen)
            }
        };
        let (a, b, scale) = self.factors(rank, last_only)?;
        let dropped = cx.dropout(x, self.method.dropout, site.id, 0)?;
        added(base.forward(x)?, &dropped, &a, &b, scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Layout, Patched};
    use engraft_tensor::testing::{close, sample};

    const Q: &str = "layers.0.attn.q";

    /// The output at a matrix in a training step, and the gradients of A and B.
    fn trained(a: &crate::Attached, x: &Tensor, step: u64) -> (Tensor, Vec<f32>, Vec<f32>) {
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, Q));
        let engraft_nn::Value::Weight(weight) = &site.value else { panic!() };
        let mode = Mode::Train { seed: 3, step, micro: 0 };
        let cx = Pass::new(Layout::counted(&[x.dim(0)]).unwrap(), None).training(mode);
        let y = Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx).forward(x).unwrap();
        let gradients = y.mul(&sample(y.shape(), 9)).unwrap().sum().unwrap().backward().unwrap();
        let of = |end: &str| {
            let p = a.adapter.params().iter().find(|p| p.name == format!("{Q}.lora_{end}.weight")).unwrap();
            gradients.get(&p.param).unwrap().to_vec().unwrap()
        };
        (y.detach(), of("A"), of("B"))
    }

    /// Which ranks have a gradient.
    fn support(a: &[f32], b: &[f32], rank: usize) -> Vec<usize> {
        let row = |i: usize| a[i * 6..(i + 1) * 6].iter().any(|g| *g != 0.0);
        let column = |i: usize| b.iter().skip(i).step_by(rank).any(|g| *g != 0.0);
        (0..rank).filter(|&i| row(i) && column(i)).collect()
    }

    #[test]
    fn a_step_uses_the_ranks_it_draws() {
        let method =
            DyLoRa { rank: 4, min_rank: 2, eval_rank: None, alpha: 8.0, dropout: 0.0, mode: Trains::Full };
        let drawn: Vec<usize> = (1..40).map(|step| method.drawn(3, step)).collect();
        assert!((2..=4).all(|rank| drawn.contains(&rank)) && drawn.iter().all(|rank| (2..=4).contains(rank)));
        let x = sample(&[5, 6], 3);
        for mode in ["full", "frozen"] {
            let settings = json!({ "rank": 4, "min_rank": 2, "alpha": 8, "mode": mode });
            let a = attached(&[chosen("dylora", settings)], &[]);
            assert_eq!(a.adapter.trained_count(), 2 * 4 * (6 + 6 + 4 + 6));
            stir(&a, 0.5);
            for rank in 2..=4 {
                let step = 1 + drawn.iter().position(|r| *r == rank).unwrap() as u64;
                let (y, da, db) = trained(&a, &x, step);
                let expected: Vec<usize> = if mode == "full" { (0..rank).collect() } else { vec![rank - 1] };
                assert_eq!(support(&da, &db, 4), expected, "{mode}");
                // As evaluated at that rank, and as the plain LoRA of that rank.
                let (sites, info) = toy();
                let methods = [chosen("dylora", json!({ "rank": 4, "alpha": 8 }))];
                let (config, tensors) =
                    crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
                let plain = sliced_dylora(&config, &tensors, rank).unwrap();
                assert_eq!((&plain.0["peft_type"], &plain.0["r"]), (&json!("LORA"), &json!(rank)));
                for (config, tensors) in [(with(config, json!({ "eval_r": rank })), tensors), plain] {
                    let loaded = crate::load_adapter(&config, tensors, &sites, &info).unwrap();
                    let loaded = crate::Attached {
                        adapter: loaded.adapter,
                        dead_targets: vec![],
                        dead_modules: vec![],
                        without_targets: vec![],
                    };
                    let (fast, defined) = both_ways(&loaded, Q, &x);
                    close(&fast, &y, 1e-5);
                    close(&fast, &defined, 1e-5);
                }
            }
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("dylora", json!({ "mode": "frozen", "eval_rank": 3 }))], &["head"]);
        let good = config(&[chosen("dylora", json!({}))], &[]);
        for bad in
            [json!({ "mode": "half" }), json!({ "r": 0 }), json!({ "min_r": 9 }), json!({ "eval_r": 9 })]
        {
            let key = bad.as_object().unwrap().keys().next().unwrap().clone();
            let Err(error) = from_file(&with(good.clone(), bad)) else { panic!("{key} passed") };
            assert!(error.to_string().contains(&key), "{error}");
        }
        assert!(sliced_dylora(&good, &vec![], 9).is_err() && sliced_dylora(&good, &vec![], 0).is_err());
        let lora = config(&[chosen("lora", json!({}))], &[]);
        assert!(sliced_dylora(&lora, &vec![], 1).is_err());
    }
}
