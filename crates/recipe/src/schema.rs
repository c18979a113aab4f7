//! The recipe's JSON Schema (draft 2020-12), from the same tables that check it; editors complete and check by it.

use serde_json::{Map, Value, json};

use crate::keys::{EXCLUSIVE, TableSpec, tables};
use crate::spec::{ABOVE_ZERO, BELOW_ONE, FieldKind, FieldSpec, MethodSpec};

/// The schema of a recipe with these methods.
pub fn schema(methods: &[MethodSpec]) -> Value {
    let mut root = Map::new();
    root.insert("$schema".into(), "https://json-schema.org/draft/2020-12/schema".into());
    root.insert("title".into(), "Engraft recipe".into());
    let find = |path: &str| tables().iter().find(|table| table.path == path);
    if let Some(Value::Object(top)) = find("").map(object) {
        root.extend(top);
    }
    let mut tables: Map<String, Value> = Map::new();
    for path in ["base", "data", "train"] {
        tables.extend(find(path).map(|table| (path.to_owned(), object(table))));
    }
    if let (Some(data), Some(columns)) = (tables.get_mut("data"), find("data.columns")) {
        data["properties"]["columns"] = object(columns);
        // With tasks, they bring the files.
        data["required"] = json!(["format"]);
        data["anyOf"] = json!([{ "required": ["path"] }, { "required": ["tasks"] }]);
    }
    if let (Some(data), Some(task)) = (tables.get_mut("data"), find("data.tasks")) {
        data["properties"]["tasks"] = json!({ "type": "array", "minItems": 1, "items": object(task) });
    }
    if let Some(shared) = find("method") {
        tables.insert("method".into(), method(shared, methods));
    }
    if let Some(properties) = root.get_mut("properties").and_then(Value::as_object_mut) {
        properties.extend(tables);
    }
    root.insert("required".into(), json!(["model", "method", "data"]));
    Value::Object(root)
}

/// One table: its keys, and no others.
fn object(table: &TableSpec) -> Value {
    let mut object = json!({
        "type": "object",
        "description": table.doc,
        "properties": properties(&table.fields),
        "additionalProperties": false,
    });
    if !table.required.is_empty() {
        object["required"] = json!(table.required);
    }
    exclude(&mut object, table.path);
    object
}

/// At most one of each pair of keys.
fn exclude(object: &mut Value, path: &str) {
    let pairs: Vec<Value> = EXCLUSIVE
        .iter()
        .filter(|row| row.0 == path)
        .map(|(_, first, second, _)| json!({ "not": { "required": [first, second] } }))
        .collect();
    if !pairs.is_empty() {
        object["allOf"] = pairs.into();
    }
}

/// One method, or a list of them: for each known name its settings beside the shared keys; or a saved adapter.
fn method(shared: &TableSpec, methods: &[MethodSpec]) -> Value {
    let mut kinds: Vec<Value> = methods
        .iter()
        .map(|method| {
            let mut keys = properties(&shared.fields);
            keys.extend(properties(&method.fields));
            keys.insert("name".into(), json!({ "const": method.name, "description": method.summary }));
            let mut object = json!({
                "type": "object",
                "description": method.summary,
                "properties": keys,
                "required": ["name"],
                "additionalProperties": false,
            });
            exclude(&mut object, "method");
            object
        })
        .collect();
    let saved = shared.fields.iter().filter(|field| matches!(field.name, "name" | "from"));
    kinds.push(json!({
        "type": "object",
        "description": "A saved adapter.",
        "properties": properties(saved),
        "required": ["from"],
        "additionalProperties": false,
    }));
    json!({
        "description": shared.doc,
        "anyOf": [
            { "anyOf": kinds },
            { "type": "array", "minItems": 1, "items": { "anyOf": kinds } },
        ],
    })
}

fn properties<'a>(fields: impl IntoIterator<Item = &'a FieldSpec>) -> Map<String, Value> {
    fields.into_iter().map(|field| (field.name.to_owned(), property(field))).collect()
}

fn property(field: &FieldSpec) -> Value {
    let mut value = kind(&field.kind);
    value["description"] = field.doc.into();
    if let Some(default) = &field.default {
        value["default"] = default.clone();
    }
    value
}

fn kind(kind: &FieldKind) -> Value {
    let text = || json!({ "type": "string" });
    match kind {
        FieldKind::Bool => json!({ "type": "boolean" }),
        FieldKind::Int { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
        FieldKind::Float { min, max } => float(*min, *max),
        FieldKind::Text | FieldKind::Path => text(),
        FieldKind::OneOf(names) => json!({ "enum": names }),
        FieldKind::TextList | FieldKind::PathList => json!({ "type": "array", "items": text() }),
        FieldKind::IntList => json!({ "type": "array", "items": { "type": "integer", "minimum": 0 } }),
        FieldKind::FloatList => json!({ "type": "array", "items": { "type": "number" } }),
        FieldKind::TextOrList => json!({ "anyOf": [text(), { "type": "array", "items": text() }] }),
        FieldKind::Layers => json!({ "anyOf": [
            { "type": "string", "pattern": "^ *[0-9]+ *(- *[0-9]+ *)?(, *[0-9]+ *(- *[0-9]+ *)?)*$" },
            { "type": "array", "items": { "type": "integer", "minimum": 0 } },
        ] }),
        FieldKind::IntMap => {
            json!({ "type": "object", "additionalProperties": { "type": "integer", "minimum": 1 } })
        }
        FieldKind::TextMap(names) => {
            let one = |name: &&str| ((*name).to_owned(), json!({ "type": "string" }));
            let properties: Map<String, Value> = names.iter().map(one).collect();
            json!({ "type": "object", "properties": properties, "additionalProperties": false })
        }
        FieldKind::FloatMap => json!({ "type": "object", "additionalProperties": { "type": "number" } }),
    }
}

fn float(min: f64, max: f64) -> Value {
    let mut value = json!({ "type": "number" });
    match min {
        ABOVE_ZERO => value["exclusiveMinimum"] = 0.into(),
        min if min > -f64::MAX => value["minimum"] = min.into(),
        _ => {}
    }
    match max {
        BELOW_ONE => value["exclusiveMaximum"] = 1.into(),
        max if max < f64::MAX => value["maximum"] = max.into(),
        _ => {}
    }
    value
}
