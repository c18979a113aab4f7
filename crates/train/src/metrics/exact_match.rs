//! The share of texts that equal one of their references, white space around them aside.

use super::is_blank;

/// Counts equal texts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ExactMatch {
    equal: u64,
    all: u64,
}

impl ExactMatch {
    /// Takes a text and what it should have been; one of the references is enough.
    pub fn add(&mut self, text: &str, references: &[&str]) {
        let bare = |text: &str| text.trim_matches(is_blank).to_owned();
        self.equal += u64::from(references.iter().any(|reference| bare(reference) == bare(text)));
        self.all += 1;
    }

    /// Equal texts of all, 0 to 1; 0 when there are none.
    pub fn score(&self) -> f64 {
        self.equal as f64 / self.all.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_equal_reference_is_enough() {
        let mut matches = ExactMatch::default();
        assert_eq!(matches.score(), 0.0);
        matches.add(" yes\n", &["no", "yes"]);
        matches.add("Yes", &["yes"]);
        matches.add("", &[]);
        matches.add("a  b", &["a b"]);
        assert_eq!(matches.score(), 0.25);
    }
}
