//! `sharegpt`: `conversations`, a list of `{from, value}`; the names of speakers are mapped to roles.

use serde_json::Value;

use super::json::kind;
use super::{Content, Message, Record};
use crate::error::not_among;

/// The speakers that occur in published sets, and their roles.
const SPEAKERS: [(&str, &str); 10] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("model", "assistant"),
    ("chatgpt", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("observation", "tool"),
    ("function", "tool"),
];

pub(super) fn content(record: &Record, column: &str) -> Result<Content, String> {
    let value = record.get(column)?;
    let list = value
        .as_array()
        .ok_or_else(|| format!("`{column}` is expected to be a list, found {}", kind(value)))?;
    if list.is_empty() {
        return Err(format!("`{column}` has no messages"));
    }
    let message = |(at, item): (usize, &Value)| {
        let text = |key: &str| {
            item.get(key)
                .and_then(Value::as_str)
                .ok_or_else(|| format!("message {}: `{key}` is missing or not text", at + 1))
        };
        let from = text("from")?;
        let names = SPEAKERS.map(|(name, _)| name);
        let role = SPEAKERS.iter().find(|(name, _)| *name == from).map(|(_, role)| *role);
        let role =
            role.ok_or_else(|| format!("message {}: {}", at + 1, not_among("speaker", from, &names)))?;
        Ok(Message::new(role, text("value")?))
    };
    list.iter().enumerate().map(message).collect::<Result<_, _>>().map(Content::Chat)
}
