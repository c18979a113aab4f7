//! A checked value written as TOML, for `plan.toml`, messages and the reference page.

use serde_json::Value;

/// `value` as TOML on one line.
pub(crate) fn toml(value: &Value) -> String {
    match value {
        Value::Null => "\"\"".into(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => string(text),
        Value::Array(items) => format!("[{}]", items.iter().map(toml).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let pairs: Vec<String> =
                map.iter().map(|(key, value)| format!("{} = {}", string(key), toml(value))).collect();
            format!("{{ {} }}", pairs.join(", "))
        }
    }
}

/// A basic string: JSON's escapes are TOML's, but for U+007F, which TOML wants escaped.
fn string(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007F")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let value = serde_json::json!({
            "text": "a\"b\\c\n\t\u{7f}\u{1}é",
            "list": [1, -2.5, 1e-8, 1e30, true],
            "map": { "a.b|c": 4 },
        });
        let text = format!("x = {}", toml(&value));
        let read: toml::Table = toml::from_str(&text).unwrap();
        let read: Value = serde_json::to_value(&read["x"]).unwrap();
        assert_eq!(read, value);
    }
}
