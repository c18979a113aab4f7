//! A tag for each word: the first token of a word carries its tag, the others are ignored.

use std::collections::HashMap;

use super::Maker;
use super::classify::sorted;
use crate::error::{Result, not_among};
use crate::example::{Example, IGNORED, Labels};
use crate::read::Content;

impl Maker<'_> {
    pub(super) fn tags(&mut self) -> Result<Vec<Example>> {
        let found = self.rows.rows.iter().flat_map(|row| match &row.content {
            Content::Words { tags, .. } => tags.clone(),
            _ => Vec::new(),
        });
        let names = self.options.labels.clone().unwrap_or_else(|| sorted(found));
        let numbers: HashMap<&str, i64> = names.iter().map(String::as_str).zip(0..).collect();
        let known: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut examples = Vec::with_capacity(self.rows.rows.len());
        for row in &self.rows.rows {
            let Content::Words { words, tags } = &row.content else {
                return Err(self.unfit(row, "words with tags"));
            };
            let number = |tag: &String| numbers.get(tag.as_str()).copied();
            if let Some(unknown) = tags.iter().find(|tag| number(tag).is_none()) {
                let message = not_among("tag", unknown, &known) + "; training has no row with it";
                return Err(self.rows.fail(row.line, message));
            }
            let (encoding, word_of, lost) = self.tokenizer.encode_words(words, self.options.max_length)?;
            let mut last = None;
            let labels = word_of.iter().map(|word| {
                let first = *word != last && word.is_some();
                last = *word;
                word.filter(|_| first)
                    .and_then(|word| tags.get(word as usize))
                    .and_then(number)
                    .unwrap_or(IGNORED)
            });
            let labels = Labels::Tokens(labels.collect());
            self.cut(lost);
            examples.push(Example { ids: encoding.ids, labels, row: row.line, ..Example::default() });
        }
        self.labels = Some(names);
        Ok(examples)
    }
}
