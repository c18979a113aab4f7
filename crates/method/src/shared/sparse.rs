//! A sparse change of weights: a mask of entries and their trained values.
//!
//! W′ = W + S; S has k values v, zeros at the start, at fixed places. v is trained alone: its gradient at row o and column i
//! is Σₜ dy[t, o]·x[t, i], so that no gradient of the size of W exists, the optimizer keeps 2k numbers, and what was not
//! chosen cannot move by weight decay, momentum or clipping. Weight decay pulls v to zero, that is W′ to W.
//!
//! The stages of a mask: scores of all entries (`scores.rs`), the choice of the k highest by a [`Budget`], training, and a
//! file that holds places and values. Places are flat numbers row·in + column, of one matrix or, where all compete, of the
//! targets one after another; or pairs of row and column, as `peft` writes them.

use std::sync::Arc;

use engraft_nn::{Base, Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::cpu::random::Key;
use engraft_tensor::ops::Pattern;
use engraft_tensor::{DType, Param, Tensor};

use crate::shared::kept::Kept;

/// How many entries are trained, and among which they are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Budget {
    /// This share of the targets together, at least one.
    Global(f64),
    /// This share of each matrix, at least one.
    Each(f64),
    /// This share of each matrix, and one more.
    EachAndOne(f64),
    /// So many in every row.
    Rows(usize),
    /// This share of the rows of each matrix, whole, at least one.
    WholeRows(f64),
    /// As many in each matrix as LoRA of this rank has: r·(in + out).
    Rank(usize),
}

impl Budget {
    /// Entries of `site`, or of the targets together where `size` is the sum of theirs.
    fn count(self, site: &Site, size: u64) -> Result<usize> {
        let share = |p: f64| (p * size as f64).floor() as usize;
        let (out, inn) = shape(site)?;
        Ok(match self {
            Budget::Global(p) if share(p) == 0 => {
                let message = format!(
                    "a share of {p} of the {size} entries of all targets is none of them; choose a larger one"
                );
                return Err(Error::Unsupported(message));
            }
            Budget::Global(p) => share(p),
            Budget::Each(p) => share(p).max(1),
            Budget::EachAndOne(p) => ((p * size as f64).floor() as usize + 1).min(size as usize),
            Budget::Rows(k) => k.min(inn) * out,
            Budget::WholeRows(p) => ((p * out as f64).floor() as usize).max(1) * inn,
            Budget::Rank(r) if (r * (inn + out)) as u64 > size => {
                let message = format!(
                    "rank {r} asks for {} of its {size} entries; choose a smaller rank, or train it whole with full",
                    r * (inn + out)
                );
                return Err(Error::Site { path: site.path.clone(), message });
            }
            Budget::Rank(r) => r * (inn + out),
        })
    }
}

/// How places are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Places {
    /// Flat, `I64` `[k]`.
    Flat,
    /// Rows and columns, `I32` [2, k].
    Pairs,
}

/// What a mask's tensors are called, how large it is, how it is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mask {
    /// Last part of the name of the values.
    pub values: &'static str,
    /// Last part of the name of the places.
    pub places: &'static str,
    /// Number of entries and scope.
    pub budget: Budget,
    /// Form of the places.
    pub form: Places,
}

/// Matrices whose entries compete for one budget.
pub(crate) struct Group<'s> {
    /// What precedes the names of its tensors.
    prefix: String,
    /// Its matrices, each with the number of its first entry.
    pub sites: Vec<(&'s Site, u64)>,
    /// Entries that are trained.
    pub count: usize,
    /// Entries of all its matrices.
    size: u64,
}

impl Mask {
    /// A mask of one of our own methods.
    pub fn own(budget: Budget) -> Mask {
        Mask { values: "sparse_values", places: "sparse_indices", budget, form: Places::Flat }
    }

    /// The groups that `sites` fall into.
    pub fn groups<'s>(&self, sites: &[&'s Site]) -> Result<Vec<Group<'s>>> {
        let size = |site: &Site| -> Result<u64> {
            let (out, inn) = shape(site)?;
            Ok((out * inn) as u64)
        };
        let mut groups = Vec::new();
        if !matches!(self.budget, Budget::Global(_)) {
            for site in sites {
                let size = size(site)?;
                let count = self.budget.count(site, size)?;
                groups.push(Group { prefix: format!("{}.", site.path), sites: vec![(site, 0)], count, size });
            }
            return Ok(groups);
        }
        let mut all = Group { prefix: String::new(), sites: vec![], count: 0, size: 0 };
        for site in sites {
            all.sites.push((site, all.size));
            all.size += size(site)?;
        }
        if let Some((first, _)) = all.sites.first() {
            all.count = self.budget.count(first, all.size)?;
            groups.push(all);
        }
        Ok(groups)
    }

    /// Values and places at the targets. Until the places are chosen they are spread evenly.
    pub fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.attach_at(b, |group| self.spread(group))
    }

    /// Values of a group, zeros, and its places, spread evenly.
    pub fn tensors(&self, b: &mut Builder<'_>, group: &Group<'_>) -> Result<(Param, Param)> {
        let places = self.spread(group)?;
        self.tensors_at(b, group, &places)
    }

    fn tensors_at(&self, b: &mut Builder<'_>, group: &Group<'_>, places: &[u64]) -> Result<(Param, Param)> {
        let places = self.tensor(group, places)?;
        let values = b.param(&format!("{}{}", group.prefix, self.values), &[group.count], Init::Zeros)?;
        let name = format!("{}{}", group.prefix, self.places);
        let shape = places.shape().to_vec();
        let places = b.fixed(&name, &shape, Init::Values(places))?;
        Ok((values, places))
    }

    fn spread(&self, group: &Group<'_>) -> Result<Vec<u64>> {
        let evenly = |count: usize, of: u64| {
            (0..count).map(move |i| (i as u128 * u128::from(of) / count.max(1) as u128) as u64).collect()
        };
        let Budget::WholeRows(_) = self.budget else { return Ok(evenly(group.count, group.size)) };
        let (out, inn) = shape(group.sites[0].0)?;
        let rows: Vec<u64> = evenly(group.count / inn, out as u64);
        Ok(whole_rows(&rows, inn))
    }

    /// Values and places at the targets, the places as `choose` gives them, ascending.
    pub fn attach_at(
        &self,
        b: &mut Builder<'_>,
        choose: impl Fn(&Group<'_>) -> Result<Vec<u64>>,
    ) -> Result<()> {
        for group in self.groups(&b.targets())? {
            let (values, places) = self.tensors_at(b, &group, &choose(&group)?)?;
            for (site, first) in group.sites {
                let delta = Delta::new(values.clone(), places.clone(), shape(site)?, first);
                b.patch(site.id, Patch::Weight(Box::new(delta)))?;
            }
        }
        Ok(())
    }

    /// The name of the places of `group` in an adapter.
    pub fn places_name(&self, group: &Group<'_>) -> String {
        format!("{}{}", group.prefix, self.places)
    }

    /// Ascending flat places in the form that is kept.
    pub fn tensor(&self, group: &Group<'_>, places: &[u64]) -> Result<Tensor> {
        let count = places.len();
        if self.form == Places::Flat {
            return Ok(Tensor::from_i64(places.iter().map(|&p| p as i64).collect(), [count])?);
        }
        let inn = group.sites.first().map_or(Ok((1, 1)), |(site, _)| shape(site))?.1 as u64;
        let (rows, columns) = (places.iter().map(|p| p / inn), places.iter().map(|p| p % inn));
        Ok(Tensor::from_i32(rows.chain(columns).map(|v| v as i32).collect(), [2, count])?)
    }
}

/// Places of whole rows of a matrix with `inn` columns.
pub(crate) fn whole_rows(rows: &[u64], inn: usize) -> Vec<u64> {
    rows.iter().flat_map(|row| row * inn as u64..(row + 1) * inn as u64).collect()
}

/// (out, in) of a matrix that can have a mask.
pub(crate) fn shape(site: &Site) -> Result<(usize, usize)> {
    match site.kind {
        Kind::Linear { out, inn, .. } | Kind::Convolution { out, inn, .. } => Ok((out, inn)),
        _ => {
            let message = "a mask is of matrices; leave the embedding out of the targets, or train rows of it with trainable_tokens";
            Err(Error::Site { path: site.path.clone(), message: message.into() })
        }
    }
}

/// `count` different places below `size`, ascending, drawn from `key` (Floyd's algorithm).
pub(crate) fn drawn(count: usize, size: u64, key: Key) -> Vec<u64> {
    let mut chosen = std::collections::BTreeSet::new();
    for (number, last) in (size - count as u64..size).enumerate() {
        let word = |i: u64| u64::from(key.bits(2 * number as u64 + i));
        let place = (((word(0) << 32 | word(1)) as u128 * (u128::from(last) + 1)) >> 64) as u64;
        if !chosen.insert(place) {
            chosen.insert(last);
        }
    }
    chosen.into_iter().collect()
}

/// W + S at one matrix.
pub(crate) struct Delta {
    values: Param,
    places: Param,
    shape: (usize, usize),
    /// Number of its first entry among those of its group.
    first: u64,
    pattern: Kept<Arc<Pattern>>,
}

impl Delta {
    pub fn new(values: Param, places: Param, shape: (usize, usize), first: u64) -> Delta {
        Delta { values, places, shape, first, pattern: Kept::new() }
    }

    /// Where the entries are.
    fn pattern(&self) -> Result<Arc<Pattern>> {
        self.pattern.read(&self.places, |places| {
            let all = self.flat(places)?;
            if !all.is_sorted() {
                return Err(Error::Unsupported(
                    "the places of a mask must be ascending; sort them, and the values with them".into(),
                ));
            }
            let end = self.first + (self.shape.0 * self.shape.1) as u64;
            let (from, to) = (all.partition_point(|&p| p < self.first), all.partition_point(|&p| p < end));
            let own = all[from..to].iter().map(|p| p - self.first);
            Ok(Arc::new(Pattern::new(own, self.shape, from)?))
        })
    }

    /// Flat places, whichever way they are kept.
    fn flat(&self, places: &Tensor) -> Result<Vec<u64>> {
        let outside = || Error::Unsupported("a place of the mask lies outside its matrix".into());
        let numbers = places.to_i64()?;
        if numbers.iter().any(|&p| p < 0) {
            return Err(outside());
        }
        if places.dtype() == DType::I64 {
            return Ok(numbers.into_iter().map(|p| p as u64).collect());
        }
        let ((rows, columns), (out, inn)) = (numbers.split_at(numbers.len() / 2), self.shape);
        if rows.iter().any(|&r| r >= out as i64) || columns.iter().any(|&c| c >= inn as i64) {
            return Err(outside());
        }
        Ok(rows.iter().zip(columns).map(|(&r, &c)| r as u64 * inn as u64 + c as u64).collect())
    }
}

impl WeightPatch for Delta {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.scatter_sparse(&self.values.get(), &self.pattern()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        Ok(base.forward(x)?.add_sparse(x, &self.values.get(), &self.pattern()?)?)
    }
}

/// Whether the gradient of a head would be seen in parts: its rows go through it in chunks.
pub(crate) fn expect_whole_gradient(site: &Site) -> Result<()> {
    if site.role != Role::Head {
        return Ok(());
    }
    let message = "a head's entries are not scored by gradients; train it whole with train_also";
    Err(Error::Site { path: site.path.clone(), message: message.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    fn sites_of(paths: &[&str]) -> Vec<Site> {
        let (sites, _) = toy();
        paths.iter().map(|path| sites.get(site_id(&sites, path)).clone()).collect()
    }

    #[test]
    fn budgets_count_what_they_say() {
        let sites = sites_of(&["layers.0.attn.q", "layers.0.attn.v", "layers.0.mlp.down"]);
        let sites: Vec<&Site> = sites.iter().collect();
        let counts = |budget: Budget| {
            let groups = Mask::own(budget).groups(&sites).unwrap();
            groups.iter().map(|g| g.count).collect::<Vec<_>>()
        };
        let sizes = [36.0, 24.0, 48.0];
        assert_eq!(counts(Budget::Global(0.1)), [10]);
        let none = Mask::own(Budget::Global(1e-12)).groups(&sites).err().unwrap().to_string();
        assert!(none.contains("is none of them"), "{none}");
        assert_eq!(counts(Budget::Each(0.1)), sizes.map(|n: f64| (0.1 * n).floor() as usize));
        assert_eq!(counts(Budget::Each(1e-9)), [1, 1, 1]);
        assert_eq!(counts(Budget::EachAndOne(0.1)), sizes.map(|n: f64| (0.1 * n).floor() as usize + 1));
        assert_eq!(counts(Budget::Rows(2)), [12, 8, 12]);
        assert_eq!(counts(Budget::Rank(2)), [24, 20, 28]);
        let error = Mask::own(Budget::Rank(4)).groups(&sites).err().unwrap().to_string();
        assert!(error.contains("rank 4 asks for 48 of its 36"), "{error}");
        assert!(shape(&sites_of(&["tok"])[0]).is_err());
    }

    #[test]
    fn draws_are_distinct_and_repeat_themselves() {
        for (count, size) in [(1, 1), (5, 5), (100, 1000), (999, 1000)] {
            let key = Init::key(3, "a");
            let places = drawn(count, size, key);
            assert_eq!(places.len(), count);
            assert!(places.is_sorted_by(|a, b| a < b) && *places.last().unwrap() < size);
            assert_eq!(places, drawn(count, size, key));
        }
        let key = |name| Init::key(3, name);
        assert_ne!(drawn(9, 1000, key("a")), drawn(9, 1000, key("b")));
    }

    #[test]
    fn both_forms_of_places_are_the_same_matrix() {
        let site = &sites_of(&["layers.0.attn.v"])[0];
        let flat = [0u64, 5, 6, 23];
        let values = Param::new(sample(&[4], 1));
        let mut results = Vec::new();
        for form in [Places::Flat, Places::Pairs] {
            let mask = Mask { form, ..Mask::own(Budget::Each(0.2)) };
            let group = &mask.groups(&[site]).unwrap()[0];
            let places = Param::frozen(mask.tensor(group, &flat).unwrap());
            let delta = Delta::new(values.clone(), places, (4, 6), 0);
            let engraft_nn::Value::Weight(w) = &site.value else { panic!() };
            results.push(delta.weight(w.as_ref()).unwrap());
        }
        close(&results[0], &results[1], 0.0);
        let mut by_hand = frozen("layers.0.attn.v").to_vec().unwrap();
        for (place, value) in flat.iter().zip(values.value().to_vec().unwrap()) {
            by_hand[*place as usize] += value;
        }
        close(&results[0], &Tensor::from_vec(by_hand, [4, 6]).unwrap(), 0.0);
    }

    #[test]
    fn places_that_do_not_fit_are_errors() {
        let values = Param::new(sample(&[2], 1));
        let pattern = |places: Tensor| Delta::new(values.clone(), Param::frozen(places), (4, 6), 0).pattern();
        for bad in [vec![3, 1], vec![-1, 2], vec![2, 2]] {
            assert!(pattern(Tensor::from_i64(bad, [2]).unwrap()).is_err());
        }
        for bad in [vec![4, 1, 0, 0], vec![0, 1, 6, 0], vec![1, 0, 0, 0]] {
            assert!(pattern(Tensor::from_i32(bad, [2, 2]).unwrap()).is_err());
        }
        assert!(pattern(Tensor::from_i32(vec![0, 1, 5, 0], [2, 2]).unwrap()).is_ok());
    }
}
