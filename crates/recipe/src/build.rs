//! Checked sections of plain values to the typed [`Recipe`]. A task's data are what its table says, and what `[data]` says.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::check::{Section, join};
use crate::keys::table;
use crate::problem::{Place, Problem, Source};
use crate::recipe::{Data, MethodTable, Recipe, Spanned, TaskData, Template};
use crate::spec::{MethodSpec, Origin};
use crate::tree::Node;

/// The typed recipe. A failure here means that table and structs disagree, which a test rules out; it is still
/// reported rather than a panic.
pub(crate) fn build(
    tree: Node,
    sources: Arc<[Source]>,
    sections: Vec<Section>,
    specs: &[MethodSpec],
    dir: &Path,
) -> Result<Recipe, Problem> {
    let section = |path: &str| sections.iter().find(|section| section.path == path);
    let model = section("").and_then(|top| top.get("model")).and_then(Value::as_str).unwrap_or_default();
    let place = tree.nearest("model").unwrap_or(Place::new(0, 0..0));
    let model_path = if place.origin() == Origin::Set { PathBuf::from(model) } else { dir.join(model) };
    let data = data(&sections, &tree, dir)?;
    let methods = sections.iter().filter(|section| section.path.starts_with("method"));
    let task = section("").and_then(|top| top.get("task")).cloned().unwrap_or_default();
    Ok(Recipe {
        model: Spanned { value: model.to_owned(), place },
        model_path,
        task: serde_json::from_value(task).map_err(disagreement)?,
        base: typed(section("base"))?,
        methods: methods.map(|section| method_table(section, &tree)).collect(),
        data,
        train: typed(section("train"))?,
        specs: specs.to_vec(),
        tree,
        sources,
        sections,
    })
}

fn typed<T: serde::de::DeserializeOwned>(section: Option<&Section>) -> Result<T, Problem> {
    let map = section.map(Section::map).unwrap_or_default();
    serde_json::from_value(Value::Object(map)).map_err(disagreement)
}

fn disagreement(error: serde_json::Error) -> Problem {
    Problem::new(format!("internal: the table of keys and its types disagree: {error}"))
        .help("please report this")
}

/// The word for the built-in template.
const PLAIN_TEMPLATE: &str = "plain";

/// Jinja's braces or a line end make a text; anything else is a path.
fn template(text: &str, dir: &Path) -> Template {
    // `plain` names the built-in form, for models without a template.
    match text == PLAIN_TEMPLATE || text.contains(['{', '\n']) {
        true => Template::Text(text.to_owned()),
        false => Template::Path(dir.join(text)),
    }
}

fn method_table(section: &Section, tree: &Node) -> MethodTable {
    let text = |key: &str| section.get(key).and_then(Value::as_str);
    let place = |key: &str| tree.nearest(&join(&section.path, key)).unwrap_or(Place::new(0, 0..0));
    let shared =
        |name: &str| table("method").is_some_and(|spec| spec.fields.iter().any(|field| field.name == name));
    let own =
        section.entries.iter().filter(|entry| !shared(entry.field.name) && entry.origin != Origin::Default);
    MethodTable {
        at: section.path.clone(),
        name: text("name").map(|name| Spanned { value: name.to_owned(), place: place("name") }),
        from: text("from").map(|from| Spanned { value: PathBuf::from(from), place: place("from") }),
        targets: section.targets("targets"),
        roles: section.texts("roles"),
        exclude: section.targets("exclude"),
        layers: section
            .get("layers")
            .and_then(Value::as_array)
            .map(|layers| layers.iter().filter_map(Value::as_u64).map(|layer| layer as usize).collect()),
        layers_pattern: section.texts("layers_pattern"),
        trained_share: section.get("trained_share").and_then(Value::as_f64),
        train_also: section.texts("train_also"),
        settings: own.map(|entry| (entry.field.name.to_owned(), entry.value.clone())).collect(),
    }
}

/// The format of the first task, where the table itself names none.
fn first_format(tasks: &[&Section]) -> Value {
    tasks.first().and_then(|task| task.get("format")).cloned().unwrap_or_default()
}

/// The data of a recipe.
fn data(sections: &[Section], tree: &Node, dir: &Path) -> Result<Data, Problem> {
    let section = |path: &str| sections.iter().find(|section| section.path == path);
    let shared = section("data").map(Section::map).unwrap_or_default();
    let columns = section("data.columns").map(Section::map).unwrap_or_default();
    let tables: Vec<&Section> = sections.iter().filter(|s| s.path.starts_with("data.tasks[")).collect();
    let one = |path: &str, own: Map<String, Value>| -> Result<Data, Problem> {
        let mut table = shared.clone();
        if own.contains_key("eval_path") {
            table.remove("eval_fraction");
        }
        table.extend(own);
        let mut names = columns.clone();
        if let Some(Value::Object(own)) = table.remove("columns") {
            names.extend(own);
        }
        let text = table.get("template").and_then(Value::as_str).map(str::to_owned);
        // Where every set is a task's, the table itself has no file.
        table.entry("format").or_insert_with(|| first_format(&tables));
        table.entry("path").or_insert_with(|| Value::String(String::new()));
        let mut data: Data = serde_json::from_value(Value::Object(table)).map_err(disagreement)?;
        data.columns = serde_json::from_value(Value::Object(names)).map_err(disagreement)?;
        let set = |path: &str| tree.find(path).is_some_and(|node| node.place.origin() == Origin::Set);
        let given = set(&format!("{path}.template")) || set("data.template");
        data.template = text.map(|text| template(&text, if given { Path::new("") } else { dir }));
        Ok(data)
    };
    let mut all = one("data", Map::new())?;
    for section in &tables {
        let mut own = section.map();
        let name = own.remove("name").and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default();
        all.tasks.push(TaskData { name, data: one(&section.path, own)? });
    }
    if let (true, Some(first)) = (all.path.as_os_str().is_empty(), all.tasks.first()) {
        all.path = first.data.path.clone();
    }
    Ok(all)
}
