//! The plan: a recipe with everything decided that needs the model or the data, and `plan.toml`, its text. Each
//! value carries its origin as a comment; the text is a recipe again, so a run can be repeated from its plan.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::check::{Entry, Section};
use crate::problem::Problems;
use crate::recipe::{Base, Data, Length, MethodTable, Recipe, Task, Train, Warmup};
use crate::rules;
use crate::spec::{FieldKind, Origin};
use crate::value;

/// The format of `plan.toml`, in its first line.
pub const PLAN_FORMAT: u32 = 1;

/// What looking at the model and the data has shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// The directory of the model where `model` is one; absent for a Hub id.
    pub model_dir: Option<PathBuf>,
    /// The task, decided: never [`Task::Auto`].
    pub task: Task,
    /// The most tokens the model takes in a row.
    pub model_length: usize,
    /// Optimizer steps in one pass over the data, at least 1.
    pub steps_per_epoch: u64,
    /// The working directory: paths in the plan are absolute, so that it can be read from anywhere.
    pub working_dir: PathBuf,
}

/// Everything a run needs, decided.
#[derive(Clone, Debug)]
pub struct Plan {
    /// An absolute directory or a Hub id.
    pub model: String,
    /// Never [`Task::Auto`].
    pub task: Task,
    /// How the frozen model is held.
    pub base: Base,
    /// The methods, their settings with all defaults.
    pub methods: Vec<MethodTable>,
    /// The data; paths are absolute, `max_length` is there.
    pub data: Data,
    /// The training; `eval_every` is there.
    pub train: Train,
    /// Tokens a row.
    pub max_length: usize,
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Steps in which the learning rate rises.
    pub warmup_steps: u64,
    /// Steps between evaluations; 0 evaluates before and after only, or not at all without evaluation data.
    pub eval_every: u64,
    sections: Vec<Section>,
}

impl Recipe {
    /// Decides what was left open.
    ///
    /// # Errors
    /// Combinations that the task rules out, shown at their place.
    pub fn plan(&self, facts: &Facts) -> Result<Plan, Problems> {
        let problems = rules::for_task(self, facts.task);
        if !problems.is_empty() {
            return Err(self.problems(problems));
        }
        let absolute = |path: &Path| facts.working_dir.join(path);
        let steps = steps(self.train.length, facts.steps_per_epoch);
        let evaluates = self.data.evaluates();
        let eval_every = self.train.eval_every.unwrap_or(if evaluates { (steps / 10).max(1) } else { 0 });
        let max_length = self.data.max_length.unwrap_or(facts.model_length.clamp(1, 1024));
        let model = facts.model_dir.as_deref().map(|dir| absolute(dir).to_string_lossy().into_owned());
        let mut plan = Plan {
            model: model.unwrap_or_else(|| self.model.value.clone()),
            task: facts.task,
            base: self.base.clone(),
            methods: self.methods.iter().map(|method| self.filled(method, &absolute)).collect(),
            data: self.data.clone(),
            train: self.train.clone(),
            max_length,
            steps,
            warmup_steps: warmup(self.train.warmup, steps),
            eval_every,
            sections: self.sections.clone(),
        };
        plan.data.path = absolute(&self.data.path);
        plan.data.eval_path = self.data.eval_path.as_deref().map(absolute);
        for task in &mut plan.data.tasks {
            task.data.path = absolute(&task.data.path);
            task.data.eval_path = task.data.eval_path.as_deref().map(absolute);
        }
        plan.data.max_length = Some(max_length);
        plan.train.eval_every = Some(eval_every);
        plan.decide(&absolute);
        Ok(plan)
    }

    /// A method with its defaults and an absolute `from`.
    fn filled(&self, method: &MethodTable, absolute: &dyn Fn(&Path) -> PathBuf) -> MethodTable {
        let mut method = method.clone();
        if let Some(from) = &mut method.from {
            from.value = absolute(&from.value);
            return method;
        }
        let spec =
            self.specs.iter().find(|spec| method.name.as_ref().is_some_and(|name| name.value == spec.name));
        let fields = spec.into_iter().flat_map(|spec| &spec.fields);
        let value = |field: &crate::spec::FieldSpec| {
            method.settings.get(field.name).cloned().or_else(|| field.default.clone())
        };
        let settings: Map<String, Value> =
            fields.filter_map(|field| Some((field.name.to_owned(), value(field)?))).collect();
        method.settings = settings;
        method
    }
}

/// Passes to steps, rounded up: a started step counts.
fn steps(length: Length, per_epoch: u64) -> u64 {
    match length {
        Length::Steps(steps) => steps,
        Length::Epochs(epochs) => ((epochs * per_epoch.max(1) as f64).ceil() as u64).max(1),
    }
}

/// Rounded up, as `transformers` does.
fn warmup(warmup: Warmup, steps: u64) -> u64 {
    match warmup {
        Warmup::Steps(steps) => steps,
        Warmup::Ratio(ratio) => (ratio * steps as f64).ceil() as u64,
    }
}

impl Plan {
    /// Writes what was decided into the values of the plan's text.
    fn decide(&mut self, absolute: &dyn Fn(&Path) -> PathBuf) {
        let task = serde_json::to_value(self.task).unwrap_or_default();
        let decided = [
            ("", "model", Value::from(self.model.as_str())),
            ("", "task", task),
            ("data", "max_length", self.max_length.into()),
            ("train", "eval_every", self.eval_every.into()),
        ];
        for section in &mut self.sections {
            for entry in section.entries.iter_mut().filter(|entry| entry.field.kind == FieldKind::Path) {
                if let Some(path) = entry.value.as_str() {
                    entry.value = absolute(Path::new(path)).to_string_lossy().into_owned().into();
                }
            }
            for (path, key, value) in &decided {
                if section.path == *path {
                    section.decide(path, key, value);
                }
            }
        }
        if let Some(crate::recipe::Template::Path(path)) = &mut self.data.template {
            *path = absolute(path);
            let text = path.to_string_lossy().into_owned();
            if let Some(data) = self.sections.iter_mut().find(|section| section.path == "data") {
                data.entries
                    .iter_mut()
                    .filter(|e| e.field.name == "template")
                    .for_each(|e| e.value = text.clone().into());
            }
        }
    }

    /// `plan.toml`: every value with where it comes from.
    pub fn to_toml(&self) -> String {
        let mut text = format!("# engraft plan, format {PLAN_FORMAT}\n");
        let _ = writeln!(text, "# {} optimizer steps, {} of them warm-up", self.steps, self.warmup_steps);
        let several = self.methods.len() > 1;
        for section in &self.sections {
            let header = match section.path.as_str() {
                "" => String::new(),
                path if path.starts_with("data.tasks") => "\n[[data.tasks]]\n".into(),
                path if path.starts_with("method") && several => "\n[[method]]\n".into(),
                path if path.starts_with("method") => "\n[method]\n".into(),
                "data.columns" if section.entries.is_empty() => continue,
                path => format!("\n[{path}]\n"),
            };
            text.push_str(&header);
            for entry in &section.entries {
                let _ = writeln!(
                    text,
                    "{} = {}  # {}",
                    entry.field.name,
                    value::toml(&entry.value),
                    entry.origin.as_str()
                );
            }
        }
        text
    }
}

impl Section {
    /// Sets a value that was found; one that stays as written keeps its origin.
    fn decide(&mut self, path: &str, key: &str, value: &Value) {
        match self.entries.iter_mut().find(|entry| entry.field.name == key) {
            Some(entry) if entry.value == *value || key == "model" => entry.value = value.clone(),
            Some(entry) => (entry.value, entry.origin) = (value.clone(), Origin::Found),
            None => {
                let field =
                    crate::keys::table(path).and_then(|table| table.fields.iter().find(|f| f.name == key));
                let entry = field.map(|field| Entry {
                    field: field.clone(),
                    value: value.clone(),
                    origin: Origin::Found,
                });
                self.entries.extend(entry);
            }
        }
    }
}
