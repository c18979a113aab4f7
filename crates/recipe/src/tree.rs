//! Text to a tree that knows its places: the recipe's TOML, and the arguments of `--set` laid over it.

use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::keys::EXCLUSIVE;
use crate::problem::{Place, Problem, Problems, Source, quoted};
use crate::spec::Origin;

/// Bytes of a recipe.
const LARGEST: usize = 1 << 20;
/// Tables within tables and lists within lists.
const DEEPEST: usize = 32;
/// What is put in front of an argument where it is shown.
const ARGUMENT: &str = "--set ";

/// A value and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub value: Tree,
    pub place: Place,
}

#[derive(Clone, Debug)]
pub(crate) enum Tree {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Date,
    /// What cannot be held; its mistake is reported already.
    Unread,
    List(Vec<Node>),
    Table(Vec<Pair>),
}

/// A key and its value, in the order of the text.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    pub name: String,
    pub place: Place,
    pub node: Node,
}

/// A recipe as a tree, with the texts its places point into.
#[derive(Debug)]
pub(crate) struct Document {
    pub tree: Node,
    pub sources: Arc<[Source]>,
    pub problems: Vec<Problem>,
}

/// Reads the recipe and lays the arguments over it. Only a text that is no TOML at all ends here.
pub(crate) fn read(source: &str, file_name: &str, sets: &[String]) -> Result<Document, Problems> {
    let text = source.strip_prefix('\u{feff}').unwrap_or(source);
    let mut sources = vec![Source { name: file_name.to_owned(), text: text.to_owned() }];
    sources.extend(sets.iter().map(|set| Source { name: String::new(), text: format!("{ARGUMENT}{set}") }));
    let sources: Arc<[Source]> = sources.into();
    let fail = |problem| Problems::new(sources.clone(), vec![problem]);
    if text.len() > LARGEST {
        let title = format!("{file_name} has {} bytes; a recipe has at most {LARGEST}", text.len());
        return Err(fail(Problem::new(title)));
    }
    let table = DeTable::parse(text).map_err(|error| fail(syntax(&error, text, 0, 0)))?;
    let mut problems = Vec::new();
    let mut reader = Reader { source: 0, offset: 0, problems: &mut problems };
    let mut tree = reader.table(table.get_ref(), 0..0, 0);
    for (index, set) in sets.iter().enumerate() {
        if let Err(problem) = lay_over(&mut tree, set, index + 1, &mut problems) {
            problems.push(problem);
        }
    }
    give_way(&mut tree);
    Ok(Document { tree, sources, problems })
}

/// The parser's first complaint. What a newcomer meets most, a bare word or nothing after `=`, is said plainly.
fn syntax(error: &toml::de::Error, text: &str, source: usize, offset: usize) -> Problem {
    let span = error.span().unwrap_or(0..0);
    let message = error.message().lines().collect::<Vec<_>>().join(", ");
    let word = text.get(span.clone()).unwrap_or("").trim();
    let place = Place::new(source, span.start + offset..span.end + offset);
    if message.starts_with("invalid basic string, expected `\"`") {
        return Problem::new("not valid TOML: a string without its closing quote")
            .label(place, "expected `\"`");
    }
    match message.starts_with("string values must be quoted") {
        true if word.is_empty() => {
            Problem::new("not valid TOML: a value is missing").label(place, "nothing after `=`")
        }
        true => Problem::new("not valid TOML: a string needs quotes")
            .label(place, format!("write `\"{}\"`", quoted(word))),
        false => Problem::new(format!("not valid TOML: {message}")).label(place, ""),
    }
}

/// Turns what the parser gives into nodes of one source.
struct Reader<'a> {
    source: usize,
    offset: usize,
    problems: &'a mut Vec<Problem>,
}

impl Reader<'_> {
    fn place(&self, span: std::ops::Range<usize>) -> Place {
        Place::new(self.source, span.start + self.offset..span.end + self.offset)
    }

    fn table(&mut self, table: &DeTable<'_>, span: std::ops::Range<usize>, depth: usize) -> Node {
        let mut pairs = Vec::with_capacity(table.len());
        for (key, value) in table {
            let node = self.node(value, depth + 1);
            pairs.push(Pair { name: key.get_ref().to_string(), place: self.place(key.span()), node });
        }
        pairs.sort_by(|a, b| a.place.cmp(&b.place));
        Node { value: Tree::Table(pairs), place: self.place(span) }
    }

    fn node(&mut self, value: &Spanned<DeValue<'_>>, depth: usize) -> Node {
        let place = self.place(value.span());
        if depth > DEEPEST {
            let title = format!("nested more than {DEEPEST} deep");
            self.problems.push(Problem::new(title).label(place.clone(), ""));
            return Node { value: Tree::Date, place };
        }
        let tree = match value.get_ref() {
            DeValue::String(text) => Tree::Text(text.to_string()),
            DeValue::Integer(number) => self.integer(number, &place),
            DeValue::Float(number) => Tree::Float(number.as_str().parse().unwrap_or(f64::NAN)),
            DeValue::Boolean(flag) => Tree::Bool(*flag),
            DeValue::Datetime(_) => Tree::Date,
            DeValue::Array(list) => Tree::List(list.iter().map(|item| self.node(item, depth + 1)).collect()),
            DeValue::Table(table) => return self.table(table, value.span(), depth),
        };
        Node { value: tree, place }
    }

    /// A number too large for 64 bits is reported here and nowhere else.
    fn integer(&mut self, number: &toml::de::DeInteger<'_>, place: &Place) -> Tree {
        match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(value) => Tree::Int(value),
            Err(_) => {
                self.problems.push(Problem::new("a number too large for 64 bits").label(place.clone(), ""));
                Tree::Unread
            }
        }
    }
}

/// One step of an argument's path: a name, perhaps with `[n]`.
struct Step {
    name: String,
    index: Option<usize>,
    place: Place,
}

/// Puts `a.b=value` into the tree, in place of what stands there.
fn lay_over(tree: &mut Node, set: &str, source: usize, problems: &mut Vec<Problem>) -> Result<(), Problem> {
    let whole = Place::new(source, ARGUMENT.len()..ARGUMENT.len() + set.len());
    let Some((path, text)) = set.split_once('=') else {
        return Err(Problem::new("an argument of `--set` is `a.b=value`")
            .label(whole, "no `=` here")
            .help("for example `--set train.learning_rate=1e-3`"));
    };
    let steps = steps(path, source)?;
    let start = ARGUMENT.len() + path.len() + 1;
    let node = argument_value(text, source, start, problems)?;
    descend(tree, &steps, node)
}

fn steps(path: &str, source: usize) -> Result<Vec<Step>, Problem> {
    let mut steps = Vec::new();
    let mut start = ARGUMENT.len();
    for part in path.split('.') {
        let place = Place::new(source, start..start + part.len());
        start += part.len() + 1;
        let (name, index) = match part.trim().strip_suffix(']').and_then(|part| part.split_once('[')) {
            Some((name, index)) => (name, Some(index)),
            None => (part.trim(), None),
        };
        let number = index.map(str::parse).transpose();
        match number {
            Ok(index) if !name.is_empty() => steps.push(Step { name: name.to_owned(), index, place }),
            _ => {
                let title = format!("`{}` is no name of a key", quoted(part));
                return Err(Problem::new(title).label(place, "write `table.key`, or `method[0].key`"));
            }
        }
    }
    if steps.len() > DEEPEST {
        let title = format!("nested more than {DEEPEST} deep");
        return Err(Problem::new(title).label(Place::new(source, ARGUMENT.len()..start - 1), ""));
    }
    Ok(steps)
}

/// A TOML value; what is none is taken as bare text, unless it begins like a list, a table or a quoted text.
fn argument_value(
    text: &str,
    source: usize,
    start: usize,
    problems: &mut Vec<Problem>,
) -> Result<Node, Problem> {
    let place = Place::new(source, start..start + text.len());
    let bare = text.trim();
    if bare.is_empty() {
        return Err(Problem::new("an argument of `--set` without a value")
            .label(Place::new(source, ARGUMENT.len()..start), "nothing after `=`"));
    }
    if text.len() > LARGEST {
        return Err(Problem::new(format!("an argument of `--set` has at most {LARGEST} bytes")));
    }
    match DeValue::parse(text) {
        Ok(value) => Ok(Reader { source, offset: start, problems }.node(&value, 1)),
        Err(error) if bare.starts_with(['[', '{', '"', '\'']) => Err(syntax(&error, text, source, start)),
        Err(_) => Ok(Node { value: Tree::Text(bare.to_owned()), place }),
    }
}

fn descend(node: &mut Node, steps: &[Step], value: Node) -> Result<(), Problem> {
    let Some((step, rest)) = steps.split_first() else {
        *node = value;
        return Ok(());
    };
    let Tree::Table(pairs) = &mut node.value else {
        return Err(Problem::new(format!("`{}` cannot be set inside a value", quoted(&step.name)))
            .label(step.place.clone(), "what holds it is not a table")
            .context(node.place.clone(), "the value"));
    };
    let at = match pairs.iter().position(|pair| pair.name == step.name) {
        Some(at) => at,
        None => {
            let empty = Node { value: Tree::Table(Vec::new()), place: step.place.clone() };
            pairs.push(Pair { name: step.name.clone(), place: step.place.clone(), node: empty });
            pairs.len() - 1
        }
    };
    if rest.is_empty() {
        pairs[at].place = step.place.clone();
    }
    descend(pick(&mut pairs[at].node, step, rest)?, rest, value)
}

/// The item `[n]` of a list; without `[n]` the only item of a list of tables, where more steps follow.
fn pick<'a>(node: &'a mut Node, step: &Step, rest: &[Step]) -> Result<&'a mut Node, Problem> {
    let count = match &node.value {
        Tree::List(items) => items.len(),
        _ if step.index.is_none_or(|index| index == 0) => return Ok(node),
        _ => 1,
    };
    let index = match step.index {
        Some(index) => index,
        None if rest.is_empty() => return Ok(node),
        None if count == 1 => 0,
        None => {
            let title = format!("`{}` has {count} tables; say which", quoted(&step.name));
            return Err(
                Problem::new(title).label(step.place.clone(), format!("`{}[0]` is the first", step.name))
            );
        }
    };
    let name = quoted(&step.name);
    match &mut node.value {
        Tree::List(items) if index < count => Ok(&mut items[index]),
        _ => Err(Problem::new(format!("`{name}[{index}]` is not there"))
            .label(step.place.clone(), format!("`{name}` has {count}"))),
    }
}

/// Where an argument sets one of two keys that exclude each other, the recipe's other one gives way.
fn give_way(tree: &mut Node) {
    let from_set = |table: &[Pair], key: &str| {
        table.iter().any(|pair| pair.name == key && pair.node.place.origin() == Origin::Set)
    };
    for &(path, first, second, _) in EXCLUSIVE {
        for table in tables_at(tree, path) {
            for (winner, loser) in [(first, second), (second, first)] {
                if from_set(table, winner) && !from_set(table, loser) {
                    table.retain(|pair| pair.name != loser);
                }
            }
        }
    }
}

/// The table of that name, or all tables of a list of that name.
fn tables_at<'a>(tree: &'a mut Node, name: &str) -> Vec<&'a mut Vec<Pair>> {
    let Tree::Table(pairs) = &mut tree.value else { return Vec::new() };
    let Some(pair) = pairs.iter_mut().find(|pair| pair.name == name) else { return Vec::new() };
    match &mut pair.node.value {
        Tree::Table(table) => vec![table],
        Tree::List(items) => items
            .iter_mut()
            .filter_map(|item| if let Tree::Table(table) = &mut item.value { Some(table) } else { None })
            .collect(),
        _ => Vec::new(),
    }
}

impl Node {
    /// The pairs of a table; none where it is another value.
    pub fn pairs(&self) -> &[Pair] {
        if let Tree::Table(pairs) = &self.value { pairs } else { &[] }
    }

    /// The node at `a.b[1].c`. `method[0]` also finds a single `[method]`.
    pub fn find(&self, path: &str) -> Option<&Node> {
        let mut node = self;
        for step in path.split('.').filter(|step| !step.is_empty()) {
            let (name, index) = match step.strip_suffix(']').and_then(|step| step.split_once('[')) {
                Some((name, index)) => (name, Some(index.parse::<usize>().ok()?)),
                None => (step, None),
            };
            node = &node.pairs().iter().find(|pair| pair.name == name)?.node;
            node = match (&node.value, index) {
                (Tree::List(items), Some(index)) => items.get(index)?,
                (_, None | Some(0)) => node,
                _ => return None,
            };
        }
        Some(node)
    }

    /// The place of the node at `path`, or of the closest table around it. A last step in quotes, as in
    /// `method.rank_pattern."layer.0"`, is a key that the recipe's author chose, and its place that of the key.
    pub fn nearest(&self, path: &str) -> Option<Place> {
        let (mut path, quoted) = match path.split_once(".\"") {
            Some((table, key)) => (table, key.strip_suffix('"')),
            None => (path, None),
        };
        let key = quoted.and_then(|key| self.find(path)?.pairs().iter().find(|pair| pair.name == key));
        if let Some(pair) = key {
            return Some(pair.place.clone());
        }
        while !path.is_empty() {
            if let Some(node) = self.find(path) {
                return Some(node.place.clone());
            }
            path = path.rfind(['.', '[']).map_or("", |at| &path[..at]);
        }
        None
    }
}
