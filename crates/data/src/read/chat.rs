//! `chat`: `messages`, a list of `{role, content}`; content is text or a list of `{"type": "text", "text": …}`.

use serde_json::{Map, Value};

use super::json::kind;
use super::{Content, Message, Record};

pub(super) fn content(record: &Record, column: &str) -> Result<Content, String> {
    messages(record.get(column)?, column).map(Content::Chat)
}

/// The messages of a list; the last words of an error say what was expected.
pub(super) fn messages(value: &Value, column: &str) -> Result<Vec<Message>, String> {
    let list = value
        .as_array()
        .ok_or_else(|| format!("`{column}` is expected to be a list, found {}", kind(value)))?;
    if list.is_empty() {
        return Err(format!("`{column}` has no messages"));
    }
    list.iter()
        .enumerate()
        .map(|(at, item)| message(item).map_err(|e| format!("message {}: {e}", at + 1)))
        .collect()
}

fn message(item: &Value) -> Result<Message, String> {
    let fields =
        item.as_object().ok_or_else(|| format!("expected {{role, content}}, found {}", kind(item)))?;
    let role = fields.get("role").and_then(Value::as_str).ok_or("`role` is missing or not text")?.to_owned();
    let content = match fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => parts.iter().map(part).collect::<Result<String, String>>()?,
        // A message that only calls a tool has no content.
        None | Some(Value::Null) if fields.contains_key("tool_calls") => String::new(),
        None => return Err("`content` is missing".into()),
        Some(other) => return Err(format!("`content` is expected to be text, found {}", kind(other))),
    };
    let extra: Map<String, Value> = fields
        .iter()
        .filter(|(key, _)| !["role", "content"].contains(&key.as_str()))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    Ok(Message { role, content, extra })
}

fn part(part: &Value) -> Result<String, String> {
    match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
        (Some("text") | None, Some(text)) => Ok(text.to_owned()),
        (other, _) => {
            Err(format!("only parts of type `text` are read, found `{}`", other.unwrap_or("no type")))
        }
    }
}
