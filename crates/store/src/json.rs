//! JSON from files that nobody vouches for, and JSON as Python writes it.
//!
//! Reading: the size first, then one pass over the bytes that bounds nesting, then `serde_json`.
//! Writing: the bytes of `json.dumps(value, indent=2, sort_keys=True)`, which is what `peft` saves.

use crate::error::{Error, Result};
use crate::limits::{Limits, check};
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Reads a regular file of at most `max` bytes; `limit` is the name of that bound in [`Limits`].
pub fn read_capped(path: &Path, limit: &'static str, max: u64) -> Result<Vec<u8>> {
    let file = open_regular(path)?;
    let size = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
    check(path, "file size in bytes", limit, max, size)?;
    let mut bytes = Vec::new();
    // The file may grow between the two calls; one byte more than allowed shows it.
    let taken = file.take(max.saturating_add(1)).read_to_end(&mut bytes);
    taken.map_err(|e| Error::io("read", path, e))?;
    check(path, "file size in bytes", limit, max, bytes.len() as u64)?;
    Ok(bytes)
}

/// Opens a file for reading; a directory, socket, pipe or device is an error, never a hang.
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
    if !meta.is_file() {
        return Err(Error::malformed(path, "expected a regular file, found something else"));
    }
    File::open(path).map_err(|e| Error::io("read", path, e))
}

/// Reads a JSON file of at most `max_bytes` (the limit named `limit`), nested at most `depth` deep.
/// Errors carry `file:line:column`.
pub fn read_json(path: &Path, limit: &'static str, max_bytes: u64, depth: u64) -> Result<Value> {
    parse_json(path, &read_capped(path, limit, max_bytes)?, depth)
}

/// Reads a config-sized JSON file under the default names of `limits`.
pub fn read_config(path: &Path, limits: &Limits) -> Result<Value> {
    read_json(path, "config_json", limits.config_json, limits.json_depth)
}

/// Parses `bytes` that came from `path`.
pub fn parse_json(path: &Path, bytes: &[u8], depth: u64) -> Result<Value> {
    check(path, "JSON nesting", "json_depth", depth, scan(bytes).depth)?;
    serde_json::from_slice(bytes).map_err(|e| Error::Json {
        path: path.to_owned(),
        line: e.line(),
        column: e.column(),
        message: without_place(&e),
    })
}

/// serde's message ends in ` at line L column C`, which the error already shows in front.
fn without_place(e: &serde_json::Error) -> String {
    let text = e.to_string();
    match text.rfind(" at line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// What one pass over JSON bytes finds, whether or not they are valid.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Extent {
    /// Deepest nesting of `{` and `[`.
    pub depth: u64,
    /// `{` seen one level below the root: the tensors of a safetensors header.
    pub entries: u64,
    /// Bytes of the longest key one level below the root, as written.
    pub longest_key: u64,
    /// Most elements of an array at level three: the dimensions of a shape.
    pub longest_array: u64,
}

pub(crate) fn scan(bytes: &[u8]) -> Extent {
    let mut found = Extent::default();
    let (mut depth, mut elements, mut at) = (0u64, 0u64, 0usize);
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'"' => {
                let start = at;
                while let Some(&inner) = bytes.get(at) {
                    at += if inner == b'\\' { 2 } else { 1 };
                    if inner == b'"' {
                        break;
                    }
                }
                if depth == 1 {
                    let end = at.min(bytes.len());
                    found.longest_key = found.longest_key.max((end - start).saturating_sub(1) as u64);
                }
            }
            b'{' | b'[' => {
                depth += 1;
                found.depth = found.depth.max(depth);
                found.entries += u64::from(byte == b'{' && depth == 2);
                elements = 1;
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b',' if depth == 3 => {
                elements += 1;
                found.longest_array = found.longest_array.max(elements);
            }
            _ => {}
        }
    }
    found
}

/// The bytes of Python's `json.dumps(value, indent=2, sort_keys=True)`: keys sorted by code point,
/// ASCII only, floats as `repr` writes them, no trailing newline.
pub fn python_json(value: &Value) -> String {
    let mut out = String::new();
    dump(value, 0, &mut out);
    out
}

fn dump(value: &Value, level: usize, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) if n.is_f64() => {
            out.push_str(&python_float(n.as_f64().expect("is_f64 was checked")));
        }
        Value::Number(n) => out.push_str(&n.to_string()),
        Value::String(s) => dump_string(s, out),
        Value::Array(items) if items.is_empty() => out.push_str("[]"),
        Value::Object(map) if map.is_empty() => out.push_str("{}"),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                new_line(i, level + 1, out);
                dump(item, level + 1, out);
            }
            close(']', level, out);
        }
        Value::Object(map) => {
            out.push('{');
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort();
            for (i, key) in keys.into_iter().enumerate() {
                new_line(i, level + 1, out);
                dump_string(key, out);
                out.push_str(": ");
                dump(&map[key], level + 1, out);
            }
            close('}', level, out);
        }
    }
}

fn new_line(index: usize, level: usize, out: &mut String) {
    out.push_str(if index == 0 { "\n" } else { ",\n" });
    out.push_str(&"  ".repeat(level));
}

fn close(bracket: char, level: usize, out: &mut String) {
    out.push('\n');
    out.push_str(&"  ".repeat(level));
    out.push(bracket);
}

fn dump_string(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    out.push('"');
}

/// `repr(float)`: the shortest digits that read back equal, in fixed form for exponents −4 to 15.
fn python_float(x: f64) -> String {
    let text = format!("{x:e}");
    let (digits, exponent) = text.split_once('e').expect("the e format always has an exponent");
    let exponent: i32 = exponent.parse().expect("the e format writes an integer exponent");
    if (-4..16).contains(&exponent) {
        let fixed = format!("{x}");
        return if fixed.contains('.') { fixed } else { fixed + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn depth_is_refused_before_parsing_and_strings_do_not_count() {
        let deep = "[".repeat(65) + &"]".repeat(65);
        let e = parse_json(Path::new("c.json"), deep.as_bytes(), 64).unwrap_err().to_string();
        assert!(e.contains("json_depth = 64"), "{e}");
        let text = format!("\"{}\"", "[{".repeat(500));
        assert!(parse_json(Path::new("c.json"), text.as_bytes(), 64).is_ok());
        let million = "[".repeat(1 << 20);
        assert!(parse_json(Path::new("c.json"), million.as_bytes(), 64).is_err());
    }

    #[test]
    fn errors_have_a_place() {
        let e = parse_json(Path::new("c.json"), b"{\n \"a\": 1,\n}", 64).unwrap_err().to_string();
        assert_eq!(e, "c.json:3:1: trailing comma");
    }

    #[test]
    fn too_large_a_file_is_refused_by_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, vec![b' '; 101]).unwrap();
        let e = read_json(&path, "config_json", 100, 64).unwrap_err().to_string();
        assert!(e.contains("file size in bytes is 101"), "{e}");
        assert!(read_json(dir.path(), "config_json", 100, 64).is_err());
    }

    #[test]
    fn the_scan_measures_a_header() {
        let header = br#"{"__metadata__":{"a":"b"},"long name":{"shape":[1,2,3],"data_offsets":[0,4]}}"#;
        let found = scan(header);
        assert_eq!((found.depth, found.entries, found.longest_array), (3, 2, 3));
        assert_eq!(found.longest_key, 12);
    }

    // Expected text: Python 3, json.dumps(value, indent=2, sort_keys=True).
    #[test]
    fn python_form() {
        let value = json!({"b": [1, 2.0, 1e-5, 1e16, 123456789.125, -0.0, 1e22, 0.0001],
            "a": {}, "é": "\u{1F600}\"\\\n\u{7f}", "c": [], "d": null, "e": {"f": true}});
        let expected = r#"{
  "a": {},
  "b": [
    1,
    2.0,
    1e-05,
    1e+16,
    123456789.125,
    -0.0,
    1e+22,
    0.0001
  ],
  "c": [],
  "d": null,
  "e": {
    "f": true
  },
  "\u00e9": "\ud83d\ude00\"\\\n\u007f"
}"#;
        assert_eq!(python_json(&value), expected);
    }
}
