//! `config.json` read with suspicion: every wrong value is noted, a harmless one takes its place, and all are reported
//! together. A key may be a path through objects: `rope_parameters.factor`.

use std::path::{Path, PathBuf};

use engraft_tensor::ops::Unary;
use serde_json::Value;

use crate::{Error, Result};

/// No size of any known model comes near; products of three still fit in 64 bits with room to spare.
const LARGEST: u64 = 1 << 20;
/// Positions and vocabularies may be larger.
const LARGEST_COUNT: u64 = 1 << 28;

/// The values of a `config.json` and what is wrong with them.
pub(crate) struct Config<'a> {
    path: PathBuf,
    value: &'a Value,
    problems: Vec<String>,
}

impl<'a> Config<'a> {
    pub fn new(path: &Path, value: &'a Value) -> Self {
        Config { path: path.to_owned(), value, problems: Vec::new() }
    }

    /// The value at `key`; null counts as absent.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        key.split('.').try_fold(self.value, |v, part| v.get(part)).filter(|v| !v.is_null())
    }

    /// Notes something that is wrong.
    pub fn problem(&mut self, message: impl Into<String>) {
        self.problems.push(message.into());
    }

    /// What `convert` makes of the value at `key`, which must be what `expected` says.
    pub fn read<T>(
        &mut self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.get(key)?;
        let converted = convert(value);
        if converted.is_none() {
            self.problem(format!("`{key}` must be {expected}, found {}", shown(value)));
        }
        converted
    }

    /// A width or a number of heads or layers, at least 1.
    pub fn size(&mut self, key: &str) -> Option<usize> {
        let fits = |v: &Value| v.as_u64().filter(|n| (1..=LARGEST).contains(n)).map(|n| n as usize);
        self.read(key, &format!("a whole number from 1 to {LARGEST}"), fits)
    }

    /// [`Config::size`] of a key that must be there.
    pub fn needed_size(&mut self, key: &str) -> usize {
        if self.get(key).is_none() {
            self.problem(format!("`{key}` is missing"));
        }
        self.size(key).unwrap_or(1)
    }

    /// A number of layers, of which each needs a tensor of the files at least; a missing one is `default`, or a problem
    /// without that.
    pub fn layers(&mut self, key: &str, default: Option<usize>, tensors: usize) -> usize {
        let found = match default {
            None => self.needed_size(key),
            Some(default) => self.size(key).unwrap_or(default),
        };
        if found <= tensors {
            return found;
        }
        self.problem(format!("`{key}` is {found}, but the files hold {tensors} tensors in all"));
        1
    }

    /// A number of rows or positions, at least 1.
    pub fn count(&mut self, key: &str) -> Option<usize> {
        let fits = |v: &Value| v.as_u64().filter(|n| (1..=LARGEST_COUNT).contains(n)).map(|n| n as usize);
        self.read(key, &format!("a whole number from 1 to {LARGEST_COUNT}"), fits)
    }

    /// [`Config::count`] of a key that must be there.
    pub fn needed_count(&mut self, key: &str) -> usize {
        if self.get(key).is_none() {
            self.problem(format!("`{key}` is missing"));
        }
        self.count(key).unwrap_or(1)
    }

    /// A whole number, 0 included.
    pub fn index(&mut self, key: &str) -> Option<usize> {
        let fits = |v: &Value| v.as_u64().filter(|n| *n <= LARGEST_COUNT).map(|n| n as usize);
        self.read(key, &format!("a whole number from 0 to {LARGEST_COUNT}"), fits)
    }

    /// A finite number above 0.
    pub fn number(&mut self, key: &str) -> Option<f64> {
        self.read(key, "a number above 0", |v| v.as_f64().filter(|x| x.is_finite() && *x > 0.0))
    }

    /// true or false.
    pub fn flag(&mut self, key: &str, default: bool) -> bool {
        self.read(key, "true or false", Value::as_bool).unwrap_or(default)
    }

    /// A text.
    pub fn text(&mut self, key: &str) -> Option<&'a str> {
        self.read(key, "a text", Value::as_str)
    }

    /// A list of texts.
    pub fn texts(&mut self, key: &str) -> Option<Vec<&'a str>> {
        self.read(key, "a list of texts", |v| v.as_array()?.iter().map(Value::as_str).collect())
    }

    /// The activation function that `key` names.
    pub fn activation(&mut self, key: &str, default: Unary) -> Unary {
        let Some(name) = self.text(key) else { return default };
        match name {
            "gelu" | "gelu_python" => Unary::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_python_tanh" => Unary::GeluTanh,
            "quick_gelu" => Unary::QuickGelu,
            "relu" => Unary::Relu,
            "silu" | "swish" => Unary::Silu,
            "tanh" => Unary::Tanh,
            "sigmoid" => Unary::Sigmoid,
            other => {
                let known =
                    "gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, quick_gelu, relu, silu, tanh, sigmoid";
                self.problem(format!("`{key}` is `{other}`, which is not there; known are {known}"));
                default
            }
        }
    }

    /// `config.json` has been read: an error if anything was wrong.
    pub fn finish(&mut self) -> Result<()> {
        if self.problems.is_empty() {
            return Ok(());
        }
        Err(Error::Config { path: self.path.clone(), problems: std::mem::take(&mut self.problems) })
    }
}

/// A value, cut if it is long.
fn shown(value: &Value) -> String {
    let mut text = value.to_string();
    if let Some((end, _)) = text.char_indices().nth(60) {
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_wrong_value_is_reported_at_once() {
        let value = json!({"a": "x", "b": 0, "c": -1.5, "d": 3, "e": {"f": 2.5}, "g": null, "h": "swoosh"});
        let mut c = Config::new(Path::new("config.json"), &value);
        assert_eq!((c.size("a"), c.size("b"), c.number("c"), c.size("d")), (None, None, None, Some(3)));
        assert_eq!((c.number("e.f"), c.number("e.g"), c.size("g")), (Some(2.5), None, None));
        c.needed_size("g");
        c.activation("h", Unary::Relu);
        let text = c.finish().unwrap_err().to_string();
        for part in ["`a` must be", "found \"x\"", "`b` must be", "`c` must be", "`g` is missing", "`swoosh`"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(c.finish().is_ok(), "problems are reported once");
    }
}
