//! Rows of text to examples, one task a file.

mod causal;
mod classify;
mod completion;
mod masked;
mod seq2seq;
mod tags;

pub(crate) use classify::sorted;
pub use masked::mask;

use crate::error::Result;
use crate::example::{Dataset, Example, Report};
use crate::read::{Need, Row, Rows};
use crate::template::ChatTemplate;
use crate::tensors::refuse_untrained;
use crate::tokenizer::Tokenizer;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// The class of a text or a pair.
    Classify,
    /// A number for a text or a pair.
    Regress,
    /// A tag for each word.
    Tags,
    /// The next token, on text cut into blocks.
    Causal,
    /// The next token, on answers only.
    Completion,
    /// The completion, by a decoder that reads what an encoder made of the prompt.
    Seq2Seq,
    /// Hidden tokens; which are hidden is drawn anew in each epoch by [`mask`].
    Masked,
}

impl Task {
    /// What it needs of each row.
    pub fn need(self) -> Need {
        match self {
            Task::Classify | Task::Regress => Need::Label,
            Task::Tags => Need::Tags,
            Task::Causal | Task::Masked => Need::Text,
            Task::Completion | Task::Seq2Seq => Need::Completion,
        }
    }

    /// Whether the objective predicts the next token, so that the first label of a row has no input before it.
    pub fn shifted(self) -> bool {
        matches!(self, Task::Causal | Task::Completion)
    }
}

/// How rows become examples.
#[derive(Default)]
pub struct EncodeOptions<'a> {
    /// Tokens a row; longer rows are cut and counted. Text is cut into blocks of so many.
    pub max_length: usize,
    /// The names of the classes or tags, in the order of their numbers; those of the training part, for evaluation.
    /// Without names they are found in the rows and sorted (as numbers if all are).
    pub labels: Option<Vec<String>>,
    /// The chat template, for conversations.
    pub template: Option<&'a ChatTemplate>,
    /// Leaves rows without a trained token out (and reports them) instead of refusing them.
    pub allow_empty: bool,
}

/// The examples of `rows` for `task`.
///
/// # Errors
/// A row that the task cannot use (its line is named), a label that is not among the names, rows without a trained
/// token unless allowed, and what the tokenizer and the template refuse.
pub fn encode(rows: &Rows, tokenizer: &Tokenizer, task: Task, options: &EncodeOptions) -> Result<Dataset> {
    let mut maker = Maker { rows, tokenizer, options, report: Report::default(), labels: None };
    maker.report.rows = rows.rows.len();
    maker.report.guesses = rows.guesses.clone();
    let examples = match task {
        Task::Classify => maker.classes()?,
        Task::Regress => maker.scores()?,
        Task::Tags => maker.tags()?,
        Task::Causal => maker.blocks()?,
        Task::Completion => maker.completions()?,
        Task::Seq2Seq => maker.targets()?,
        Task::Masked => maker.masked()?,
    };
    let mut kept = Vec::with_capacity(examples.len());
    for example in examples {
        if example.trained(task.shifted()) == 0 {
            maker.report.untrained_rows.push(example.row);
        } else {
            kept.push(example);
        }
    }
    refuse_untrained(&maker.report, options.allow_empty)?;
    maker.report.measure(&kept, task.shifted());
    Ok(Dataset { examples: kept, images: None, labels: maker.labels, report: maker.report })
}

/// What the tasks share while they go over the rows.
struct Maker<'a> {
    rows: &'a Rows,
    tokenizer: &'a Tokenizer,
    options: &'a EncodeOptions<'a>,
    report: Report,
    labels: Option<Vec<String>>,
}

impl Maker<'_> {
    /// Counts a row that lost `lost` tokens.
    fn cut(&mut self, lost: usize) {
        if lost > 0 {
            self.report.truncated_rows += 1;
            self.report.truncated_tokens += lost;
        }
    }

    /// Cuts an example at the limit.
    fn cut_example(&mut self, example: &mut Example) {
        let limit = self.options.max_length;
        self.cut(example.ids.len().saturating_sub(limit));
        example.ids.truncate(limit);
        if let crate::Labels::Tokens(labels) = &mut example.labels {
            labels.truncate(limit);
        }
    }

    /// An error for rows whose fields are not what the task takes.
    fn unfit(&self, row: &Row, expected: &str) -> crate::Error {
        self.rows
            .fail(row.line, format!("the task takes {expected}; this row holds something else (check task)"))
    }
}

#[cfg(test)]
mod tests;
