//! How ranks are dealt out: when, to which triplets, and how they are found in an adapter.

use engraft_nn::{Adapter, Error, Result};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::Step;
use crate::shared::low_rank::{ending, named, own_path};

/// The state that holds the length of the schedule.
pub(super) const TOTAL: &str = "adalora_total_step";

/// When ranks are cut.
#[derive(Clone, Debug)]
pub(super) struct Schedule {
    /// Steps before the first cut.
    pub tinit: u64,
    /// Steps after the last.
    pub tfinal: u64,
    /// Steps from one cut to the next.
    pub delta_t: u64,
    /// Steps of the whole; of the run where nothing is said.
    pub total: Option<u64>,
}

/// What is done after a step.
#[derive(Debug, PartialEq)]
pub(super) enum Cut {
    /// Importance is taken, no rank is cut.
    Not,
    /// Importance is taken and ranks are cut to this sum.
    To(usize),
    /// Ranks are cut to this sum for good.
    Last(usize),
    /// What was cut for good stays so.
    Keep,
}

impl Schedule {
    pub fn total(&self, step: Step) -> u64 {
        self.total.unwrap_or(step.total)
    }

    /// An error where there is no step to cut ranks in.
    pub fn check(&self, total: u64) -> Result<()> {
        if self.tinit + self.tfinal < total {
            return Ok(());
        }
        Err(Error::Unsupported(format!(
            "`tinit` = {} and `tfinal` = {} leave no step of {total} to cut ranks in; make them smaller",
            self.tinit, self.tfinal
        )))
    }

    /// At step t, from the sum `first` of all ranks to `target`.
    pub fn at(&self, t: u64, total: u64, first: usize, target: usize) -> Cut {
        let last = total - self.tfinal;
        // As Python computes it, so that budgets agree to the whole number.
        let left =
            1.0 - (t as f64 - self.tinit as f64) / (total as f64 - self.tfinal as f64 - self.tinit as f64);
        let budget = ((first as f64 - target as f64) * left.powf(3.0) + target as f64) as usize;
        match t {
            t if t > last => Cut::Keep,
            t if t == last => Cut::Last(budget),
            t if t > self.tinit && t.is_multiple_of(self.delta_t) => Cut::To(budget),
            _ => Cut::Not,
        }
    }
}

/// The tensors at one matrix.
pub(super) struct Triplets<'a> {
    pub stem: &'a str,
    pub a: &'a Param,
    pub b: &'a Param,
    pub e: &'a Param,
    /// Which triplets are on, as numbers.
    pub mask: Param,
    /// Of E, A and B: the tensor, its smoothed sensitivity, and the doubt about that.
    pub smoothed: Vec<(&'a Param, &'a Param, &'a Param)>,
}

pub(super) fn triplets(adapter: &Adapter) -> Result<Vec<Triplets<'_>>> {
    let mut all = Vec::new();
    for (stem, e) in ending(adapter, ".lora_E")? {
        let of = |end: &str| named(adapter, &format!("{stem}.lora_{end}"));
        let (a, b) = (of("A")?, of("B")?);
        // Nothing is chosen any more where a file has said which triplets there are.
        let (mask, smoothed) = match of("E.mask") {
            Ok(mask) => {
                let average = |param, letter: &str| {
                    let sensitivity = of(&format!("{letter}.sensitivity"))?;
                    Result::Ok((param, sensitivity, of(&format!("{letter}.doubt"))?))
                };
                (mask.clone(), vec![average(e, "E")?, average(a, "A")?, average(b, "B")?])
            }
            Err(_) => (Param::frozen(Tensor::full(1.0, e.value().shape().to_vec())), vec![]),
        };
        all.push(Triplets { stem, a, b, e, mask, smoothed });
    }
    Ok(all)
}

pub(super) fn named_total(adapter: &Adapter) -> Result<&Param> {
    let found = ending(adapter, TOTAL)?;
    found.first().map(|f| f.1).ok_or_else(|| Error::Unsupported(format!("the adapter has no `{TOTAL}`")))
}

/// Sets the masks so that the `off` triplets of the lowest scores are off, and those that score as the last of them.
pub(super) fn choose(triplets: &[Triplets<'_>], off: usize) -> Result<()> {
    let mut scores = Vec::new();
    for t in triplets {
        let score =
            |i: usize| -> Result<Tensor> { Ok(t.smoothed[i].1.value().mul(&t.smoothed[i].2.value())?) };
        let (e, a, b) = (score(0)?, score(1)?, score(2)?);
        let rank = e.dim(0);
        let a = a.sum_dim(1)?.scale(1.0 / a.dim(1) as f32)?;
        let b = b.sum_dim(0)?.scale(1.0 / b.dim(0) as f32)?.reshape([rank, 1])?;
        scores.push(e.add(&a.add(&b)?)?.to_vec()?);
    }
    let mut sorted: Vec<f32> = scores.iter().flatten().copied().collect();
    sorted.sort_by(f32::total_cmp);
    // Nothing to cut.
    let Some(&limit) = off.checked_sub(1).and_then(|last| sorted.get(last)) else { return Ok(()) };
    for (t, scores) in triplets.iter().zip(scores) {
        let marks: Vec<f32> = scores.iter().map(|s| if *s > limit { 1.0 } else { 0.0 }).collect();
        let count = marks.len();
        t.mask.set(Tensor::from_vec(marks, [count, 1])?)?;
    }
    Ok(())
}

/// `rank_pattern`, once a triplet is off.
pub(super) fn pattern_of(adapter: &Adapter) -> Option<Map<String, Value>> {
    let mut pattern = Map::new();
    for t in triplets(adapter).ok()? {
        let marks: Vec<bool> = t.mask.value().to_vec().ok()?.iter().map(|m| *m != 0.0).collect();
        pattern.insert(format!("{}.lora_E", own_path(t.stem)), json!(marks));
    }
    let any_off = pattern.values().any(|marks| marks.as_array().is_some_and(|m| m.contains(&json!(false))));
    any_off.then_some(pattern)
}
