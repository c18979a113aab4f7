//! Settings of a saved adapter that are chosen anew where it is used.

use engraft_nn::{Error, Result};
use serde_json::Value;

use crate::assemble::{is_union, methods_of};
use crate::{Method, Settings, from_file};

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
        for (part, key) in parts.into_iter().zip(keys) {
            let (Some(map), Some(key)) = (part.as_object_mut(), key) else { continue };
            map.insert(key.into(), value.clone());
            from_file(part).map_err(|error| {
                let text = error.to_string().replace(&format!("`{key}`"), &format!("`{setting}`"));
                Error::Unsupported(text)
            })?;
        }
    }
    Ok(config)
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
            let Some(saved) = (!open.is_empty()).then(|| config(&[chosen(entry.info.name, json!({}))], &[]))
            else {
                continue;
            };
            for (setting, key) in open {
                assert!(entry.info.fields.iter().any(|field| field.name == *setting), "{setting}");
                assert!(saved.get(key).is_some(), "{}: {key}", entry.info.name);
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
