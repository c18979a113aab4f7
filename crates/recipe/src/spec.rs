//! What a key may hold: one [`FieldSpec`] a key, for the recipe's own keys and for a method's settings alike.
//! Parsing, nearest names, the JSON Schema, the plan and the reference page are all read from these.

use serde_json::Value;

/// The smallest number above zero, as a `min`: "greater than 0".
pub const ABOVE_ZERO: f64 = f64::MIN_POSITIVE;
/// The largest number below one, as a `max`: "less than 1".
pub const BELOW_ONE: f64 = 1.0 - f64::EPSILON / 2.0;

/// The kind of value a key takes. Bounds are inclusive.
#[derive(Clone, Debug, PartialEq)]
pub enum FieldKind {
    /// `true` or `false`.
    Bool,
    /// A whole number.
    Int {
        /// Smallest.
        min: i64,
        /// Largest.
        max: i64,
    },
    /// A finite number; whole numbers are taken too.
    Float {
        /// Smallest ([`ABOVE_ZERO`] to leave zero out).
        min: f64,
        /// Largest ([`BELOW_ONE`] to leave one out).
        max: f64,
    },
    /// Any text.
    Text,
    /// A file or directory; relative to the recipe's directory, or in `--set` to the working directory.
    Path,
    /// A list of files or directories, as [`FieldKind::Path`] has them.
    PathList,
    /// One of these texts.
    OneOf(&'static [&'static str]),
    /// A list of texts.
    TextList,
    /// A list of whole numbers, none negative.
    IntList,
    /// A list of finite numbers.
    FloatList,
    /// One text or a list of texts.
    TextOrList,
    /// Layers: a list of whole numbers, or ranges as text, `"0-5"` or `"0-5,11"`.
    Layers,
    /// Pattern → whole number of at least 1, as in `peft`'s `rank_pattern`.
    IntMap,
    /// Pattern → number, as in `peft`'s `alpha_pattern`.
    FloatMap,
    /// One of these names → text.
    TextMap(&'static [&'static str]),
}

/// One key: its name, what it takes, its default and a line of explanation.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldSpec {
    /// The key as written.
    pub name: &'static str,
    /// What it takes.
    pub kind: FieldKind,
    /// The value when the recipe says nothing; `None` where leaving it out has a meaning of its own.
    pub default: Option<Value>,
    /// One sentence for the reference page and the schema.
    pub doc: &'static str,
}

impl FieldSpec {
    /// A key without a default.
    pub fn new(name: &'static str, kind: FieldKind, doc: &'static str) -> Self {
        Self { name, kind, default: None, doc }
    }

    /// The same key with a default. A `null` is no default.
    pub fn or(mut self, default: impl Into<Value>) -> Self {
        self.default = Some(default.into()).filter(|value| !value.is_null());
        self
    }

    /// The default as a recipe that writes it would be read: a number of a `Float` key is a decimal number.
    pub(crate) fn read_default(&self) -> Option<Value> {
        let default = self.default.clone()?;
        match (&self.kind, default.as_f64()) {
            (FieldKind::Float { .. }, Some(number)) => Some(number.into()),
            _ => Some(default),
        }
    }
}

/// A method as a recipe sees it: its name and the settings it takes beside the keys every method shares.
#[derive(Clone, Debug, PartialEq)]
pub struct MethodSpec {
    /// The name written as `method.name`.
    pub name: &'static str,
    /// One line.
    pub summary: &'static str,
    /// Its own settings.
    pub fields: Vec<FieldSpec>,
    /// What is had with it and called a method elsewhere: the name there, and what to write here.
    pub elsewhere: Vec<(String, String)>,
}

/// Where a value of the plan comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Written in the recipe.
    Recipe,
    /// Given by `--set`.
    Set,
    /// The table's or the method's default.
    Default,
    /// Found by looking at the model or the data.
    Found,
}

impl Origin {
    /// The comment in `plan.toml`.
    pub fn as_str(self) -> &'static str {
        match self {
            Origin::Recipe => "recipe",
            Origin::Set => "--set",
            Origin::Default => "default",
            Origin::Found => "found",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_default_of_a_decimal_key_reads_as_if_written() {
        let alpha = FieldSpec::new("alpha", FieldKind::Float { min: 0.0, max: 1e9 }, "").or(16);
        assert_eq!(alpha.read_default().unwrap().to_string(), "16.0");
        let rank = FieldSpec::new("rank", FieldKind::Int { min: 1, max: 64 }, "").or(8);
        assert_eq!(rank.read_default().unwrap().to_string(), "8");
    }
}
