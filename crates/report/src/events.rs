//! The events of a run, read from the text of `events.jsonl`.
//!
//! One JSON object a line, told apart by `"event"`: `step`, `eval`, `checkpoint`, `warning`, `resume`, `end`. Unknown
//! kinds and unknown keys are passed over, so that a newer writer does not break an older reader. A last line without its
//! newline that does not parse was cut by a kill and is left out. A `resume` at step s takes back every step, evaluation
//! and checkpoint after s; of two records of one step the later counts.
//!
//! A number may also be `null` or one of the strings `"NaN"`, `"inf"`, `"-inf"`: JSON has no other way to say that a loss
//! was not finite, and that is what a reader of a failed run looks for.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A longer line is not something that a run wrote.
const LINE_BYTES_MAX: usize = 1 << 20;

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Step {
    /// Optimizer step, from 1.
    pub step: u64,
    /// Passes over the data so far, with the fraction of the one under way.
    pub epoch: Option<f64>,
    /// Training loss of this step; NaN when it was not finite.
    pub loss: f64,
    /// Learning rate of this step.
    pub learning_rate: Option<f64>,
    /// Gradient norm before clipping.
    pub grad_norm: Option<f64>,
    /// Tokens in this step.
    pub tokens: Option<u64>,
    /// Seconds that this step took.
    pub seconds: Option<f64>,
    /// Peak memory of the process so far, in bytes.
    pub memory_bytes: Option<u64>,
}

/// One evaluation; step 0 is the base before training.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Eval {
    /// Optimizer steps done before this evaluation.
    pub step: u64,
    /// Evaluation loss.
    pub loss: Option<f64>,
    /// Metrics by name, such as `accuracy`.
    pub metrics: BTreeMap<String, f64>,
}

/// A warning given while running.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Warning {
    /// Step at which it was given, where it belongs to one.
    pub step: Option<u64>,
    /// What was said.
    pub message: String,
}

/// How the run ended.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct End {
    /// Why it ended, such as `done`, `interrupted`, `early stop`.
    pub reason: Option<String>,
    /// Optimizer steps done.
    pub step: Option<u64>,
    /// Wall time of the whole run in seconds.
    pub seconds: Option<f64>,
}

/// Everything that happened in a run, in order of steps.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Events {
    /// Steps, each number once, ascending.
    pub steps: Vec<Step>,
    /// Evaluations, each step once, ascending.
    pub evals: Vec<Eval>,
    /// Steps at which a checkpoint was kept, ascending.
    pub checkpoints: Vec<u64>,
    /// Warnings in the order in which they were given.
    pub warnings: Vec<Warning>,
    /// Steps from which the run was resumed, in order of time.
    pub resumes: Vec<u64>,
    /// The end, if the run reached one.
    pub end: Option<End>,
    /// True when the last line was cut.
    pub torn: bool,
}

impl Events {
    /// Reads the text of `events.jsonl`.
    ///
    /// # Errors
    /// [`Error::Event`] with the line's number when a line is not a JSON object, lacks a key, or holds the wrong type.
    pub fn parse(text: &str) -> Result<Events> {
        let mut reader = Reader::default();
        for (index, line) in text.split_inclusive('\n').enumerate() {
            let whole = line.ends_with('\n');
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            match reader.line(line) {
                Ok(()) => {}
                // Only a line that is not JSON can be torn: a complete object without its newline is judged as such.
                Err(Fault::Json(_)) if !whole => reader.torn = true,
                Err(fault) => return Err(Error::Event { line: index + 1, problem: fault.message() }),
            }
        }
        Ok(reader.finish())
    }

    /// Wall time in seconds: as the end says, else the sum over the steps that have a time.
    pub fn seconds(&self) -> Option<f64> {
        let steps = || {
            let timed: Vec<f64> = self.steps.iter().filter_map(|step| step.seconds).collect();
            (!timed.is_empty()).then(|| timed.iter().sum())
        };
        self.end.as_ref().and_then(|end| end.seconds).or_else(steps)
    }

    /// The largest memory that any step reports, in bytes.
    pub fn peak_memory_bytes(&self) -> Option<u64> {
        self.steps.iter().filter_map(|step| step.memory_bytes).max()
    }

    /// Names of all metrics of all evaluations, sorted, those of single tasks (TASK.NAME) last.
    pub fn metric_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> =
            self.evals.iter().flat_map(|eval| eval.metrics.keys().map(String::as_str)).collect();
        names.sort_unstable_by_key(|name| (name.contains('.'), *name));
        names.dedup();
        names
    }
}

/// Why a line was not understood.
enum Fault {
    Json(String),
    Content(String),
}

impl Fault {
    fn message(self) -> String {
        match self {
            Fault::Json(problem) | Fault::Content(problem) => problem,
        }
    }
}

type LineResult<T> = std::result::Result<T, Fault>;

/// The events while they are read: by step, so that a later record replaces an earlier one.
#[derive(Default)]
struct Reader {
    steps: BTreeMap<u64, Step>,
    evals: BTreeMap<u64, Eval>,
    checkpoints: BTreeMap<u64, ()>,
    warnings: Vec<Warning>,
    resumes: Vec<u64>,
    end: Option<End>,
    torn: bool,
}

impl Reader {
    fn line(&mut self, line: &str) -> LineResult<()> {
        if line.len() > LINE_BYTES_MAX {
            return Err(Fault::Content(format!(
                "expected at most {LINE_BYTES_MAX} bytes, found {}",
                line.len()
            )));
        }
        let value: Value = serde_json::from_str(line).map_err(|error| {
            Fault::Json(format!("expected a JSON object, found text that is not JSON: {error}"))
        })?;
        let Value::Object(object) = value else {
            return Err(Fault::Content(format!("expected a JSON object, found {}", kind(&value))));
        };
        let fields = Fields(&object);
        match fields.text("event")?.ok_or_else(|| missing("event"))?.as_str() {
            "step" => {
                let step = fields.step()?;
                self.steps.insert(step.step, step);
            }
            "eval" => {
                let eval = fields.eval()?;
                self.evals.insert(eval.step, eval);
            }
            "checkpoint" => {
                self.checkpoints.insert(fields.required_count("step")?, ());
            }
            "warning" => {
                let message = fields.text("message")?.ok_or_else(|| missing("message"))?;
                self.warnings.push(Warning { step: fields.count("step")?, message });
            }
            "resume" => self.resume(fields.required_count("step")?),
            "end" => {
                let reason = fields.text("reason")?;
                self.end =
                    Some(End { reason, step: fields.count("step")?, seconds: fields.number("seconds")? });
            }
            _ => {}
        }
        Ok(())
    }

    /// Work after the checkpoint is done again: what was recorded of it no longer belongs to the run.
    fn resume(&mut self, step: u64) {
        self.steps.retain(|at, _| *at <= step);
        self.evals.retain(|at, _| *at <= step);
        self.checkpoints.retain(|at, ()| *at <= step);
        self.resumes.push(step);
        self.end = None;
    }

    fn finish(self) -> Events {
        Events {
            steps: self.steps.into_values().collect(),
            evals: self.evals.into_values().collect(),
            checkpoints: self.checkpoints.into_keys().collect(),
            warnings: self.warnings,
            resumes: self.resumes,
            end: self.end,
            torn: self.torn,
        }
    }
}

/// Typed access to the keys of one line.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn step(&self) -> LineResult<Step> {
        Ok(Step {
            step: self.required_count("step")?,
            epoch: self.number("epoch")?,
            // A null loss is one that JSON could not hold.
            loss: if self.0.contains_key("loss") {
                self.number("loss")?.unwrap_or(f64::NAN)
            } else {
                return Err(missing("loss"));
            },
            learning_rate: self.number("learning_rate")?,
            grad_norm: self.number("grad_norm")?,
            tokens: self.count("tokens")?,
            seconds: self.number("seconds")?,
            memory_bytes: self.count("memory_bytes")?,
        })
    }

    fn eval(&self) -> LineResult<Eval> {
        let mut metrics = BTreeMap::new();
        match self.0.get("metrics") {
            None | Some(Value::Null) => {}
            Some(Value::Object(object)) => {
                for name in object.keys() {
                    metrics.insert(name.clone(), Fields(object).number(name)?.unwrap_or(f64::NAN));
                }
            }
            Some(other) => return Err(wrong("metrics", "an object", other)),
        }
        Ok(Eval { step: self.required_count("step")?, loss: self.number("loss")?, metrics })
    }

    fn number(&self, key: &str) -> LineResult<Option<f64>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match (value.as_f64(), value.as_str()) {
                (Some(number), _) => Ok(Some(number)),
                (_, Some("NaN")) => Ok(Some(f64::NAN)),
                (_, Some("inf" | "Infinity")) => Ok(Some(f64::INFINITY)),
                (_, Some("-inf" | "-Infinity")) => Ok(Some(f64::NEG_INFINITY)),
                _ => Err(wrong(key, "a number", value)),
            },
        }
    }

    fn count(&self, key: &str) -> LineResult<Option<u64>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or_else(|| wrong(key, "a whole number", value)),
        }
    }

    fn required_count(&self, key: &str) -> LineResult<u64> {
        self.count(key)?.ok_or_else(|| missing(key))
    }

    fn text(&self, key: &str) -> LineResult<Option<String>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(value) => Err(wrong(key, "a string", value)),
        }
    }
}

fn missing(key: &str) -> Fault {
    Fault::Content(format!("expected the key `{key}`, found none"))
}

fn wrong(key: &str, expected: &str, found: &Value) -> Fault {
    Fault::Content(format!("expected `{key}` to be {expected}, found {}", kind(found)))
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".to_string(),
        Value::Bool(_) => "a boolean".to_string(),
        Value::Number(number) => format!("the number {number}"),
        Value::String(text) => format!("the string {:?}", text.chars().take(40).collect::<String>()),
        Value::Array(_) => "an array".to_string(),
        Value::Object(_) => "an object".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_kind_and_passes_over_what_it_does_not_know() {
        let text = concat!(
            r#"{"event":"eval","step":0,"loss":2.5,"metrics":{"accuracy":0.08}}"#,
            "\n",
            r#"{"event":"step","step":1,"epoch":0.1,"loss":2.4,"learning_rate":1e-3,"grad_norm":0.9,"tokens":512,"seconds":0.25,"memory_bytes":1024,"later":[1]}"#,
            "\n\n",
            r#"{"event":"invented","x":1}"#,
            "\n",
            r#"{"event":"checkpoint","step":1,"path":"checkpoints/step-00000001"}"#,
            "\n",
            r#"{"event":"warning","message":"3 rows cut"}"#,
            "\n",
            r#"{"event":"end","reason":"done","seconds":12.5}"#,
            "\n",
        );
        let events = Events::parse(text).unwrap();
        assert_eq!(events.steps.len(), 1);
        assert_eq!(events.steps[0].learning_rate, Some(1e-3));
        assert_eq!(events.evals[0].metrics["accuracy"], 0.08);
        assert_eq!(events.checkpoints, [1]);
        assert_eq!(events.warnings[0].message, "3 rows cut");
        assert_eq!(events.seconds(), Some(12.5));
        assert_eq!(events.peak_memory_bytes(), Some(1024));
        assert!(!events.torn);
    }

    #[test]
    fn a_torn_last_line_is_left_out_and_told() {
        let events = Events::parse("{\"event\":\"step\",\"step\":1,\"loss\":1.0}\n{\"event\":\"ste").unwrap();
        assert_eq!((events.steps.len(), events.torn), (1, true));
        let middle =
            Events::parse("{\"event\":\"ste\n{\"event\":\"step\",\"step\":1,\"loss\":1.0}\n").unwrap_err();
        assert!(middle.to_string().contains("line 1"), "{middle}");
    }

    #[test]
    fn a_resume_takes_back_what_came_after_it_and_the_last_record_wins() {
        let step = |step: u64, loss: f64| format!("{{\"event\":\"step\",\"step\":{step},\"loss\":{loss}}}\n");
        let text = [
            step(1, 3.0),
            step(2, 2.0),
            step(3, 9.0),
            step(4, 9.5),
            "{\"event\":\"resume\",\"step\":2}\n".to_string(),
            step(3, 1.5),
            step(3, 1.25),
        ]
        .concat();
        let events = Events::parse(&text).unwrap();
        let losses: Vec<(u64, f64)> = events.steps.iter().map(|step| (step.step, step.loss)).collect();
        assert_eq!(losses, [(1, 3.0), (2, 2.0), (3, 1.25)]);
        assert_eq!(events.resumes, [2]);
    }

    #[test]
    fn losses_that_json_cannot_hold() {
        let text = "{\"event\":\"step\",\"step\":1,\"loss\":null}\n{\"event\":\"step\",\"step\":2,\"loss\":\"inf\"}\n";
        let events = Events::parse(text).unwrap();
        assert!(events.steps[0].loss.is_nan());
        assert_eq!(events.steps[1].loss, f64::INFINITY);
    }

    #[test]
    fn mistakes_name_the_line_the_key_and_what_was_found() {
        for (text, expected) in [
            ("\n[1]\n", "line 2: expected a JSON object, found an array"),
            ("{\"event\":\"step\",\"step\":1}\n", "line 1: expected the key `loss`, found none"),
            (
                "{\"event\":\"step\",\"step\":-1,\"loss\":1}\n",
                "`step` to be a whole number, found the number -1",
            ),
            (
                "{\"event\":\"eval\",\"step\":1,\"metrics\":3}\n",
                "`metrics` to be an object, found the number 3",
            ),
            ("{\"step\":1}", "line 1: expected the key `event`, found none"),
            (
                "{\"event\":\"step\",\"step\":1,\"loss\":\"low\"}\n",
                "`loss` to be a number, found the string \"low\"",
            ),
        ] {
            let message = Events::parse(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}\n{expected}");
        }
        let long = format!("{{\"event\":\"warning\",\"message\":\"{}\"}}\n", "x".repeat(LINE_BYTES_MAX));
        assert!(Events::parse(&long).unwrap_err().to_string().contains("at most"));
    }
}
