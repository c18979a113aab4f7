//! The error type of training.

use std::path::PathBuf;

/// What can go wrong between a recipe and a finished run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Mistakes of the recipe, found with the model and the data at hand.
    #[error(transparent)]
    Recipe(#[from] engraft_recipe::Problems),
    /// Rows, tokenizer or template.
    #[error(transparent)]
    Data(#[from] engraft_data::Error),
    /// Files.
    #[error(transparent)]
    Store(#[from] engraft_store::Error),
    /// The model's directory.
    #[error(transparent)]
    Load(#[from] engraft_model::Error),
    /// The model, the adapter or a method.
    #[error(transparent)]
    Model(#[from] engraft_nn::Error),
    /// A tensor operation.
    #[error(transparent)]
    Tensor(#[from] engraft_tensor::Error),
    /// The run's own events cannot be read again.
    #[error(transparent)]
    Report(#[from] engraft_report::Error),
    /// The files fit neither each other nor what was asked.
    #[error("{0}")]
    Setup(String),
    /// A choice that a saved adapter does not leave open, or that it cannot have.
    #[error("{0}")]
    Choice(String),
    /// A checkpoint, or the run it belongs to, is not that of this recipe.
    #[error("{0}")]
    Resume(String),
    /// Stopped from outside before there was anything to save.
    #[error("interrupted before the first step; nothing was saved yet")]
    Interrupted,
    /// A loss or gradient is not a number; nothing was updated.
    #[error(transparent)]
    NotFinite(#[from] Box<NotFinite>),
    /// Checkpoints could not be written, several times in a row.
    #[error("{attempts} checkpoints in a row could not be written, the last at step {step}: {source}")]
    Checkpoint {
        /// Saves that failed in a row.
        attempts: u32,
        /// The step of the last attempt.
        step: u64,
        /// Why the last one failed.
        source: engraft_store::Error,
    },
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Where a run lost its numbers.
#[derive(Debug, thiserror::Error)]
#[error("{}{}{}{}", self.title(), rows_text(self), tensors_text(self), kept_text(self))]
pub struct NotFinite {
    /// "loss" or "gradient norm".
    pub what: &'static str,
    /// What it is: NaN or infinite.
    pub value: f32,
    /// The step that was not taken.
    pub step: u64,
    /// Its rows, as lines of `file`.
    pub rows: Vec<usize>,
    /// The training file.
    pub file: PathBuf,
    /// Gradient norms of the last finite steps, oldest first.
    pub grad_norms: Vec<f32>,
    /// Trained tensors whose gradient is not finite.
    pub tensors: Vec<String>,
    /// The newest checkpoint.
    pub kept: Option<PathBuf>,
    /// Nothing was trained yet, so that it comes from the base, the start of the adapter or the data.
    pub untrained: bool,
    /// A tensor that was not finite from the start; looked for where nothing was trained yet.
    pub cause: Option<String>,
}

impl NotFinite {
    fn title(&self) -> String {
        let Self { what, value, step, .. } = self;
        match (self.untrained, &self.cause) {
            (false, _) => format!("{what} became {value} at step {step}"),
            (true, Some(tensor)) => format!(
                "the first {what} is {value}, before anything was trained: {tensor} holds values that are not finite"
            ),
            (true, None) => format!(
                "the first {what} is {value}, before anything was trained: the weights are finite, so these data, or the \
                 type of the computation, make values that are not"
            ),
        }
    }
}

/// "rows 8113, 40, 977 of train.jsonl; gradient norm 0.8 → 412 in 5 steps".
fn rows_text(e: &NotFinite) -> String {
    let shown: Vec<String> = e.rows.iter().take(8).map(usize::to_string).collect();
    let more = if e.rows.len() > 8 { format!(" and {} more", e.rows.len() - 8) } else { String::new() };
    let file = e.file.file_name().unwrap_or(e.file.as_os_str()).to_string_lossy();
    let mut text = format!("\nrows {}{more} of {file}", shown.join(", "));
    if let [first, .., last] = &e.grad_norms[..] {
        text.push_str(&format!("; gradient norm {first:.3} → {last:.3} in {} steps", e.grad_norms.len()));
    }
    text
}

fn tensors_text(e: &NotFinite) -> String {
    match &e.tensors[..] {
        [] => String::new(),
        [only] => format!("\nnot finite: the gradient of {only}"),
        [first, rest @ ..] => format!("\nnot finite: the gradients of {first} and {} more", rest.len()),
    }
}

fn kept_text(e: &NotFinite) -> String {
    e.kept.as_ref().map_or(String::new(), |path| format!("\nkept  {}", path.display()))
}
