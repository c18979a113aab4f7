//! `format = "tensors"`: token ids that were made elsewhere, as arrays of one width.
//!
//! Masked places are dropped, and each token that is left keeps its column as its position, so that rows padded on the
//! left and on the right give what the padded model gives at those places. A row without gaps has positions `None`.

mod pixels;
mod seq2seq;

pub use pixels::PixelTensors;
pub use seq2seq::Seq2SeqTensors;

use crate::error::{Error, Result};
use crate::example::{Dataset, Example, IGNORED, Labels, Report};

/// Arrays as read, row after row.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tensors<'a> {
    /// Rows.
    pub rows: usize,
    /// Places in a row.
    pub width: usize,
    /// `[rows, width]`.
    pub input_ids: &'a [i64],
    /// `[rows, width]`, 0 where there is padding; absent means no padding.
    pub attention_mask: Option<&'a [i64]>,
    /// `[rows, width]`.
    pub token_type_ids: Option<&'a [i64]>,
    /// `[rows, width]` with −100 ignored, or `[rows]` for classes.
    pub labels: Option<&'a [i64]>,
    /// `[rows]`, the task of each from 0.
    pub task_ids: Option<&'a [i64]>,
}

impl Tensors<'_> {
    /// The examples of the rows. `shifted` says that the objective predicts the next token; with `allow_untrained`
    /// rows without a trained token are left out and reported, not refused.
    ///
    /// # Errors
    /// Arrays whose sizes do not agree, ids or classes out of their range, rows without tokens or without loss.
    pub fn dataset(&self, shifted: bool, allow_untrained: bool) -> Result<Dataset> {
        let places = self.rows.checked_mul(self.width).filter(|places| *places > 0);
        let places = places
            .ok_or_else(|| fail("input_ids", format!("[{}, {}] holds no rows", self.rows, self.width)))?;
        let sized = |name: &str, array: Option<&[i64]>| match array {
            Some(array) if array.len() != places => Err(wrong_size(name, array.len(), self.rows, self.width)),
            _ => Ok(()),
        };
        sized("input_ids", Some(self.input_ids))?;
        sized("attention_mask", self.attention_mask)?;
        sized("token_type_ids", self.token_type_ids)?;
        if let Some(tasks) = self.task_ids.filter(|tasks| tasks.len() != self.rows) {
            let message = format!("expected {} numbers, one a row, found {}", self.rows, tasks.len());
            return Err(fail("task_ids", message));
        }
        let by_row = self.labels.is_some_and(|labels| labels.len() == self.rows && self.width != 1);
        if !by_row {
            sized("labels", self.labels)?;
        }
        let mut report = Report { rows: self.rows, ..Report::default() };
        let mut examples = Vec::with_capacity(self.rows);
        for row in 0..self.rows {
            let example = self.example(row, by_row)?;
            if self.labels.is_some() && example.trained(shifted) == 0 {
                report.untrained_rows.push(row);
                continue;
            }
            examples.push(example);
        }
        refuse_untrained(&report, allow_untrained)?;
        report.measure(&examples, shifted);
        Ok(Dataset { examples, images: None, labels: None, report })
    }

    fn example(&self, row: usize, by_row: bool) -> Result<Example> {
        let of = |array: &'_ [i64], column: usize| array[row * self.width + column];
        let kept: Vec<usize> = (0..self.width)
            .filter(|column| self.attention_mask.is_none_or(|mask| of(mask, *column) != 0))
            .collect();
        if kept.is_empty() {
            return Err(fail(
                "attention_mask",
                format!("row {row} masks all of its tokens; take the row out"),
            ));
        }
        let small = |name: &str, value: i64, column: usize| {
            u32::try_from(value)
                .map_err(|_| fail(name, format!("row {row}, column {column}: {value} is no id")))
        };
        let take = |name: &str, array: &[i64]| -> Result<Vec<u32>> {
            kept.iter().map(|column| small(name, of(array, *column), *column)).collect()
        };
        let labels = match self.labels {
            None => Labels::None,
            Some(labels) if by_row => Labels::Class(small("labels", labels[row], 0)?),
            Some(labels) => Labels::Tokens(kept.iter().map(|column| of(labels, *column)).collect()),
        };
        if let Labels::Tokens(labels) = &labels
            && let Some(label) = labels.iter().find(|label| **label < 0 && **label != IGNORED)
        {
            return Err(fail("labels", format!("row {row}: {label} is neither an id nor {IGNORED}")));
        }
        Ok(Example {
            ids: take("input_ids", self.input_ids)?,
            type_ids: self.token_type_ids.map(|types| take("token_type_ids", types)).transpose()?,
            positions: (kept.last() != Some(&(kept.len() - 1)))
                .then(|| kept.iter().map(|column| *column as u32).collect()),
            image: None,
            labels,
            task: self.task_ids.map(|tasks| task(tasks[row], row)).transpose()?,
            row,
        })
    }
}

/// Tasks that one run may have: more is no list anyone writes, and methods hold tensors for each.
const TASKS: i64 = 65_536;

fn task(value: i64, row: usize) -> Result<usize> {
    match value {
        0..TASKS => Ok(value as usize),
        _ => Err(fail(
            "task_ids",
            format!("row {row}: expected a task from 0 to {}, found {value}", TASKS - 1),
        )),
    }
}

/// Rows without loss are an error that names them, unless they are allowed.
pub(crate) fn refuse_untrained(report: &Report, allowed: bool) -> Result<()> {
    if report.untrained_rows.is_empty() || (allowed && report.untrained_rows.len() < report.rows) {
        return Ok(());
    }
    let shown: Vec<String> = report.untrained_rows.iter().take(5).map(usize::to_string).collect();
    let more = if report.untrained_rows.len() > 5 { " …" } else { "" };
    let message = format!(
        "{} of {} rows have nothing to learn (rows {}{more}): raise data.max_length if the answers are cut off, give \
         the rows an answer, or set data.allow_empty = true to leave them out",
        report.untrained_rows.len(),
        report.rows,
        shown.join(", ")
    );
    Err(fail("data", message))
}

fn wrong_size(name: &str, found: usize, rows: usize, width: usize) -> Error {
    fail(name, format!("expected [{rows}, {width}] as input_ids has, found {found} values"))
}

fn fail(place: &str, message: String) -> Error {
    Error::Data { place: place.into(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_on_either_side_is_dropped_and_columns_stay_as_positions() {
        let tensors = Tensors {
            rows: 3,
            width: 4,
            input_ids: &[5, 6, 7, 0, 0, 0, 8, 9, 1, 2, 3, 4],
            attention_mask: Some(&[1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1]),
            token_type_ids: Some(&[0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]),
            labels: Some(&[-100, 6, 7, -100, -100, -100, -100, 9, 1, 2, 3, 4]),
            task_ids: Some(&[2, 0, 1]),
        };
        let data = tensors.dataset(true, false).unwrap();
        assert_eq!(
            (data.examples[0].ids.as_slice(), data.examples[0].positions.as_ref()),
            (&[5, 6, 7][..], None)
        );
        assert_eq!((data.examples[1].ids.as_slice(), data.examples[0].task), (&[8, 9][..], Some(2)));
        assert_eq!(data.examples[1].positions.as_deref(), Some(&[2, 3][..]));
        assert_eq!(data.examples[1].type_ids.as_deref(), Some(&[0, 1][..]));
        assert_eq!(data.examples[1].labels, Labels::Tokens(vec![-100, 9]));
        assert_eq!((data.report.tokens, data.report.examples), (9, 3));
        let classes = Tensors { labels: Some(&[2, 0, 1]), ..tensors }.dataset(false, false).unwrap();
        assert_eq!(classes.examples[0].labels, Labels::Class(2));
    }

    #[test]
    fn sizes_ids_and_empty_rows_are_checked() {
        let sound = Tensors { rows: 2, width: 2, input_ids: &[1, 2, 3, 4], ..Tensors::default() };
        let message = |tensors: Tensors| tensors.dataset(true, false).unwrap_err().to_string();
        assert!(sound.dataset(true, false).is_ok());
        assert!(message(Tensors { input_ids: &[1, 2, 3], ..sound }).contains("expected [2, 2]"));
        assert!(message(Tensors { input_ids: &[1, -2, 3, 4], ..sound }).contains("row 0, column 1: -2"));
        assert!(message(Tensors { rows: usize::MAX, ..sound }).contains("holds no rows"));
        assert!(
            message(Tensors { attention_mask: Some(&[1, 1, 0, 0]), ..sound }).contains("row 1 masks all")
        );
        let untrained = Tensors { labels: Some(&[-100, 2, 7, -100]), ..sound };
        assert!(message(untrained).contains("data.allow_empty"));
        assert_eq!(untrained.dataset(true, true).unwrap().report.untrained_rows, [1]);
        assert!(message(Tensors { labels: Some(&[-100, -7, 7, 7]), ..sound }).contains("-7 is neither"));
    }
}
