//! BLEU-4 of a corpus (Papineni et al., ACL 2002): BP · exp(mean of ln pₙ), n = 1 to 4, as `sacrebleu` computes it.
//!
//! pₙ counts the n-grams of all texts that their references hold too, each as often as the reference with the most has
//! it. BP = exp(1 − r/c) when the texts (c tokens) are shorter than the references nearest to them in length (r). An n
//! without a match counts as half a match, the next as a quarter (smoothing "exp"). Tokens are those of `mteval-v13a`.

use std::collections::HashMap;

use super::is_blank;

/// The longest n-grams that are compared.
const ORDER: usize = 4;

/// Collects texts for one score.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bleu {
    /// n-grams found in a reference, and all, for each n.
    matched: [u64; ORDER],
    total: [u64; ORDER],
    /// Tokens of the texts, and of the references nearest in length.
    length: u64,
    reference_length: u64,
}

impl Bleu {
    /// Takes a text and its references.
    pub fn add(&mut self, text: &str, references: &[&str]) {
        let tokens = tokens(text);
        let references: Vec<Vec<String>> =
            references.iter().map(|reference| self::tokens(reference)).collect();
        let nearest =
            references.iter().map(Vec::len).min_by_key(|length| (length.abs_diff(tokens.len()), *length));
        self.length += tokens.len() as u64;
        self.reference_length += nearest.unwrap_or(0) as u64;
        for n in 1..=ORDER {
            let mut most: HashMap<&[String], u64> = HashMap::new();
            for reference in &references {
                for (gram, count) in counts(reference, n) {
                    let most = most.entry(gram).or_default();
                    *most = count.max(*most);
                }
            }
            for (gram, count) in counts(&tokens, n) {
                self.total[n - 1] += count;
                self.matched[n - 1] += count.min(most.get(gram).copied().unwrap_or(0));
            }
        }
    }

    /// The score, 0 to 100.
    pub fn score(&self) -> f64 {
        // Without one match, or without an n-gram of every length, there is nothing to smooth.
        if self.matched == [0; ORDER] || self.total.contains(&0) {
            return 0.0;
        }
        let (mut sum, mut part) = (0.0, 1.0);
        for (matched, total) in self.matched.iter().zip(self.total) {
            let matched = if *matched > 0 {
                *matched as f64
            } else {
                part /= 2.0;
                part
            };
            sum += (100.0 * matched / total as f64).ln();
        }
        let penalty = match self.length < self.reference_length {
            true => (1.0 - self.reference_length as f64 / self.length as f64).exp(),
            false => 1.0,
        };
        penalty * (sum / ORDER as f64).exp()
    }
}

/// How often each n-gram occurs.
fn counts(tokens: &[String], n: usize) -> HashMap<&[String], u64> {
    let mut counts = HashMap::new();
    tokens.windows(n).for_each(|gram| *counts.entry(gram).or_default() += 1);
    counts
}

/// Tokens of `mteval-v13a`: punctuation stands alone, except `.` and `,` between digits, and `-` and `'` in most places.
fn tokens(text: &str) -> Vec<String> {
    let text = text.trim_end_matches(is_blank).replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    let mut text = format!(" {text} ");
    for (code, character) in [("&quot;", "\""), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")] {
        text = text.replace(code, character);
    }
    let mut apart = String::with_capacity(text.len() * 2);
    for c in text.chars() {
        let stands_alone = c.is_ascii_punctuation() && !matches!(c, '\'' | ',' | '-' | '.');
        match stands_alone {
            true => apart.extend([' ', c, ' ']),
            false => apart.push(c),
        }
    }
    let is_point = |c: char| matches!(c, '.' | ',');
    let apart = pairs(&apart, |a, b| !a.is_ascii_digit() && is_point(b), |a, b| [a, ' ', b, ' ']);
    let apart = pairs(&apart, |a, b| is_point(a) && !b.is_ascii_digit(), |a, b| [' ', a, ' ', b]);
    let apart = pairs(&apart, |a, b| a.is_ascii_digit() && b == '-', |a, b| [a, ' ', b, ' ']);
    apart.split(is_blank).filter(|token| !token.is_empty()).map(str::to_owned).collect()
}

/// Rewrites pairs of neighbours from left to right; a character takes part in one pair only, as in a regular expression.
fn pairs(text: &str, found: impl Fn(char, char) -> bool, write: impl Fn(char, char) -> [char; 4]) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    let mut rest = text.chars().peekable();
    while let Some(a) = rest.next() {
        match rest.peek() {
            Some(b) if found(a, *b) => {
                out.extend(write(a, *b));
                rest.next();
            }
            _ => out.push(a),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::rouge::tests::{REFERENCES, TEXTS};

    fn score(texts: &[(&str, &[&str])]) -> f64 {
        let mut bleu = Bleu::default();
        texts.iter().for_each(|(text, references)| bleu.add(text, references));
        bleu.score()
    }

    #[test]
    fn tokens_are_those_of_sacrebleu() {
        let cases: [(&str, &[&str]); 4] = [
            (TEXTS[1], &["A", "price", "of", "$", "3,500.50", "-", "that's", "10", "-", "fold", "!"]),
            (TEXTS[4], &["Hello", "\"", "world", "\"", "Second", "line", ",", "here", "."]),
            (TEXTS[5], &["It", "is", "a", "naïve", "café", ";", "isn't", "it", "?"]),
            (
                "a.b,c 1.2,3 .5 5. -x 3-4 ...,,",
                &[
                    "a", ".", "b", ",", "c", "1.2,3", ".", "5", "5", ".", "-x", "3", "-", "4", ".", ".", ".",
                    ",", ",",
                ],
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(tokens(text), expected);
        }
    }

    #[test]
    fn scores_are_those_of_sacrebleu() {
        // sacrebleu 2.6.0, corpus_bleu with its defaults.
        let both: Vec<(&str, &[&str])> = TEXTS.into_iter().zip(REFERENCES.iter().map(|r| &r[..])).collect();
        let first: Vec<(&str, &[&str])> = TEXTS.into_iter().zip(REFERENCES.iter().map(|r| &r[..1])).collect();
        for (found, expected) in [
            (score(&both), 26.25078374726667),
            (score(&first), 22.90323033977651),
            (score(&[(TEXTS[0], &REFERENCES[0][1..])]), 43.47208719449914),
            (score(&[("a b c d e", &["a x c y e"])]), 14.058533129758727),
            (score(&[("a b", &["a b"])]), 0.0),
            (score(&[]), 0.0),
        ] {
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }
    }
}
