//! One value against its [`FieldKind`]: the value in plain form, or a message that says what to write instead.

use serde_json::{Map, Number, Value};

use crate::check::{Checker, found};
use crate::problem::{Problem, quoted};
use crate::spec::{ABOVE_ZERO, BELOW_ONE, FieldKind, FieldSpec, Origin};
use crate::tree::{Node, Tree};

/// The highest number of a layer.
const LAST_LAYER: u64 = 9_999;
/// Wrong items of one list that are reported.
const WRONG: usize = 10;
/// Bytes of a text of ranges of layers.
const LONGEST: usize = 256;

impl Checker<'_> {
    /// The value of the key at `path` in plain form, paths resolved; `None` after reporting what is wrong.
    pub(crate) fn read(&mut self, path: &str, field: &FieldSpec, node: &Node) -> Option<Value> {
        if matches!(node.value, Tree::Unread) {
            return None;
        }
        match &field.kind {
            FieldKind::Bool => match node.value {
                Tree::Bool(flag) => Some(flag.into()),
                _ => self.wrong(path, &field.kind, node),
            },
            FieldKind::Int { min, max } => match node.value {
                Tree::Int(number) if (*min..=*max).contains(&number) => Some(number.into()),
                Tree::Int(number) => self.out_of_range(path, field, node, number as f64, &number.to_string()),
                _ => self.wrong(path, &field.kind, node),
            },
            FieldKind::Float { min, max } => match as_float(&node.value) {
                Some(number) if (*min..=*max).contains(&number) => {
                    Number::from_f64(number).map(Value::Number)
                }
                Some(number) => self.out_of_range(path, field, node, number, &number.to_string()),
                None => self.wrong(path, &field.kind, node),
            },
            FieldKind::Text | FieldKind::Path | FieldKind::OneOf(_) => self.text(path, field, node),
            FieldKind::TextOrList | FieldKind::Layers if matches!(node.value, Tree::Text(_)) => {
                let text = self.text(path, field, node)?;
                if field.kind == FieldKind::Layers {
                    self.layers(path, text.as_str()?, node)
                } else {
                    Some(text)
                }
            }
            FieldKind::TextList
            | FieldKind::PathList
            | FieldKind::IntList
            | FieldKind::FloatList
            | FieldKind::TextOrList
            | FieldKind::Layers => self.list(path, field, node),
            FieldKind::IntMap | FieldKind::FloatMap | FieldKind::TextMap(_) => self.map(path, field, node),
        }
    }

    fn text(&mut self, path: &str, field: &FieldSpec, node: &Node) -> Option<Value> {
        let text = match &node.value {
            Tree::Text(text) => text.clone(),
            // A shell takes the quotes away, so an argument's bare value counts as text where text is wanted.
            Tree::Bool(_) | Tree::Int(_) | Tree::Float(_) | Tree::Date
                if node.place.origin() == Origin::Set =>
            {
                self.raw(&node.place)?.trim().to_owned()
            }
            _ => return self.wrong(path, &field.kind, node),
        };
        if text.is_empty() && field.default.is_none() {
            let problem = Problem::new(format!("`{path}` must not be empty")).label(node.place.clone(), "");
            return self.report(problem);
        }
        match &field.kind {
            FieldKind::OneOf(names) if !names.contains(&text.as_str()) => {
                self.not_one_of(path, names, &text, node)
            }
            FieldKind::Path if node.place.origin() == Origin::Recipe => {
                Some(self.dir.join(text).to_string_lossy().into_owned().into())
            }
            _ => Some(text.into()),
        }
    }

    fn not_one_of(&mut self, path: &str, names: &[&str], text: &str, node: &Node) -> Option<Value> {
        let list: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
        let title = format!("`{path}` must be one of {}, found \"{}\"", list.join(", "), quoted(text));
        let label = engraft_words::nearest(text, names.iter().copied());
        let label = label.map_or(String::new(), |near| format!("did you mean `{near}`?"));
        self.report(Problem::new(title).label(node.place.clone(), label))
    }

    fn list(&mut self, path: &str, field: &FieldSpec, node: &Node) -> Option<Value> {
        let Tree::List(items) = &node.value else {
            return self.wrong(path, &field.kind, node);
        };
        let item = FieldSpec { kind: item_kind(&field.kind), default: None, ..field.clone() };
        let mut values = Vec::with_capacity(items.len());
        let mut wrong = 0;
        for (index, node) in items.iter().enumerate() {
            match self.read(&format!("{path}[{index}]"), &item, node) {
                Some(value) => values.push(value),
                None => wrong += 1,
            }
            if wrong == WRONG {
                break;
            }
        }
        if wrong > 0 {
            return None;
        }
        if field.kind == FieldKind::Layers {
            values.sort_by_key(Value::as_u64);
            values.dedup();
        }
        Some(values.into())
    }

    fn map(&mut self, path: &str, field: &FieldSpec, node: &Node) -> Option<Value> {
        let Tree::Table(pairs) = &node.value else {
            return self.wrong(path, &field.kind, node);
        };
        let item = FieldSpec { kind: item_kind(&field.kind), default: None, ..field.clone() };
        let mut map = Map::new();
        let mut complete = true;
        for pair in pairs {
            if let FieldKind::TextMap(names) = &field.kind
                && !names.contains(&pair.name.as_str())
            {
                self.not_one_of(path, names, &pair.name, &pair.node);
                complete = false;
                continue;
            }
            match self.read(&format!("{path}.\"{}\"", quoted(&pair.name)), &item, &pair.node) {
                Some(value) => drop(map.insert(pair.name.clone(), value)),
                None => complete = false,
            }
        }
        complete.then_some(map.into())
    }

    /// `0-5,11` → the numbers.
    fn layers(&mut self, path: &str, text: &str, node: &Node) -> Option<Value> {
        // A long text of ranges is no list anyone writes, and would be expanded at length.
        let text = if text.len() <= LONGEST { text } else { "" };
        let number = |text: &str| text.trim().parse::<u64>().ok().filter(|layer| *layer <= LAST_LAYER);
        let range = |part: &str| match part.split_once('-') {
            Some((first, last)) => Some(number(first)?..=number(last)?).filter(|range| !range.is_empty()),
            None => number(part).map(|layer| layer..=layer),
        };
        let Some(ranges) = text.split(',').map(range).collect::<Option<Vec<_>>>() else {
            let title = format!("`{path}` must be a list of layers or ranges, found \"{}\"", quoted(text));
            let problem =
                Problem::new(title).label(node.place.clone(), "write `[0, 1]`, `\"0-5\"` or `\"0-5,11\"`");
            return self.report(problem);
        };
        let all: std::collections::BTreeSet<u64> = ranges.into_iter().flatten().collect();
        Some(all.into_iter().collect::<Vec<u64>>().into())
    }

    fn wrong(&mut self, path: &str, kind: &FieldKind, node: &Node) -> Option<Value> {
        let title = format!("`{path}` must be {}, found {}", noun(kind), found(&node.value));
        let label = hint(kind, &node.value).unwrap_or_default();
        self.report(Problem::new(title).label(node.place.clone(), label))
    }

    fn out_of_range(
        &mut self,
        path: &str,
        field: &FieldSpec,
        node: &Node,
        number: f64,
        shown: &str,
    ) -> Option<Value> {
        let (low, high) = bounds(&field.kind);
        let bound = match number {
            number if number.is_nan() || number.is_infinite() => "finite".to_owned(),
            number if number < lowest(&field.kind) => low.unwrap_or_default(),
            _ => high.unwrap_or_default(),
        };
        let title = format!("`{path}` must be {bound}, found {shown}");
        let default =
            field.default.as_ref().map(|value| format!("the default is {}", crate::value::toml(value)));
        self.report(Problem::new(title).label(node.place.clone(), default.unwrap_or_default()))
    }

    fn report(&mut self, problem: Problem) -> Option<Value> {
        self.push(problem);
        None
    }
}

/// The kind of the items of a list or table.
fn item_kind(kind: &FieldKind) -> FieldKind {
    match kind {
        FieldKind::IntList => FieldKind::Int { min: 0, max: i64::MAX },
        FieldKind::PathList => FieldKind::Path,
        FieldKind::Layers => FieldKind::Int { min: 0, max: LAST_LAYER as i64 },
        FieldKind::IntMap => FieldKind::Int { min: 1, max: i64::MAX },
        FieldKind::FloatList | FieldKind::FloatMap => FieldKind::Float { min: -f64::MAX, max: f64::MAX },
        _ => FieldKind::Text,
    }
}

fn as_float(value: &Tree) -> Option<f64> {
    match value {
        Tree::Int(number) => Some(*number as f64),
        Tree::Float(number) => Some(*number),
        _ => None,
    }
}

fn noun(kind: &FieldKind) -> &'static str {
    match kind {
        FieldKind::Bool => "true or false",
        FieldKind::Int { .. } => "a whole number",
        FieldKind::Float { .. } => "a number",
        FieldKind::Text | FieldKind::Path | FieldKind::OneOf(_) => "a string",
        FieldKind::TextList => "a list of strings",
        FieldKind::PathList => "a list of paths",
        FieldKind::IntList => "a list of whole numbers",
        FieldKind::FloatList => "a list of numbers",
        FieldKind::TextOrList => "a string or a list of strings",
        FieldKind::Layers => "a list of whole numbers or a range",
        FieldKind::IntMap => "a table of patterns and whole numbers",
        FieldKind::FloatMap => "a table of patterns and numbers",
        FieldKind::TextMap(_) => "a table of names and strings",
    }
}

/// What to write instead, where that can be told.
fn hint(kind: &FieldKind, value: &Tree) -> Option<String> {
    let shown = |value: Value| crate::value::toml(&value);
    Some(match (kind, value) {
        (FieldKind::Int { .. }, Tree::Text(text)) => {
            format!("write `{}` without quotes", text.trim().parse::<i64>().ok()?)
        }
        (FieldKind::Float { .. }, Tree::Text(text)) => {
            let bare = text.trim();
            bare.parse::<f64>().ok().filter(|number| number.is_finite() && bare.len() <= 30)?;
            format!("write `{bare}` without quotes")
        }
        (FieldKind::Bool, Tree::Text(text)) => match text.trim().to_lowercase().as_str() {
            "true" | "yes" | "on" | "1" => "write `true` without quotes".into(),
            "false" | "no" | "off" | "0" => "write `false` without quotes".into(),
            _ => return None,
        },
        (FieldKind::Bool, Tree::Int(number @ (0 | 1))) => format!("write `{}`", *number == 1),
        (FieldKind::Int { .. }, Tree::Float(number)) if number.fract() == 0.0 && number.abs() < 1e15 => {
            format!("write `{number}`")
        }
        (FieldKind::Text | FieldKind::Path | FieldKind::OneOf(_), Tree::Int(number)) => {
            format!("write `\"{number}\"`")
        }
        (FieldKind::Text | FieldKind::Path | FieldKind::OneOf(_), Tree::Bool(flag)) => {
            format!("write `\"{flag}\"`")
        }
        (FieldKind::TextList | FieldKind::PathList, Tree::Text(text)) if text.len() <= 60 => {
            format!("write `[{}]`", shown(text.as_str().into()))
        }
        (FieldKind::IntList | FieldKind::Layers, Tree::Int(number)) => format!("write `[{number}]`"),
        (FieldKind::TextMap(names), _) => format!("write `{{ {} = \"…\" }}`", names.first()?),
        (FieldKind::IntMap | FieldKind::FloatMap, _) => "write `{ \"pattern\" = 4 }`".into(),
        _ => return None,
    })
}

fn lowest(kind: &FieldKind) -> f64 {
    match *kind {
        FieldKind::Int { min, .. } => min as f64,
        FieldKind::Float { min, .. } => min,
        _ => f64::MIN,
    }
}

/// The lowest and the highest value of a number in words; none where there is no bound.
fn bounds(kind: &FieldKind) -> (Option<String>, Option<String>) {
    match *kind {
        FieldKind::Int { min, max } => (
            (min > i64::MIN).then(|| format!("at least {min}")),
            (max < i64::MAX).then(|| format!("at most {max}")),
        ),
        FieldKind::Float { min, max } => {
            let low = match min {
                ABOVE_ZERO => Some("greater than 0".into()),
                min => (min > -f64::MAX).then(|| format!("at least {min}")),
            };
            let high = match max {
                BELOW_ONE => Some("less than 1".into()),
                max => (max < f64::MAX).then(|| format!("at most {max}")),
            };
            (low, high)
        }
        _ => (None, None),
    }
}

/// What a key takes, for the reference page.
pub(crate) fn takes(kind: &FieldKind) -> String {
    match kind {
        FieldKind::OneOf(names) => {
            names.iter().map(|name| format!("`\"{name}\"`")).collect::<Vec<_>>().join(", ")
        }
        FieldKind::Int { .. } | FieldKind::Float { .. } => {
            let (low, high) = bounds(kind);
            let words = std::iter::once(noun(kind).to_owned()).chain(low).chain(high);
            words.collect::<Vec<_>>().join(", ")
        }
        FieldKind::Path => "a path".into(),
        kind => noun(kind).into(),
    }
}
