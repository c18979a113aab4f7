//! What training sees of the data: token ids, labels, and a report of what became of the rows.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::images::Images;

/// The label value that takes no part in the loss.
pub const IGNORED: i64 = -100;

/// What one example is trained towards.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Labels {
    /// Nothing: for inference.
    #[default]
    None,
    /// The class of the whole row, an index into [`Dataset::labels`].
    Class(u32),
    /// A number, for regression.
    Score(f32),
    /// One label for each token, `[ids.len()]`; [`IGNORED`] takes no part in the loss. For causal models they
    /// are the ids themselves, not shifted: the objective shifts.
    Tokens(Vec<i64>),
    /// What the decoder of an encoder–decoder model learns to write.
    Target(Target),
}

/// The decoder's side of an example, without padding.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Target {
    /// What is to come out at each place, `[target tokens]`; [`IGNORED`] takes no part in the loss.
    pub labels: Vec<i64>,
    /// What the decoder reads at each place, `[target tokens]`; `None` means the labels moved right by one behind the
    /// model's start token, ignored ones read as its padding token.
    pub inputs: Option<Vec<u32>>,
    /// Position of each place, `[target tokens]`; `None` means 0, 1, 2 …
    pub positions: Option<Vec<u32>>,
}

/// One row as a model reads it, without padding.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Example {
    /// Token ids, `[tokens]`; none where the model reads a picture.
    pub ids: Vec<u32>,
    /// Segment of each token, `[tokens]`; `None` means that all are 0.
    pub type_ids: Option<Vec<u32>>,
    /// Position of each token, `[tokens]`; `None` means 0, 1, 2 …
    pub positions: Option<Vec<u32>>,
    /// The picture that the model reads, an index into [`Dataset::images`].
    pub image: Option<usize>,
    /// What to train towards.
    pub labels: Labels,
    /// The task it is of, from 0, where the data have several.
    pub task: Option<usize>,
    /// The line (from 1) of the row in its file, for messages; rows of tensors count from 0.
    pub row: usize,
}

impl Example {
    /// How many of the tokens (or, for a class or a score, whether the row) take part in the loss.
    ///
    /// `shifted` says that the objective predicts the next token, so that the first label has no input before it.
    pub fn trained(&self, shifted: bool) -> usize {
        match &self.labels {
            Labels::None => 0,
            Labels::Class(_) | Labels::Score(_) => 1,
            Labels::Tokens(labels) => {
                labels.iter().skip(usize::from(shifted)).filter(|label| **label != IGNORED).count()
            }
            // The decoder's inputs are shifted already.
            Labels::Target(target) => target.labels.iter().filter(|label| **label != IGNORED).count(),
        }
    }
}

/// The examples of one part (training, evaluation) of the data.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// In file order.
    pub examples: Vec<Example>,
    /// The pictures that [`Example::image`] counts; a part that is held out shares them.
    pub images: Option<Arc<Images>>,
    /// The names of the classes, for classification.
    pub labels: Option<Vec<String>>,
    /// What became of the rows.
    pub report: Report,
}

impl Dataset {
    /// The number of tokens of every example, those of its target included, `[examples]`.
    pub fn lengths(&self) -> Vec<usize> {
        let target = |labels: &Labels| match labels {
            Labels::Target(target) => target.labels.len(),
            _ => 0,
        };
        self.examples.iter().map(|example| example.ids.len() + target(&example.labels)).collect()
    }
}

/// What became of the rows of a part: nothing is cut or left out without a count here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Rows read from the file.
    pub rows: usize,
    /// Examples made of them (text is cut in blocks, so there the two differ).
    pub examples: usize,
    /// Rows that were cut at `max_length`.
    pub truncated_rows: usize,
    /// Tokens lost by that.
    pub truncated_tokens: usize,
    /// Lines (from 1) of rows that have no trained token; they are left out. Empty unless those were allowed.
    pub untrained_rows: Vec<usize>,
    /// Examples whose ids and labels equal those of an earlier one.
    pub duplicates: usize,
    /// Tokens of all examples.
    pub tokens: usize,
    /// The middle length, in tokens.
    pub median_length: usize,
    /// 99 of 100 examples are at most this long, in tokens.
    pub length_99: usize,
    /// The longest, in tokens.
    pub max_length: usize,
    /// The share of labels that take part in the loss, 0 to 1; classes and scores are one a row.
    pub trained_share: f64,
    /// What was guessed, in words; each guess can be replaced by a setting.
    pub guesses: Vec<String>,
}

impl Report {
    /// Counts `examples` into the fields that can be known from them; the others stay as they are.
    pub fn measure(&mut self, examples: &[Example], shifted: bool) {
        let mut lengths: Vec<usize> = examples.iter().map(|example| example.ids.len()).collect();
        lengths.sort_unstable();
        // Nearest rank: the smallest length that at least `percent` of the examples do not exceed.
        let quantile = |percent: usize| {
            let rank = (lengths.len() * percent).div_ceil(100).max(1);
            lengths.get(rank - 1).copied().unwrap_or(0)
        };
        (self.median_length, self.length_99, self.max_length) = (quantile(50), quantile(99), quantile(100));
        self.tokens = lengths.iter().sum();
        self.examples = examples.len();
        let places = |example: &Example| match &example.labels {
            Labels::Tokens(labels) => labels.len(),
            Labels::Target(target) => target.labels.len(),
            Labels::None | Labels::Class(_) | Labels::Score(_) => 1,
        };
        let of: usize = examples.iter().map(places).sum();
        let trained: usize = examples.iter().map(|example| example.trained(shifted)).sum();
        self.trained_share = if of == 0 { 0.0 } else { trained as f64 / of as f64 };
        let mut seen = HashSet::new();
        self.duplicates = examples.iter().filter(|example| !seen.insert(fingerprint(example))).count();
    }
}

/// 64 bits are enough to count duplicates: at a million rows a false one has a chance of 3e-8.
fn fingerprint(example: &Example) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&example.ids, example.image, example.task).hash(&mut hasher);
    match &example.labels {
        Labels::None => 0u8.hash(&mut hasher),
        Labels::Class(class) => (1u8, class).hash(&mut hasher),
        Labels::Score(score) => (2u8, score.to_bits()).hash(&mut hasher),
        Labels::Tokens(labels) => (3u8, labels).hash(&mut hasher),
        Labels::Target(target) => (4u8, &target.labels, &target.inputs).hash(&mut hasher),
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(length: usize, labels: Labels) -> Example {
        Example { ids: vec![7; length], labels, row: 1, ..Example::default() }
    }

    #[test]
    fn the_report_counts_lengths_shares_and_duplicates() {
        let mut examples: Vec<Example> = (1..=100).map(|n| example(n, Labels::Class(0))).collect();
        examples.push(example(5, Labels::Class(1)));
        examples.push(example(5, Labels::Class(0)));
        let mut report = Report::default();
        report.measure(&examples, false);
        assert_eq!((report.median_length, report.length_99, report.max_length), (49, 99, 100));
        assert_eq!((report.duplicates, report.tokens, report.trained_share), (1, 5060, 1.0));
        let tokens = [example(4, Labels::Tokens(vec![7, IGNORED, 7, 7]))];
        report.measure(&tokens, true);
        assert_eq!(report.trained_share, 0.5);
        report.measure(&tokens, false);
        assert_eq!(report.trained_share, 0.75);
        report.measure(&[], true);
        assert_eq!((report.max_length, report.trained_share), (0, 0.0));
    }
}
