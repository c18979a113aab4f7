//! A class or a number for each text or pair of texts.

use std::collections::HashMap;

use super::Maker;
use crate::error::{Result, not_among};
use crate::example::{Example, Labels};
use crate::read::{Content, Row};

impl Maker<'_> {
    pub(super) fn classes(&mut self) -> Result<Vec<Example>> {
        let found = self.rows.rows.iter().filter_map(|row| match &row.content {
            Content::Text { label, .. } => label.clone(),
            _ => None,
        });
        let names = self.options.labels.clone().unwrap_or_else(|| sorted(found));
        let numbers: HashMap<&str, u32> = names.iter().map(String::as_str).zip(0..).collect();
        let known: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut examples = Vec::with_capacity(self.rows.rows.len());
        for row in &self.rows.rows {
            let label = self.label(row)?;
            let class = numbers.get(label).ok_or_else(|| {
                self.rows.fail(row.line, not_among("label", label, &known) + "; training has no row with it")
            })?;
            examples.push(self.text(row, Labels::Class(*class))?);
        }
        self.labels = Some(names);
        Ok(examples)
    }

    pub(super) fn scores(&mut self) -> Result<Vec<Example>> {
        let mut examples = Vec::with_capacity(self.rows.rows.len());
        for row in &self.rows.rows {
            let label = self.label(row)?;
            let score = label.trim().parse::<f32>().ok().filter(|score| score.is_finite());
            let score = score.ok_or_else(|| {
                self.rows.fail(row.line, format!("expected a number as label, found `{label}`"))
            })?;
            examples.push(self.text(row, Labels::Score(score))?);
        }
        Ok(examples)
    }

    fn label<'r>(&self, row: &'r Row) -> Result<&'r str> {
        match &row.content {
            Content::Text { label: Some(label), .. } => Ok(label),
            _ => Err(self.unfit(row, "text with a label")),
        }
    }

    /// The ids of a text or pair with the special tokens around, cut at the limit.
    pub(super) fn text(&mut self, row: &Row, labels: Labels) -> Result<Example> {
        let Content::Text { text, pair, .. } = &row.content else { return Err(self.unfit(row, "text")) };
        let (encoding, lost) = self.tokenizer.encode_cut(text, pair.as_deref(), self.options.max_length)?;
        if encoding.ids.is_empty() {
            return Err(self.rows.fail(row.line, "the text gives no tokens; take the row out"));
        }
        self.cut(lost);
        let type_ids = encoding.type_ids.iter().any(|kind| *kind != 0).then_some(encoding.type_ids);
        Ok(Example { ids: encoding.ids, type_ids, labels, row: row.line, ..Example::default() })
    }
}

/// Different names, as numbers if all are, otherwise by code points.
pub(crate) fn sorted(found: impl Iterator<Item = String>) -> Vec<String> {
    let mut names: Vec<String> = found.collect();
    names.sort();
    names.dedup();
    if names.iter().all(|name| name.parse::<i64>().is_ok()) {
        names.sort_by_key(|name| name.parse::<i64>().unwrap_or(0));
    }
    names
}
