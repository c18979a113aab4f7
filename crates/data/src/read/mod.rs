//! Data files to rows of text, one format a file.
//!
//! Every format first gives records (a line number and named values); [`map`] turns them into the fields a task
//! needs. `.gz` files are unpacked as they are read. Limits: [`ROW_LIMIT`] a row, [`FILE_LIMIT`] a file, unpacked.

mod alpaca;
mod chat;
mod json;
mod map;
mod sharegpt;
mod sniff;
mod table;
mod text;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result, not_among};
use crate::rng::Random;
pub(crate) use json::kind;
pub use sniff::{Sniff, sniff};

/// The largest row, in bytes.
pub const ROW_LIMIT: u64 = 16 << 20;
/// The largest data file, unpacked, in bytes.
pub const FILE_LIMIT: u64 = 4 << 30;

/// The form of a data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Comma-separated values, with quoting.
    Csv,
    /// Tab-separated values, without quoting.
    Tsv,
    /// One JSON object a line, or one JSON list of objects.
    Jsonl,
    /// Plain text.
    Text,
    /// JSON objects with a list of `messages`, each `{role, content}`.
    Chat,
    /// JSON objects with `instruction`, `input`, `output`.
    Alpaca,
    /// JSON objects with a list of `conversations`, each `{from, value}`.
    Sharegpt,
}

impl Format {
    /// Every format with its name in recipes.
    pub const ALL: [(Format, &str); 7] = [
        (Format::Csv, "csv"),
        (Format::Tsv, "tsv"),
        (Format::Jsonl, "jsonl"),
        (Format::Text, "text"),
        (Format::Chat, "chat"),
        (Format::Alpaca, "alpaca"),
        (Format::Sharegpt, "sharegpt"),
    ];

    /// The format called `name`.
    ///
    /// # Errors
    /// No format has that name.
    pub fn from_name(name: &str) -> Result<Format> {
        let names: Vec<&str> = Format::ALL.iter().map(|(_, name)| *name).collect();
        Format::ALL.iter().find(|(_, known)| *known == name).map(|(format, _)| *format).ok_or_else(|| {
            Error::Data { place: "data.format".into(), message: not_among("format", name, &names) }
        })
    }

    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        Format::ALL.iter().find(|(format, _)| *format == self).map_or("", |(_, name)| name)
    }
}

/// What a task needs of each row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Text alone, or a pair of texts.
    Text,
    /// Text or a pair, with a label.
    Label,
    /// A list of words with a list of tags.
    Tags,
    /// A prompt with its completion, or a conversation.
    Completion,
    /// The path of a picture, with a label.
    Image,
}

/// Which column is what; those left out are looked for by their usual names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are the words of the recipe
pub struct Columns {
    pub text: Option<String>,
    pub text_pair: Option<String>,
    pub label: Option<String>,
    pub prompt: Option<String>,
    pub completion: Option<String>,
    pub messages: Option<String>,
    pub tokens: Option<String>,
    pub tags: Option<String>,
    pub image: Option<String>,
}

impl Columns {
    /// Every field with the column given for it.
    pub fn pairs(&self) -> [(&'static str, &Option<String>); 9] {
        [
            ("text", &self.text),
            ("text_pair", &self.text_pair),
            ("label", &self.label),
            ("prompt", &self.prompt),
            ("completion", &self.completion),
            ("messages", &self.messages),
            ("tokens", &self.tokens),
            ("tags", &self.tags),
            ("image", &self.image),
        ]
    }
}

/// How to read a data file.
#[derive(Clone, Debug, PartialEq)]
pub struct ReadOptions {
    /// The form of the file.
    pub format: Format,
    /// What of each row is needed.
    pub need: Need,
    /// Whether the first line of csv and tsv names the columns; otherwise they are called `1`, `2` …
    pub header: bool,
    /// Whether each line of a text file is a row of its own; otherwise the file is one row.
    pub lines: bool,
    /// Which column is what.
    pub columns: Columns,
}

impl ReadOptions {
    /// The usual way to read `format` for `need`.
    pub fn new(format: Format, need: Need) -> ReadOptions {
        ReadOptions { format, need, header: true, lines: false, columns: Columns::default() }
    }
}

/// One message of a conversation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// What was said.
    pub content: String,
    /// Whatever else the message holds (`tool_calls`, `name`), for the template.
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message without extras.
    pub fn new(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into(), extra: Map::new() }
    }
}

/// The fields of a row.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the fields are the words of the recipe
pub enum Content {
    /// Text, or two texts read together, with a label where one is needed.
    Text { text: String, pair: Option<String>, label: Option<String> },
    /// Words, each with a tag.
    Words { words: Vec<String>, tags: Vec<String> },
    /// A prompt and what is learned to follow it.
    Completion { prompt: String, completion: String },
    /// A picture file, by its path from the data file's directory, with a label.
    Image { path: String, label: String },
    /// A conversation, of which the assistant's messages are learned.
    Chat(Vec<Message>),
}

/// One row of a data file.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its line (from 1), or for a JSON list its item (from 1).
    pub line: usize,
    /// Its fields.
    pub content: Content,
}

/// The rows of a data file.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// The file.
    pub path: PathBuf,
    /// In file order.
    pub rows: Vec<Row>,
    /// What was guessed, in words.
    pub guesses: Vec<String>,
}

impl Rows {
    /// Holds out `fraction` of the rows, drawn by `seed`: (the rest, the held out), both in file order.
    ///
    /// # Errors
    /// One of the two parts would be empty.
    pub fn split(self, fraction: f64, seed: u64) -> Result<(Rows, Rows)> {
        let held_out = (self.rows.len() as f64 * fraction).round() as usize;
        if held_out == 0 || held_out >= self.rows.len() {
            let message = format!(
                "a share of {fraction} of {} rows holds out {held_out}, so one part is empty; use data.eval_path, \
                 or another data.eval_fraction",
                self.rows.len()
            );
            return Err(Error::Data { place: self.path.display().to_string(), message });
        }
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        Random::new(seed, 3, 0).shuffle(&mut order);
        let mut out = vec![false; order.len()];
        order[..held_out].iter().for_each(|index| out[*index] = true);
        let (mut train, mut eval) = (Vec::new(), Vec::new());
        for (row, out) in self.rows.into_iter().zip(out) {
            if out { eval.push(row) } else { train.push(row) }
        }
        let eval = Rows { path: self.path.clone(), rows: eval, guesses: self.guesses.clone() };
        Ok((Rows { path: self.path, rows: train, guesses: self.guesses }, eval))
    }

    /// An error at the place of `line`.
    pub(crate) fn fail(&self, line: usize, message: impl Into<String>) -> Error {
        Error::Row { path: self.path.clone(), line, message: message.into() }
    }
}

/// Reads the rows of a data file.
///
/// # Errors
/// A file that cannot be read or is too large, a row that is not what the format says, a column that is not there,
/// or no rows at all.
pub fn read(path: &Path, options: &ReadOptions) -> Result<Rows> {
    let mut source = Source::open(path)?;
    let mut rows = Rows { path: path.into(), rows: Vec::new(), guesses: Vec::new() };
    match options.format {
        Format::Text => rows.rows = text::rows(&mut source, options.lines)?,
        Format::Csv | Format::Tsv => {
            let records = table::records(source, options.format, options.header)?;
            map::rows(records, options, &mut rows)?;
        }
        Format::Jsonl => map::rows(json::records(&mut source)?, options, &mut rows)?,
        Format::Chat => {
            let column = options.columns.messages.as_deref().unwrap_or("messages");
            rows.rows = each(path, json::records(&mut source)?, |record| chat::content(record, column))?;
        }
        Format::Alpaca => rows.rows = each(path, json::records(&mut source)?, alpaca::content)?,
        Format::Sharegpt => {
            let column = options.columns.messages.as_deref().unwrap_or("conversations");
            rows.rows = each(path, json::records(&mut source)?, |record| sharegpt::content(record, column))?;
        }
    }
    if rows.rows.is_empty() {
        let message = "holds no rows; check data.path and data.format".into();
        return Err(Error::Data { place: path.display().to_string(), message });
    }
    Ok(rows)
}

/// A line or item with named values.
pub(crate) struct Record {
    pub line: usize,
    pub fields: Map<String, Value>,
}

impl Record {
    /// The value of `column`; otherwise words naming the nearest and those there.
    pub fn get(&self, column: &str) -> std::result::Result<&Value, String> {
        self.fields.get(column).ok_or_else(|| {
            let names: Vec<&str> = self.fields.keys().map(String::as_str).collect();
            not_among("column", column, &names)
        })
    }

    /// The text of `column`: strings as they are, numbers and booleans as written.
    pub fn text(&self, column: &str) -> std::result::Result<String, String> {
        match self.get(column)? {
            Value::String(text) => Ok(text.clone()),
            Value::Number(number) => Ok(number.to_string()),
            Value::Bool(value) => Ok(value.to_string()),
            other => Err(format!("`{column}` is expected to be text, found {}", json::kind(other))),
        }
    }
}

/// Rows of records by one rule.
fn each(
    path: &Path,
    records: Vec<Record>,
    rule: impl Fn(&Record) -> std::result::Result<Content, String>,
) -> Result<Vec<Row>> {
    let row = |record: Record| match rule(&record) {
        Ok(content) => Ok(Row { line: record.line, content }),
        Err(message) => Err(Error::Row { path: path.into(), line: record.line, message }),
    };
    records.into_iter().map(row).collect()
}

/// Opens a file; a directory or pipe is an error, never a wait.
fn open_regular(path: &Path) -> Result<File> {
    let io = |source| Error::Io { path: path.into(), source };
    let kind = std::fs::metadata(path).map_err(io)?.file_type();
    if !kind.is_file() {
        let found = if kind.is_dir() { "a directory" } else { "a pipe or device" };
        let message = format!("expected a file, found {found}; name one regular file");
        return Err(Error::Data { place: path.display().to_string(), message });
    }
    File::open(path).map_err(io)
}

/// The bytes of a file of at most `limit` bytes.
pub(crate) fn read_limited(path: &Path, limit: u64, help: &'static str) -> Result<Vec<u8>> {
    let io = |source| Error::Io { path: path.into(), source };
    let mut bytes = Vec::new();
    open_regular(path)?.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > limit {
        return Err(Error::TooLarge {
            what: path.display().to_string(),
            found: bytes.len() as u64,
            limit,
            help,
        });
    }
    Ok(bytes)
}

/// A data file being read: unpacked, without byte-order mark, at most [`FILE_LIMIT`] bytes.
pub(crate) struct Source {
    pub path: PathBuf,
    pub reader: Box<dyn BufRead>,
    line: usize,
}

impl Source {
    pub fn open(path: &Path) -> Result<Source> {
        let io = |source| Error::Io { path: path.into(), source };
        let mut source = Source::open_binary(path)?;
        let start = source.reader.fill_buf().map_err(io)?;
        if start.starts_with(b"\xFF\xFE") || start.starts_with(b"\xFE\xFF") {
            let message = "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8".into();
            return Err(Error::Data { place: path.display().to_string(), message });
        }
        if start.starts_with(b"\xEF\xBB\xBF") {
            source.reader.consume(3);
        }
        Ok(source)
    }

    /// A file that is no text: unpacked, at most [`FILE_LIMIT`] bytes.
    pub fn open_binary(path: &Path) -> Result<Source> {
        let io = |source| Error::Io { path: path.into(), source };
        let mut file = BufReader::new(open_regular(path)?);
        let packed = file.fill_buf().map_err(io)?.starts_with(&[0x1F, 0x8B]);
        let inner: Box<dyn Read> =
            if packed { Box::new(flate2::bufread::MultiGzDecoder::new(file)) } else { Box::new(file) };
        let reader = BufReader::with_capacity(1 << 16, Limited { inner, left: FILE_LIMIT });
        Ok(Source { path: path.into(), reader: Box::new(reader), line: 0 })
    }

    /// The next line with its number (from 1), without its end; `None` after the last.
    pub fn line(&mut self) -> Result<Option<(usize, String)>> {
        let mut bytes = Vec::new();
        let io = |source| Error::Io { path: self.path.clone(), source };
        (&mut self.reader).take(ROW_LIMIT + 1).read_until(b'\n', &mut bytes).map_err(io)?;
        if bytes.is_empty() {
            return Ok(None);
        }
        self.line += 1;
        if bytes.len() as u64 > ROW_LIMIT {
            let what = format!("line {} of {}", self.line, self.path.display());
            let help = "check that data.format is right: a JSON list or binary file has no lines";
            return Err(Error::TooLarge { what, found: bytes.len() as u64, limit: ROW_LIMIT, help });
        }
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
            if bytes.last() == Some(&b'\r') {
                bytes.pop();
            }
        }
        let text = String::from_utf8(bytes).map_err(|error| Error::Row {
            path: self.path.clone(),
            line: self.line,
            message: not_utf8(&error.utf8_error()),
        })?;
        Ok(Some((self.line, text)))
    }
}

/// Says at which byte UTF-8 ends, and what to do.
fn not_utf8(error: &std::str::Utf8Error) -> String {
    format!(
        "not UTF-8 from byte {} of the row on; convert it: iconv -f LATIN1 -t UTF-8",
        error.valid_up_to() + 1
    )
}

/// Fails, rather than ends, at the limit: a cut file must not look like a whole one.
struct Limited {
    inner: Box<dyn Read>,
    left: u64,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(count as u64).ok_or_else(|| {
            std::io::Error::other(format!("more than {FILE_LIMIT} bytes unpacked; split the file"))
        })?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
