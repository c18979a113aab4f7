//! Rows of a table of learned positions.
//!
//! BERT's and GPT-2's positions are the tokens' columns, moved by prompts and prefixes. RoBERTa counts what is no padding.

use engraft_nn::{Error, Pass};
use engraft_tensor::Tensor;

/// An error where a position is beyond the table, which has `reach` for tokens and prompts.
pub(crate) fn check_reach(positions: &[i64], reach: usize) -> engraft_nn::Result<()> {
    match positions.iter().max().filter(|&&last| last >= reach as i64) {
        None => Ok(()),
        Some(last) => Err(Error::Unsupported(format!(
            "the input needs {} positions, prompts included; the model has {reach}: cut rows with `data.max_length`",
            last + 1
        ))),
    }
}

/// The positions of all rows of a pass as rows of a table with `reach` rows, `I64` [rows].
pub(crate) fn columns(cx: &Pass, reach: usize) -> engraft_nn::Result<Tensor> {
    let positions: Vec<i64> = cx.layout().positions().iter().map(|&p| i64::from(p)).collect();
    check_reach(&positions, reach)?;
    let rows = positions.len();
    Ok(Tensor::from_i64(positions, [rows])?)
}

/// How an encoder numbers its rows.
pub(crate) struct Numbering {
    /// RoBERTa's way: tokens other than padding are counted.
    pub by_token: bool,
    /// The row of the first position: 0, or RoBERTa's `pad_token_id` + 1.
    pub first: i64,
    /// The id of padding.
    pub pad: i64,
    /// Positions there are.
    pub reach: usize,
}

impl Numbering {
    /// RoBERTa's numbers of the tokens `rows`, whose columns are `columns`: padding has that before the first, the others
    /// count what is no padding. Columns that a mask dropped count where they lie between tokens (a mask over words) and do
    /// not before the first (padding on the left): their ids are not known here.
    fn numbers(&self, ids: &[i64], columns: &[i32], moved: i64) -> Vec<i64> {
        let first = columns.first().map_or(0, |&c| i64::from(c));
        let mut padding = 0;
        let number = |(&id, &column): (&i64, &i32)| match id == self.pad {
            true => {
                padding += 1;
                -1
            }
            false => i64::from(column) - first - padding + moved,
        };
        ids.iter().zip(columns).map(number).collect()
    }

    /// Rows of the position table, `I64` [rows]; `plain` is the pass before prefixes and prompts moved its tokens.
    pub fn rows(&self, tokens: &[i64], plain: &Pass, all: &Pass) -> engraft_nn::Result<Tensor> {
        let (layout, before) = (all.layout(), plain.layout());
        let mut ids: Vec<i64> = Vec::with_capacity(layout.tokens());
        for (i, (s, &virtual_count)) in layout.sequences().iter().zip(layout.virtual_counts()).enumerate() {
            let first = |positions: &[i32], at: usize| positions.get(at).map_or(0, |&p| i64::from(p));
            let token = s.start + virtual_count;
            let moved =
                first(layout.positions(), token) - first(before.positions(), before.sequences()[i].start);
            let padded = layout.is_padded(i);
            if padded {
                // Column 0; RoBERTa gives all padding the position before the first.
                ids.push(if self.by_token { -1 } else { moved });
            }
            if self.by_token && (padded || virtual_count == 0) {
                // Only the number among real tokens counts, and how far a prefix moved them.
                let rows = before.sequences()[i].clone();
                ids.extend(self.numbers(&tokens[rows.clone()], &before.positions()[rows], moved));
            } else {
                ids.extend(layout.positions()[layout.seen(i)].iter().map(|&p| i64::from(p)));
            }
        }
        check_reach(&ids, self.reach)?;
        ids.iter_mut().for_each(|id| *id += self.first);
        Ok(Tensor::from_i64(ids, [layout.tokens()])?)
    }
}
