//! `text`: plain text, the whole file as one row, or one row a line. Empty lines are no rows.

use std::io::Read;

use super::{Content, Row, Source, not_utf8};
use crate::error::{Error, Result};

pub(super) fn rows(source: &mut Source, lines: bool) -> Result<Vec<Row>> {
    let row = |line, text| Row { line, content: Content::Text { text, pair: None, label: None } };
    let mut rows = Vec::new();
    if lines {
        while let Some((line, text)) = source.line()? {
            if !text.trim().is_empty() {
                rows.push(row(line, text));
            }
        }
        return Ok(rows);
    }
    let mut bytes = Vec::new();
    source
        .reader
        .read_to_end(&mut bytes)
        .map_err(|error| Error::Io { path: source.path.clone(), source: error })?;
    match String::from_utf8(bytes) {
        Ok(text) if text.trim().is_empty() => {}
        Ok(text) => rows.push(row(1, text)),
        Err(error) => {
            let end = error.utf8_error().valid_up_to();
            let before = &error.as_bytes()[..end];
            let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
            let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            let in_line = std::str::from_utf8(&error.as_bytes()[start..]).err().unwrap_or(error.utf8_error());
            return Err(Error::Row { path: source.path.clone(), line, message: not_utf8(&in_line) });
        }
    }
    Ok(rows)
}
