//! Reads a flat table of settings, a recipe's or `adapter_config.json`'s, and reports everything wrong with it at once.

use std::fmt::Display;

use engraft_nn::{Error, Pattern as Expression, Result};
use serde_json::{Map, Value};

use crate::Field;
use crate::shared::torch_random::Seed;

/// Settings by key. Every key that is looked at is known; a key that is left over and says something is an error.
pub(crate) struct Reader<'a> {
    map: &'a Map<String, Value>,
    is_file: bool,
    defaults: Map<String, Value>,
    known: Vec<&'static str>,
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    /// A method's table of a recipe; absent settings take the defaults of `fields`.
    pub fn settings(map: &'a Map<String, Value>, fields: &[Field]) -> Self {
        let default = |f: &Field| Some((f.name.to_string(), serde_json::from_str(f.default?).ok()?));
        let defaults = fields.iter().filter_map(default).collect();
        Reader { map, is_file: false, defaults, known: vec![], problems: vec![] }
    }

    /// A saved configuration.
    pub fn file(map: &'a Map<String, Value>) -> Self {
        Reader { map, is_file: true, defaults: Map::new(), known: vec![], problems: vec![] }
    }

    /// Whether it is a saved configuration.
    pub fn is_file(&self) -> bool {
        self.is_file
    }

    /// The value of a key; `None` if absent or null and without default.
    pub fn value(&mut self, key: &'static str) -> Option<&Value> {
        self.known.push(key);
        let given = self.map.get(key).filter(|v| !v.is_null());
        given.or_else(|| self.defaults.get(key)).filter(|v| !v.is_null())
    }

    /// Notes a problem.
    pub fn problem(&mut self, text: impl Into<String>) {
        self.problems.push(text.into());
    }

    fn read<T>(
        &mut self,
        key: &'static str,
        expected: impl Display,
        get: impl Fn(&Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.value(key)?.clone();
        let found = get(&value);
        if found.is_none() {
            self.problem(format!("`{key}`: expected {expected}, found {value}"));
        }
        found
    }

    /// A number; absent is `default`.
    pub fn float(&mut self, key: &'static str, default: f64) -> f64 {
        self.read(key, "a number", Value::as_f64).unwrap_or(default)
    }

    /// A width over that of a bottleneck: at least 0.01, since a bottleneck of a hundred times the width is a mistake.
    pub fn reduction(&mut self, key: &'static str, default: f64) -> f64 {
        self.read(key, "a number of at least 0.01", reduction).unwrap_or(default)
    }

    /// A share above zero, one at most; absent is `default`.
    pub fn share(&mut self, key: &'static str, default: f64) -> f64 {
        let share = |v: &Value| v.as_f64().filter(|p| *p > 0.0 && *p <= 1.0);
        self.read(key, "a number above 0 and at most 1", share).unwrap_or(default)
    }

    /// A probability, below one in a recipe. In files it may be one, which leaves everything out while training.
    pub fn dropout(&mut self, key: &'static str) -> f32 {
        let (is_file, share) = (self.is_file, |v: &Value| v.as_f64().filter(|p| (0.0..=1.0).contains(p)));
        let expected =
            if is_file { "a number from 0 to 1" } else { "a number of at least 0 and less than 1" };
        let found = self.read(key, expected, |v| share(v).filter(|p| is_file || *p < 1.0));
        found.unwrap_or(0.0) as f32
    }

    /// A count of at least 1 and at most `max`.
    pub fn count(&mut self, key: &'static str, default: usize, max: usize) -> usize {
        let count = |v: &Value| v.as_u64().map(|n| n as usize).filter(|n| (1..=max).contains(n));
        self.read(key, format!("a whole number from 1 to {max}"), count).unwrap_or(default)
    }

    /// A count that may be zero, at most `max`; absent is `default`.
    pub fn whole(&mut self, key: &'static str, default: usize, max: usize) -> usize {
        let count = |v: &Value| v.as_u64().map(|n| n as usize).filter(|n| *n <= max);
        self.read(key, format!("a whole number up to {max}"), count).unwrap_or(default)
    }

    /// A whole number of at least `least`; absent is `default`.
    pub fn at_least(&mut self, key: &'static str, default: u64, least: u64) -> u64 {
        let whole = |v: &Value| v.as_u64().filter(|n| *n >= least);
        self.read(key, format!("a whole number from {least}"), whole).unwrap_or(default)
    }

    /// A seed of PyTorch's generator.
    pub fn torch_seed(&mut self, key: &'static str, default: u64) -> Seed {
        self.read(key, "a whole number of 64 bits", Seed::read).unwrap_or(Seed::of(default))
    }

    /// A seed: a whole number of at least 0.
    pub fn seed(&mut self, key: &'static str, default: u64) -> u64 {
        self.read(key, "a whole number of at least 0", Value::as_u64).unwrap_or(default)
    }

    /// True or false; absent is `default`.
    pub fn flag(&mut self, key: &'static str, default: bool) -> bool {
        self.read(key, "true or false", Value::as_bool).unwrap_or(default)
    }

    /// A text; absent is nothing.
    pub fn text(&mut self, key: &'static str) -> Option<String> {
        self.read(key, "a text", |v| v.as_str().map(str::to_string))
    }

    /// One of some texts, as what it stands for; absent is the first.
    pub fn one_of<T: Copy>(&mut self, key: &'static str, choices: &[(&str, T)]) -> T {
        let names: Vec<&str> = choices.iter().map(|c| c.0).collect();
        let choose = |v: &Value| choices.iter().find(|c| v.as_str() == Some(c.0)).map(|c| c.1);
        self.read(key, format!("one of {}", names.join(", ")), choose).unwrap_or(choices[0].1)
    }

    /// A text with the ids of its tokens, as the caller gives settings of [`crate::FieldKind::Tokens`].
    pub fn tokens(&mut self, key: &'static str) -> Option<Tokens> {
        let value = self.value(key)?.clone();
        if value.is_string() {
            self.problem(format!("`{key}`: a text needs the model's tokenizer, and there is none"));
            return None;
        }
        let ids = |v: &Value| v.as_array()?.iter().map(Value::as_i64).collect::<Option<Vec<i64>>>();
        self.read(key, "a text of at least one token", |v| {
            let tokens = Tokens { text: v.get("text")?.as_str()?.to_owned(), ids: ids(v.get("ids")?)? };
            (!tokens.ids.is_empty()).then_some(tokens)
        })
    }

    /// A list of texts.
    pub fn texts(&mut self, key: &'static str) -> Option<Vec<String>> {
        self.read(key, "a list of texts", texts)
    }

    /// A list of whole numbers.
    pub fn counts(&mut self, key: &'static str) -> Option<Vec<usize>> {
        self.read(key, "a list of whole numbers", |v| {
            v.as_array()?.iter().map(|n| Some(n.as_u64()? as usize)).collect()
        })
    }

    /// Pattern → number above 0.
    pub fn patterns(&mut self, key: &'static str) -> Vec<Pattern> {
        let patterns = self.scales(key);
        for p in patterns.iter().filter(|p| p.number <= 0.0) {
            self.problem(format!("`{key}`: expected a number above 0 for `{}`, found {}", p.text, p.number));
        }
        patterns
    }

    /// Pattern → number of any sign: a factor. The first one that matches holds: in a file as it stands there, in a recipe by the
    /// alphabet, in which files are written.
    pub fn scales(&mut self, key: &'static str) -> Vec<Pattern> {
        let Some(map) = self.read(key, "a table of patterns", |v| v.as_object().cloned()) else {
            return vec![];
        };
        let mut patterns = Vec::new();
        let mut map: Vec<(String, Value)> = map.into_iter().collect();
        if !self.is_file {
            map.sort_by(|a, b| a.0.cmp(&b.0));
        }
        for (text, value) in map {
            match (pattern(&text), value.as_f64()) {
                (Ok(regex), Some(number)) => patterns.push(Pattern { text, regex, number }),
                (Err(e), _) => self.problem(format!("`{key}`: `{text}` is not a valid pattern: {e}")),
                (_, None) => self.problem(format!("`{key}`: expected a number for `{text}`, found {value}")),
            }
        }
        patterns
    }

    /// Keys that say nothing about the result, whatever they hold.
    pub fn ignore(&mut self, keys: &[&'static str]) {
        self.known.extend(keys);
    }

    /// Whether the key is given and says something; it does not become known by that.
    pub fn gives(&self, key: &str) -> bool {
        self.on(key)
    }

    /// Whether the key is given and holds something other than null, false, zero or nothing.
    fn on(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(says_something)
    }

    /// Keys of variants that are not there: an error where one is switched on.
    pub fn must_be_off(&mut self, keys: &[&'static str]) {
        for key in keys {
            self.known.push(key);
            if self.on(key) {
                let text = format!(
                    "`{key}` is {}: this variant is not supported, and without it the result would differ",
                    self.map[*key]
                );
                self.problem(text);
            }
        }
    }

    /// Reports what was wrong, unknown keys included.
    pub fn finish(mut self) -> Result<()> {
        for (key, value) in self.map {
            if !self.known.contains(&key.as_str()) && says_something(value) {
                self.problem(format!(
                    "`{key}` = {value}: this key is not known, and it may change the result"
                ));
            }
        }
        if self.problems.is_empty() { Ok(()) } else { Err(Error::Mismatch(self.problems)) }
    }
}

/// A text and the ids of its tokens.
#[derive(Clone, Debug)]
pub(crate) struct Tokens {
    pub text: String,
    pub ids: Vec<i64>,
}

fn says_something(v: &Value) -> bool {
    match v {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    }
}

/// A JSON list of texts.
pub(crate) fn texts(v: &Value) -> Option<Vec<String>> {
    v.as_array()?.iter().map(|t| t.as_str().map(str::to_string)).collect()
}

/// A number as Python writes it: whole ones as integers.
pub(crate) fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 { Value::from(value as i64) } else { Value::from(value) }
}

/// The shortest decimal that reads back as the same f32.
pub(crate) fn as_written(v: f32) -> f64 {
    v.to_string().parse().unwrap_or(f64::from(v))
}

/// The paths that a key of `rank_pattern` and its like stands for: those it matches from the start or from a dot to the
/// end.
///
/// # Errors
/// A text that is no regular expression.
pub(crate) fn pattern(text: &str) -> std::result::Result<Expression, String> {
    Expression::ending(text)
}

/// A number for the modules whose path, or the end of it from a dot on, a pattern matches.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    text: String,
    regex: Expression,
    number: f64,
}

impl Pattern {
    /// The number of the first pattern that matches.
    pub fn find(patterns: &[Pattern], path: &str) -> Option<f64> {
        patterns.iter().find(|p| p.regex.is_match(path)).map(|p| p.number)
    }

    /// As it is written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The number.
    pub fn value(&self) -> f64 {
        self.number
    }

    /// The number as text, unless it is a count up to `max`.
    pub fn not_a_count(&self, max: usize) -> Option<String> {
        let fits = self.number.fract() == 0.0 && (1.0..=max as f64).contains(&self.number);
        (!fits).then(|| format!("{} for `{}`", self.number, self.text))
    }

    /// As in the file.
    pub fn table(patterns: &[Pattern]) -> Value {
        Value::Object(patterns.iter().map(|p| (p.text.clone(), number(p.number))).collect())
    }
}
/// A number that [`Reader::reduction`] takes.
pub(crate) fn reduction(value: &Value) -> Option<f64> {
    value.as_f64().filter(|reduction| *reduction >= 0.01)
}
