//! Starts from what the base makes of the training data, found before the first step.

mod corda;
mod eva;
mod lora_ga;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard};

use engraft_nn::{Adapter, Result, Site, SiteId};
use engraft_tensor::{Param, Tensor};
use serde_json::{Value, json};

use super::start::Start;
use super::{Lora, named};
use crate::{Calibration, Seen, observe};

/// Numbers of what is summed up for the weights of one pass over the batches, at most: 1 GiB of them.
const NUMBERS_MAX: usize = 1 << 28;

/// How a start is looked for.
#[derive(Clone, Debug)]
pub(super) struct Search {
    /// Most batches looked at.
    pub batches: usize,
    /// EVA: most ranks of a weight over its own.
    pub rho: f64,
    /// EVA: the cosine at which a direction counts as found.
    pub tau: f64,
    /// CorDA: what is adapted.
    pub prior: Prior,
    /// LoRA-GA: γ.
    pub gamma: f64,
    /// What a file says of an EVA that was made elsewhere.
    pub eva_config: Option<Value>,
}

/// Which directions CorDA adapts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Prior {
    /// Those that the data use most.
    Instruction,
    /// Those that the data use least, so that what the data show is kept.
    Knowledge,
}

impl Default for Search {
    fn default() -> Self {
        Search { batches: 32, rho: 2.0, tau: 0.99, prior: Prior::Instruction, gamma: 16.0, eva_config: None }
    }
}

impl Search {
    /// How many ranks EVA may give a weight with `inn` inputs that has `rank` of its own.
    pub fn most_ranks(&self, rank: usize, inn: usize) -> usize {
        let most = (rank as f64 * self.rho).round_ties_even() as usize;
        most.min(inn).max(rank)
    }

    /// `eva_config` of a file. Every token of a sequence is looked at, whether or not it has a label.
    pub fn eva_config(&self) -> Value {
        let own = || {
            json!({ "adjust_scaling_factors": true, "label_mask_value": -100, "rho": self.rho, "tau": self.tau,
                "use_label_mask": false, "whiten": false })
        };
        self.eva_config.clone().unwrap_or_else(own)
    }
}

/// A matrix whose factors are to start.
struct Place<'a> {
    site: &'a Site,
    a: &'a Param,
    b: &'a Param,
    taken: Option<(&'a Param, &'a Param)>,
    rank: usize,
    scale: f32,
}

impl Place<'_> {
    /// Starts A and B at the given values, and what is taken off the weight too.
    fn set(&self, a: &Tensor, b: &Tensor) -> Result<()> {
        let set = |param: &Param, value: &Tensor| -> Result<()> {
            Ok(param.set(value.reshape(param.value().shape())?)?)
        };
        set(self.a, a)?;
        set(self.b, b)?;
        match self.taken {
            Some((a0, b0)) => set(a0, a).and_then(|()| set(b0, b)),
            None => Ok(()),
        }
    }
}

impl Lora {
    pub(super) fn search_start(&self, adapter: &Arc<Adapter>, base: &dyn Calibration) -> Result<()> {
        if self.from_file {
            return Ok(());
        }
        match self.start {
            Start::Eva => self.eva(&self.places(adapter, base)?, base),
            Start::Corda => self.corda(&self.places(adapter, base)?, base),
            Start::LoraGa => self.lora_ga(&self.places(adapter, base)?, base),
            _ => Ok(()),
        }
    }

    fn places<'a>(&self, adapter: &'a Adapter, base: &'a dyn Calibration) -> Result<Vec<Place<'a>>> {
        let mut places = Vec::new();
        for site in adapter.sites().into_iter().map(|id| base.sites().get(id)).filter(|site| site.is_weight())
        {
            let of = |end: &str| named(adapter, &format!("{}.{end}", site.path));
            let (Some(a), Some(b)) = (of("lora_A.weight")?, of("lora_B.weight")?) else { continue };
            let taken = of("lora_A.start")?.zip(of("lora_B.start")?);
            let (rank, scale) = self.scale_at(&site.path);
            places.push(Place { site, a, b, taken, rank, scale });
        }
        Ok(places)
    }
}

/// For each place the first that has the same input: what inputs alone say is found once for all of them.
fn same_inputs(places: &[Place<'_>], base: &dyn Calibration) -> Result<Vec<usize>> {
    let seen: Arc<Mutex<HashMap<SiteId, u64>>> = Arc::default();
    let slot = seen.clone();
    let look = move |seen: &Seen<'_>| {
        let mut hash = DefaultHasher::new();
        seen.x.shape().hash(&mut hash);
        seen.x.to_vec()?.iter().for_each(|v| v.to_bits().hash(&mut hash));
        locked(&slot).insert(seen.site.id, hash.finish());
        Ok(())
    };
    base.expect(1);
    observe(base, &ids(places, 0..places.len()), 0, false, &(Arc::new(look) as _))?;
    let seen = locked(&seen);
    let hash = |place: &Place<'_>| seen.get(&place.site.id).copied();
    let first = |(at, place): (usize, &Place<'_>)| {
        let own = hash(place);
        places.iter().position(|other| own.is_some() && hash(other) == own).unwrap_or(at)
    };
    Ok(places.iter().enumerate().map(first).collect())
}

/// Sums up what `of` makes of each weight's rows in all batches, for as many weights at once as memory should hold, and
/// hands each sum to `with`, with the number of what was added up.
fn summed(
    places: &[Place<'_>],
    which: &[usize],
    numbers: impl Fn(&Place<'_>) -> usize,
    (base, batches, gradients): (&dyn Calibration, usize, bool),
    of: impl Fn(&Seen<'_>) -> Result<Vec<Tensor>> + Send + Sync + 'static,
    mut with: impl FnMut(usize, Tensor, usize) -> Result<()>,
) -> Result<()> {
    type Sums = HashMap<SiteId, (Tensor, usize)>;
    let of = Arc::new(of);
    let (mut rest, mut groups) = (which, Vec::new());
    while !rest.is_empty() {
        let mut held = 0;
        let fits = |at: &&usize| {
            held += numbers(&places[**at]);
            held <= NUMBERS_MAX
        };
        let (now, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
        groups.push(now);
        rest = later;
    }
    base.expect((groups.len() * batches) as u64);
    for now in groups {
        let sums: Arc<Mutex<Sums>> = Arc::default();
        for number in 0..batches {
            let (slot, of) = (sums.clone(), of.clone());
            let add = move |seen: &Seen<'_>| {
                for part in of(seen)? {
                    let mut sums = locked(&slot);
                    let sum = match sums.remove(&seen.site.id) {
                        Some((sum, count)) => (sum.plus(&part)?, count + 1),
                        None => (part, 1),
                    };
                    sums.insert(seen.site.id, sum);
                }
                Ok(())
            };
            observe(
                base,
                &ids(places, now.iter().copied()),
                number as u64,
                gradients,
                &(Arc::new(add) as _),
            )?;
        }
        for &at in now {
            let sum = locked(&sums).remove(&places[at].site.id);
            if let Some((sum, count)) = sum {
                with(at, sum, count)?;
            }
        }
    }
    Ok(())
}

fn ids(places: &[Place<'_>], which: impl IntoIterator<Item = usize>) -> Vec<SiteId> {
    which.into_iter().map(|at| places[at].site.id).collect()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
