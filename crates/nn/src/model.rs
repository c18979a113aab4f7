//! What every architecture offers.

use std::sync::Arc;

use engraft_tensor::Tensor;

use crate::{Error, Layout, Pass, Result, Sites};

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
    /// Logits of the next target token [target tokens, vocabulary], given a source.
    Seq2Seq,
    /// Logits [pictures, labels].
    ImageClassification,
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
            Task::Seq2Seq => "seq2seq",
            Task::ImageClassification => "image-classification",
        }
    }

    /// Whether the output has a row a sequence, not a row a token.
    pub fn per_sequence(self) -> bool {
        matches!(self, Task::SequenceClassification | Task::Embedding | Task::ImageClassification)
    }

    /// Whether what it tells apart are classes of the data, so that the head may be made anew.
    pub fn is_classification(self) -> bool {
        matches!(self, Task::SequenceClassification | Task::TokenClassification | Task::ImageClassification)
    }
}

/// Sizes that methods, plans and generation need.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// `model_type` of `config.json`.
    pub architecture: String,
    /// Name of the class of `transformers` that has this head; `None` where there is none.
    pub class: Option<&'static str>,
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
    /// Size of the pictures that it was trained on, and reads unless `any_size` says more.
    pub picture: Option<Picture>,
    /// Height and width of a patch, where it reads pictures of any size from one patch on.
    pub any_size: Option<(usize, usize)>,
}

/// Size of the pictures that a model was trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Picture {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
}

/// What a model reads: a packed batch.
#[derive(Clone)]
pub struct Inputs {
    /// The sequences; positions are the tokens' columns in their padded rows. A picture is a sequence of one row, until
    /// its model cuts it into patches.
    pub layout: Layout,
    /// What the sequences are made of.
    pub source: Source,
    /// What the decoder of an encoder–decoder model reads, a sequence for each of the source's.
    pub target: Option<Target>,
}

/// What the sequences of a batch are made of.
#[derive(Clone)]
pub enum Source {
    /// Words.
    Tokens {
        /// Token ids, `I64` `[tokens]`.
        ids: Tensor,
        /// Token types, `I64` `[tokens]`; zeros if absent.
        types: Option<Tensor>,
    },
    /// Pictures [pictures, channels, height, width].
    Pixels(Tensor),
}

/// A packed batch of target tokens.
#[derive(Clone)]
pub struct Target {
    /// Token ids, `I64` `[target tokens]`.
    pub ids: Tensor,
    /// The sequences.
    pub layout: Layout,
}

impl Inputs {
    /// Words: ids `I64` `[tokens]` and, where the model has them, their types.
    pub fn tokens(ids: Tensor, types: Option<Tensor>, layout: Layout) -> Inputs {
        Inputs { layout, source: Source::Tokens { ids, types }, target: None }
    }

    /// Pictures [pictures, channels, height, width].
    pub fn pixels(pixels: Tensor) -> Result<Inputs> {
        let layout = Layout::counted(&vec![1; pixels.dim(0)])?;
        Ok(Inputs { layout, source: Source::Pixels(pixels), target: None })
    }

    /// The same with a target for each sequence.
    pub fn with_target(self, ids: Tensor, layout: Layout) -> Inputs {
        Inputs { target: Some(Target { ids, layout }), ..self }
    }

    /// Token ids, for models that read words.
    pub fn ids(&self) -> Result<&Tensor> {
        match &self.source {
            Source::Tokens { ids, .. } => Ok(ids),
            Source::Pixels(_) => {
                Err(Error::Unsupported("this model reads tokens; these are pictures".into()))
            }
        }
    }

    /// Token types, where they were given.
    pub fn types(&self) -> Option<&Tensor> {
        match &self.source {
            Source::Tokens { types, .. } => types.as_ref(),
            Source::Pixels(_) => None,
        }
    }

    /// Pictures, for models that read them.
    pub fn pictures(&self) -> Result<&Tensor> {
        match &self.source {
            Source::Pixels(pixels) => Ok(pixels),
            Source::Tokens { .. } => {
                Err(Error::Unsupported("this model reads pictures; these are tokens".into()))
            }
        }
    }

    /// The target, for encoder–decoder models.
    pub fn target(&self) -> Result<&Target> {
        let absent = || Error::Unsupported("this model needs decoder inputs beside its inputs".into());
        self.target.as_ref().ok_or_else(absent)
    }
}

/// What the trunk computes: features and the pass that describes their rows (prompts add rows).
pub struct Output {
    /// [rows, width].
    pub features: Tensor,
    /// What the last block gave of all rows, normed where the head reads it so, in models of text whose features are those of
    /// sequences.
    pub states: Option<Tensor>,
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
