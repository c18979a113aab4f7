//! A source and what is to be written for it: the prompt goes to the encoder, the completion is learned by the decoder.
//!
//! Both are encoded as texts of their own, with the special tokens that the tokenizer adds; where it adds no end token the
//! completion gets one. Either is cut at the limit.

use super::Maker;
use crate::error::Result;
use crate::example::{Example, Labels, Target};
use crate::read::Content;

impl Maker<'_> {
    pub(super) fn targets(&mut self) -> Result<Vec<Example>> {
        let mut examples = Vec::with_capacity(self.rows.rows.len());
        for row in &self.rows.rows {
            let Content::Completion { prompt, completion } = &row.content else {
                return Err(self.unfit(row, "a prompt with a completion"));
            };
            let ids = self.tokenizer.encode(prompt, true)?.ids;
            let mut answer = self.tokenizer.encode(completion, true)?.ids;
            if let Some(eos) = self.tokenizer.eos_id().filter(|eos| answer.last() != Some(eos)) {
                answer.push(eos);
            }
            let limit = self.options.max_length;
            self.cut(ids.len().saturating_sub(limit) + answer.len().saturating_sub(limit));
            let labels = answer.iter().take(limit).map(|id| i64::from(*id)).collect();
            let labels = Labels::Target(Target { labels, inputs: None, positions: None });
            let ids = ids.into_iter().take(limit).collect();
            examples.push(Example { ids, labels, row: row.line, ..Example::default() });
        }
        if self.tokenizer.eos_id().is_none() {
            self.report
                .guesses
                .push("the tokenizer names no end token, so no end is learned after answers".into());
        }
        Ok(examples)
    }
}
