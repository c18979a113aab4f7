//! What a report is made of. Every part may be absent: a report leaves out what a run did not record.

use serde::{Deserialize, Serialize};

use crate::events::Events;

/// The material of one report.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RunData {
    /// Name of the run, such as its directory's.
    pub name: String,
    /// What came of it.
    pub verdict: Option<Verdict>,
    /// What happened, step by step; its warnings are shown too.
    pub events: Option<Events>,
    /// Fixed evaluation rows with the answers of base and adapter.
    pub rows: Option<Vec<EvalRow>>,
    /// ‖ΔW‖/‖W‖ of each adapted weight.
    pub changes: Option<Vec<Change>>,
    /// Amounts of the data: lengths, cuts, share of trained tokens.
    pub data: Option<Vec<Fact>>,
    /// Rows by length in tokens, such as `("0-31", 120)`.
    pub lengths: Option<Vec<(String, u64)>>,
    /// What merging or quantization cost.
    pub damage: Option<Vec<Fact>>,
    /// All settings of the resolved plan.
    pub settings: Option<Vec<Setting>>,
    /// Versions, hashes, hardware.
    pub provenance: Option<Vec<Fact>>,
    /// The command that repeats the run.
    pub command: Option<String>,
}

/// Task, method and what the metric did.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Verdict {
    /// What was trained for.
    pub task: Option<String>,
    /// The method's name.
    pub method: Option<String>,
    /// Name of the metric.
    pub metric: Option<String>,
    /// The metric of the base.
    pub before: Option<f64>,
    /// The metric after training.
    pub after: Option<f64>,
    /// Confidence interval of `after`, low and high.
    pub interval: Option<(f64, f64)>,
    /// Wall time in seconds.
    pub seconds: Option<f64>,
    /// Peak memory in bytes.
    pub peak_memory_bytes: Option<u64>,
}

/// One evaluation row.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EvalRow {
    /// What the model was given.
    pub input: String,
    /// What it should answer.
    pub expected: String,
    /// What the base answers.
    pub base: Option<String>,
    /// What the adapted model answers.
    pub adapted: Option<String>,
}

/// How far one weight moved.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Change {
    /// Layer, from 0; none for weights outside the layers.
    pub layer: Option<usize>,
    /// Role of the site, such as `q`.
    pub role: String,
    /// ‖ΔW‖/‖W‖ in Frobenius norms.
    pub ratio: f64,
}

/// A name and its value as text.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Fact {
    /// What it is.
    pub name: String,
    /// Its value, with the unit.
    pub value: String,
}

/// One setting of the plan.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Setting {
    /// Dotted key, such as `train.learning_rate`.
    pub name: String,
    /// Value in this run.
    pub value: String,
    /// Default value; none where the setting has none.
    pub default: Option<String>,
}
