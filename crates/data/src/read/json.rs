//! `jsonl`: one JSON object a line; a file that begins with `[` is one JSON list of objects.

use std::io::{BufRead, Read};

use serde_json::Value;

use super::{ROW_LIMIT, Record, Source};
use crate::error::{Error, Result};

/// The records of the file. Empty lines are no records.
pub(super) fn records(source: &mut Source) -> Result<Vec<Record>> {
    let io = |path, source| Error::Io { path, source };
    // Nothing found: an empty file, or more blanks at its start than any list has.
    let buffer = source.reader.fill_buf().map_err(|error| io(source.path.clone(), error))?;
    let start = buffer.iter().find(|byte| !byte.is_ascii_whitespace()).copied();
    if start == Some(b'[') { list(source) } else { lines(source) }
}

fn lines(source: &mut Source) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    while let Some((line, text)) = source.line()? {
        if text.trim().is_empty() {
            continue;
        }
        let fail = |message| Error::Row { path: source.path.clone(), line, message };
        match serde_json::from_str(&text) {
            Ok(Value::Object(fields)) => records.push(Record { line, fields }),
            Ok(other) => return Err(fail(format!("expected a JSON object, found {}", kind(&other)))),
            Err(error) => return Err(fail(format!("not JSON: {error}; expected one object a line"))),
        }
    }
    Ok(records)
}

fn list(source: &mut Source) -> Result<Vec<Record>> {
    let mut bytes = Vec::new();
    source
        .reader
        .read_to_end(&mut bytes)
        .map_err(|error| Error::Io { path: source.path.clone(), source: error })?;
    let fail = |line, message| Error::Row { path: source.path.clone(), line, message };
    let items: Vec<Value> = serde_json::from_slice(&bytes)
        .map_err(|error| fail(error.line(), format!("not a JSON list: {error}")))?;
    let record = |(index, item): (usize, Value)| {
        let line = index + 1;
        let found = size(&item);
        if found > ROW_LIMIT {
            let what = format!("item {line} of {}", source.path.display());
            return Err(Error::TooLarge {
                what,
                found,
                limit: ROW_LIMIT,
                help: "check that this is the data meant",
            });
        }
        match item {
            Value::Object(fields) => Ok(Record { line, fields }),
            other => {
                Err(fail(line, format!("item {line} of the list is {}, expected an object", kind(&other))))
            }
        }
    };
    items.into_iter().enumerate().map(record).collect()
}

/// About the bytes that a value takes, as text.
fn size(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64 + 2,
        Value::Array(list) => list.iter().map(size).sum::<u64>() + 2,
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| key.len() as u64 + size(value) + 4).sum::<u64>() + 2
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => 4,
    }
}

/// What a JSON value is, in words.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
