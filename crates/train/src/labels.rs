//! The names of the classes that an adapter was trained on, beside its two files: `peft`'s form has no place for them, and
//! without them class 3 of a head means nothing.

use std::path::Path;

use engraft_store::{Limits, json, read_head, write_atomic};
use serde_json::Value;

use crate::hub_head::names_of_head;
use crate::read::{config_classes, known_labels};
use crate::{Error, Result};

/// The file's name in an adapter directory.
const FILE: &str = "label_names.json";
const BYTES_MAX: u64 = 4 << 20;

/// Writes the names, in the order of the classes' numbers.
pub fn write_label_names(dir: &Path, names: &[String]) -> Result<()> {
    write_names(&dir.join(FILE), names)
}

/// The names beside an adapter; none where it has no such file, nor a head of AdapterHub's that names them.
///
/// # Errors
/// A file that is not a list of texts.
pub fn label_names(dir: &Path) -> Result<Option<Vec<String>>> {
    match names_in(&dir.join(FILE), "class names")? {
        None => Ok(read_head(dir, &Limits::default())?.and_then(|head| names_of_head(&head.config))),
        named => Ok(named),
    }
}

/// Writes a list of names.
pub(crate) fn write_names(path: &Path, names: &[String]) -> Result<()> {
    let text = serde_json::to_string_pretty(names).unwrap_or_default() + "\n";
    Ok(write_atomic(path, text.as_bytes())?)
}

/// The list of names, which are called `what`, of a file; none where there is no such file.
pub(crate) fn names_in(path: &Path, what: &str) -> Result<Option<Vec<String>>> {
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = json::read_capped(path, "config_json", BYTES_MAX)?;
    let value = json::parse_json(path, &bytes, Limits::default().json_depth)?;
    let names: Option<Vec<String>> =
        value.as_array().and_then(|list| list.iter().map(|name| name.as_str().map(str::to_owned)).collect());
    let wrong = || Error::Setup(format!("{}: expected a list of {what}", path.display()));
    names.map(Some).ok_or_else(wrong)
}

/// The names of the classes of a model that is scored as it is: `id2label`, where its head tells classes apart.
pub fn model_labels(config: &Value) -> Option<Vec<String>> {
    classifies(config).then(|| known_labels(config))?
}

/// How many classes the head of a model's files tells apart.
pub fn model_classes(config: &Value) -> Option<usize> {
    classifies(config).then(|| config_classes(config))?
}

fn classifies(config: &Value) -> bool {
    let kinds = ["ForSequenceClassification", "ForTokenClassification", "ForImageClassification"];
    config["architectures"][0].as_str().is_some_and(|class| kinds.iter().any(|kind| class.contains(kind)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_other_things_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(label_names(dir.path()).unwrap(), None);
        let names = ["no".to_owned(), "yes".to_owned()];
        write_label_names(dir.path(), &names).unwrap();
        assert_eq!(label_names(dir.path()).unwrap().unwrap(), names);
        for wrong in ["{", "{\"a\": 1}", "[1, 2]"] {
            std::fs::write(dir.path().join(FILE), wrong).unwrap();
            assert!(label_names(dir.path()).is_err(), "{wrong}");
        }
    }
}
