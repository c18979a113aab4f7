//! How sequences lie in a packed batch: one after another, without padding.

use std::ops::Range;
use std::sync::Arc;

use engraft_tensor::Tensor;

use crate::Result;

/// Rows and positions of the sequences of a batch; `tokens` rows in all.
#[derive(Clone, Debug)]
pub struct Layout {
    sequences: Arc<[Range<usize>]>,
    virtual_counts: Arc<[usize]>,
    /// Sequences whose virtual rows are padding.
    padded: Arc<[bool]>,
    positions: Arc<[i32]>,
    positions_tensor: Tensor,
    /// Position that each sequence begins at: what stands before it moves it. Empty where all begin at 0.
    begins: Arc<[i32]>,
    /// Length of the rows with their padding, where it is known.
    columns: Option<usize>,
    /// Task of each sequence; empty where none was named.
    tasks: Arc<[usize]>,
    /// Last tokens of each sequence that are asked for; empty where all are given.
    asked: Arc<[usize]>,
}

impl Layout {
    /// Sequences of the given lengths; `positions` holds each token's position, all sequences joined.
    pub fn new(lengths: &[usize], positions: Vec<i32>) -> Result<Self> {
        Self::with_virtual(lengths, vec![0; lengths.len()], positions)
    }

    /// Sequences whose positions count from 0.
    pub fn counted(lengths: &[usize]) -> Result<Self> {
        Self::new(lengths, lengths.iter().flat_map(|&n| 0..n as i32).collect())
    }

    /// Sequences of which the first `virtual_counts[i]` rows are prompt rows.
    pub(crate) fn with_virtual(
        lengths: &[usize],
        virtual_counts: Vec<usize>,
        positions: Vec<i32>,
    ) -> Result<Self> {
        let mut at = 0;
        let sequences: Vec<Range<usize>> = lengths
            .iter()
            .map(|&n| {
                at += n;
                at - n..at
            })
            .collect();
        let positions_tensor = Tensor::from_i32(positions.clone(), [at])?;
        Ok(Layout {
            sequences: sequences.into(),
            padded: vec![false; virtual_counts.len()].into(),
            virtual_counts: virtual_counts.into(),
            positions: positions.into(),
            positions_tensor,
            begins: Arc::default(),
            columns: None,
            tasks: Arc::default(),
            asked: Arc::default(),
        })
    }

    /// Says at which position each sequence begins: rows that are put before it later follow what moved it.
    pub(crate) fn beginning_at(self, begins: Vec<i32>) -> Self {
        Layout { begins: begins.into(), ..self }
    }

    /// The positions that sequences begin at; empty where all begin at 0.
    pub(crate) fn all_begins(&self) -> Vec<i32> {
        self.begins.to_vec()
    }

    /// The position that sequence `i` begins at.
    pub(crate) fn begins(&self, i: usize) -> i32 {
        self.begins.get(i).copied().unwrap_or(0)
    }

    /// Says how long the rows were before their padding was dropped: `dynamic` rotary scaling counts padding.
    pub fn with_columns(self, columns: usize) -> Self {
        Layout { columns: Some(columns), ..self }
    }

    /// Length of the rows with their padding; `None` where they had none.
    pub fn columns(&self) -> Option<usize> {
        self.columns
    }

    /// Says which task each sequence is of; [`crate::Pass::tasks`] tells patches.
    pub fn with_tasks(self, tasks: Vec<usize>) -> Self {
        debug_assert_eq!(tasks.len(), self.sequences.len());
        Layout { tasks: tasks.into(), ..self }
    }

    /// The task of each sequence; empty where none was named.
    pub fn tasks(&self) -> &[usize] {
        &self.tasks
    }

    /// Says how many of each sequence's last tokens are there to be learnt rather than given; [`crate::Pass::given`] leaves
    /// them out, so that what a patch makes of its input does not know the answer.
    pub fn with_asked(self, asked: Vec<usize>) -> Self {
        debug_assert_eq!(asked.len(), self.sequences.len());
        Layout { asked: asked.into(), ..self }
    }

    /// How many of each sequence's last tokens are asked for; empty where all are given.
    pub fn asked(&self) -> &[usize] {
        &self.asked
    }

    /// Says of which sequences the virtual rows are padding: they see their sequence and nobody sees them.
    pub(crate) fn padded(self, which: Vec<bool>) -> Self {
        Layout { padded: which.into(), ..self }
    }

    /// The rows of sequence `i` that its tokens attend to: all but padding.
    pub fn seen(&self, i: usize) -> Range<usize> {
        let s = &self.sequences[i];
        s.start + if self.padded[i] { self.virtual_counts[i] } else { 0 }..s.end
    }

    /// An error if a sequence has no rows: nothing can be computed of it.
    pub fn expect_filled(&self) -> Result<()> {
        match self.sequences.iter().position(Range::is_empty) {
            Some(i) => {
                Err(crate::Error::Unsupported(format!("sequence {i} of the batch is empty; give it a token")))
            }
            None if self.sequences.is_empty() => Err(crate::Error::Unsupported("the batch is empty".into())),
            None => Ok(()),
        }
    }

    /// Whether sequence `i` begins with padding.
    pub fn is_padded(&self, i: usize) -> bool {
        self.padded[i]
    }

    /// Rows of each sequence.
    pub fn sequences(&self) -> &[Range<usize>] {
        &self.sequences
    }

    /// Number of rows.
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Position of each row.
    pub fn positions(&self) -> &[i32] {
        &self.positions
    }

    /// Position of each row, `I32` `[tokens]`.
    pub fn positions_tensor(&self) -> &Tensor {
        &self.positions_tensor
    }

    /// Rows at the start of each sequence that are no tokens: a prompt, or padding.
    pub fn virtual_counts(&self) -> &[usize] {
        &self.virtual_counts
    }

    /// Rows of real tokens, or `None` if there are no others.
    pub fn real_rows(&self) -> Option<Vec<i64>> {
        if self.virtual_counts.iter().all(|&n| n == 0) {
            return None;
        }
        let real = |(s, &n): (&Range<usize>, &usize)| (s.start + n..s.end).map(|i| i as i64);
        Some(self.sequences.iter().zip(self.virtual_counts.iter()).flat_map(real).collect())
    }

    /// The sequences `which` alone, rows counted from 0.
    pub fn slice(&self, which: Range<usize>) -> Result<Layout> {
        let rows = self.rows_of(&which);
        let lengths: Vec<usize> = self.sequences[which.clone()].iter().map(Range::len).collect();
        let padded = self.padded[which.clone()].to_vec();
        let tasks = self.tasks.get(which.clone()).unwrap_or_default().to_vec();
        let asked = self.asked.get(which.clone()).unwrap_or_default().to_vec();
        let begins = self.begins.get(which.clone()).unwrap_or_default().to_vec();
        let virtual_counts = self.virtual_counts[which].to_vec();
        let cut = Self::with_virtual(&lengths, virtual_counts, self.positions[rows].to_vec())?.padded(padded);
        Ok(Layout { tasks: tasks.into(), asked: asked.into(), begins: begins.into(), ..cut })
    }

    /// Rows of the sequences `which`.
    pub fn rows_of(&self, which: &Range<usize>) -> Range<usize> {
        match self.sequences.get(which.clone()) {
            Some([first, .., last]) => first.start..last.end,
            Some([only]) => only.clone(),
            _ => 0..0,
        }
    }
}
