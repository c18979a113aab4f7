//! Sources and targets of encoder–decoder models, as two arrays of different widths.
//!
//! The source is read as [`Tensors`] reads it. Of the target, places that the mask leaves out are dropped and so are
//! ignored labels at the end: the decoder looks back only, so nothing before them changes. Where places in between are
//! masked, the tokens that are left keep their columns as positions, and what the decoder reads must be given, because
//! moving labels right and dropping places do not commute there.

use super::{Tensors, fail, refuse_untrained};
use crate::error::Result;
use crate::example::{Dataset, Example, IGNORED, Labels, Report, Target};

/// Arrays as read, row after row.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seq2SeqTensors<'a> {
    /// The source, without labels.
    pub source: Tensors<'a>,
    /// The shape of `labels`: `[rows, target width]`.
    pub labels_shape: &'a [usize],
    /// −100 is ignored.
    pub labels: &'a [i64],
    /// As `labels`; absent means the labels moved right by one.
    pub decoder_input_ids: Option<&'a [i64]>,
    /// As `labels`, 0 where there is padding; absent means no padding.
    pub decoder_attention_mask: Option<&'a [i64]>,
}

impl Seq2SeqTensors<'_> {
    /// The examples of the rows; with `allow_untrained` rows without a label are left out and reported, not refused.
    ///
    /// # Errors
    /// Arrays whose sizes do not agree, ids out of their range, rows without tokens or without loss.
    pub fn dataset(&self, allow_untrained: bool) -> Result<Dataset> {
        let source = Tensors { labels: None, ..self.source }.dataset(false, false)?;
        let width = match *self.labels_shape {
            [rows, width]
                if rows == self.source.rows && rows.checked_mul(width) == Some(self.labels.len()) =>
            {
                width
            }
            _ => {
                let expected = format!("[{}, target width] to go with input_ids", self.source.rows);
                return Err(fail("labels", format!("expected {expected}, found {:?}", self.labels_shape)));
            }
        };
        for (name, array) in [
            ("decoder_input_ids", self.decoder_input_ids),
            ("decoder_attention_mask", self.decoder_attention_mask),
        ] {
            if let Some(array) = array.filter(|array| array.len() != self.labels.len()) {
                let message =
                    format!("expected {:?} as labels has, found {} values", self.labels_shape, array.len());
                return Err(fail(name, message));
            }
        }
        let mut report = Report { rows: self.source.rows, ..Report::default() };
        let mut examples = Vec::with_capacity(self.source.rows);
        for example in source.examples {
            let labels = Labels::Target(self.target(example.row, width)?);
            let example = Example { labels, ..example };
            match example.trained(false) {
                0 => report.untrained_rows.push(example.row),
                _ => examples.push(example),
            }
        }
        refuse_untrained(&report, allow_untrained)?;
        report.measure(&examples, false);
        Ok(Dataset { examples, report, ..Dataset::default() })
    }

    fn target(&self, row: usize, width: usize) -> Result<Target> {
        let of = |array: &'_ [i64], column: usize| array[row * width + column];
        let is_kept = |column: &usize| self.decoder_attention_mask.is_none_or(|mask| of(mask, *column) != 0);
        let mut kept: Vec<usize> = (0..width).filter(is_kept).collect();
        while kept.last().is_some_and(|column| of(self.labels, *column) == IGNORED) {
            kept.pop();
        }
        let labels: Vec<i64> = kept.iter().map(|column| of(self.labels, *column)).collect();
        if let Some(label) = labels.iter().find(|label| **label != IGNORED && u32::try_from(**label).is_err())
        {
            return Err(fail("labels", format!("row {row}: {label} is neither an id nor {IGNORED}")));
        }
        let gaps = kept.iter().enumerate().any(|(place, column)| place != *column);
        if gaps && self.decoder_input_ids.is_none() {
            let message =
                format!("row {row} masks places before its last label; give decoder_input_ids with it");
            return Err(fail("decoder_attention_mask", message));
        }
        let id = |ids: &[i64], column: usize| {
            u32::try_from(of(ids, column)).map_err(|_| {
                fail("decoder_input_ids", format!("row {row}, column {column}: {} is no id", of(ids, column)))
            })
        };
        let read = |ids| kept.iter().map(|column| id(ids, *column)).collect::<Result<Vec<u32>>>();
        let inputs = self.decoder_input_ids.map(read).transpose()?;
        let positions = gaps.then(|| kept.iter().map(|column| *column as u32).collect());
        Ok(Target { labels, inputs, positions })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Tensors = Tensors {
        rows: 2,
        width: 2,
        input_ids: &[5, 6, 7, 0],
        attention_mask: Some(&[1, 1, 1, 0]),
        token_type_ids: None,
        labels: None,
        task_ids: None,
    };
    const SOUND: Seq2SeqTensors = Seq2SeqTensors {
        source: SOURCE,
        labels_shape: &[2, 3],
        labels: &[8, -100, 1, 9, 1, -100],
        decoder_input_ids: None,
        decoder_attention_mask: None,
    };

    fn target(data: &Dataset, row: usize) -> &Target {
        match &data.examples[row].labels {
            Labels::Target(target) => target,
            other => panic!("a target expected, found {other:?}"),
        }
    }

    #[test]
    fn padding_goes_and_ignored_labels_within_stay() {
        let data = SOUND.dataset(false).unwrap();
        assert_eq!((data.examples[1].ids.as_slice(), data.examples[1].row), (&[7][..], 1));
        assert_eq!(target(&data, 0).labels, [8, -100, 1]);
        assert_eq!(target(&data, 1), &Target { labels: vec![9, 1], inputs: None, positions: None });
        assert_eq!((data.report.tokens, data.report.trained_share), (3, 0.8));
    }

    #[test]
    fn a_mask_moves_positions_only_with_inputs() {
        let masked = Seq2SeqTensors { decoder_attention_mask: Some(&[0, 1, 1, 1, 1, 0]), ..SOUND };
        let error = masked.dataset(false).unwrap_err().to_string();
        assert!(error.contains("row 0 masks places before its last label"), "{error}");
        let given = Seq2SeqTensors { decoder_input_ids: Some(&[0, 2, 8, 0, 9, 0]), ..masked };
        let data = given.dataset(false).unwrap();
        let expected =
            Target { labels: vec![-100, 1], inputs: Some(vec![2, 8]), positions: Some(vec![1, 2]) };
        assert_eq!(target(&data, 0), &expected);
        assert_eq!(target(&data, 1).inputs.as_deref(), Some(&[0, 9][..]));
    }

    #[test]
    fn shapes_ids_and_empty_rows_are_checked() {
        let message = |tensors: Seq2SeqTensors| tensors.dataset(false).unwrap_err().to_string();
        let wrong = message(Seq2SeqTensors { labels_shape: &[6], ..SOUND });
        assert!(wrong.contains("expected [2, target width] to go with input_ids, found [6]"), "{wrong}");
        assert!(message(Seq2SeqTensors { labels_shape: &[3, 2], ..SOUND }).contains("found [3, 2]"));
        let short = Seq2SeqTensors { decoder_input_ids: Some(&[1]), ..SOUND };
        assert!(message(short).contains("expected [2, 3] as labels has, found 1 values"));
        assert!(message(Seq2SeqTensors { labels: &[8, -2, 1, 9, 1, 1], ..SOUND }).contains("-2 is neither"));
        let negative = Seq2SeqTensors { decoder_input_ids: Some(&[0, 0, 0, 0, -1, 0]), ..SOUND };
        assert!(message(negative).contains("row 1, column 1: -1 is no id"));
        let empty = Seq2SeqTensors { labels: &[8, 1, 1, -100, -100, -100], ..SOUND };
        assert!(message(empty).contains("1 of 2 rows have nothing to learn (rows 1)"));
        assert_eq!(empty.dataset(true).unwrap().report.untrained_rows, [1]);
    }
}
