//! Settings of a saved adapter that are chosen anew where it is used.

use engraft_nn::{Error, Result};
use serde_json::Value;

use crate::assemble::{is_union, methods_of};
use crate::{FieldKind, Info, Method, Settings, from_file};

/// A saved adapter's `config` with `choices` made: settings that its methods leave open ([`Method::chosen_in_use`]), by the names
/// that they have in recipes.
///
/// # Errors
/// A setting that no method of the adapter leaves open, a value that it cannot have.
pub fn choose(config: &Value, choices: &Settings) -> Result<Value> {
    let mut config = config.clone();
    for (setting, value) in choices {
        let methods = methods_of(&config)?;
        let key = |method: &dyn Method| {
            method.chosen_in_use().iter().find(|(name, _)| name == setting).map(|(_, key)| *key)
        };
        let keys: Vec<Option<&str>> = methods.iter().map(|(method, _)| key(method.as_ref())).collect();
        if keys.iter().all(Option::is_none) {
            return Err(not_open(setting, methods.iter().map(|(method, _)| method.as_ref())));
        }
        let several = is_union(&config);
        let parts = match config.get_mut("methods") {
            Some(Value::Array(parts)) if several => parts.iter_mut().collect(),
            _ => vec![&mut config],
        };
        for ((part, key), (method, _)) in parts.into_iter().zip(keys).zip(&methods) {
            let (Some(map), Some(key)) = (part.as_object_mut(), key) else { continue };
            within(method.info(), setting, value)?;
            map.insert(key.into(), value.clone());
            from_file(part).map_err(|error| {
                let text = error.to_string().replace(&format!("`{key}`"), &format!("`{setting}`"));
                Error::Unsupported(text)
            })?;
        }
    }
    Ok(config)
}

/// An error where a number lies outside the bounds that recipes keep, or is none.
fn within(info: &Info, setting: &str, value: &Value) -> Result<()> {
    let Some(field) = info.fields.iter().find(|field| field.name == setting) else { return Ok(()) };
    let expected = match field.kind {
        FieldKind::Int { min, max } if !value.as_i64().is_some_and(|v| (min..=max).contains(&v)) => {
            format!("a whole number from {min} to {max}")
        }
        FieldKind::Float { min, max } if !value.as_f64().is_some_and(|v| (min..=max).contains(&v)) => {
            format!("a number from {min} to {max}")
        }
        _ => return Ok(()),
    };
    Err(Error::Unsupported(format!("`{setting}`: expected {expected}, found {value}")))
}

/// What an adapter leaves open where `setting` is none of it.
fn not_open<'m>(setting: &str, methods: impl Iterator<Item = &'m dyn Method>) -> Error {
    let (mut titles, mut open) = (Vec::new(), Vec::new());
    for method in methods {
        titles.push(method.info().title);
        open.extend(method.chosen_in_use().iter().map(|(name, _)| format!("`{name}`")));
    }
    let titles = titles.join(" and ");
    Error::Unsupported(match open.is_empty() {
        true => format!(
            "`{setting}` cannot be chosen: an adapter of {titles} leaves nothing open until it is used"
        ),
        false => format!(
            "`{setting}` cannot be chosen: an adapter of {titles} leaves {} open until it is used",
            open.join(", ")
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::METHODS;
    use crate::testing::{chosen, config};
    use serde_json::{Map, json};

    fn one(setting: &str, value: Value) -> Settings {
        Map::from_iter([(setting.to_owned(), value)])
    }

    #[test]
    fn what_is_left_open_is_a_setting_and_a_key_of_the_file() {
        let mut some = 0;
        for entry in METHODS {
            let open = (entry.example)().chosen_in_use();
            let Some(saved) = (!open.is_empty()).then(|| config(&[((entry.example)(), None)], &[])) else {
                continue;
            };
            for (setting, key) in open {
                let kind = entry.info.fields.iter().find(|field| field.name == *setting).unwrap().kind;
                let (least, less) = match kind {
                    FieldKind::Int { min, .. } => (json!(min), json!(min - 1)),
                    FieldKind::Float { min, .. } => (json!(min), json!(min - 1.0)),
                    _ => panic!("{setting} is no number"),
                };
                assert!(choose(&saved, &one(setting, least)).is_ok(), "{}: {key}", entry.info.name);
                for beyond in [less, json!("x"), Value::Null] {
                    let error = choose(&saved, &one(setting, beyond)).unwrap_err().to_string();
                    assert!(error.contains(&format!("`{setting}`: expected")), "{error}");
                }
                some += 1;
            }
        }
        assert!(some > 1);
    }

    #[test]
    fn each_method_of_several_takes_its_own() {
        let union = [chosen("lora", json!({})), chosen("dylora", json!({ "rank": 4 }))];
        let saved = config(&union, &[]);
        assert!(is_union(&saved));
        let made = choose(&saved, &one("eval_rank", json!(2))).unwrap();
        assert_eq!(made["methods"][1]["eval_r"], 2);
        assert_eq!(made["methods"][0], saved["methods"][0]);
        let error =
            |config: &Value, setting, value| choose(config, &one(setting, value)).unwrap_err().to_string();
        assert!(error(&saved, "eval_rank", json!(5)).contains("`eval_rank`: expected at most the rank 4"));
        assert!(error(&saved, "eval_rank", json!("x")).contains("`eval_rank`: expected a whole number"));
        assert!(error(&saved, "rank", json!(5)).contains("leaves `eval_rank` open"));
        let plain = config(&[chosen("lora", json!({}))], &[]);
        assert!(error(&plain, "rank", json!(5)).contains("LoRA leaves nothing open"));
    }
}
