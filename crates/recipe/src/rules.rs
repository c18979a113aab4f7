//! Combinations that cannot be: each rule looks at the written values and reports all places it concerns.

use std::collections::HashMap;

use serde_json::Value;

use crate::check::Section;
use crate::keys::EXCLUSIVE;
use crate::problem::{Place, Problem, quoted};
use crate::recipe::{Recipe, Task};
use crate::tree::{Node, Pair, Tree};

/// What the rules look at.
struct Rules<'a> {
    tree: &'a Node,
    sections: &'a [Section],
    problems: &'a mut Vec<Problem>,
}

/// All rules that the text alone can break.
pub(crate) fn check(tree: &Node, sections: &[Section], problems: &mut Vec<Problem>) {
    let mut rules = Rules { tree, sections, problems };
    rules.exclusive();
    rules.evaluation();
    rules.base();
    rules.format();
    rules.steps();
    rules.tasks();
    rules.labels();
    for section in sections.iter().filter(|section| section.path.starts_with("method")) {
        rules.method(section);
    }
    let task = rules.value("", "task").and_then(|task| serde_json::from_value(task.clone()).ok());
    let task = task.unwrap_or(Task::Auto);
    task_rules(task, &|path| tree.find(path).map(|node| node.place.clone()), sections, rules.problems);
}

/// The rules that need the decided task.
pub(crate) fn for_task(recipe: &Recipe, task: Task) -> Vec<Problem> {
    let mut problems = Vec::new();
    task_rules(task, &|path| recipe.place(path), &recipe.sections, &mut problems);
    problems
}

fn task_rules(
    task: Task,
    place: &dyn Fn(&str) -> Option<Place>,
    sections: &[Section],
    problems: &mut Vec<Problem>,
) {
    let differs = |key| sections.iter().any(|section| section.path == "data" && section.differs(key));
    let name = serde_json::to_value(task).unwrap_or_default();
    let name = name.as_str().unwrap_or_default().to_owned();
    let mut refuse = |key: &str, why: &str| {
        if let Some(at) = place(key) {
            let problem = Problem::new(format!("`{key}` does not go with the task {name}")).label(at, why);
            let problem = match place("task") {
                Some(task) => problem.context(task, "the task"),
                None => problem.note(format!("the task {name} follows from the model and the data")),
            };
            problems.push(problem);
        }
    };
    if differs("packing") && !matches!(task, Task::CausalLm | Task::MaskedLm | Task::Auto) {
        refuse("data.packing", "a packed row would hold several answers");
    }
    if differs("labels") && matches!(task, Task::CausalLm | Task::Seq2Seq | Task::MaskedLm | Task::Embedding)
    {
        refuse("data.labels", "this task has no classes");
    }
    let accuracy =
        sections.iter().find(|section| section.path == "train").and_then(|train| train.get("best_metric"));
    if matches!(accuracy.and_then(Value::as_str), Some("f1"))
        && matches!(task, Task::CausalLm | Task::Seq2Seq | Task::MaskedLm)
    {
        refuse("train.best_metric", "a metric of classes");
    }
}

impl Rules<'_> {
    fn value(&self, section: &str, key: &str) -> Option<&Value> {
        self.sections.iter().find(|s| s.path == section)?.get(key)
    }

    fn differs(&self, section: &str, key: &str) -> bool {
        self.sections.iter().any(|s| s.path == section && s.differs(key))
    }

    fn place(&self, path: &str) -> Option<Place> {
        self.tree.find(path).map(|node| node.place.clone())
    }

    /// A written key of a table, wherever its table stands.
    fn pair(&self, table: &str, key: &str) -> Option<&Pair> {
        self.tree.find(table)?.pairs().iter().find(|pair| pair.name == key)
    }

    /// `epochs` and `steps`, and their like.
    fn exclusive(&mut self) {
        for &(table, first, second, what) in EXCLUSIVE {
            let paths = self.sections.iter().map(|section| section.path.clone());
            let paths: Vec<String> = paths.filter(|path| path.split('[').next() == Some(table)).collect();
            for path in paths {
                let (Some(a), Some(b)) = (self.pair(&path, first), self.pair(&path, second)) else {
                    continue;
                };
                let mut places = [a.place.clone(), b.place.clone()];
                places.sort();
                let [earlier, later] = places;
                let title = format!("`{path}.{first}` and `{path}.{second}` cannot both be set");
                let problem = Problem::new(title)
                    .context(earlier, format!("first {what}"))
                    .label(later, format!("second {what}"))
                    .help("delete one");
                self.problems.push(problem);
            }
        }
    }

    /// What evaluates needs something to evaluate on.
    fn evaluation(&mut self) {
        let mut sets = self.sections.iter().filter(|section| section.path.starts_with("data"));
        if sets.any(|set| set.get("eval_path").is_some() || set.get("eval_fraction").is_some()) {
            return;
        }
        for key in ["eval_every", "early_stopping_patience", "best_metric"] {
            let zero = self.value("train", key).and_then(Value::as_u64) == Some(0);
            let path = format!("train.{key}");
            if zero || !self.differs("train", key) {
                continue;
            }
            let Some(place) = self.place(&path) else { continue };
            let problem = Problem::new(format!("`{path}` needs evaluation data"))
                .label(place, "")
                .help("add `eval_path = \"test.csv\"` or `eval_fraction = 0.1` to `[data]`");
            self.problems.push(problem);
        }
    }

    /// Where every file is a task's, the table has none.
    fn tasks(&mut self) {
        let Some(tasks) = self.place("data.tasks") else { return };
        for key in ["path", "eval_path", "labels_path", "eval_labels_path"] {
            if let Some(pair) = self.pair("data", key) {
                let problem = Problem::new(format!("`data.{key}` and `[[data.tasks]]` cannot both be set"))
                    .label(pair.place.clone(), "")
                    .context(tasks.clone(), "the tasks")
                    .help(format!("write `{key}` in each `[[data.tasks]]`"));
                self.problems.push(problem);
            }
        }
        let names: Vec<&str> = self
            .sections
            .iter()
            .filter(|s| s.path.starts_with("data.tasks["))
            .filter_map(|s| s.get("name")?.as_str())
            .collect();
        for (index, name) in names.iter().enumerate().filter(|(index, name)| names[..*index].contains(name)) {
            let problem = Problem::new(format!("two tasks are called `{}`", quoted(name)));
            let place = self.tree.nearest(&format!("data.tasks[{index}].name"));
            self.problems.push(match place {
                Some(place) => problem.label(place, "the second"),
                None => problem,
            });
        }
    }

    fn base(&mut self) {
        if self.value("base", "quantize").and_then(Value::as_str) != Some("none") {
            return;
        }
        for key in ["double_quant", "block_size"] {
            let path = format!("base.{key}");
            if let Some(place) = self.place(&path).filter(|_| self.differs("base", key)) {
                let problem = Problem::new(format!("`{path}` needs `quantize = \"nf4\"`"));
                self.problems.push(problem.label(place, "nothing is quantized"));
            }
        }
    }

    /// Keys that a format of files has no use for.
    fn format(&mut self) {
        let Some(format) = self.value("data", "format").and_then(Value::as_str).map(str::to_owned) else {
            return;
        };
        let table = matches!(format.as_str(), "csv" | "tsv");
        let mut refused: Vec<(String, &str)> = Vec::new();
        if !table && self.differs("data", "header") {
            refused.push(("data.header".into(), "only csv and tsv have a header"));
        }
        if matches!(format.as_str(), "text" | "tensors") {
            refused.push(("data.columns".into(), "this format has no columns"));
        }
        if format == "tensors" {
            refused.push(("data.template".into(), "tensors are tokens already"));
            if self.differs("data", "packing") {
                refused.push(("data.packing".into(), "tensors are batched as they are"));
            }
        }
        for (path, why) in refused {
            let Some(place) = self.place(&path) else { continue };
            let problem =
                Problem::new(format!("`{path}` does not go with `format = \"{format}\"`")).label(place, why);
            let format = self.place("data.format");
            self.problems.push(match format {
                Some(format) => problem.context(format, "the format"),
                None => problem,
            });
        }
    }

    /// Counts of steps that contradict each other.
    fn steps(&mut self) {
        let number = |key| self.value("train", key).and_then(Value::as_u64);
        if let (Some(steps), Some(warmup)) = (number("steps"), number("warmup_steps"))
            && warmup > steps
            && self.pair("train", "warmup_ratio").is_none()
            && let Some(place) = self.place("train.warmup_steps")
        {
            let mut problem =
                Problem::new(format!("`train.warmup_steps` must be at most `train.steps`, found {warmup}"));
            problem = problem.label(place, format!("the run has {steps} steps"));
            self.problems.push(problem);
        }
        let number = |key| self.value("train", key).and_then(Value::as_u64);
        if let (Some(every @ 1..), Some(keep @ 1..)) = (number("checkpoint_every"), number("keep_every"))
            && keep % every != 0
            && let Some(place) = self.place("train.keep_every")
        {
            let title = "`train.keep_every` must be a multiple of `train.checkpoint_every`";
            let label = format!("checkpoints are written every {every} steps");
            self.problems.push(Problem::new(title).label(place, label));
        }
    }

    /// A label counts once.
    fn labels(&mut self) {
        let Some(Tree::List(items)) = self.tree.find("data.labels").map(|node| &node.value) else { return };
        let mut seen: HashMap<&str, &Place> = HashMap::new();
        for item in items {
            let Tree::Text(label) = &item.value else { continue };
            if let Some(first) = seen.insert(label, &item.place) {
                let problem = Problem::new(format!("`data.labels` has \"{}\" twice", quoted(label)))
                    .context(first.clone(), "first")
                    .label(item.place.clone(), "second");
                self.problems.push(problem);
                return;
            }
        }
    }

    /// Contradictions inside one `[method]`.
    fn method(&mut self, section: &Section) {
        let at = &section.path;
        if let Some(from) = self.pair(at, "from") {
            let from = from.place.clone();
            let pairs = self.tree.find(at).map_or(&[][..], Node::pairs);
            for pair in pairs.iter().filter(|pair| !matches!(pair.name.as_str(), "name" | "from")) {
                let key = quoted(&pair.name);
                let problem = Problem::new(format!("`{at}.from` and `{at}.{key}` cannot both be set"))
                    .label(pair.place.clone(), "the saved adapter has its own")
                    .context(from.clone(), "the saved adapter")
                    .help(format!("delete `{key}`"));
                self.problems.push(problem);
            }
        }
        for key in ["targets", "roles"] {
            let Some(pair) = self.pair(at, key) else { continue };
            if matches!(&pair.node.value, Tree::List(items) if items.is_empty()) {
                let problem = Problem::new(format!("`{at}.{key}` is an empty list"))
                    .label(pair.node.place.clone(), "nothing would be trained")
                    .help(format!("delete `{key}` for the method's own choice"));
                self.problems.push(problem);
            }
        }
        if let (Some(pattern), None) = (self.pair(at, "layers_pattern"), self.pair(at, "layers")) {
            let problem = Problem::new(format!("`{at}.layers_pattern` needs `layers`"))
                .label(pattern.place.clone(), "says where layers are counted")
                .help("add `layers = \"0-5\"`, or delete it");
            self.problems.push(problem);
        }
    }
}
