//! Which examples go into which batch: a function of (lengths, batch size, order, epoch) and nothing else.
//!
//! There is no state to save: a run that resumes asks for the same epoch and goes on at its batch.
//! The order of version [`crate::rng::VERSION`]:
//! - `File`: as they are.
//! - `Shuffled`: Fisher–Yates by SplitMix64 keyed (seed, 1, epoch).
//! - several tasks at a temperature: each epoch takes as many rows in all, of every task its share, from shuffles of its own
//!   rows one after another, keyed (seed, 4 + task, round); what they give is ordered like any rows.
//! - `LengthGrouped`: that shuffle; within windows of [`WINDOW`] batches a stable sort, longest first; cut into
//!   batches; the batches shuffled, keyed (seed, 2, epoch). Rows of like length meet, yet each epoch differs.

use crate::error::{Error, Result};
use crate::rng::Random;

/// Batches that are sorted by length together.
pub const WINDOW: usize = 50;

/// In which order examples are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As in the file, the same in every epoch.
    File,
    /// Anew in every epoch.
    Shuffled {
        /// The seed of the shuffle.
        seed: u64,
    },
    /// Anew in every epoch, examples of like length together.
    LengthGrouped {
        /// The seed of the shuffles.
        seed: u64,
    },
}

/// The batches of every epoch of a data set.
#[derive(Clone, Debug)]
pub struct Batches {
    lengths: Vec<usize>,
    batch_size: usize,
    order: Order,
    mixture: Option<Mixture>,
}

/// Rows of several tasks, of which an epoch takes shares other than their own.
#[derive(Clone, Debug)]
struct Mixture {
    /// The examples of each task.
    rows: Vec<Vec<usize>>,
    /// How many of each an epoch takes; as many in all as there are.
    counts: Vec<usize>,
    seed: u64,
}

impl Mixture {
    /// The examples of an epoch, by task.
    fn of(&self, epoch: u64) -> Vec<usize> {
        let mut all = Vec::new();
        for (task, (rows, &count)) in self.rows.iter().zip(&self.counts).enumerate() {
            let first = epoch * count as u64;
            let mut shuffled: Option<(u64, Vec<usize>)> = None;
            for place in first..first + count as u64 {
                let (round, at) = (place / rows.len() as u64, (place % rows.len() as u64) as usize);
                if shuffled.as_ref().is_none_or(|(of, _)| *of != round) {
                    let mut order = rows.clone();
                    Random::new(self.seed, 4 + task as u64, round).shuffle(&mut order);
                    shuffled = Some((round, order));
                }
                all.extend(shuffled.as_ref().map(|(_, order)| order[at]));
            }
        }
        all
    }
}

/// `total` parted in proportion to sizes^(1/temperature), by largest remainders; every task has at least one.
fn shares(sizes: &[usize], temperature: f64, total: usize) -> Vec<usize> {
    let weights: Vec<f64> = sizes.iter().map(|&n| (n as f64).powf(1.0 / temperature)).collect();
    let sum: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|w| w / sum * total as f64).collect();
    let mut counts: Vec<usize> = exact.iter().map(|&e| (e.floor() as usize).max(1)).collect();
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by(|&a, &b| (exact[b] - exact[b].floor()).total_cmp(&(exact[a] - exact[a].floor())));
    for &task in order.iter().cycle().take(total.saturating_sub(counts.iter().sum())) {
        counts[task] += 1;
    }
    while counts.iter().sum::<usize>() > total.max(sizes.len()) {
        if let Some(largest) = counts.iter_mut().max() {
            *largest -= 1;
        }
    }
    counts
}

/// The batches of one epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct Epoch {
    order: Vec<usize>,
    ranges: Vec<(usize, usize)>,
}

impl Epoch {
    /// The examples (indices from 0) of batch `index`; `None` past the last.
    pub fn batch(&self, index: usize) -> Option<&[usize]> {
        self.ranges.get(index).map(|(start, end)| &self.order[*start..*end])
    }

    /// All batches in order.
    pub fn batches(&self) -> impl Iterator<Item = &[usize]> {
        self.ranges.iter().map(|(start, end)| &self.order[*start..*end])
    }
}

impl Batches {
    /// Batches of `batch_size` examples (the last of an epoch may be smaller) whose tokens are `lengths`, `[examples]`.
    ///
    /// # Errors
    /// No examples, or a batch size of 0.
    pub fn new(lengths: Vec<usize>, batch_size: usize, order: Order) -> Result<Batches> {
        let fail = |message: &str| Err(Error::Data { place: "data".into(), message: message.into() });
        if lengths.is_empty() {
            return fail("there is not one example to train on; check data.path");
        }
        if batch_size == 0 {
            return fail("train.batch_size is 0; set it to 1 or more");
        }
        Ok(Batches { lengths, batch_size, order, mixture: None })
    }

    /// The same where each example is of a task (from 0) and tasks are drawn in proportion to size^(1/`temperature`): at 1 as
    /// they are, the more evenly the higher. An order that is not shuffled stays as it is.
    pub fn mixed(self, tasks: &[usize], temperature: f64) -> Batches {
        let seed = match self.order {
            Order::Shuffled { seed } | Order::LengthGrouped { seed } if temperature != 1.0 => seed,
            _ => return self,
        };
        let mut rows = vec![Vec::new(); tasks.iter().max().map_or(0, |last| last + 1)];
        tasks.iter().enumerate().for_each(|(index, &task)| rows[task].push(index));
        rows.retain(|rows| !rows.is_empty());
        let sizes: Vec<usize> = rows.iter().map(Vec::len).collect();
        let counts = shares(&sizes, temperature, self.lengths.len());
        Batches { mixture: Some(Mixture { rows, counts, seed }), ..self }
    }

    /// Tokens of example `index`.
    pub fn tokens(&self, index: usize) -> usize {
        self.lengths.get(index).copied().unwrap_or(0)
    }

    /// Batches in an epoch.
    pub fn per_epoch(&self) -> usize {
        self.lengths.len().div_ceil(self.batch_size)
    }

    /// Where the batch `number` (from 0, over all epochs) lies: its epoch, and its place in that.
    pub fn place(&self, number: u64) -> (u64, usize) {
        let per_epoch = self.per_epoch() as u64;
        (number / per_epoch, (number % per_epoch) as usize)
    }

    /// The batches of epoch `epoch` (from 0).
    pub fn epoch(&self, epoch: u64) -> Epoch {
        let mut order: Vec<usize> = match &self.mixture {
            Some(mixture) => mixture.of(epoch),
            None => (0..self.lengths.len()).collect(),
        };
        let mut ranges: Vec<(usize, usize)> = (0..self.per_epoch())
            .map(|batch| {
                (batch * self.batch_size, order.len().min((batch + 1).saturating_mul(self.batch_size)))
            })
            .collect();
        match self.order {
            Order::File => {}
            Order::Shuffled { seed } => Random::new(seed, 1, epoch).shuffle(&mut order),
            Order::LengthGrouped { seed } => {
                Random::new(seed, 1, epoch).shuffle(&mut order);
                for window in order.chunks_mut(self.batch_size.saturating_mul(WINDOW)) {
                    window.sort_by_key(|index| std::cmp::Reverse(self.lengths[*index]));
                }
                Random::new(seed, 2, epoch).shuffle(&mut ranges);
            }
        }
        Epoch { order, ranges }
    }

    /// The share of places that padding would fill in epoch `epoch` if rows were padded to the longest of their
    /// batch, 0 to 1. Packed training fills none; this is what that saves.
    pub fn padding_share(&self, epoch: u64) -> f64 {
        let (taken, mut places) = (self.epoch(epoch), 0);
        for batch in taken.batches() {
            places += batch.len() * batch.iter().map(|index| self.lengths[*index]).max().unwrap_or(0);
        }
        let tokens: usize = taken.order.iter().map(|index| self.lengths[*index]).sum();
        if places == 0 { 0.0 } else { 1.0 - tokens as f64 / places as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temperature_evens_tasks_out_and_every_row_has_its_turn() {
        assert_eq!(shares(&[900, 100], 1.0, 1000), [900, 100]);
        assert_eq!(shares(&[900, 100], 2.0, 1000), [750, 250]);
        assert_eq!(shares(&[900, 100, 1], 1e9, 1001).iter().sum::<usize>(), 1001);
        assert_eq!(shares(&[5, 1], 1e9, 6), [3, 3]);
        let tasks: Vec<usize> = (0..12).map(|i| usize::from(i >= 9)).collect();
        let all = Batches::new(vec![1; 12], 4, Order::Shuffled { seed: 5 }).unwrap();
        let mixed = all.clone().mixed(&tasks, 1e9);
        let taken = |epoch| mixed.epoch(epoch).batches().flatten().copied().collect::<Vec<_>>();
        for epoch in 0..3 {
            let rows = taken(epoch);
            assert_eq!(rows.len(), 12);
            assert_eq!(rows.iter().filter(|&&row| row >= 9).count(), 6);
            assert_eq!(rows, taken(epoch));
        }
        // Nine rows of the first task in turns of six: two epochs hold each of them at least once.
        let both = [taken(0), taken(1)].concat();
        assert!((0..9).all(|row| both.contains(&row)));
        assert_eq!(all.clone().mixed(&tasks, 1.0).epoch(0), all.epoch(0));
    }

    fn lengths(n: usize) -> Vec<usize> {
        (0..n).map(|i| 3 + i * 37 % 101).collect()
    }

    #[test]
    fn every_epoch_has_every_example_once_and_repeats_to_the_bit() {
        for order in [Order::File, Order::Shuffled { seed: 3 }, Order::LengthGrouped { seed: 3 }] {
            let batches = Batches::new(lengths(1003), 8, order).unwrap();
            for epoch in 0..3 {
                let taken = batches.epoch(epoch);
                let mut all: Vec<usize> = taken.batches().flatten().copied().collect();
                all.sort_unstable();
                assert_eq!(all, (0..1003).collect::<Vec<_>>());
                assert_eq!(taken, Batches::new(lengths(1003), 8, order).unwrap().epoch(epoch));
                assert_eq!(taken.batches().filter(|batch| batch.len() != 8).count(), 1);
            }
            let same = batches.epoch(0) == batches.epoch(1);
            assert_eq!(same, order == Order::File);
        }
    }

    #[test]
    fn a_batch_number_leads_to_its_epoch_and_place() {
        let batches = Batches::new(lengths(10), 4, Order::File).unwrap();
        assert_eq!(batches.per_epoch(), 3);
        assert_eq!((batches.place(0), batches.place(5), batches.place(6)), ((0, 0), (1, 2), (2, 0)));
        let epoch = batches.epoch(1);
        assert_eq!((epoch.batch(2), epoch.batch(3)), (Some(&[8, 9][..]), None));
    }

    #[test]
    fn grouping_by_length_takes_padding_away() {
        let shuffled = Batches::new(lengths(4000), 16, Order::Shuffled { seed: 1 }).unwrap().padding_share(0);
        let grouped =
            Batches::new(lengths(4000), 16, Order::LengthGrouped { seed: 1 }).unwrap().padding_share(0);
        assert!(shuffled > 0.4 && grouped < 0.03, "{shuffled} {grouped}");
        let equal = Batches::new(vec![5; 9], 2, Order::File).unwrap();
        assert_eq!(equal.padding_share(0), 0.0);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert!(Batches::new(vec![], 4, Order::File).is_err());
        assert!(Batches::new(vec![1], 0, Order::File).is_err());
        assert_eq!(
            Batches::new(vec![1, 2], usize::MAX, Order::File).unwrap().epoch(0).batch(0),
            Some(&[0, 1][..])
        );
    }
}
