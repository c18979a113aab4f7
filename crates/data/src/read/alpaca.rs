//! `alpaca`: `instruction`, `input` (may be empty or absent), `output`.
//!
//! The prompt is that of Stanford Alpaca (tatsu-lab/stanford_alpaca, `train.py`), in its two forms.

use super::{Content, Record};

const WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further \
context. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n\
### Input:\n{input}\n\n### Response:";
const WITHOUT_INPUT: &str = "Below is an instruction that describes a task. Write a response that appropriately \
completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:";

pub(super) fn content(record: &Record) -> Result<Content, String> {
    let instruction = record.text("instruction")?;
    let input = match record.fields.get("input") {
        None | Some(serde_json::Value::Null) => String::new(),
        Some(_) => record.text("input")?,
    };
    let completion = record.text("output")?;
    Ok(Content::Completion { prompt: prompt(&instruction, &input), completion })
}

/// The prompt; the parts are put in once each, so braces inside them mean nothing.
fn prompt(instruction: &str, input: &str) -> String {
    let form = if input.is_empty() { WITHOUT_INPUT } else { WITH_INPUT };
    let (before, rest) = form.split_once("{instruction}").unwrap_or((form, ""));
    match rest.split_once("{input}") {
        Some((middle, after)) => format!("{before}{instruction}{middle}{input}{after}"),
        None => format!("{before}{instruction}{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_in_the_data_stay() {
        let text = prompt("say {input}", "x");
        assert!(text.contains("### Instruction:\nsay {input}\n\n### Input:\nx\n\n### Response:"), "{text}");
        assert!(!prompt("a", "").contains("### Input"));
    }
}
