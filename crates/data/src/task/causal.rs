//! Language modelling: all text as one run of tokens, cut into blocks of `max_length`.
//!
//! Each row begins with the tokens that the tokenizer puts before a text, and ends with the end token; blocks go over
//! the borders of rows, so nothing is lost. The last block is as long as what is left.

use super::Maker;
use crate::error::Result;
use crate::example::{Example, Labels};
use crate::read::Content;

impl Maker<'_> {
    pub(super) fn blocks(&mut self) -> Result<Vec<Example>> {
        let (mut run, mut lines): (Vec<u32>, Vec<usize>) = (Vec::new(), Vec::new());
        let eos = self.tokenizer.eos_id();
        for row in &self.rows.rows {
            let Content::Text { text, pair: None, .. } = &row.content else {
                return Err(self.unfit(row, "one text a row"));
            };
            run.extend(self.tokenizer.encode(text, true)?.ids);
            if let Some(eos) = eos.filter(|eos| run.last() != Some(eos)) {
                run.push(eos);
            }
            lines.resize(run.len(), row.line);
        }
        let size = self.options.max_length.max(2);
        let blocks = run.chunks(size).zip(lines.chunks(size));
        // One token alone has nothing before it to be predicted from.
        let blocks = blocks.filter(|(ids, _)| ids.len() > 1).map(|(ids, lines)| Example {
            ids: ids.to_vec(),
            labels: Labels::Tokens(ids.iter().map(|id| i64::from(*id)).collect()),
            row: lines[0],
            ..Example::default()
        });
        Ok(blocks.collect())
    }
}
