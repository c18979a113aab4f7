//! The registry of methods as recipes see it.

use engraft_method::{Entry, Field, FieldKind, METHODS, elsewhere};
use engraft_recipe::{FieldKind as Kind, FieldSpec, MethodSpec};
use serde_json::Value;

/// Every method with its settings.
pub fn method_specs() -> Vec<MethodSpec> {
    METHODS.iter().map(|entry| spec(entry)).collect()
}

fn spec(entry: &Entry) -> MethodSpec {
    let fields = entry.info.fields.iter().map(field).collect();
    MethodSpec { name: entry.info.name, summary: entry.info.summary, fields, elsewhere: elsewhere(entry) }
}

fn field(field: &Field) -> FieldSpec {
    let spec = FieldSpec::new(field.name, kind(field.kind), field.doc);
    let default = field.default.and_then(|text| serde_json::from_str::<Value>(text).ok());
    spec.or(default.unwrap_or(Value::Null))
}

fn kind(kind: FieldKind) -> Kind {
    match kind {
        FieldKind::Bool => Kind::Bool,
        FieldKind::Int { min, max } => Kind::Int { min, max },
        FieldKind::Float { min, max } => Kind::Float { min, max },
        FieldKind::Text | FieldKind::Tokens => Kind::Text,
        FieldKind::OneOf(names) => Kind::OneOf(names),
        FieldKind::TextList => Kind::TextList,
        FieldKind::Prompts | FieldKind::Adapters => Kind::PathList,
        FieldKind::IntList => Kind::IntList,
        FieldKind::IntMap => Kind::IntMap,
        FieldKind::FloatMap => Kind::FloatMap,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_setting_has_a_name_that_every_method_s_table_has() {
        let common = [
            "name",
            "from",
            "targets",
            "roles",
            "exclude",
            "layers",
            "layers_pattern",
            "trained_share",
            "train_also",
        ];
        for entry in METHODS {
            let taken = entry.info.fields.iter().find(|field| common.contains(&field.name));
            assert!(taken.is_none(), "{}: `{}` would not reach it", entry.info.name, taken.unwrap().name);
        }
    }

    #[test]
    fn every_default_is_json_and_fits_its_kind() {
        for entry in METHODS {
            for field in entry.info.fields {
                let Some(text) = field.default else { continue };
                let value: Value = serde_json::from_str(text)
                    .unwrap_or_else(|e| panic!("{}.{}: {text}: {e}", entry.info.name, field.name));
                let fits = match field.kind {
                    _ if value.is_null() => true,
                    FieldKind::Bool => value.is_boolean(),
                    FieldKind::Int { min, max } => value.as_i64().is_some_and(|n| (min..=max).contains(&n)),
                    FieldKind::Float { min, max } => value.as_f64().is_some_and(|n| (min..=max).contains(&n)),
                    FieldKind::Text | FieldKind::Tokens => value.is_string(),
                    FieldKind::OneOf(names) => value.as_str().is_some_and(|text| names.contains(&text)),
                    FieldKind::TextList | FieldKind::Prompts | FieldKind::Adapters | FieldKind::IntList => {
                        value.is_array()
                    }
                    FieldKind::IntMap | FieldKind::FloatMap => value.is_object(),
                };
                assert!(fits, "{}.{} = {text} does not fit its kind", entry.info.name, field.name);
            }
        }
    }
}
