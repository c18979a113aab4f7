//! The names of the tasks that an adapter of several was trained on, beside its two files as those of classes are: `peft`'s form
//! numbers tasks, and in another order of the data the same numbers would mean other ones.

use std::path::Path;

use engraft_method::{Chosen, Settings};
use engraft_recipe::{Problem, Recipe};
use serde_json::Value;

use crate::labels::{names_in, write_names};
use crate::{Error, Result};

/// The file's name in an adapter directory.
const FILE: &str = "task_names.json";
/// The setting that chooses one of them.
const SETTING: &str = "task";

/// The names of the tasks beside an adapter, by their numbers; empty where it has no such file.
///
/// # Errors
/// A file that is not a list of texts.
pub fn task_names(dir: &Path) -> Result<Vec<String>> {
    Ok(names_in(&dir.join(FILE), "task names")?.unwrap_or_default())
}

/// The number of a task of `known` ones.
///
/// # Errors
/// None of this name.
pub fn task_number(known: &[String], name: &str) -> Result<usize> {
    let found = known.iter().position(|known| known == name);
    found.ok_or_else(|| Error::Setup(unknown(name, known)))
}

fn unknown(name: &str, known: &[String]) -> String {
    let known: Vec<String> = known.iter().map(|name| format!("`{name}`")).collect();
    format!("there is no task `{name}`; the adapter knows {}", known.join(", "))
}

/// `choices` with the number of a task in the place of its name, where the adapter of `dir` has names.
pub(crate) fn numbered(choices: &Settings, dir: &Path) -> Result<Settings> {
    let mut choices = choices.clone();
    if let Some(Value::String(name)) = choices.get(SETTING) {
        let known = task_names(dir)?;
        if !known.is_empty() {
            let number = task_number(&known, name)?;
            choices.insert(SETTING.into(), number.into());
        }
    }
    Ok(choices)
}

/// The tasks of a session by their numbers: those that the adapter it starts from knows, and then what the data add.
#[derive(Clone, Debug, Default)]
pub struct TaskNames {
    names: Vec<String>,
    known: usize,
}

impl TaskNames {
    pub(crate) fn of(recipe: &Recipe) -> Result<TaskNames> {
        let from = match &recipe.methods[..] {
            [method] => method.from.as_ref(),
            _ => None,
        };
        let mut names = from.map(|from| task_names(&from.value)).transpose()?.unwrap_or_default();
        let known = names.len();
        for task in &recipe.data.tasks {
            if !names.contains(&task.name) {
                names.push(task.name.clone());
            }
        }
        Ok(TaskNames { names, known })
    }

    /// The names, by number.
    pub fn names(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).collect()
    }

    /// The number of a task of the data.
    pub(crate) fn number(&self, name: &str) -> Option<usize> {
        self.names.iter().position(|known| known == name)
    }

    /// What is wrong where a saved adapter knows its tasks by name and the data have another.
    pub fn not_known(&self, recipe: &Recipe) -> Option<Problem> {
        let name = self.names.get(self.known).filter(|_| self.known > 0)?;
        let at = recipe.data.tasks.iter().position(|task| task.name == *name)?;
        let title = unknown(name, &self.names[..self.known]);
        Some(recipe.problem_at(&format!("data.tasks[{at}].name"), title))
    }

    /// The same where the adapter has no place for it either.
    pub(crate) fn without_place(&self, recipe: &Recipe, methods: &[Chosen]) -> Option<Problem> {
        let places = methods.iter().filter_map(|(method, _)| method.tasks()).min()?;
        self.not_known(recipe).filter(|_| self.names.len() > places)
    }

    /// Writes the names beside an adapter of methods that tell tasks apart.
    pub(crate) fn write(&self, dir: &Path, methods: &[Chosen]) -> Result<()> {
        let apart = methods.iter().any(|(method, _)| method.tasks().is_some());
        if apart && !self.names.is_empty() { write_names(&dir.join(FILE), &self.names) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_method::find;
    use serde_json::json;

    #[test]
    fn names_stand_for_numbers_where_an_adapter_has_them() {
        let dir = tempfile::tempdir().unwrap();
        let choice = |value: Value| Settings::from_iter([("task".to_owned(), value)]);
        let made = |value: Value| numbered(&choice(value), dir.path()).map(|made| made["task"].clone());
        assert_eq!(made(json!("b")).unwrap(), "b", "no names, so that the method says what it expects");
        let names = TaskNames { names: vec!["a".into(), "b".into()], known: 0 };
        let method = |name: &str| vec![((find(name).unwrap().example)(), None)];
        names.write(dir.path(), &method("lora")).unwrap();
        assert!(task_names(dir.path()).unwrap().is_empty(), "one factor for all tasks knows none");
        names.write(dir.path(), &method("poly")).unwrap();
        assert_eq!(task_names(dir.path()).unwrap(), ["a", "b"]);
        assert_eq!((made(json!("b")).unwrap(), made(json!(7)).unwrap()), (json!(1), json!(7)));
        let error = made(json!("c")).unwrap_err().to_string();
        assert!(error.contains("no task `c`; the adapter knows `a`, `b`"), "{error}");
        std::fs::write(dir.path().join(FILE), "{}").unwrap();
        assert!(task_names(dir.path()).is_err());
    }
}
