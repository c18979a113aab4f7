//! Examples to micro-batches: sequences one after another, without padding, each token at its own position.

use engraft_data::{Batches, Dataset, Epoch, Example, IGNORED, Images, Labels, Order, Target, mask};
use engraft_nn::{Inputs, Layout};
use engraft_tensor::Tensor;

use crate::target::Shift;
use crate::{Error, Result};

/// What one forward takes and what its outputs should be.
pub struct Batch {
    /// Ids, types and layout, `[tokens]`.
    pub inputs: Inputs,
    /// A label a token, `[tokens]`, or a label a sequence, `[sequences]`; −100 takes no part.
    pub labels: Vec<i64>,
    /// The line of each sequence in its file.
    pub rows: Vec<usize>,
}

/// What examples are packed with besides themselves.
#[derive(Clone, Copy, Default)]
pub struct Packing<'a> {
    /// The pictures that examples count.
    pub images: Option<&'a Images>,
    /// How the labels of targets become decoder inputs.
    pub shift: Option<Shift>,
    /// Whether the labels of tokens are those tokens, which the model is to write (causal language models).
    pub writes: bool,
}

impl Batch {
    /// Packs examples.
    ///
    /// # Errors
    /// Examples whose labels are numbers rather than classes, pictures that cannot be read.
    pub fn pack(examples: &[Example], with: Packing<'_>) -> Result<Batch> {
        let pictures: Vec<usize> = examples.iter().filter_map(|e| e.image).collect();
        let inputs = match with.images.filter(|_| !pictures.is_empty()) {
            Some(images) => Inputs::pixels(pixels(images, &pictures)?)?,
            None => tokens(examples)?,
        };
        let inputs = if with.writes { without_answers(inputs, examples) } else { inputs };
        let mut labels = vec![];
        for example in examples {
            match &example.labels {
                Labels::None => {}
                Labels::Class(class) => labels.push(i64::from(*class)),
                Labels::Tokens(of) => labels.extend(of),
                Labels::Target(target) => labels.extend(&target.labels),
                Labels::Score(_) => {
                    return Err(Error::Setup("regression is not trained yet; give classes as labels".into()));
                }
            }
        }
        let targets: Vec<&Target> = examples.iter().filter_map(|e| target(&e.labels)).collect();
        let mut inputs =
            if targets.is_empty() { inputs } else { with_targets(inputs, &targets, with.shift)? };
        if examples.iter().any(|e| e.task.is_some()) {
            let tasks = examples.iter().map(|e| e.task.unwrap_or(0)).collect();
            inputs.layout = inputs.layout.with_tasks(tasks);
        }
        Ok(Batch { inputs, labels, rows: examples.iter().map(|e| e.row).collect() })
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.inputs.layout.tokens()
    }
}

fn target(labels: &Labels) -> Option<&Target> {
    match labels {
        Labels::Target(target) => Some(target),
        _ => None,
    }
}

/// The inputs, with the tokens from the first that has a label on marked as asked for.
fn without_answers(inputs: Inputs, examples: &[Example]) -> Inputs {
    let asked = |example: &Example| match &example.labels {
        Labels::Tokens(of) => of.iter().position(|&l| l != IGNORED).map_or(0, |first| of.len() - first),
        _ => 0,
    };
    let asked = examples.iter().map(asked).collect();
    Inputs { layout: inputs.layout.with_asked(asked), ..inputs }
}

/// Token ids, types and positions of examples, one after another.
fn tokens(examples: &[Example]) -> Result<Inputs> {
    let (mut ids, mut types, mut positions) = (vec![], vec![], vec![]);
    let lengths: Vec<usize> = examples.iter().map(|e| e.ids.len()).collect();
    for example in examples {
        ids.extend(example.ids.iter().map(|&id| i64::from(id)));
        match &example.type_ids {
            Some(of) => types.extend(of.iter().map(|&t| i64::from(t))),
            None => types.extend(std::iter::repeat_n(0, example.ids.len())),
        }
        match &example.positions {
            Some(of) => positions.extend(of.iter().map(|&p| p as i32)),
            None => positions.extend(0..example.ids.len() as i32),
        }
    }
    let count = ids.len();
    let types = match examples.iter().any(|e| e.type_ids.is_some()) {
        true => Some(Tensor::from_i64(types, [count])?),
        false => None,
    };
    Ok(Inputs::tokens(Tensor::from_i64(ids, [count])?, types, Layout::new(&lengths, positions)?))
}

/// The pictures `which` as [pictures, channels, height, width].
fn pixels(images: &Images, which: &[usize]) -> Result<Tensor> {
    let mut values = Vec::new();
    for &index in which {
        values.extend(images.pixels(index)?);
    }
    let (height, width) = which.first().map_or((0, 0), |&index| images.size(index));
    Ok(Tensor::from_vec(values, [which.len(), images.channels(), height, width])?)
}

/// The inputs with what the decoder reads.
fn with_targets(inputs: Inputs, targets: &[&Target], shift: Option<Shift>) -> Result<Inputs> {
    let (mut ids, mut positions) = (vec![], vec![]);
    for target in targets {
        match (&target.inputs, shift) {
            (Some(given), _) => ids.extend(given.iter().map(|&id| i64::from(id))),
            (None, Some(shift)) => ids.extend(shift.inputs(&target.labels)),
            (None, None) => {
                let text =
                    "config.json names no decoder_start_token_id, so the data must hold decoder_input_ids";
                return Err(Error::Setup(text.into()));
            }
        }
        match &target.positions {
            Some(of) => positions.extend(of.iter().map(|&p| p as i32)),
            None => positions.extend(0..target.labels.len() as i32),
        }
    }
    let lengths: Vec<usize> = targets.iter().map(|t| t.labels.len()).collect();
    let count = ids.len();
    // The start token is given, all others are to be written.
    let layout =
        Layout::new(&lengths, positions)?.with_asked(lengths.iter().map(|n| n.saturating_sub(1)).collect());
    Ok(inputs.with_target(Tensor::from_i64(ids, [count])?, layout))
}

/// What masked language modelling draws from.
#[derive(Clone, Copy, Debug)]
pub struct Masking {
    /// The mask token.
    pub mask_id: u32,
    /// Bound of random ids.
    pub vocabulary: u32,
    /// Seed of the run.
    pub seed: u64,
}

impl Masking {
    /// The example `index` as masked in `epoch`.
    pub fn apply(&self, example: &Example, index: usize, epoch: u64) -> Example {
        mask(example, index, self.mask_id, self.vocabulary, self.seed, epoch)
    }
}

/// How the training examples are batched.
#[derive(Clone, Copy, Debug)]
pub struct FeedOptions {
    /// Rows a micro-batch.
    pub batch_size: usize,
    /// Micro-batches a step.
    pub accumulation: usize,
    /// In which order.
    pub order: Order,
    /// Tokens that examples sharing a row fill at most; `None` gives each its own row.
    pub packed: Option<usize>,
    /// Draws masks.
    pub masking: Option<Masking>,
    /// How the labels of targets become decoder inputs.
    pub shift: Option<Shift>,
    /// Tasks are drawn in proportion to size^(1/temperature).
    pub temperature: f64,
    /// As in `Packing`.
    pub writes: bool,
}

/// The micro-batches of every step, a function of the step's number: there is no state to save.
pub struct Feed<'a> {
    data: &'a Dataset,
    options: FeedOptions,
    /// Examples that share a row; each alone without packing.
    groups: Vec<Vec<usize>>,
    batches: Batches,
    epoch: Option<(u64, Epoch)>,
}

/// What to do where one of two levels would have no row.
fn too_few(rows: usize, held_out: f64) -> String {
    let needed = (1.0 / held_out).ceil().max(2.0);
    format!(
        "the training rows are parted into two levels, and of {rows} a share of {held_out} is no row for one of them; give at least {needed} rows, or another `held_out`"
    )
}

impl<'a> Feed<'a> {
    /// The feed of a data set.
    pub fn new(data: &'a Dataset, options: FeedOptions) -> Result<Self> {
        Self::of(data, options, |_| true)
    }

    /// The feeds of the rows that stay, and of every so many that make up the share `held_out`.
    pub fn parts(data: &'a Dataset, options: FeedOptions, held_out: f64) -> Result<[Self; 2]> {
        let held = |row: usize| ((row + 1) as f64 * held_out).floor() > (row as f64 * held_out).floor();
        let rows = groups(data, options.packed).len();
        let count = (0..rows).filter(|&row| held(row)).count();
        if count == 0 || count == rows {
            return Err(Error::Setup(too_few(rows, held_out)));
        }
        Ok([Self::of(data, options, |row| !held(row))?, Self::of(data, options, held)?])
    }

    fn of(data: &'a Dataset, options: FeedOptions, wanted: impl Fn(usize) -> bool) -> Result<Self> {
        let lengths = data.lengths();
        let all = groups(data, options.packed).into_iter().enumerate();
        let groups: Vec<Vec<usize>> = all.filter(|(row, _)| wanted(*row)).map(|(_, group)| group).collect();
        let of_group = |group: &Vec<usize>| group.iter().map(|&i| lengths[i]).sum();
        let tasks: Vec<usize> = groups.iter().map(|group| task_of(data, group)).collect();
        let batches = Batches::new(groups.iter().map(of_group).collect(), options.batch_size, options.order)?
            .mixed(&tasks, options.temperature);
        Ok(Feed { data, options, groups, batches, epoch: None })
    }

    /// Optimizer steps in one pass over the data; the last may hold fewer micro-batches.
    pub fn steps_per_epoch(&self) -> u64 {
        (self.batches.per_epoch().div_ceil(self.options.accumulation) as u64).max(1)
    }

    /// Micro-batches of one epoch.
    pub fn micro_batches_per_epoch(&self) -> u64 {
        self.batches.per_epoch().max(1) as u64
    }

    /// Share of places that padding would take, 0 to 1, in the first epoch.
    pub fn padding_share(&self) -> f64 {
        self.batches.padding_share(0)
    }

    /// Of the first `steps` steps, the one that holds the micro-batch of the most tokens, and how many these are.
    pub fn largest(&self, steps: u64) -> Option<(u64, usize)> {
        let per_epoch = self.steps_per_epoch();
        let tokens = |groups: &[usize]| groups.iter().map(|&group| self.batches.tokens(group)).sum::<usize>();
        let of_epoch = |epoch: u64| -> Vec<(u64, usize)> {
            let order = self.batches.epoch(epoch);
            let step = |(batch, groups): (usize, &[usize])| {
                (epoch * per_epoch + (batch / self.options.accumulation) as u64 + 1, tokens(groups))
            };
            order.batches().enumerate().map(step).collect()
        };
        let all = (0..steps.div_ceil(per_epoch)).flat_map(of_epoch);
        // The first of equals.
        all.filter(|(step, _)| *step <= steps).max_by_key(|&(step, tokens)| (tokens, std::cmp::Reverse(step)))
    }

    /// The micro-batches of step `number`, from 1.
    pub fn step(&mut self, number: u64) -> Result<Vec<Batch>> {
        let per_epoch = self.steps_per_epoch();
        let (epoch, step) = ((number - 1) / per_epoch, ((number - 1) % per_epoch) as usize);
        let order = match self.epoch.take() {
            Some((same, order)) if same == epoch => order,
            _ => self.batches.epoch(epoch),
        };
        let first = step * self.options.accumulation;
        let chosen: Vec<Vec<usize>> = (first..first + self.options.accumulation)
            .map_while(|b| order.batch(b).map(<[usize]>::to_vec))
            .collect();
        self.epoch = Some((epoch, order));
        chosen.iter().map(|groups| self.pack(groups, epoch)).collect()
    }

    /// Micro-batch `number` of training, from 0.
    pub fn micro(&self, number: u64) -> Result<Batch> {
        let per_epoch = self.batches.per_epoch().max(1) as u64;
        let (epoch, place) = (number / per_epoch, (number % per_epoch) as usize);
        let order = self.batches.epoch(epoch);
        self.pack(order.batch(place).unwrap_or(&[]), epoch)
    }

    fn pack(&self, groups: &[usize], epoch: u64) -> Result<Batch> {
        let examples: Vec<Example> = groups
            .iter()
            .flat_map(|&group| &self.groups[group])
            .map(|&index| {
                let example = &self.data.examples[index];
                self.options.masking.map_or_else(|| example.clone(), |m| m.apply(example, index, epoch))
            })
            .collect();
        let FeedOptions { shift, writes, .. } = self.options;
        Batch::pack(&examples, Packing { images: self.data.images.as_deref(), shift, writes })
    }
}

/// The task of the examples that share a row.
fn task_of(data: &Dataset, group: &[usize]) -> usize {
    group.first().and_then(|&index| data.examples[index].task).unwrap_or(0)
}

/// Examples in file order, as many of one task a row as `limit` tokens hold.
fn groups(data: &Dataset, limit: Option<usize>) -> Vec<Vec<usize>> {
    let lengths = data.lengths();
    let Some(limit) = limit else { return (0..lengths.len()).map(|i| vec![i]).collect() };
    let (mut groups, mut filled): (Vec<Vec<usize>>, usize) = (vec![], usize::MAX);
    for (index, &length) in lengths.iter().enumerate() {
        let same = |group: &[usize]| task_of(data, group) == task_of(data, &[index]);
        match groups.last_mut() {
            Some(group) if filled.saturating_add(length) <= limit && same(group) => {
                group.push(index);
                filled += length;
            }
            _ => {
                groups.push(vec![index]);
                filled = length;
            }
        }
    }
    groups
}

/// Number of labels that take part.
pub(crate) fn labelled(labels: &[i64]) -> usize {
    labels.iter().filter(|&&l| l != IGNORED).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(lengths: &[usize]) -> Dataset {
        let example = |(row, &n): (usize, &usize)| Example {
            ids: (0..n as u32).collect(),
            labels: Labels::Class(row as u32),
            row,
            ..Example::default()
        };
        Dataset { examples: lengths.iter().enumerate().map(example).collect(), ..Dataset::default() }
    }

    fn options(batch_size: usize, accumulation: usize) -> FeedOptions {
        FeedOptions {
            batch_size,
            accumulation,
            order: Order::File,
            packed: None,
            masking: None,
            shift: None,
            temperature: 1.0,
            writes: false,
        }
    }

    #[test]
    fn the_last_step_of_an_epoch_holds_what_is_left() {
        let data = data(&[3, 1, 2, 4, 5]);
        let mut feed = Feed::new(&data, options(2, 2)).unwrap();
        assert_eq!(feed.steps_per_epoch(), 2);
        let rows = |batches: Vec<Batch>| batches.iter().map(|b| b.rows.clone()).collect::<Vec<_>>();
        assert_eq!(rows(feed.step(1).unwrap()), [vec![0, 1], vec![2, 3]]);
        assert_eq!(rows(feed.step(2).unwrap()), [vec![4]]);
        assert_eq!(rows(feed.step(3).unwrap()), [vec![0, 1], vec![2, 3]]);
        assert_eq!([0, 2, 4].map(|n| feed.micro(n).unwrap().rows), [vec![0, 1], vec![4], vec![2, 3]]);
        assert_eq!((feed.largest(1), feed.largest(5)), (Some((1, 6)), Some((1, 6))));
        let mut by_row = Feed::new(&data, options(1, 1)).unwrap();
        assert_eq!((by_row.largest(4), by_row.largest(12)), (Some((4, 4)), Some((5, 5))));
        assert_eq!(by_row.step(5).unwrap()[0].tokens(), 5);
        let first = &feed.step(1).unwrap()[0];
        assert_eq!(first.inputs.layout.positions(), [0, 1, 2, 0]);
        assert_eq!((first.tokens(), &first.labels[..]), (4, &[0, 1][..]));
    }

    #[test]
    fn what_a_language_model_is_to_write_is_not_given() {
        let mut data = data(&[4, 3, 2]);
        let labels = [vec![IGNORED, IGNORED, 7, 8], vec![IGNORED; 3], vec![5, 6]];
        for (example, labels) in data.examples.iter_mut().zip(labels) {
            example.labels = Labels::Tokens(labels);
        }
        let asked = |writes| {
            let mut feed = Feed::new(&data, FeedOptions { writes, ..options(3, 1) }).unwrap();
            feed.step(1).unwrap()[0].inputs.layout.asked().to_vec()
        };
        assert_eq!(asked(true), [2, 0, 2]);
        assert!(asked(false).is_empty(), "labels of other models are no tokens of theirs");
    }

    #[test]
    fn rows_are_parted_for_two_levels() {
        let data = data(&[1; 10]);
        let [mut lower, mut upper] = Feed::parts(&data, options(2, 1), 0.3).unwrap();
        let mut rows = |n| [lower.step(n).unwrap()[0].rows.clone(), upper.step(n).unwrap()[0].rows.clone()];
        assert_eq!(rows(1), [vec![0, 1], vec![3, 6]]);
        assert_eq!(rows(2), [vec![2, 4], vec![9]]);
        assert_eq!(rows(3), [vec![5, 7], vec![3, 6]]);
        assert!(Feed::parts(&data, options(2, 1), 0.01).is_err());
    }

    #[test]
    fn packed_rows_hold_no_more_than_the_limit() {
        let data = data(&[3, 1, 2, 4, 5]);
        let mut feed = Feed::new(&data, FeedOptions { packed: Some(6), ..options(1, 1) }).unwrap();
        let rows: Vec<Vec<usize>> = (1..=3).map(|s| feed.step(s).unwrap()[0].rows.clone()).collect();
        assert_eq!(rows, [vec![0, 1, 2], vec![3], vec![4]]);
    }

    #[test]
    fn masks_are_drawn_anew_in_each_epoch_and_the_same_when_repeated() {
        let mut data = data(&[200]);
        data.examples[0].labels = Labels::Tokens((0..200).collect());
        let masking = Some(Masking { mask_id: 999, vocabulary: 1000, seed: 3 });
        let mut feed = Feed::new(&data, FeedOptions { masking, ..options(1, 1) }).unwrap();
        let mut labels = |step| feed.step(step).unwrap()[0].labels.clone();
        let (first, second) = (labels(1), labels(2));
        assert!(first != second && first == labels(1));
        assert!((10..60).contains(&labelled(&first)), "{}", labelled(&first));
    }
}
