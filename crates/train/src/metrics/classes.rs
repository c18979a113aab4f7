//! Accuracy, macro F1 and Matthews' correlation, from what was predicted and what was right.
//!
//! Macro F1 is the mean over the classes that occur (in labels or predictions), as scikit-learn's. Matthews'
//! correlation for several classes: (c·s − Σ pₖtₖ) / √((s² − Σ pₖ²)(s² − Σ tₖ²)) (Gorodkin 2004).

use std::collections::BTreeMap;

/// (label, prediction) counted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Confusion(BTreeMap<(i64, i64), u64>);

impl Confusion {
    pub fn add(&mut self, label: i64, predicted: i64) {
        *self.0.entry((label, predicted)).or_default() += 1;
    }

    /// Share of right answers.
    pub fn accuracy(&self) -> f64 {
        let right: u64 = self.0.iter().filter(|((l, p), _)| l == p).map(|(_, n)| n).sum();
        right as f64 / self.total().max(1) as f64
    }

    fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// class → (as label, as prediction, both).
    fn by_class(&self) -> BTreeMap<i64, (f64, f64, f64)> {
        let mut classes: BTreeMap<i64, (f64, f64, f64)> = BTreeMap::new();
        for (&(label, predicted), &n) in &self.0 {
            classes.entry(label).or_default().0 += n as f64;
            classes.entry(predicted).or_default().1 += n as f64;
            if label == predicted {
                classes.entry(label).or_default().2 += n as f64;
            }
        }
        classes
    }

    /// Mean F1 over the classes.
    pub fn macro_f1(&self) -> f64 {
        let classes = self.by_class();
        let f1: f64 =
            classes.values().map(|(labels, predicted, both)| 2.0 * both / (labels + predicted)).sum();
        f1 / classes.len().max(1) as f64
    }

    /// Matthews' correlation; 0 where it is undefined.
    pub fn matthews(&self) -> f64 {
        let classes = self.by_class();
        let s = self.total() as f64;
        let sum = |f: &dyn Fn(&(f64, f64, f64)) -> f64| classes.values().map(f).sum::<f64>();
        let right = sum(&|c| c.2);
        let spread = (s * s - sum(&|c| c.1 * c.1)) * (s * s - sum(&|c| c.0 * c.0));
        if spread > 0.0 { (right * s - sum(&|c| c.0 * c.1)) / spread.sqrt() } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_scikit_learn() {
        let mut c = Confusion::default();
        for (label, predicted) in [(0, 0), (0, 1), (1, 1), (2, 2), (2, 0), (2, 2)] {
            c.add(label, predicted);
        }
        // accuracy_score, f1_score(average="macro"), matthews_corrcoef
        assert!((c.accuracy() - 4.0 / 6.0).abs() < 1e-12);
        assert!((c.macro_f1() - (0.5 + 2.0 / 3.0 + 0.8) / 3.0).abs() < 1e-12);
        assert!((c.matthews() - 12.0 / (24.0f64 * 22.0).sqrt()).abs() < 1e-12);
        assert_eq!(Confusion::default().accuracy(), 0.0);
        // scikit-learn 1.9.1, with two classes often mistaken.
        let mut many = Confusion::default();
        for i in 0..60 {
            many.add(i * 7 % 5, if i % 3 == 0 { i * i % 6 } else { i * 7 % 5 });
        }
        for (found, expected) in [
            (many.accuracy(), 0.7333333333333333),
            (many.macro_f1(), 0.7466666666666667),
            (many.matthews(), 0.6810052246069989),
        ] {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }
}
