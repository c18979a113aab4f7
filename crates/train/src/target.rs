//! What the decoder of an encoder–decoder model reads: its labels, moved right by one.

use engraft_data::IGNORED;
use serde_json::Value;

/// The token that a decoder begins with: `decoder_start_token_id`, else `pad_token_id`, of `config.json`.
pub fn decoder_start(config: &Value) -> Option<u32> {
    id(config, "decoder_start_token_id").or_else(|| id(config, "pad_token_id"))
}

fn id(config: &Value, key: &str) -> Option<u32> {
    config.get(key)?.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// How labels become decoder inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shift {
    /// The token that comes first.
    pub start: u32,
    /// What ignored labels are read as.
    pub pad: u32,
}

impl Shift {
    /// As `config.json` says; `None` where it names no start.
    pub fn of(config: &Value) -> Option<Shift> {
        let start = decoder_start(config)?;
        Some(Shift { start, pad: id(config, "pad_token_id").unwrap_or(start) })
    }

    /// Decoder inputs `[labels]`.
    pub fn inputs(self, labels: &[i64]) -> Vec<i64> {
        let read = |&label: &i64| if label == IGNORED { i64::from(self.pad) } else { label };
        let moved = labels.iter().take(labels.len().saturating_sub(1)).map(read);
        std::iter::once(i64::from(self.start)).chain(moved).take(labels.len()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn labels_move_right_behind_the_start() {
        let shift = Shift::of(&json!({ "decoder_start_token_id": 7, "pad_token_id": 0 })).unwrap();
        assert_eq!(shift.inputs(&[4, IGNORED, 5, 1]), [7, 4, 0, 5]);
        assert_eq!(shift.inputs(&[]), [0i64; 0]);
        assert_eq!(Shift::of(&json!({ "pad_token_id": 3 })), Some(Shift { start: 3, pad: 3 }));
        assert_eq!(Shift::of(&json!({})), None);
    }
}
