//! SPT, sensitivity-aware tuning: single entries where few matter, a low-rank product where many do.
//!
//! Σ g² over some batches before training ranks all entries of the targets. Of the τ first ones a matrix has c: where
//! c ≥ n/α, n = r·(in + out) being what LoRA of rank r takes, the matrix gets W′ = W + B·A, else W′ = W + S with values at these c
//! entries. τ is the largest for which all this is within ⌊budget·P⌋ numbers. A starts as Kaiming-uniform noise, B and the
//! values as zeros. Vectors, which the authors train where a fifth of them is sensitive, are not counted; head and the like are
//! trained whole by `train_also`.
//!
//! He et al. 2023, arXiv:2303.08566, algorithm 1.
//!
//! A [rank, in] and B [out, rank] of the matrices with a product; `sparse_values` `[k]`, `sparse_indices` `I64` `[k]` of all
//! others together, numbered through the targets. What the plan leaves unused is not in a finished file.

use std::sync::Arc;

use engraft_nn::{
    Adapter, Base, Builder, Error, Init, Matcher, Pass, Patch, Result, Site, Sites, Targets, WeightPatch,
};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, number};
use crate::shared::fields::{float, int};
use crate::shared::scores::{Best, Data, Score, each_score};
use crate::shared::sizes;
use crate::shared::sparse::{Delta, shape};
use crate::{Calibration, Described, Entry, Info, Method, peft};

const RANK_MAX: usize = 1024;
const BATCHES_MAX: usize = 1 << 20;
const PLAN: &str = "spt_plan";
const VALUES: &str = "sparse_values";
const PLACES: &str = "sparse_indices";

struct Spt {
    budget: f64,
    rank: usize,
    alpha: f64,
    batches: usize,
    /// What a file says of its plan: the matrices with a product, and the number of entries of the others.
    fixed: Option<(Vec<String>, usize)>,
}

static INFO: Info = Info {
    name: "spt",
    title: "SPT",
    class: "selective",
    sites: "weight",
    paper: "arXiv:2303.08566",
    summary: "trains the most sensitive entries, and low-rank products of matrices that have many",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_SPT",
    fields: &[
        float("budget", (0.0, 1.0), "0.005", "Numbers trained at most, as a share of the targets."),
        int("rank", (1, RANK_MAX as i64), Some("8"), "Inner size r of a product."),
        float(
            "alpha",
            (1e-3, 1e6),
            "10",
            "A matrix gets a product when it has 1/alpha as many sensitive entries as the product has numbers.",
        ),
        int(
            "batches",
            (1, BATCHES_MAX as i64),
            Some("8"),
            "Micro-batches whose squared gradients are summed.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| peft::own_settings(&INFO, settings, |r| Spt { fixed: None, ..Spt::read(r) }),
    from_file: |config| {
        peft::own_file(&INFO, config, |r| {
            let structured = r.texts("structured").unwrap_or_default();
            let entries = r.value("entries").and_then(Value::as_u64).unwrap_or(0) as usize;
            Spt { fixed: Some((structured, entries)), ..Spt::read(r) }
        })
    },
    example: || Box::new(Spt { budget: 0.05, rank: 2, alpha: 10.0, batches: 1, fixed: None }),
};

impl Spt {
    fn read(r: &mut Reader<'_>) -> Self {
        let spt = Spt {
            budget: r.share("budget", 0.005),
            rank: r.count("rank", 8, RANK_MAX),
            alpha: r.float("alpha", 10.0),
            batches: r.count("batches", 8, BATCHES_MAX),
            fixed: None,
        };
        if spt.alpha <= 0.0 {
            r.problem(format!("`alpha`: expected a number above 0, found {}", spt.alpha));
        }
        spt
    }

    /// Numbers that may be trained of targets with so many entries.
    fn allowed(&self, size: u64) -> usize {
        ((self.budget * size as f64).floor() as usize).max(1)
    }

    /// Which matrices get a product, and which entries of the others are trained, from places in the order of their scores.
    fn planned(&self, matrices: &[Matrix], ranked: &[u64], allowed: usize) -> (Vec<bool>, Vec<u64>) {
        let of = |place: u64| matrices.partition_point(|m| m.first <= place) - 1;
        let (mut counts, mut structured) = (vec![0usize; matrices.len()], vec![false; matrices.len()]);
        let (mut total, mut last) = (0, 0);
        for &place in ranked {
            let number = of(place);
            let product = self.rank * (matrices[number].out + matrices[number].inn);
            let becomes = !structured[number] && (counts[number] + 1) as f64 >= product as f64 / self.alpha;
            let after = match (structured[number], becomes) {
                (true, _) => total,
                (_, true) => total + product - counts[number],
                (_, false) => total + 1,
            };
            if after > allowed {
                break;
            }
            counts[number] += 1;
            structured[number] |= becomes;
            (total, last) = (after, last + 1);
        }
        let mut entries: Vec<u64> = ranked[..last].iter().copied().filter(|p| !structured[of(*p)]).collect();
        entries.sort_unstable();
        (structured, entries)
    }
}

/// A target with the number of its first entry.
struct Matrix {
    first: u64,
    out: usize,
    inn: usize,
}

fn matrices(sites: &[&Site]) -> Result<(Vec<Matrix>, u64)> {
    let (mut all, mut first) = (Vec::new(), 0);
    for site in sites {
        let (out, inn) = shape(site)?;
        all.push(Matrix { first, out, inn });
        first += (out * inn) as u64;
    }
    Ok((all, first))
}

fn own(adapter: &Adapter, name: &str) -> Result<Param> {
    let found = adapter.params().iter().find(|p| p.name == name);
    found
        .map(|p| p.param.clone())
        .ok_or_else(|| Error::Unsupported(format!("the adapter has no tensor `{name}`")))
}

/// The plan of a new adapter, and what precedes its name.
fn plan(adapter: &Adapter) -> Option<(Param, String)> {
    let named = adapter.params().iter().find(|p| p.name.ends_with(PLAN))?;
    Some((named.param.clone(), named.name.trim_end_matches(PLAN).to_owned()))
}

/// The matrices that have factors, in the order of the plan, each with its number of entries.
fn factors<'a>(adapter: &'a Adapter, prefix: &str) -> Vec<(&'a str, usize)> {
    let of = |p: &'a engraft_nn::NamedParam| {
        let stem = p.name.strip_prefix(prefix)?.strip_suffix(".lora_A.weight")?;
        let out = own(adapter, &format!("{prefix}{stem}.lora_B.weight")).ok()?.value().dim(0);
        Some((stem, out * p.param.value().width()))
    };
    adapter.params().iter().filter_map(of).collect()
}

impl Method for Spt {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let targets = b.targets();
        let (matrices, size) = matrices(&targets)?;
        // Until it is planned, no matrix has a product and the entries are spread evenly.
        let count = self.fixed.as_ref().map_or(self.allowed(size), |(_, entries)| *entries);
        let plan = match &self.fixed {
            Some(_) => None,
            None => {
                let none = Tensor::from_i64(vec![0; targets.len()], [targets.len()])?;
                Some(b.state(PLAN, &[targets.len()], Init::Values(none))?)
            }
        };
        let spread = (0..count).map(|i| (i as u128 * u128::from(size) / count as u128) as i64).collect();
        let sparse = match count {
            0 => None,
            _ => Some((
                b.param(VALUES, &[count], Init::Zeros)?,
                b.fixed(PLACES, &[count], Init::Values(Tensor::from_i64(spread, [count])?))?,
            )),
        };
        for (number, (site, matrix)) in targets.iter().zip(&matrices).enumerate() {
            let structured = self.fixed.as_ref().map(|(paths, _)| paths.contains(&site.path));
            if structured.unwrap_or(true) {
                let name = |part: &str| format!("{}.{part}.weight", site.path);
                let product = Product {
                    a: b.param(&name("lora_A"), &[self.rank, matrix.inn], Init::kaiming(matrix.inn))?,
                    b: b.param(&name("lora_B"), &[matrix.out, self.rank], Init::Zeros)?,
                    plan: plan.clone(),
                    number,
                };
                b.patch(site.id, Patch::Weight(Box::new(product)))?;
            }
            if let Some((values, places)) = sparse.as_ref().filter(|_| structured != Some(true)) {
                let shape = (matrix.out, matrix.inn);
                let delta = Delta::new(values.clone(), places.clone(), shape, matrix.first);
                b.patch(site.id, Patch::Weight(Box::new(delta)))?;
            }
        }
        Ok(())
    }

    fn default_targets(&self, _sites: &Sites) -> Option<Targets> {
        Some(Matcher::AllLinear.into())
    }

    fn rests(&self) -> bool {
        self.fixed.is_none()
    }

    fn prepare(&self, adapter: &Arc<Adapter>, base: &dyn Calibration) -> Result<()> {
        let sites: Vec<&Site> = base.targets().iter().map(|&id| base.sites().get(id)).collect();
        let (matrices, size) = matrices(&sites)?;
        let allowed = self.allowed(size);
        // Entries of a matrix with a product cost nothing more, so that τ may be beyond the budget; eight times are kept.
        let mut best = Best::new((8 * allowed).min(size as usize));
        let mut first = 0;
        let data = Data::Batches(self.batches as u64);
        each_score(base, &sites, Score::Squares, data, &mut |site, scores| {
            best.offer(&site.path, first, &scores)?;
            first += scores.len() as u64;
            Ok(())
        })?;
        let (structured, entries) = self.planned(&matrices, &best.ranked(), allowed);
        // What is left of the vector of values lies behind the last entry, where nothing reads it.
        let mut places: Vec<i64> = entries.iter().map(|&p| p as i64).collect();
        places.extend((0..allowed - entries.len()).map(|i| (size + i as u64) as i64));
        let set = |name: &str, values: Vec<i64>| -> Result<()> {
            let count = values.len();
            Ok(own(adapter, &format!("{}{name}", base.prefix()))?.set(Tensor::from_i64(values, [count])?)?)
        };
        set(PLAN, structured.into_iter().map(i64::from).collect())?;
        set(PLACES, places)
    }

    /// What is left of the values goes.
    fn finish(&self, adapter: &Adapter) -> Result<()> {
        let Some((_, prefix)) = plan(adapter) else { return Ok(()) };
        let size: usize = factors(adapter, &prefix).iter().map(|(_, size)| size).sum();
        let (values, places) =
            (own(adapter, &format!("{prefix}{VALUES}"))?, own(adapter, &format!("{prefix}{PLACES}"))?);
        let used = places.value().to_i64()?.iter().filter(|&&place| (place as usize) < size).count();
        for param in [values, places] {
            param.replace(param.value().rows_between(0, used)?);
        }
        Ok(())
    }

    fn keeps(&self, adapter: &Adapter, name: &str) -> bool {
        let Some((plan, prefix)) = plan(adapter) else { return true };
        if name == VALUES || name == PLACES {
            return own(adapter, &format!("{prefix}{name}")).is_ok_and(|param| !param.value().is_empty());
        }
        let stem = name.strip_suffix(".lora_A.weight").or(name.strip_suffix(".lora_B.weight"));
        let Some(stem) = stem else { return true };
        // Factors are made in the order of the plan.
        let number = factors(adapter, &prefix).iter().position(|(found, _)| *found == stem);
        number.is_some_and(|n| plan.value().to_i64().is_ok_and(|planned| planned[n] == 1))
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let (structured, entries) = self.fixed.clone().unwrap_or_else(|| {
            let Some((plan, prefix)) = plan(model.adapter) else { return Default::default() };
            let planned = plan.value().to_i64().unwrap_or_default();
            let sites = model.chosen.iter().map(|&id| model.sites.get(id)).zip(planned);
            let products = sites.filter(|(_, planned)| *planned == 1).map(|(site, _)| site.path.clone());
            let entries =
                own(model.adapter, &format!("{prefix}{PLACES}")).map_or(0, |param| param.value().len());
            (products.collect(), entries)
        });
        let own = json!({ "budget": self.budget, "rank": self.rank, "alpha": number(self.alpha), "batches": self.batches,
            "structured": structured, "entries": entries });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// W + B·A, where the plan has it.
struct Product {
    a: Param,
    b: Param,
    plan: Option<Param>,
    number: usize,
}

impl Product {
    fn planned(&self) -> Result<bool> {
        match &self.plan {
            Some(plan) => Ok(plan.value().to_i64()?[self.number] == 1),
            None => Ok(true),
        }
    }
}

impl WeightPatch for Product {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        match self.planned()? {
            true => Ok(base.dense()?.add(&self.b.get().matmul(&self.a.get())?)?),
            false => base.dense(),
        }
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        match self.planned()? {
            true => Ok(base.forward(x)?.add_low_rank(x, &self.a.get(), &self.b.get(), 1.0)?),
            false => base.forward(x),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    const PATHS: [&str; 3] = ["layers.0.attn.q", "layers.0.attn.v", "layers.1.mlp.down"];

    #[test]
    fn trained_numbers() {
        // ⌊0.25·264⌋ entries, and room for a product of rank 1 at every matrix, of which `prepare` leaves one kind.
        let products = 2 * ((6 + 6) + (4 + 6) + (4 + 6) + (6 + 8));
        assert_eq!(trained("spt", json!({ "budget": 0.25, "rank": 1 })), 66 + products);
    }

    #[test]
    fn the_plan_is_the_largest_within_the_budget() {
        let spt = Spt { budget: 0.3, rank: 1, alpha: 2.0, batches: 1, fixed: None };
        let matrices = [Matrix { first: 0, out: 4, inn: 2 }, Matrix { first: 8, out: 5, inn: 5 }];
        // The first matrix reaches 6/2 entries at the third place and costs 6 from then on; the fourth is free.
        let ranked = [0, 1, 2, 3, 10, 20, 30];
        for (allowed, products, entries) in [
            (2, [false, false], vec![0, 1]),
            (5, [false, false], vec![0, 1]),
            (6, [true, false], vec![]),
            (8, [true, false], vec![10, 20]),
            (20, [true, false], vec![10, 20, 30]),
        ] {
            let (structured, found) = spt.planned(&matrices, &ranked, allowed);
            assert_eq!((structured, found), (products.to_vec(), entries), "{allowed}");
        }
    }

    #[test]
    fn every_matrix_has_one_kind_of_change_and_the_budget_holds() {
        let method = chosen("spt", json!({ "budget": 0.25, "rank": 1, "alpha": 4, "batches": 2 })).0;
        let (base, adapter) = prepared(method.as_ref(), &PATHS);
        let plan = param(&adapter, PLAN).value().to_i64().unwrap();
        assert!(plan.contains(&1) && plan.contains(&0), "both kinds: {plan:?}");
        let before = engraft_nn::merged_tensors(base.sites(), &adapter).unwrap();
        before.iter().for_each(|m| close(&m.value, &frozen(&m.site.path), 0.0));
        for (number, p) in adapter.trainable().enumerate() {
            p.param.set(sample(p.param.value().shape(), number as u64)).unwrap();
        }
        let mut trained = 0;
        for (number, m) in engraft_nn::merged_tensors(base.sites(), &adapter).unwrap().iter().enumerate() {
            let moved = m.value.sub(&frozen(&m.site.path)).unwrap().to_vec().unwrap();
            let moved = moved.iter().filter(|v| **v != 0.0).count();
            let (out, inn) = shape(m.site).unwrap();
            match plan[number] {
                1 => assert_eq!(moved, out * inn),
                _ => assert!(moved < out + inn),
            }
            trained += if plan[number] == 1 { out + inn } else { moved };
        }
        assert!(trained <= (0.25 * (36.0 + 24.0 + 48.0)) as usize, "{trained}");
    }

    #[test]
    fn the_file_holds_what_is_used() {
        let method = chosen("spt", json!({ "budget": 0.25, "rank": 1, "alpha": 4 })).0;
        let (base, adapter) = prepared(method.as_ref(), &PATHS);
        let targets = Some(Targets::names(PATHS));
        let adapter = Arc::try_unwrap(adapter).ok().unwrap();
        for (number, p) in adapter.trainable().enumerate() {
            p.param.set(sample(p.param.value().shape(), number as u64)).unwrap();
        }
        let info = toy().1;
        method.finish(&adapter).unwrap();
        let methods = [(method, targets)];
        let (config, tensors) =
            crate::save_adapter(&adapter, &methods, &[], "b", base.sites(), &info).unwrap();
        let loaded = crate::load_adapter(&config, tensors.clone(), base.sites(), &info).unwrap();
        let merged = |a: &Adapter| engraft_nn::merged_tensors(base.sites(), a).unwrap();
        for (found, expected) in merged(&loaded.adapter).iter().zip(merged(&adapter)) {
            close(&found.value, &expected.value, 0.0);
        }
        let again =
            crate::save_adapter(&loaded.adapter, &loaded.methods, &[], "b", base.sites(), &info).unwrap();
        assert_eq!(again.0, config);
        assert_eq!(again.1.len(), tensors.len());
        let products = config["structured"].as_array().unwrap().len();
        let sparse = if config["entries"] == 0 { 0 } else { 2 };
        assert_eq!(tensors.len(), 2 * products + sparse);
    }

    #[test]
    fn configurations() {
        survives_saving(&[((ENTRY.example)(), None)], &["head"]);
        let written = config(&[chosen("spt", json!({}))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "alpha": -1.0 }))).is_err());
    }
}
