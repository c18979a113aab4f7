//! `--fail-if 'accuracy < 0.9'`: a metric, a comparison, a number.

use std::collections::BTreeMap;

use crate::failure::{Failure, Outcome};

/// One condition under which an evaluation fails.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    text: String,
    metric: String,
    comparison: &'static str,
    bound: f64,
}

impl std::str::FromStr for Gate {
    type Err = String;

    fn from_str(text: &str) -> Result<Gate, String> {
        let wrong = || {
            "expected METRIC COMPARISON NUMBER, such as 'accuracy < 0.9'; comparisons are < <= > >= "
                .trim()
                .to_owned()
        };
        let at = text.find(['<', '>']).ok_or_else(wrong)?;
        let comparison =
            ["<=", ">=", "<", ">"].into_iter().find(|c| text[at..].starts_with(c)).ok_or_else(wrong)?;
        let bound = text[at + comparison.len()..]
            .trim()
            .parse::<f64>()
            .ok()
            .filter(|b| b.is_finite())
            .ok_or_else(wrong)?;
        let metric = text[..at].trim();
        if metric.is_empty() || metric.contains(char::is_whitespace) {
            return Err(wrong());
        }
        Ok(Gate { text: text.trim().to_owned(), metric: metric.to_owned(), comparison, bound })
    }
}

impl Gate {
    /// Whether the evaluation fails. A metric that is not a number fails.
    ///
    /// # Errors
    /// A metric that the evaluation does not have; exit code 2.
    pub fn fails(&self, metrics: &BTreeMap<String, f64>) -> Outcome<bool> {
        let Some(value) = metrics.get(&self.metric) else {
            let known: Vec<&str> = metrics.keys().map(String::as_str).collect();
            let message =
                format!("`--fail-if`: there is no metric `{}`; there are {}", self.metric, known.join(", "));
            return Err(Failure::before_work(message));
        };
        Ok(value.is_nan()
            || match self.comparison {
                "<" => *value < self.bound,
                "<=" => *value <= self.bound,
                ">" => *value > self.bound,
                _ => *value >= self.bound,
            })
    }

    /// The condition as written.
    pub fn text(&self) -> &str {
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(text: &str) -> bool {
        let metrics = BTreeMap::from([("accuracy".to_owned(), 0.9), ("loss".to_owned(), f64::NAN)]);
        text.parse::<Gate>().unwrap().fails(&metrics).unwrap()
    }

    #[test]
    fn comparisons() {
        assert!(!fails("accuracy < 0.9") && fails("accuracy<=0.9"));
        assert!(!fails("accuracy > 0.9") && fails("accuracy >= 0.9"));
        assert!(fails("loss > 5"), "what is not a number passes no gate");
    }

    #[test]
    fn mistakes_are_told() {
        for bad in ["accuracy", "accuracy < x", "< 0.9", "a b < 1", "accuracy = 1", "accuracy < NaN"] {
            assert!(bad.parse::<Gate>().is_err(), "{bad}");
        }
        let error = "f2 < 1".parse::<Gate>().unwrap().fails(&BTreeMap::new()).unwrap_err();
        assert_eq!(error.code, crate::failure::code::BEFORE_WORK);
    }
}
