//! Named columns to the fields that a task needs, by the recipe's mapping or by the usual names (a labelled guess).

use serde_json::Value;

use super::json::kind;
use super::{Content, Need, ReadOptions, Record, Row, Rows, chat};
use crate::error::{Error, Result};

/// The usual names of each field, most telling first.
pub(super) const TEXT: &[&str] =
    &["text", "sentence", "sentence1", "premise", "content", "utterance", "question", "query"];
pub(super) const PAIR: &[&str] = &["text_pair", "sentence2", "hypothesis"];
pub(super) const LABEL: &[&str] =
    &["label", "labels", "category", "class", "intent", "target", "topic", "score"];
pub(super) const PROMPT: &[&str] = &["prompt", "instruction", "question", "input"];
pub(super) const COMPLETION: &[&str] = &["completion", "response", "answer", "output"];
pub(super) const IMAGE: &[&str] = &["image", "file_name", "image_path", "filename", "path", "file"];
pub(super) const WORDS: &[&str] = &["tokens", "words"];
pub(super) const TAGS: &[&str] = &["tags", "ner_tags", "pos_tags", "labels"];

/// Where each field of the rows comes from.
enum Plan {
    Text { text: String, pair: Option<String>, label: Option<String> },
    Words { words: String, tags: String },
    Completion { prompt: String, completion: String },
    Chat(String),
    Image { image: String, label: String },
}

/// Maps `records` into `rows`, noting guesses there.
pub(super) fn rows(records: Vec<Record>, options: &ReadOptions, rows: &mut Rows) -> Result<()> {
    let Some(first) = records.first() else { return Ok(()) };
    let fail = |line, message| Error::Row { path: rows.path.clone(), line, message };
    let mut guesses = Vec::new();
    let plan = plan(first, options, &mut guesses).map_err(|message| {
        let mut names = options.columns.pairs().into_iter().filter_map(|(_, name)| name.clone());
        match names.find(|name| first.get(name).is_err_and(|words| words == message)) {
            Some(column) => Error::Column { path: rows.path.clone(), line: first.line, column, message },
            None => fail(first.line, message),
        }
    })?;
    for record in &records {
        let content = content(record, &plan).map_err(|message| fail(record.line, message))?;
        rows.rows.push(Row { line: record.line, content });
    }
    rows.guesses.extend(guesses);
    Ok(())
}

/// Chooses the columns by the first record.
fn plan(
    first: &Record,
    options: &ReadOptions,
    guesses: &mut Vec<String>,
) -> std::result::Result<Plan, String> {
    let given = &options.columns;
    // A column by its given name (which must exist), or by a usual one.
    let mut find = |field: &str, given: &Option<String>, usual: &[&str]| match given {
        Some(name) => first.get(name).map(|_| Some(name.clone())),
        None => {
            let found =
                usual.iter().find(|name| first.fields.contains_key(**name)).map(|name| name.to_string());
            if let Some(name) = &found {
                guesses.push(format!("column `{name}` is taken as {field} (data.columns.{field} sets it)"));
            }
            Ok(found)
        }
    };
    let missing = |field: &str| {
        let names: Vec<String> = first.fields.keys().map(|name| format!("`{name}`")).collect();
        format!(
            "no column is known to be the {field}; set data.columns.{field} to one of {}",
            names.join(", ")
        )
    };
    match options.need {
        Need::Text | Need::Label => {
            let text = find("text", &given.text, TEXT)?.ok_or_else(|| missing("text"))?;
            let pair = find("text_pair", &given.text_pair, PAIR)?;
            let label = match options.need {
                Need::Label => Some(find("label", &given.label, LABEL)?.ok_or_else(|| missing("label"))?),
                _ => None,
            };
            Ok(Plan::Text { text, pair, label })
        }
        Need::Tags => Ok(Plan::Words {
            words: find("tokens", &given.tokens, WORDS)?.ok_or_else(|| missing("tokens"))?,
            tags: find("tags", &given.tags, TAGS)?.ok_or_else(|| missing("tags"))?,
        }),
        Need::Image => Ok(Plan::Image {
            image: find("image", &given.image, IMAGE)?.ok_or_else(|| missing("image"))?,
            label: find("label", &given.label, LABEL)?.ok_or_else(|| missing("label"))?,
        }),
        Need::Completion => {
            if given.prompt.is_none()
                && given.completion.is_none()
                && let Some(column) = find("messages", &given.messages, &["messages"])?
            {
                return Ok(Plan::Chat(column));
            }
            let prompt = find("prompt", &given.prompt, PROMPT)?.ok_or_else(|| missing("prompt"))?;
            let completion = find("completion", &given.completion, COMPLETION)?;
            Ok(Plan::Completion { prompt, completion: completion.ok_or_else(|| missing("completion"))? })
        }
    }
}

fn content(record: &Record, plan: &Plan) -> std::result::Result<Content, String> {
    let optional = |column: &Option<String>| column.as_deref().map(|name| record.text(name)).transpose();
    match plan {
        Plan::Text { text, pair, label } => {
            let label = optional(label)?;
            label.as_deref().map_or(Ok(()), not_empty)?;
            Ok(Content::Text { text: record.text(text)?, pair: optional(pair)?, label })
        }
        Plan::Words { words, tags } => {
            let (words, tags) = (strings(record, words)?, strings(record, tags)?);
            if words.len() != tags.len() {
                return Err(format!(
                    "expected one tag a word, found {} words and {} tags",
                    words.len(),
                    tags.len()
                ));
            }
            Ok(Content::Words { words, tags })
        }
        Plan::Completion { prompt, completion } => {
            Ok(Content::Completion { prompt: record.text(prompt)?, completion: record.text(completion)? })
        }
        Plan::Image { image, label } => {
            let label = record.text(label)?;
            not_empty(&label)?;
            Ok(Content::Image { path: record.text(image)?, label })
        }
        Plan::Chat(column) => chat::messages(record.get(column)?, column).map(Content::Chat),
    }
}

fn not_empty(label: &str) -> std::result::Result<(), String> {
    match label.trim().is_empty() {
        true => Err("the label is empty; give it one or take the row out".into()),
        false => Ok(()),
    }
}

/// A list of words: a JSON list, or in csv and tsv words between blanks.
fn strings(record: &Record, column: &str) -> std::result::Result<Vec<String>, String> {
    let word = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => Err(format!("`{column}` is expected to be a list of words, found {} in it", kind(other))),
    };
    match record.get(column)? {
        Value::Array(list) => list.iter().map(word).collect(),
        Value::String(text) => Ok(text.split_whitespace().map(str::to_owned).collect()),
        other => Err(format!("`{column}` is expected to be a list of words, found {}", kind(other))),
    }
}
