//! EVA: A starts as the directions in which a weight's inputs vary most, and ranks go where they explain most.
//!
//! Paischer et al. 2024, arXiv:2410.07170, as `peft` has it: for each weight the principal components of its inputs, brought up
//! to date batch by batch (the components so far, times their singular values, are further rows; Ross et al. 2008), until
//! the directions of two batches have a cosine of at least τ. Shares of explained variance of all weights are put in order,
//! and as many as there are ranks get one; a weight may get ρ times its own. Weights with the same input share its components.
//!
//! A has room for ρ·r ranks. Those that get nothing are zero in A and in B, so that no gradient ever reaches them, and are
//! left out of the file. The scale of a weight stays what it was, as `peft` keeps it by changing `alpha_pattern`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use engraft_nn::{Adapter, Error, NamedParam, Result};
use engraft_tensor::Tensor;
use engraft_tensor::cpu::random::Key;
use engraft_tensor::linalg::svd_lowrank;
use engraft_tensor::ops::cat;

use super::{Place, ids, locked, same_inputs};
use crate::reparameterized::lora::Lora;
use crate::reparameterized::lora::start::Start;
use crate::{Calibration, Seen, observe};

/// Rounds of the randomised decomposition, and the seed of its numbers.
const ROUNDS: usize = 4;
const SEED: u64 = 42;

impl Lora {
    /// The numbers of ranks beyond those that are dealt out, counted as if every weight got its own.
    pub(in crate::reparameterized::lora) fn spare_ranks(&self, adapter: &Adapter, prefix: &str) -> usize {
        if self.start != Start::Eva || self.from_file {
            return 0;
        }
        let spare = |p: &NamedParam| {
            let (module, end) = p.name.strip_prefix(prefix)?.rsplit_once(".lora_")?;
            let (value, own) = (p.param.value(), self.scale_at(module).0);
            let most = match end {
                "A.weight" => value.dim(0),
                "B.weight" => value.dim(1),
                _ => return None,
            };
            Some(value.len() / most * most.saturating_sub(own))
        };
        adapter.trainable().filter_map(spare).sum()
    }

    pub(super) fn eva(&self, places: &[Place<'_>], base: &dyn Calibration) -> Result<()> {
        let first = same_inputs(places, base)?;
        let most: Vec<usize> = places.iter().map(|p| p.a.value().dim(0)).collect();
        let mut count = most.clone();
        first.iter().enumerate().for_each(|(at, &f)| count[f] = count[f].max(most[at]));
        let sources: Vec<usize> = (0..places.len()).filter(|&at| first[at] == at).collect();
        let found: Arc<Mutex<HashMap<usize, Components>>> = Arc::default();
        let mut ranks = count.clone();
        base.expect(self.search.batches as u64);
        for number in 0..self.search.batches as u64 {
            let wanting: Vec<usize> = {
                let found = locked(&found);
                let settled = |at: &usize| found.get(at).is_some_and(|c| c.settled(ranks[*at]));
                sources.iter().copied().filter(|at| !settled(at)).collect()
            };
            if wanting.is_empty() {
                break;
            }
            let at: HashMap<_, _> = wanting.iter().map(|&at| (places[at].site.id, at)).collect();
            let (slot, count, tau) = (found.clone(), count.clone(), self.search.tau);
            let look = move |seen: &Seen<'_>| {
                let Some(&at) = at.get(&seen.site.id) else { return Ok(()) };
                // So few rows have no such number of directions.
                if seen.x.rows() < count[at] {
                    return Ok(());
                }
                let before = locked(&slot).remove(&at);
                let after = Components::with(before, seen.x, count[at], tau)?;
                locked(&slot).insert(at, after);
                Ok(())
            };
            observe(base, &ids(places, wanting), number, false, &(Arc::new(look) as _))?;
            let found = locked(&found);
            if sources.iter().all(|at| found.contains_key(at)) {
                ranks = deal(places, &most, &first, &found);
            }
        }
        let found = locked(&found);
        for (at, place) in places.iter().enumerate() {
            let Some(components) = found.get(&first[at]) else {
                return Err(too_few(place, count[first[at]]));
            };
            let rank = ranks[at].min(most[at]);
            let (rows, width) = (components.rows.rows_between(0, rank)?, components.rows.width());
            let a = cat(&[&rows, &Tensor::zeros([most[at] - rank, width])], 0)?;
            place.a.set(a.reshape(place.a.value().shape())?)?;
        }
        Ok(())
    }
}

fn too_few(place: &Place<'_>, count: usize) -> Error {
    Error::Site {
        path: place.site.path.clone(),
        message: format!(
            "`init = \"eva\"` looks for {count} directions, and no batch had as many rows; set a larger `batch_size`, or a \
             smaller `rank` or `eva_rho`"
        ),
    }
}

/// Ranks by place: the largest shares of explained variance get one each, as many as there are ranks; among equals the
/// first place goes first.
fn deal(
    places: &[Place<'_>],
    most: &[usize],
    first: &[usize],
    found: &HashMap<usize, Components>,
) -> Vec<usize> {
    let shares =
        |at: usize| found[&first[at]].shares().into_iter().take(most[at]).map(move |share| (share, at));
    let mut all: Vec<(f64, usize)> = (0..places.len()).flat_map(shares).collect();
    all.sort_by(|x, y| y.0.total_cmp(&x.0));
    let mut ranks = vec![0; places.len()];
    let budget: usize = places.iter().map(|place| place.rank).sum();
    all.into_iter().take(budget).for_each(|(_, at)| ranks[at] += 1);
    ranks
}

/// Principal components of the rows seen so far.
struct Components {
    /// Directions [count, width], the strongest first.
    rows: Tensor,
    /// Their singular values.
    values: Vec<f32>,
    /// [1, width].
    mean: Tensor,
    /// Sum of the squares of all rows about their mean.
    spread: f64,
    /// Rows.
    seen: f64,
    /// Whether each direction is the one of before.
    same: Vec<bool>,
}

impl Components {
    fn with(before: Option<Components>, x: &Tensor, count: usize, tau: f64) -> Result<Components> {
        let (rows, width) = (x.rows(), x.width());
        let x = x.reshape([rows, width])?;
        let own_mean = x.sum_to(&[1, width])?.scale(1.0 / rows as f32)?;
        let centred = x.sub(&own_mean)?;
        let own_spread = squares(&centred)?;
        let rows = rows as f64;
        let (stacked, mean, spread, seen) = match &before {
            None => (centred, own_mean, own_spread, rows),
            Some(b) => {
                let total = b.seen + rows;
                let apart = b.mean.sub(&own_mean)?;
                let values = Tensor::from_vec(b.values.clone(), [b.values.len(), 1])?;
                let shift = apart.scale((b.seen / total * rows).sqrt() as f32)?;
                let stacked = cat(&[&b.rows.mul(&values)?, &centred, &shift], 0)?;
                let mean = own_mean.add(&apart.scale((b.seen / total) as f32)?)?;
                (stacked, mean, b.spread + own_spread + b.seen * rows / total * squares(&apart)?, total)
            }
        };
        let svd = svd_lowrank(&stacked, 2 * count, ROUNDS, Key { seed: SEED, stream: 0 })?;
        let directions = svd.vt.rows_between(0, count.min(svd.vt.dim(0)))?;
        let same = match &before {
            None => vec![false; count],
            Some(b) => {
                let cosines = directions.mul(&b.rows)?.sum_to(&[directions.dim(0), 1])?.to_vec()?;
                cosines.into_iter().map(|c| f64::from(c) >= tau).collect()
            }
        };
        let values = svd.s[..directions.dim(0)].to_vec();
        Ok(Components { rows: directions, values, mean, spread, seen, same })
    }

    /// Whether the first `rank` directions stay as they are.
    fn settled(&self, rank: usize) -> bool {
        self.same.iter().take(rank).all(|same| *same)
    }

    /// Shares of the variance that the directions explain.
    fn shares(&self) -> Vec<f64> {
        self.values.iter().map(|&v| f64::from(v).powi(2) / self.spread.max(f64::MIN_POSITIVE)).collect()
    }
}

fn squares(t: &Tensor) -> Result<f64> {
    Ok(t.to_vec()?.iter().map(|&v| f64::from(v).powi(2)).sum())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::testing::{attached, chosen};

    #[test]
    fn room_for_ranks_that_eva_deals_out_is_not_counted() {
        let eva = || chosen("lora", json!({ "rank": 2, "init": "eva", "eva_rho": 1.5 }));
        let (a, union) =
            (attached(&[eva()], &[]), attached(&[chosen("lora", json!({ "rank": 2 })), eva()], &[]));
        let own = |rank: usize| 2 * rank * ((6 + 6) + (4 + 6));
        assert_eq!((a.adapter.trained_count(), eva().0.spare(&a.adapter, "")), (own(3), own(1)));
        assert_eq!([eva().0.spare(&union.adapter, "1."), union.adapter.trained_count()], [own(1), own(5)]);
    }
}
