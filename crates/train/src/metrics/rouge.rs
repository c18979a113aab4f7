//! ROUGE-1, -2, -L and -Lsum (Lin, 2004), the F-measure 2PR / (P + R) of each, as Google's `rouge_score` computes it
//! without stemming: tokens are runs of `a`–`z` and `0`–`9` after lowering.
//!
//! ROUGE-n counts common n-grams; ROUGE-L takes the longest common subsequence of the two texts. ROUGE-Lsum does so line
//! by line: of each line of the reference, the union of its longest common subsequences with all lines of the text, no
//! token counted more often than it occurs.

use std::collections::{BTreeSet, HashMap};

/// The four scores, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs)] // the fields are the names of the scores
pub struct RougeScores {
    pub rouge_1: f64,
    pub rouge_2: f64,
    pub rouge_l: f64,
    pub rouge_lsum: f64,
}

/// Collects texts for mean scores.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rouge {
    sums: RougeScores,
    texts: u64,
}

impl Rouge {
    /// Takes a text and its references; for each score the best reference counts.
    pub fn add(&mut self, text: &str, references: &[&str]) {
        let mut best = RougeScores::default();
        for reference in references {
            let found = scores(text, reference);
            best.each(&found, f64::max);
        }
        self.sums.each(&best, |sum, score| sum + score);
        self.texts += 1;
    }

    /// The means over the texts; 0 when there are none.
    pub fn scores(&self) -> RougeScores {
        let mut means = self.sums;
        means.each(&self.sums, |_, sum| sum / self.texts.max(1) as f64);
        means
    }
}

impl RougeScores {
    fn each(&mut self, other: &RougeScores, f: impl Fn(f64, f64) -> f64) {
        self.rouge_1 = f(self.rouge_1, other.rouge_1);
        self.rouge_2 = f(self.rouge_2, other.rouge_2);
        self.rouge_l = f(self.rouge_l, other.rouge_l);
        self.rouge_lsum = f(self.rouge_lsum, other.rouge_lsum);
    }
}

fn scores(text: &str, reference: &str) -> RougeScores {
    let (found, expected) = (tokens(text), tokens(reference));
    let lines = |text: &str| text.split('\n').map(tokens).collect::<Vec<_>>();
    let whole = common(&expected, &found);
    RougeScores {
        rouge_1: grams(&found, &expected, 1),
        rouge_2: grams(&found, &expected, 2),
        rouge_l: f_measure(whole.len(), found.len(), expected.len()),
        rouge_lsum: by_lines(&lines(text), &lines(reference)),
    }
}

fn tokens(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let parts = lower.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit()));
    parts.filter(|token| !token.is_empty()).map(str::to_owned).collect()
}

/// 2PR / (P + R) with P = `hits` of `found` and R = `hits` of `expected`.
fn f_measure(hits: usize, found: usize, expected: usize) -> f64 {
    let (precision, recall) = (hits as f64 / found.max(1) as f64, hits as f64 / expected.max(1) as f64);
    if hits == 0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) }
}

fn grams(found: &[String], expected: &[String], n: usize) -> f64 {
    let mut left: HashMap<&[String], usize> = HashMap::new();
    expected.windows(n).for_each(|gram| *left.entry(gram).or_default() += 1);
    let mut hits = 0;
    for gram in found.windows(n) {
        if let Some(count) = left.get_mut(gram).filter(|count| **count > 0) {
            *count -= 1;
            hits += 1;
        }
    }
    let count = |tokens: &[String]| (tokens.len() + 1).saturating_sub(n);
    f_measure(hits, count(found), count(expected))
}

/// Places in `expected` of one longest common subsequence; of several, the one that `rouge_score` reads out, because the
/// union over lines depends on it.
fn common(expected: &[String], found: &[String]) -> Vec<usize> {
    let width = found.len() + 1;
    // `[expected + 1, found + 1]`: lengths for the beginnings.
    let mut lengths = vec![0u32; (expected.len() + 1) * width];
    for (row, a) in expected.iter().enumerate() {
        for (column, b) in found.iter().enumerate() {
            let at = (row + 1) * width + column + 1;
            lengths[at] = match a == b {
                true => lengths[at - width - 1] + 1,
                false => lengths[at - width].max(lengths[at - 1]),
            };
        }
    }
    let (mut row, mut column, mut places) = (expected.len(), found.len(), Vec::new());
    while row > 0 && column > 0 {
        let at = row * width + column;
        if expected[row - 1] == found[column - 1] {
            places.push(row - 1);
            row -= 1;
            column -= 1;
        } else if lengths[at - 1] > lengths[at - width] {
            column -= 1;
        } else {
            row -= 1;
        }
    }
    places
}

fn by_lines(found: &[Vec<String>], expected: &[Vec<String>]) -> f64 {
    let occurrences = |lines: &[Vec<String>]| {
        let mut counts: HashMap<String, usize> = HashMap::new();
        lines.iter().flatten().for_each(|token| *counts.entry(token.clone()).or_default() += 1);
        counts
    };
    let (mut in_found, mut in_expected) = (occurrences(found), occurrences(expected));
    let mut hits = 0;
    for line in expected {
        let union: BTreeSet<usize> = found.iter().flat_map(|other| common(line, other)).collect();
        for token in union.into_iter().map(|place| &line[place]) {
            if let (Some(here), Some(there)) = (in_found.get_mut(token), in_expected.get_mut(token))
                && *here > 0
                && *there > 0
            {
                *here -= 1;
                *there -= 1;
                hits += 1;
            }
        }
    }
    let count = |lines: &[Vec<String>]| lines.iter().map(Vec::len).sum();
    f_measure(hits, count(found), count(expected))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Texts with two references each, for this and BLEU.
    pub const TEXTS: [&str; 6] = [
        "The cat sat on the mat.",
        "A price of $3,500.50 - that's 10-fold!",
        "the the the the",
        "",
        "Hello &quot;world&quot;\nSecond line, here.",
        "It is  a naïve café; isn't it?",
    ];
    pub const REFERENCES: [[&str; 2]; 6] = [
        ["The cat is sitting on the mat.", "There's a cat on the mat."],
        ["The price is $3,500.50, that is 10-fold.", "A cost of 3500.50"],
        ["the cat", "the dog sat there"],
        ["nothing at all", "some"],
        ["Hello \"world\"!\nA second line here.", "Hello world"],
        ["It's a naive café, isn't it?", "It is a café."],
    ];

    fn close(found: RougeScores, expected: [f64; 4]) {
        let found = [found.rouge_1, found.rouge_2, found.rouge_l, found.rouge_lsum];
        let same = found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-12);
        assert!(same, "{found:?} {expected:?}");
    }

    #[test]
    fn scores_are_those_of_rouge_score() {
        // rouge_score 0.1.2, RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"]), means of score(…).fmeasure.
        let mut rouge = Rouge::default();
        TEXTS.iter().zip(REFERENCES).for_each(|(text, references)| rouge.add(text, &references[..1]));
        close(rouge.scores(), [0.546279537456008, 0.2922558922558922, 0.546279537456008, 0.546279537456008]);
        let mut lines = Rouge::default();
        lines.add(
            "the quick fox\njumps over a dog\nand sleeps",
            &["a quick brown fox sleeps\nand a dog jumps over the moon\nthe end"],
        );
        close(
            lines.scores(),
            [0.782608695652174, 0.1904761904761905, 0.34782608695652173, 0.6086956521739131],
        );
    }

    #[test]
    fn the_best_reference_counts_and_nothing_scores_nothing() {
        let mut rouge = Rouge::default();
        close(rouge.scores(), [0.0; 4]);
        rouge.add("a b c", &["x y", "a b d"]);
        close(rouge.scores(), [2.0 / 3.0, 0.5, 2.0 / 3.0, 2.0 / 3.0]);
        rouge.add("", &[""]);
        close(rouge.scores(), [1.0 / 3.0, 0.25, 1.0 / 3.0, 1.0 / 3.0]);
    }
}
