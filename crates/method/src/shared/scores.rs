//! Scores of a weight's entries, and the choice of the highest.
//!
//! Scores by gradients are gathered site by site while backward passes (`observe`): dyᵀ·x of one matrix exists at a time. What
//! must be summed over batches is kept for as many matrices at once as fit into a part of the bytes of all; the data are read
//! again for the others. Squares of the gradients of single sequences are made and added in blocks of rows that a core's cache
//! holds: whole gradients, one a sequence, would go through memory some eight times each.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use engraft_nn::{Adapter, Base, Error, Result, Site, SiteId, Value};
use engraft_tensor::Tensor;
use engraft_tensor::ops::Unary;

use super::sparse::{Budget, Group, Mask, expect_whole_gradient, shape};
use crate::{Calibration, Observe, Seen, observe};

/// Bytes of sums over batches that are kept at once: a sixteenth of all, so that data are read sixteen times, within these bounds.
const SUMS_BYTES: std::ops::RangeInclusive<usize> = 64 << 20..=1 << 30;
const PASSES: usize = 16;
/// Numbers in a block of rows.
const BLOCK: usize = 1 << 16;

/// What makes an entry worth training. g is the gradient of the loss averaged over a batch, w the entry.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Score {
    /// |w|.
    Largest,
    /// −|w|; entries that are exactly zero (padding, pruned) come last.
    Smallest,
    /// |Σ g| over batches.
    Gradient,
    /// |w·Σ g| over batches.
    Saliency,
    /// Σ g² over batches.
    Squares,
    /// Σ g² over sequences, g of the log-likelihood of each sequence's labels: the diagonal of the empirical Fisher information.
    Fisher,
}

impl Score {
    fn needs_gradients(self) -> bool {
        !matches!(self, Score::Largest | Score::Smallest)
    }
}

/// How much data is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Data {
    /// So many micro-batches.
    Batches(u64),
    /// As many micro-batches as have so many sequences, one epoch at most.
    Sequences(usize),
    /// One epoch.
    Epoch,
}

/// Chooses the places of `mask` in `adapter` by `score`.
pub(crate) fn choose(
    mask: &Mask,
    adapter: &Adapter,
    base: &dyn Calibration,
    score: Score,
    data: Data,
) -> Result<()> {
    let sites: Vec<&Site> = base.targets().iter().map(|&id| base.sites().get(id)).collect();
    let groups = mask.groups(&sites)?;
    let rows = matches!(mask.budget, Budget::Rows(_));
    let mut best: Vec<Best> = groups.iter().map(|g| Best::new(if rows { 0 } else { g.count })).collect();
    let of: HashMap<SiteId, (usize, u64)> = groups
        .iter()
        .enumerate()
        .flat_map(|(number, g)| g.sites.iter().map(move |(site, first)| (site.id, (number, *first))))
        .collect();
    each_score(base, &sites, score, data, &mut |site, scores| {
        let (number, first) = of[&site.id];
        match mask.budget {
            Budget::Rows(k) => best[number].offer_rows(&site.path, k, shape(site)?.1, &scores),
            _ => best[number].offer(&site.path, first, &scores),
        }
    })?;
    for (group, best) in groups.iter().zip(best) {
        set_places(mask, group, adapter, base.prefix(), &best.places())?;
    }
    Ok(())
}

/// Gives the mask of `group` these places, ascending.
pub(crate) fn set_places(
    mask: &Mask,
    group: &Group<'_>,
    adapter: &Adapter,
    prefix: &str,
    places: &[u64],
) -> Result<()> {
    let name = format!("{prefix}{}", mask.places_name(group));
    let Some(param) = adapter.params().iter().find(|p| p.name == name) else {
        return Err(Error::Unsupported(format!("the adapter has no mask `{name}`")));
    };
    Ok(param.param.set(mask.tensor(group, places)?)?)
}

/// Hands the scores of each of `sites`, row by row, to `take`, in model order.
pub(crate) fn each_score(
    base: &dyn Calibration,
    sites: &[&Site],
    score: Score,
    data: Data,
    take: &mut dyn FnMut(&Site, Vec<f32>) -> Result<()>,
) -> Result<()> {
    if !score.needs_gradients() {
        for site in sites {
            let rank = |w: f32| if w == 0.0 { f32::NEG_INFINITY } else { -w.abs() };
            let scores = weight(site)?.into_iter();
            take(
                site,
                match score {
                    Score::Smallest => scores.map(rank).collect(),
                    _ => scores.map(f32::abs).collect(),
                },
            )?;
        }
        return Ok(());
    }
    sites.iter().try_for_each(|site| expect_whole_gradient(site))?;
    let all: usize = sites.iter().map(bytes).sum();
    let groups = parts(sites, (all / PASSES).clamp(*SUMS_BYTES.start(), *SUMS_BYTES.end()));
    match data {
        Data::Batches(n) => base.expect(groups.len() as u64 * n),
        Data::Epoch => base.expect(groups.len() as u64 * base.micro_batches()),
        // How many batches hold so many sequences shows only as they are read.
        Data::Sequences(_) => {}
    }
    for now in groups {
        let mut sums = sums(base, now, score, data)?;
        for site in now {
            let (out, inn) = shape(site)?;
            let mut sum = Vec::with_capacity(out * inn);
            for block in sums.remove(&site.id).unwrap_or_default() {
                sum.extend(block.to_vec()?);
            }
            sum.resize(out * inn, 0.0);
            take(
                site,
                match score {
                    Score::Saliency => weight(site)?.iter().zip(sum).map(|(w, g)| (w * g).abs()).collect(),
                    _ => sum.into_iter().map(f32::abs).collect(),
                },
            )?;
        }
    }
    Ok(())
}

/// Bytes of a sum at a site.
fn bytes(site: &&Site) -> usize {
    shape(site).map_or(0, |(out, inn)| 4 * out * inn)
}

/// The sites in parts whose sums have so many bytes at most, or that are one site.
fn parts<'l, 's>(sites: &'l [&'s Site], most: usize) -> Vec<&'l [&'s Site]> {
    let (mut rest, mut parts) = (sites, Vec::new());
    while !rest.is_empty() {
        let mut sum = 0;
        let fit = rest.iter().take_while(|site| {
            sum += bytes(site);
            sum <= most
        });
        let (now, later) = rest.split_at(fit.count().max(1));
        parts.push(now);
        rest = later;
    }
    parts
}

/// The frozen weight of a site, row by row.
fn weight(site: &Site) -> Result<Vec<f32>> {
    match &site.value {
        Value::Weight(weight) => Ok(weight.dense()?.to_vec()?),
        _ => Err(Error::Site { path: site.path.clone(), message: "expected a matrix, found none".into() }),
    }
}

/// Sums at sites, in blocks of rows.
type Sums = HashMap<SiteId, Vec<Tensor>>;

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Σ g, or Σ g², of each of `sites` over the data.
fn sums(base: &dyn Calibration, sites: &[&Site], score: Score, data: Data) -> Result<Sums> {
    let ids: Vec<SiteId> = sites.iter().map(|site| site.id).collect();
    let sums: Arc<Mutex<Sums>> = Arc::default();
    let sequences: Arc<Mutex<usize>> = Arc::default();
    let (mut number, mut read) = (0, 0);
    while match data {
        Data::Batches(n) => number < n,
        Data::Epoch => number < base.micro_batches(),
        Data::Sequences(n) => read < n && number < base.micro_batches(),
    } {
        let labels = if score == Score::Fisher { base.labels(number)? as f32 } else { 1.0 };
        let (to, seen) = (sums.clone(), sequences.clone());
        let each: Observe = Arc::new(move |at: &Seen<'_>| {
            *held(&seen) = at.layout.sequences().len();
            add(&mut held(&to), at, score, labels)
        });
        observe(base, &ids, number, true, &each)?;
        read += (*held(&sequences)).max(1);
        number += 1;
    }
    Ok(std::mem::take(&mut held(&sums)))
}

/// Adds what one batch says of one matrix.
fn add(sums: &mut Sums, at: &Seen<'_>, score: Score, labels: f32) -> Result<()> {
    let Some(dy) = at.dy else { return Ok(()) };
    let own = sums.entry(at.site.id).or_default();
    let mut sum = |block: usize, term: Tensor| -> Result<()> {
        match own.get_mut(block) {
            Some(sum) => *sum = std::mem::replace(sum, Tensor::zeros([0])).plus(&term)?,
            None => own.push(term),
        }
        Ok(())
    };
    let (x, dy) = (at.x.reshape([at.x.rows(), at.x.width()])?, dy.reshape([dy.rows(), dy.width()])?);
    match score {
        Score::Fisher if at.layout.tokens() != x.rows() => Err(Error::Site {
            path: at.site.path.clone(),
            message: "its rows are not those of the sequences, so that it has no gradient a sequence; leave it out of the targets".into(),
        }),
        Score::Fisher => {
            let rows = (BLOCK / x.width().max(1)).max(1);
            for (block, first) in (0..dy.width()).step_by(rows).enumerate() {
                let dy = dy.narrow(1, first, rows.min(dy.width() - first))?;
                for rows in at.layout.sequences() {
                    let part = |t: &Tensor| t.rows_between(rows.start, rows.end);
                    // The loss is an average; the likelihood of a sequence is a product over its labels.
                    sum(block, part(&dy)?.t_matmul(&part(&x)?)?.scale(labels)?.unary(Unary::Square)?)?;
                }
            }
            Ok(())
        }
        Score::Squares => sum(0, dy.t_matmul(&x)?.unary(Unary::Square)?),
        _ => sum(0, dy.t_matmul(&x)?),
    }
}

/// The highest of what is offered, the lower place first where scores are equal. Keeps twice as many at most.
pub(crate) struct Best {
    count: usize,
    kept: Vec<(f32, u64)>,
    /// The lowest that can still be among the highest.
    floor: f32,
}

impl Best {
    pub fn new(count: usize) -> Best {
        Best { count, kept: Vec::new(), floor: f32::NEG_INFINITY }
    }

    /// Offers scores of places from `first` on.
    pub fn offer(&mut self, path: &str, first: u64, scores: &[f32]) -> Result<()> {
        for (place, &score) in (first..).zip(scores) {
            if score.is_nan() {
                return Err(not_a_number(path));
            }
            if score >= self.floor {
                self.kept.push((score, place));
                if self.kept.len() > 2 * self.count + 1024 {
                    self.cut();
                }
            }
        }
        Ok(())
    }

    /// Offers the scores of a matrix with rows of `width`, of each of which the `k` highest are taken.
    pub fn offer_rows(&mut self, path: &str, k: usize, width: usize, scores: &[f32]) -> Result<()> {
        for (number, row) in scores.chunks(width.max(1)).enumerate() {
            let mut best = Best::new(k.min(width));
            best.offer(path, (number * width) as u64, row)?;
            best.cut();
            self.kept.append(&mut best.kept);
        }
        self.count = self.kept.len();
        Ok(())
    }

    fn cut(&mut self) {
        if self.kept.len() > self.count && self.count > 0 {
            let order = |a: &(f32, u64), b: &(f32, u64)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
            let (_, last, _) = self.kept.select_nth_unstable_by(self.count - 1, order);
            self.floor = last.0;
            self.kept.truncate(self.count);
        }
    }

    /// The places chosen, the highest first.
    pub fn ranked(mut self) -> Vec<u64> {
        self.cut();
        self.kept.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        self.kept.into_iter().map(|(_, place)| place).collect()
    }

    /// The places chosen, ascending.
    pub fn places(mut self) -> Vec<u64> {
        self.cut();
        let mut places: Vec<u64> = self.kept.into_iter().map(|(_, place)| place).collect();
        places.sort_unstable();
        places
    }
}

fn not_a_number(path: &str) -> Error {
    let message = "a score is not a number: the loss or the weight is not finite".into();
    Error::Site { path: path.into(), message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Linears, toy};

    #[test]
    fn the_highest_are_kept_whatever_the_order() {
        let scores: Vec<f32> = (0..5000).map(|i| ((i * 7919) % 1000) as f32).collect();
        let mut best = Best::new(12);
        for (part, first) in scores.chunks(600).zip((0..).step_by(600)) {
            best.offer("w", first, part).unwrap();
        }
        let mut expected: Vec<u64> = (0..5000).collect();
        expected.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
        expected.truncate(12);
        expected.sort_unstable();
        assert_eq!(best.places(), expected);
        assert!(Best::new(1).offer("w", 0, &[1.0, f32::NAN]).is_err());
        let mut rows = Best::new(0);
        rows.offer_rows("w", 2, 3, &[1.0, 3.0, 2.0, 5.0, 5.0, 5.0]).unwrap();
        assert_eq!(rows.places(), [1, 2, 3, 4]);
    }

    /// dyᵀ·x of the rows `rows` of batch `number` at a site, from the definition.
    fn by_hand(base: &Linears, site: &Site, number: u64, rows: std::ops::Range<usize>) -> Vec<f32> {
        let (x, dy) = base.seen(site, number);
        let (x, dy) =
            (x.rows_between(rows.start, rows.end).unwrap(), dy.rows_between(rows.start, rows.end).unwrap());
        dy.t_matmul(&x).unwrap().to_vec().unwrap()
    }

    #[test]
    fn scores_are_their_definitions() {
        let base = Linears::new(&["layers.0.attn.q", "layers.1.mlp.down"]);
        let (sites, _) = toy();
        let chosen: Vec<&Site> = base.targets().iter().map(|&id| sites.get(id)).collect();
        let run = |score, data| {
            let mut all = Vec::new();
            each_score(&base, &chosen, score, data, &mut |_, scores| {
                all.push(scores);
                Ok(())
            })
            .unwrap();
            all
        };
        let whole = Linears::ROWS;
        for (number, site) in chosen.iter().enumerate() {
            let g: Vec<Vec<f32>> = (0..3).map(|n| by_hand(&base, site, n, 0..whole)).collect();
            let w = weight(site).unwrap();
            let near = |found: &[f32], expected: &dyn Fn(usize) -> f32| {
                let far = found.iter().enumerate().find(|(i, f)| (*f - expected(*i)).abs() > 1e-5);
                assert!(far.is_none(), "{}: {far:?}", site.path);
            };
            near(&run(Score::Gradient, Data::Batches(3))[number], &|i| (g[0][i] + g[1][i] + g[2][i]).abs());
            near(&run(Score::Squares, Data::Batches(2))[number], &|i| g[0][i].powi(2) + g[1][i].powi(2));
            near(&run(Score::Saliency, Data::Batches(1))[number], &|i| (w[i] * g[0][i]).abs());
            near(&run(Score::Largest, Data::Batches(1))[number], &|i| w[i].abs());
            // Two sequences a batch; three are asked for, so that two batches are read.
            let parts: Vec<Vec<f32>> =
                (0..2).flat_map(|n| Linears::SEQUENCES.map(|rows| by_hand(&base, site, n, rows))).collect();
            let labels = Linears::LABELS as f32;
            near(&run(Score::Fisher, Data::Sequences(3))[number], &|i| {
                parts.iter().map(|p| (labels * p[i]).powi(2)).sum()
            });
        }
    }

    #[test]
    fn sums_are_kept_for_so_many_sites_as_fit() {
        let base = Linears::new(&["layers.0.attn.q", "layers.0.attn.v", "layers.1.mlp.down"]);
        let (sites, _) = toy();
        let chosen: Vec<&Site> = base.targets().iter().map(|&id| sites.get(id)).collect();
        let sizes: Vec<usize> = chosen.iter().map(bytes).collect();
        let counts = |most| parts(&chosen, most).iter().map(|part| part.len()).collect::<Vec<_>>();
        assert_eq!(counts(usize::MAX), [3]);
        assert_eq!(counts(sizes[0] + sizes[1]), [2, 1]);
        assert_eq!(counts(1), [1, 1, 1], "one is kept whatever its size");
        assert_eq!(parts(&chosen, 1).concat().len(), 3);
    }

    #[test]
    fn a_mask_is_chosen_by_the_scores_of_its_scope() {
        let paths = ["layers.0.attn.q", "layers.1.mlp.down"];
        let base = Linears::new(&paths);
        for budget in [Budget::Global(0.2), Budget::Each(0.2), Budget::Rows(1)] {
            let mask = Mask::own(budget);
            let adapter = base.adapter(&|b| mask.attach(b));
            choose(&mask, &adapter, &base, Score::Gradient, Data::Batches(1)).unwrap();
            let (sites, _) = toy();
            let chosen: Vec<&Site> = base.targets().iter().map(|&id| sites.get(id)).collect();
            let mut scored: Vec<(f32, usize, usize)> = Vec::new();
            for (number, site) in chosen.iter().enumerate() {
                let g = by_hand(&base, site, 0, 0..Linears::ROWS);
                scored.extend(g.iter().enumerate().map(|(i, g)| (g.abs(), number, i)));
            }
            scored.sort_by(|a, b| b.0.total_cmp(&a.0));
            let groups = mask.groups(&chosen).unwrap();
            for (g, group) in groups.iter().enumerate() {
                let name = mask.places_name(group);
                let param = adapter.params().iter().find(|p| p.name == name).unwrap();
                let found = param.param.value().to_i64().unwrap();
                let within = |s: &&(f32, usize, usize)| groups.len() == 1 || s.1 == g;
                let mut expected: Vec<i64> = match budget {
                    Budget::Rows(_) => {
                        let width = shape(group.sites[0].0).unwrap().1;
                        let mut rows: HashMap<usize, usize> = HashMap::new();
                        scored.iter().filter(within).for_each(|s| {
                            rows.entry(s.2 / width).or_insert(s.2);
                        });
                        rows.values().map(|&i| i as i64).collect()
                    }
                    _ => {
                        let number = |s: &(f32, usize, usize)| {
                            group.sites.iter().find(|(site, _)| site.id == chosen[s.1].id).unwrap().1 as i64
                                + s.2 as i64
                        };
                        scored.iter().filter(within).take(group.count).map(number).collect()
                    }
                };
                expected.sort_unstable();
                assert_eq!(found, expected, "{budget:?}");
            }
        }
    }
}
