//! Instruction data: loss on the answers only.
//!
//! A prompt and its completion are read as one text (a line break is put between them when neither has a blank
//! there), followed by the end token, which is learned. Conversations go through the chat template.

use super::Maker;
use crate::chat::encode_conversation;
use crate::error::{Error, Result};
use crate::example::{Example, IGNORED, Labels};
use crate::read::Content;

/// The prompt as it stands before `completion`: with a line break when neither side of the seam has a blank.
pub(crate) fn joined(prompt: &str, completion: &str) -> String {
    let apart = prompt.ends_with(char::is_whitespace) || completion.starts_with(char::is_whitespace);
    if apart || prompt.is_empty() { prompt.to_owned() } else { format!("{prompt}\n") }
}

impl Maker<'_> {
    pub(super) fn completions(&mut self) -> Result<Vec<Example>> {
        let mut examples = Vec::with_capacity(self.rows.rows.len());
        let (mut broken, mut without_end) = (0, false);
        for row in &self.rows.rows {
            let mut example = match &row.content {
                Content::Completion { prompt, completion } => {
                    let start = joined(prompt, completion);
                    broken += usize::from(start.len() > prompt.len());
                    without_end |= self.tokenizer.eos_id().is_none();
                    self.completion(&start, completion, row.line)?
                }
                Content::Chat(messages) => {
                    let template = self.options.template.ok_or_else(|| Error::Template {
                        message: "conversations need a chat template and the model has none; set data.template to a \
                                  template file, or to \"plain\" for `User: …`, `Assistant: …` lines"
                            .into(),
                    })?;
                    let conversation = encode_conversation(self.tokenizer, template, messages)
                        .map_err(|error| self.rows.fail(row.line, error.to_string()))?;
                    let ids = conversation.encoding.ids;
                    let labels = ids.iter().zip(&conversation.trained);
                    let labels =
                        labels.map(|(id, trained)| if *trained { i64::from(*id) } else { IGNORED }).collect();
                    let (labels, row) = (Labels::Tokens(labels), row.line);
                    Example { ids, labels, row, ..Example::default() }
                }
                _ => return Err(self.unfit(row, "a prompt with a completion, or messages")),
            };
            self.cut_example(&mut example);
            examples.push(example);
        }
        if broken > 0 {
            let note = format!(
                "{broken} rows have no blank between prompt and completion; a line break is put there"
            );
            self.report.guesses.push(note);
        }
        if without_end {
            self.report
                .guesses
                .push("the tokenizer names no end token, so no end is learned after answers".into());
        }
        Ok(examples)
    }

    fn completion(&self, start: &str, completion: &str, row: usize) -> Result<Example> {
        let encoding = self.tokenizer.encode(&format!("{start}{completion}"), true)?;
        let mut ids = encoding.ids;
        // A token over the seam belongs to the prompt: generation is never asked for half of it.
        let learned = encoding.offsets.iter().map(|(from, to)| to > from && *from >= start.len());
        let mut labels: Vec<i64> = ids
            .iter()
            .zip(learned)
            .map(|(id, learned)| if learned { i64::from(*id) } else { IGNORED })
            .collect();
        if let Some(eos) = self.tokenizer.eos_id().filter(|_| labels.iter().any(|label| *label != IGNORED)) {
            if ids.last() != Some(&eos) {
                ids.push(eos);
                labels.push(IGNORED);
            }
            if let Some(last) = labels.last_mut() {
                *last = i64::from(eos);
            }
        }
        Ok(Example { ids, labels: Labels::Tokens(labels), row, ..Example::default() })
    }
}
