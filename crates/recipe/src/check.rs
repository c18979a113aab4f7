//! The tree read against the tables of keys: unknown keys, wrong kinds, values out of range, missing keys. What
//! passes becomes [`Section`]s of plain values with their origin, and those the typed [`Recipe`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::keys::{EXCLUSIVE, TableSpec, table, tables};
use crate::plan::PLAN_FORMAT;
use crate::problem::{Place, Problem, Problems, Source, quoted};
use crate::recipe::{Recipe, Targets};
use crate::rules;
use crate::spec::{FieldSpec, MethodSpec, Origin};
use crate::suggest;
use crate::tree::{Document, Node, Pair, Tree};

/// Problems kept.
const MOST: usize = 1000;
/// Methods in one recipe.
const METHODS: usize = 64;

/// The values of one table, in the order of its keys, defaults included.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    /// Where it stands: `""`, `train`, `method[1]`.
    pub path: String,
    pub entries: Vec<Entry>,
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub field: FieldSpec,
    pub value: Value,
    pub origin: Origin,
}

impl Section {
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|entry| entry.field.name == key).map(|entry| &entry.value)
    }

    /// Whether the key holds something else than its default.
    pub fn differs(&self, key: &str) -> bool {
        self.entries
            .iter()
            .any(|entry| entry.field.name == key && entry.field.read_default().as_ref() != Some(&entry.value))
    }

    /// The values as one JSON object.
    pub fn map(&self) -> Map<String, Value> {
        self.entries.iter().map(|entry| (entry.field.name.to_owned(), entry.value.clone())).collect()
    }

    pub fn texts(&self, key: &str) -> Vec<String> {
        match self.get(key) {
            Some(Value::String(text)) => vec![text.clone()],
            Some(Value::Array(items)) => items.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            _ => Vec::new(),
        }
    }

    pub fn targets(&self, key: &str) -> Option<Targets> {
        Some(match self.get(key)? {
            Value::String(text) if key == "targets" && text == "all-linear" => Targets::AllLinear,
            Value::String(text) => Targets::Pattern(text.clone()),
            _ => Targets::Names(self.texts(key)),
        })
    }
}

/// Checks a document and builds the recipe from it.
pub(crate) fn recipe(
    document: Document,
    file_name: &str,
    methods: &[MethodSpec],
) -> Result<Recipe, Problems> {
    let Document { tree, sources, problems } = document;
    let dir = Path::new(file_name).parent().unwrap_or(Path::new("")).to_path_buf();
    let mut checker = Checker { sources: sources.clone(), dir, methods, problems, sections: Vec::new() };
    checker.format();
    checker.tables(&tree);
    rules::check(&tree, &checker.sections, &mut checker.problems);
    let Checker { sections, problems, dir, .. } = checker;
    if !problems.is_empty() {
        return Err(Problems::new(sources, problems));
    }
    crate::build::build(tree, sources.clone(), sections, methods, &dir)
        .map_err(|problem| Problems::new(sources, vec![problem]))
}

pub(crate) struct Checker<'a> {
    sources: Arc<[Source]>,
    /// The directory of the recipe.
    pub(crate) dir: PathBuf,
    methods: &'a [MethodSpec],
    pub(crate) problems: Vec<Problem>,
    sections: Vec<Section>,
}

impl Checker<'_> {
    /// A plan names its format in the first line; a newer one is not guessed at.
    fn format(&mut self) {
        let line = self.sources[0].text.lines().next().unwrap_or("");
        let Some(format) = line.strip_prefix("# engraft plan, format ") else { return };
        if format.trim() != PLAN_FORMAT.to_string() {
            let title =
                format!("plan format {} is unknown; this program reads {PLAN_FORMAT}", quoted(format.trim()));
            self.push(Problem::new(title).label(Place::new(0, 0..line.len()), ""));
        }
    }

    fn tables(&mut self, tree: &Node) {
        let top = table("");
        for spec in tables() {
            match spec.path {
                "" => self.section("", spec, Some(tree), &fields_of(spec)),
                path if tree.find(path).is_none()
                    && top.is_some_and(|top| there(Some(tree), "", &top.fields, path)) => {}
                "method" => self.methods(tree.find("method")),
                "data.tasks" => self.tasks(tree.find("data.tasks"), spec),
                path => {
                    let node = tree.find(path);
                    let known = matches!(node, None | Some(Node { value: Tree::Table(_), .. }));
                    match node.filter(|_| !known) {
                        Some(node) => self.not_a_table(path, node),
                        None => self.section(path, spec, node, &fields_of(spec)),
                    }
                }
            }
        }
    }

    fn not_a_table(&mut self, path: &str, node: &Node) {
        let title = format!("`{path}` must be a table, found {}", found(&node.value));
        let label = format!("write `[{path}]` on a line of its own");
        self.push(Problem::new(title).label(node.place.clone(), label));
    }

    fn methods(&mut self, node: Option<&Node>) {
        let example = self.methods.first().map_or("lora", |method| method.name);
        let help = format!("add\n[method]\nname = \"{example}\"");
        match node {
            None => self.push(Problem::new("`[method]` is missing").help(help)),
            Some(node) => match &node.value {
                Tree::Table(_) => self.method("method", node),
                Tree::List(items) if items.is_empty() => {
                    let problem = Problem::new("`method` is empty").label(node.place.clone(), "").help(help);
                    self.push(problem);
                }
                Tree::List(items) if items.len() > METHODS => {
                    let title = format!("{} methods; a recipe has at most {METHODS}", items.len());
                    self.push(Problem::new(title).label(items[METHODS].place.clone(), "one too many"));
                }
                Tree::List(items) => {
                    for (index, item) in items.iter().enumerate() {
                        let path = format!("method[{index}]");
                        match item.value {
                            Tree::Table(_) => self.method(&path, item),
                            _ => self.not_a_table(&path, item),
                        }
                    }
                }
                _ => self.not_a_table("method", node),
            },
        }
    }

    /// The data sets of several tasks.
    fn tasks(&mut self, node: Option<&Node>, spec: &TableSpec) {
        let Some(node) = node else { return };
        let Tree::List(items) = &node.value else {
            let title = format!("`data.tasks` must be a list of tables, found {}", found(&node.value));
            let label = "write `[[data.tasks]]` on a line of its own for each";
            return self.push(Problem::new(title).label(node.place.clone(), label));
        };
        if items.is_empty() {
            self.push(Problem::new("`data.tasks` is empty").label(node.place.clone(), "leave it out"));
        }
        for (index, item) in items.iter().take(MOST).enumerate() {
            let path = format!("data.tasks[{index}]");
            match item.value {
                Tree::Table(_) => self.section(&path, spec, Some(item), &fields_of(spec)),
                _ => self.not_a_table(&path, item),
            }
        }
    }

    /// One method: the shared keys, and the settings of the method that `name` says.
    fn method(&mut self, path: &str, node: &Node) {
        let Some(shared) = table("method") else { return };
        let name = node.find("name");
        let text =
            name.and_then(|name| if let Tree::Text(text) = &name.value { Some(text.as_str()) } else { None });
        let spec = text.and_then(|text| self.methods.iter().find(|method| method.name == text));
        match (text, name) {
            (Some(text), Some(place)) if spec.is_none() => self.unknown_method(text, place.place.clone()),
            (None, None) if node.find("from").is_none() => {
                let example = self.methods.first().map_or("lora", |method| method.name);
                let problem = Problem::new(format!("`{path}.name` is missing"))
                    .label(node.place.clone(), "this table")
                    .help(format!("add `name = \"{example}\"`; `engraft methods` lists them"));
                self.push(problem);
            }
            _ => {}
        }
        let own = spec.map_or(&[][..], |spec| &spec.fields);
        let mut fields: Vec<FieldSpec> = own.to_vec();
        let others = shared.fields.iter().filter(|field| own.iter().all(|mine| mine.name != field.name));
        let at = others.clone().count();
        fields.extend(others.cloned());
        fields.rotate_right(at);
        if node.find("from").is_some() {
            // The saved adapter's config decides; a default written beside it would contradict it.
            fields.iter_mut().for_each(|field| field.default = None);
        }
        self.section(path, shared, Some(node), &fields);
    }

    fn unknown_method(&mut self, text: &str, place: Place) {
        let names = self.methods.iter().map(|method| method.name);
        let problem = Problem::new(format!("unknown method `{}`", quoted(text)));
        if let Some(how) = suggest::known_elsewhere(text, self.methods) {
            self.push(problem.label(place, "no method here").help(format!("write {how}")));
            return;
        }
        self.push(match engraft_words::nearest(text, names.clone()) {
            Some(near) => problem.label(place, format!("did you mean `{near}`?")),
            None => problem.label(place, "").help(format!(
                "methods: {}; `engraft methods` describes them",
                names.collect::<Vec<_>>().join(", ")
            )),
        });
    }

    /// Checks one table and keeps its values.
    fn section(&mut self, path: &str, spec: &TableSpec, node: Option<&Node>, fields: &[FieldSpec]) {
        let pairs = node.map_or(&[][..], Node::pairs);
        let names = names_in(path, fields);
        // Nothing can be said about the settings of an unknown method; beside a saved one none may stand (a rule).
        let saved = node.is_some_and(|node| node.find("from").is_some());
        let unsure = spec.path == "method" && (self.guess(node).is_none() || saved);
        for pair in pairs.iter().filter(|pair| !unsure && !names.contains(&pair.name.as_str())).take(MOST) {
            self.unknown(path, pair, fields, node);
        }
        self.missing(path, spec, node);
        let mut entries = Vec::new();
        for field in fields {
            let written = pairs.iter().find(|pair| pair.name == field.name);
            let entry = match written {
                Some(pair) => {
                    let at = join(path, field.name);
                    self.read(&at, field, &pair.node).map(|value| (value, pair.node.place.origin()))
                }
                None => default(spec.path, field, pairs).map(|value| (value, Origin::Default)),
            };
            entries.extend(entry.map(|(value, origin)| Entry { field: field.clone(), value, origin }));
        }
        self.sections.push(Section { path: path.to_owned(), entries });
    }

    /// The method of a `[method]` table, where its name is known.
    fn guess(&self, node: Option<&Node>) -> Option<&MethodSpec> {
        match &node?.find("name")?.value {
            Tree::Text(text) => self.methods.iter().find(|method| method.name == text),
            _ => None,
        }
    }

    fn missing(&mut self, path: &str, spec: &TableSpec, node: Option<&Node>) {
        // Tasks bring files of their own.
        let tasks = node.and_then(|n| n.find("tasks")).filter(|_| path == "data");
        let in_all = |tasks: &Node, key: &str| match &tasks.value {
            Tree::List(items) => !items.is_empty() && items.iter().all(|task| task.find(key).is_some()),
            _ => false,
        };
        let brought = |key: &str| tasks.is_some_and(|tasks| key == "path" || in_all(tasks, key));
        let missing: Vec<&str> = spec
            .required
            .iter()
            .copied()
            .filter(|key| !there(node, path, &spec.fields, key) && !brought(key))
            .collect();
        // A model below some table is reported there.
        let mut tables = ["base", "data", "train"].iter();
        let strayed = path.is_empty()
            && tables.any(|table| node.is_some_and(|tree| tree.find(&join(table, "model")).is_some()));
        if missing.is_empty() || strayed {
            return;
        }
        let example = |key: &str| match key {
            "model" => "model = \"DIR-or-Hub-id\"".to_owned(),
            "format" => "format = \"csv\"".to_owned(),
            "name" => "name = \"a-task\"".to_owned(),
            key => format!("{key} = \"train.csv\""),
        };
        let help = |key: &str| match written(node, "path").filter(|_| key == "format") {
            Some(path) => suggest::format_for(path),
            None => format!("add `{}`", example(key)),
        };
        let Some(node) = node.filter(|_| !path.is_empty()) else {
            let lines: Vec<String> = missing.iter().map(|key| example(key)).collect();
            self.push(match path {
                "" => Problem::new("`model` is missing")
                    .help(format!("add `{}` as the first line", lines.join(", "))),
                path => Problem::new(format!("`[{path}]` is missing"))
                    .help(format!("add\n[{path}]\n{}", lines.join("\n"))),
            });
            return;
        };
        for key in missing {
            let problem = Problem::new(format!("`{path}.{key}` is missing"))
                .label(node.place.clone(), "this table")
                .help(help(key));
            self.push(problem);
        }
    }

    fn unknown(&mut self, path: &str, pair: &Pair, fields: &[FieldSpec], node: Option<&Node>) {
        let name = pair.name.as_str();
        let is_table = path.is_empty() && matches!(pair.node.value, Tree::Table(_));
        let title = match is_table {
            true => format!("unknown table `[{}]`", quoted(name)),
            false => format!("unknown key `{}`", quoted(&join(path, name))),
        };
        let problem = Problem::new(title);
        let place = pair.place.clone();
        let names = names_in(path, fields);
        self.push(match engraft_words::nearest(name, names.iter().copied()) {
            Some(near) => problem.label(place, format!("did you mean `{near}`?")),
            None => match suggest::ours(name, names.iter().copied()) {
                Some(ours) => problem.label(place, format!("called `{ours}` here")),
                None => self.stranger(path, pair, &names, node, problem),
            },
        });
    }

    /// A key that no name of its table resembles: another table's, or nobody's.
    fn stranger(
        &self,
        path: &str,
        pair: &Pair,
        names: &[&str],
        node: Option<&Node>,
        problem: Problem,
    ) -> Problem {
        let place = pair.place.clone();
        let is_table = matches!(pair.node.value, Tree::Table(_));
        match elsewhere(path, &pair.name).filter(|_| !is_table) {
            Some((label, help)) => problem.label(place, label).help(help),
            None => {
                let method = self.guess(node).filter(|_| path.starts_with("method"));
                let label =
                    method.map_or(String::new(), |method| format!("not a setting of `{}`", method.name));
                problem.label(place, label).help(format!("keys here: {}", names.join(", ")))
            }
        }
    }

    /// Keeps a problem; after [`MOST`] of them no more are kept, so that a hostile file costs little.
    pub(crate) fn push(&mut self, problem: Problem) {
        if self.problems.len() < MOST {
            self.problems.push(problem);
        }
    }

    /// The text of a place, for an argument's bare value where text is wanted (`--set model=7`).
    pub(crate) fn raw(&self, place: &Place) -> Option<&str> {
        self.sources.get(place.source)?.text.get(place.start..place.end)
    }
}

/// The text written at `key` of a table.
fn written<'a>(node: Option<&'a Node>, key: &str) -> Option<&'a str> {
    match &node?.find(key)?.value {
        Tree::Text(text) => Some(text),
        _ => None,
    }
}

fn fields_of(spec: &TableSpec) -> Vec<FieldSpec> {
    spec.fields.clone()
}

pub(crate) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// Whether a key is written, be it under a name that resembles it: that is one mistake, not two.
fn there(node: Option<&Node>, path: &str, fields: &[FieldSpec], key: &str) -> bool {
    let names = names_in(path, fields);
    let means = |name: &str| {
        engraft_words::nearest(name, names.iter().copied())
            .or_else(|| suggest::ours(name, names.iter().copied()))
            == Some(key)
    };
    let pairs = node.map_or(&[][..], Node::pairs);
    let mut strangers = pairs.iter().filter(|pair| !names.contains(&pair.name.as_str())).take(MOST);
    pairs.iter().any(|pair| pair.name == key) || strangers.any(|pair| means(&pair.name))
}

/// The names that may stand in a table: its keys, and the tables inside it.
fn names_in(path: &str, fields: &[FieldSpec]) -> Vec<&'static str> {
    let inside = tables().iter().filter_map(|table| match table.path.rsplit_once('.') {
        Some((outer, inner)) => (outer == path).then_some(inner),
        None => (path.is_empty() && !table.path.is_empty()).then_some(table.path),
    });
    fields.iter().map(|field| field.name).chain(inside).collect()
}

/// Another table that has this key, or a key for what other programs call so: the words beside it and the remedy.
fn elsewhere(path: &str, name: &str) -> Option<(String, String)> {
    let here = path.split('[').next().unwrap_or(path);
    for table in tables().iter().filter(|table| table.path != here) {
        let names = || table.fields.iter().map(|field| field.name);
        let (where_to, help) = match table.path {
            "" => ("at the top of the file".to_owned(), "move the line above the first `[table]`".to_owned()),
            path => (format!("in `[{path}]`"), format!("move the line below `[{path}]`")),
        };
        if names().any(|key| key == name) {
            return Some((format!("belongs {where_to}"), help));
        }
        if let Some(ours) = suggest::ours(name, names()) {
            return Some((format!("called `{ours}` and belongs {where_to}"), help));
        }
    }
    None
}

/// The default of a key that is not written, unless the key that excludes it is.
fn default(table: &str, field: &FieldSpec, pairs: &[Pair]) -> Option<Value> {
    let written = |name: &str| pairs.iter().any(|pair| pair.name == name);
    let given_way = EXCLUSIVE.iter().filter(|row| row.0 == table).any(|&(_, first, second, _)| {
        (field.name == first && written(second)) || (field.name == second && written(first))
    });
    field.read_default().filter(|_| !given_way)
}

/// What stands there, in words.
pub(crate) fn found(value: &Tree) -> &'static str {
    match value {
        Tree::Bool(_) => "a boolean",
        Tree::Int(_) => "a whole number",
        Tree::Float(_) => "a decimal number",
        Tree::Text(_) => "a string",
        Tree::Date => "a date",
        Tree::Unread => "something unreadable",
        Tree::List(_) => "a list",
        Tree::Table(_) => "a table",
    }
}
