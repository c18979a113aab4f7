//! `csv` and `tsv`: lines of columns. In `csv` values may be quoted; in `tsv` a quote is a character like any other.

use serde_json::{Map, Value};

use super::{Format, ROW_LIMIT, Record, Source, not_utf8};
use crate::error::{Error, Result};

/// The records of the file, their columns named by its first line or, without `header`, `1`, `2` …
pub(super) fn records(source: Source, format: Format, header: bool) -> Result<Vec<Record>> {
    let path = source.path;
    let fail = |line: u64, message: String| Error::Row { path: path.clone(), line: line as usize, message };
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(if format == Format::Csv { b',' } else { b'\t' })
        .quoting(format == Format::Csv)
        .has_headers(false)
        .flexible(true)
        .from_reader(source.reader);
    let (mut names, mut records): (Vec<String>, Vec<Record>) = (Vec::new(), Vec::new());
    let (mut record, mut start) = (csv::ByteRecord::new(), 0);
    while reader
        .read_byte_record(&mut record)
        .map_err(|error| fail(reader.position().line(), error.to_string()))?
    {
        let line = record.position().map_or(0, csv::Position::line);
        let size = reader.position().byte().saturating_sub(start);
        start = reader.position().byte();
        if size > ROW_LIMIT {
            let what = format!("the row at line {line} of {}", path.display());
            let help = "look for a quote that is never closed";
            return Err(Error::TooLarge { what, found: size, limit: ROW_LIMIT, help });
        }
        let values: Vec<String> = record
            .iter()
            .map(|value| {
                std::str::from_utf8(value).map(str::to_owned).map_err(|error| fail(line, not_utf8(&error)))
            })
            .collect::<Result<_>>()?;
        if names.is_empty() {
            names = if header { values.clone() } else { (1..=values.len()).map(|n| n.to_string()).collect() };
            if let Some(twice) = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name)) {
                return Err(fail(line, format!("two columns are called `{}`; rename one", twice.1)));
            }
            if let (true, [only]) = (header, &names[..])
                && let Some(other) = [';', '\t'].into_iter().find(|other| only.contains(*other))
            {
                let expected = format.name();
                return Err(fail(
                    line,
                    format!(
                        "the columns are separated by {other:?}, which {expected} is not; convert the file, or set data.format = \"tsv\" for tabs"
                    ),
                ));
            }
            if header {
                continue;
            }
        }
        if values.len() != names.len() {
            let expected =
                format!("expected {} columns, as the first line has, found {}", names.len(), values.len());
            return Err(fail(line, format!("{expected}; check data.format and the quotes of this row")));
        }
        let fields: Map<String, Value> =
            names.iter().cloned().zip(values.into_iter().map(Value::String)).collect();
        records.push(Record { line: line as usize, fields });
    }
    Ok(records)
}
