//! The learning rate of a step, as `transformers`' `get_constant_schedule_with_warmup`, `get_linear_…` and
//! `get_cosine_schedule_with_warmup` give it.
//!
//! With s the step counted from 0, w the warm-up and T all steps: s/w below w; after it 1, (T − s)/(T − w), or
//! ½(1 + cos(π(s − w)/(T − w))).

use engraft_recipe::Schedule;

/// The factors of all steps of a run.
#[derive(Clone, Copy, Debug)]
pub struct LearningRate {
    /// The highest rate.
    pub peak: f64,
    /// What follows the warm-up.
    pub schedule: Schedule,
    /// Steps in which the rate rises.
    pub warmup: u64,
    /// Steps of the run.
    pub steps: u64,
}

impl LearningRate {
    /// The rate of the optimizer step `number`, from 1.
    pub fn at(&self, number: u64) -> f64 {
        let step = number.saturating_sub(1);
        let (s, w, total) = (step as f64, self.warmup as f64, self.steps as f64);
        let span = (total - w).max(1.0);
        let factor = if step < self.warmup {
            s / w.max(1.0)
        } else {
            match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => ((total - s) / span).max(0.0),
                Schedule::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * ((s - w) / span)).cos())).max(0.0),
            }
        };
        self.peak * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_transformers() {
        let text = include_str!("../../../tests/golden/optim/schedules.json");
        let cases: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
        assert!(cases.len() >= 6);
        for case in cases {
            let rate = LearningRate {
                peak: case["learning_rate"].as_f64().unwrap(),
                schedule: serde_json::from_value(case["schedule"].clone()).unwrap(),
                warmup: case["warmup_steps"].as_u64().unwrap(),
                steps: case["steps"].as_u64().unwrap(),
            };
            for (step, expected) in case["learning_rates"].as_array().unwrap().iter().enumerate() {
                let (found, expected) = (rate.at(step as u64 + 1), expected.as_f64().unwrap());
                assert!(
                    (found - expected).abs() <= 1e-12 * rate.peak,
                    "{rate:?} step {step}: {found} {expected}"
                );
            }
        }
    }
}
