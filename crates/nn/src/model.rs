//! What every architecture offers.

use std::sync::Arc;

use engraft_tensor::Tensor;

use crate::{Layout, Pass, Result, Sites};

/// What a model's head computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Next-token logits [tokens, vocabulary].
    CausalLm,
    /// Logits of masked tokens [tokens, vocabulary].
    MaskedLm,
    /// Logits [sequences, labels].
    SequenceClassification,
    /// Logits [tokens, labels].
    TokenClassification,
    /// Mean-pooled sentence embedding [sequences, width].
    Embedding,
}

impl Task {
    /// The name used in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Task::CausalLm => "causal-lm",
            Task::MaskedLm => "masked-lm",
            Task::SequenceClassification => "sequence-classification",
            Task::TokenClassification => "token-classification",
            Task::Embedding => "embedding",
        }
    }

    /// Whether the output has a row a sequence, not a row a token.
    pub fn per_sequence(self) -> bool {
        matches!(self, Task::SequenceClassification | Task::Embedding)
    }
}

/// Sizes that methods, plans and generation need.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// `model_type` of `config.json`.
    pub architecture: String,
    /// What the head computes.
    pub task: Task,
    /// Width of the stream.
    pub width: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the token embedding.
    pub vocabulary: usize,
    /// Logits a row.
    pub outputs: usize,
    /// Longest input the model was made for, in tokens.
    pub max_positions: usize,
}

/// A packed batch of tokens.
#[derive(Clone)]
pub struct Inputs {
    /// Token ids, `I64` `[tokens]`.
    pub ids: Tensor,
    /// Token types, `I64` `[tokens]`; zeros if absent.
    pub type_ids: Option<Tensor>,
    /// The sequences; positions are the tokens' columns in their padded rows.
    pub layout: Layout,
}

/// What the trunk computes: features and the pass that describes their rows (prompts add rows).
pub struct Output {
    /// [rows, width].
    pub features: Tensor,
    /// The rows; `layout().real_rows()` are those of real tokens.
    pub pass: Pass,
}

/// An architecture with its frozen weights.
pub trait Model: Send + Sync {
    /// Sizes.
    fn info(&self) -> &ModelInfo;
    /// Where methods may attach.
    fn sites(&self) -> &Arc<Sites>;
    /// Tokens → features [rows, width]; per-sequence tasks give [sequences, width].
    fn features(&self, inputs: &Inputs, cx: &Pass) -> Result<Output>;
    /// features [rows, width] (any ascending selection of rows, with its pass) → logits [rows, outputs].
    fn logits(&self, features: &Tensor, cx: &Pass) -> Result<Tensor>;

    /// Tokens → logits of all real tokens [tokens, outputs], or [sequences, outputs].
    fn forward(&self, inputs: &Inputs, cx: &Pass) -> Result<Tensor> {
        let out = self.features(inputs, cx)?;
        match out.pass.layout().real_rows() {
            Some(rows) if !self.info().task.per_sequence() => {
                let pass = out.pass.select(&rows)?;
                let index = Tensor::from_i64(rows.clone(), [rows.len()])?;
                self.logits(&out.features.gather(&index)?, &pass)
            }
            _ => self.logits(&out.features, &out.pass),
        }
    }
}
