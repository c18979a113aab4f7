//! A first look at a data file for `init`: its format, its columns and the likely task, each with the reason.

use std::collections::HashSet;
use std::path::Path;

use super::{Columns, Format, Need, Record, Source, json, map, table};
use crate::error::{Error, Result};

/// What a file seems to be. Everything here is a guess; `reasons` says why.
#[derive(Clone, Debug, PartialEq)]
pub struct Sniff {
    /// The form of the file.
    pub format: Format,
    /// What a task would take of each row; `Text` means language modelling.
    pub need: Need,
    /// Whether the first line of csv and tsv names the columns.
    pub header: bool,
    /// The names of the columns that are there.
    pub names: Vec<String>,
    /// Which column seems to be what, where the usual names would not find it.
    pub columns: Columns,
    /// How many rows there are (lines for text).
    pub rows: usize,
    /// How many different labels there are, for `Need::Label`.
    pub labels: Option<usize>,
    /// Why, one sentence each.
    pub reasons: Vec<String>,
}

/// Looks at `path`.
///
/// # Errors
/// The file cannot be read, is empty, or breaks its format.
pub fn sniff(path: &Path) -> Result<Sniff> {
    let mut guess = Sniff {
        format: Format::Text,
        need: Need::Text,
        header: true,
        names: Vec::new(),
        columns: Columns::default(),
        rows: 0,
        labels: None,
        reasons: Vec::new(),
    };
    let mut source = Source::open(path)?;
    let Some((_, first)) = first_line(&mut source)? else {
        return Err(Error::Data {
            place: path.display().to_string(),
            message: "is empty; nothing to look at".into(),
        });
    };
    let records = match container(path, &first, &mut guess) {
        Format::Csv | Format::Tsv => {
            let delimiter = if guess.format == Format::Csv { ',' } else { '\t' };
            guess.header = has_header(&first, delimiter, &mut guess.reasons);
            table::records(Source::open(path)?, guess.format, guess.header)?
        }
        Format::Text => {
            guess.rows = 1;
            while source.line()?.is_some() {
                guess.rows += 1;
            }
            guess.reasons.push("plain text: a language model is trained on all of it".into());
            return Ok(guess);
        }
        _ => json::records(&mut Source::open(path)?)?,
    };
    guess.rows = records.len();
    if let Some(first) = records.first() {
        guess.names = first.fields.keys().cloned().collect();
        by_columns(&records, &mut guess);
    }
    Ok(guess)
}

/// The first line with anything on it. A JSON list may be one long line: its beginning is enough.
fn first_line(source: &mut Source) -> Result<Option<(usize, String)>> {
    use std::io::BufRead;
    let buffer =
        source.reader.fill_buf().map_err(|error| Error::Io { path: source.path.clone(), source: error })?;
    if buffer.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
        return Ok(Some((1, "[".into())));
    }
    while let Some((line, text)) = source.line()? {
        if !text.trim().is_empty() {
            return Ok(Some((line, text)));
        }
    }
    Ok(None)
}

/// The container by the name's end, or else by the first line; `Jsonl` stands for all JSON forms.
fn container(path: &Path, first: &str, guess: &mut Sniff) -> Format {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    let by_name = match name.rsplit_once('.').map_or("", |(_, end)| end) {
        "csv" => Some(Format::Csv),
        "tsv" => Some(Format::Tsv),
        "json" | "jsonl" | "ndjson" => Some(Format::Jsonl),
        "txt" | "md" => Some(Format::Text),
        _ => None,
    };
    let by_content = || match first.trim_start().chars().next() {
        Some('{' | '[') => Format::Jsonl,
        _ if first.contains('\t') => Format::Tsv,
        _ => Format::Text,
    };
    guess.format = by_name.unwrap_or_else(by_content);
    let why = if by_name.is_some() { "the file's name ends so" } else { "its first line looks so" };
    guess.reasons.push(format!("format {}: {why}", guess.format.name()));
    guess.format
}

/// The first line is a header when one of its values is a usual column name.
fn has_header(first: &str, delimiter: char, reasons: &mut Vec<String>) -> bool {
    let usual: HashSet<&str> = [map::TEXT, map::PAIR, map::LABEL, map::PROMPT, map::COMPLETION]
        .into_iter()
        .flatten()
        .copied()
        .collect();
    let values: Vec<String> =
        first.split(delimiter).map(|value| value.trim().trim_matches('"').to_lowercase()).collect();
    let named = values.iter().find(|value| usual.contains(value.as_str()));
    match named {
        Some(name) => reasons.push(format!("the first line names the columns: `{name}` is a usual name")),
        None => reasons.push("no usual column name is on the first line, so it is taken as a row".into()),
    }
    named.is_some()
}

/// Format and need by the names of columns, or else by what is in them.
fn by_columns(records: &[Record], guess: &mut Sniff) {
    let has = |usual: &[&str]| usual.iter().any(|name| guess.names.iter().any(|known| known == name));
    let json = guess.format == Format::Jsonl;
    let (format, need, reason) = if json && has(&["messages"]) {
        (Format::Chat, Need::Completion, "the rows hold `messages`: conversations")
    } else if json && has(&["conversations"]) {
        (Format::Sharegpt, Need::Completion, "the rows hold `conversations`")
    } else if json && has(&["instruction"]) && has(&["output"]) {
        (Format::Alpaca, Need::Completion, "the rows hold `instruction` and `output`")
    } else if has(map::WORDS) && has(map::TAGS) {
        (guess.format, Need::Tags, "the rows hold words and tags")
    } else if has(map::TEXT) && has(map::LABEL) {
        (guess.format, Need::Label, "a text column and a label column are there")
    } else if has(map::PROMPT) && has(map::COMPLETION) {
        (guess.format, Need::Completion, "a prompt column and a completion column are there")
    } else if has(map::TEXT) {
        (guess.format, Need::Text, "a text column is there and no label")
    } else {
        return by_values(records, guess);
    };
    (guess.format, guess.need) = (format, need);
    guess.reasons.push(reason.into());
    if need == Need::Label {
        let column =
            map::LABEL.iter().find(|name| guess.names.iter().any(|known| known == *name)).unwrap_or(&"");
        guess.labels = Some(distinct(records, column));
    }
}

/// No usual names: the longest text is the text; the column with fewest different values, if they repeat, the label.
fn by_values(records: &[Record], guess: &mut Sniff) {
    let length = |name: &str| {
        records.iter().filter_map(|row| row.text(name).ok()).map(|text| text.len()).sum::<usize>()
    };
    let Some(text) = guess.names.iter().max_by_key(|name| length(name)).cloned() else { return };
    guess.reasons.push(format!("column `{text}` has the longest text"));
    let repeats = |name: &&String| (2..=records.len() / 2).contains(&distinct(records, name));
    // A constant column or a source column may stand first; the label is the one with fewest values above one.
    let others = guess.names.iter().filter(|name| **name != text);
    if let Some(label) = others.filter(repeats).min_by_key(|name| distinct(records, name)).cloned() {
        let labels = distinct(records, &label);
        guess
            .reasons
            .push(format!("column `{label}` has {labels} different values, so it is taken as the label"));
        (guess.need, guess.labels, guess.columns.label) = (Need::Label, Some(labels), Some(label));
    }
    guess.columns.text = Some(text);
}

fn distinct(records: &[Record], column: &str) -> usize {
    records.iter().filter_map(|row| row.text(column).ok()).collect::<HashSet<String>>().len()
}
