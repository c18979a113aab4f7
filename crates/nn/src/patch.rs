//! What may be attached: one trait a kind of site.

use engraft_tensor::Tensor;

use crate::{Pass, Result, Site};

/// A weight as a patch sees it: the frozen one, or one that earlier patches of the same site already changed.
pub trait Base {
    /// (out, in), or (rows, width) of a table.
    fn shape(&self) -> (usize, usize);
    /// x [tokens, in] → x·Wᵀ [tokens, out], without bias.
    fn forward(&self, x: &Tensor) -> Result<Tensor>;
    /// ids `[tokens]` → rows of W [tokens, width].
    fn lookup(&self, ids: &Tensor) -> Result<Tensor>;
    /// W [out, in].
    fn dense(&self) -> Result<Tensor>;
    /// ‖row‖² of every row of W `[out]`, where W is frozen and they need be computed once; `None` under patches.
    fn row_squares(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

/// W → W′. The definition makes it mergeable; `forward` and `lookup` may be faster and are checked against it.
pub trait WeightPatch: Send + Sync {
    /// W′ [out, in].
    fn weight(&self, base: &dyn Base) -> Result<Tensor>;

    /// x [tokens, in] → x·W′ᵀ [tokens, out].
    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        Ok(x.matmul_t(&self.weight(base)?)?)
    }

    /// ids `[tokens]` → rows of W′ [tokens, width].
    fn lookup(&self, ids: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        Ok(self.weight(base)?.gather(ids)?)
    }

    /// Whether W′ is all there is: false where the output depends on the input in another way.
    fn mergeable(&self) -> bool {
        true
    }

    /// Whether all that W′ lacks is a constant added to the output, for which the layer has no bias.
    fn lacks_bias(&self) -> bool {
        false
    }
}

/// v → v′.
pub trait VectorPatch: Send + Sync {
    /// v′, length of v.
    fn vector(&self, v: &Tensor) -> Result<Tensor>;
}

/// A function on rows [tokens, width].
pub type RowsFn<'a> = dyn Fn(&Tensor) -> Result<Tensor> + 'a;

/// What a sublayer patch sees; all tensors [tokens, width].
pub struct Sublayer<'a> {
    /// The stream that the output will be added to.
    pub residual: &'a Tensor,
    /// What the sublayer read (normed in pre-norm models).
    pub input: &'a Tensor,
    /// What the sublayer computed.
    pub output: Tensor,
    /// In post-norm models, the norm applied to `residual + output`.
    pub norm: Option<&'a RowsFn<'a>>,
}

/// (residual, input, output) → output′.
pub trait SublayerPatch: Send + Sync {
    /// output′ [tokens, width].
    fn output(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor>;

    /// Whether `output` is, in post-norm models, the next stream itself, to which neither residual nor norm are applied.
    fn replaces_norm(&self) -> bool {
        false
    }
}

/// h, run → h′.
pub trait BlockPatch: Send + Sync {
    /// Rows that it puts before each sequence ([`Pass::with_rows_before`]): a cache must have room for them.
    fn rows_before(&self) -> usize {
        0
    }
    /// h [tokens, width] → h′; `run` is the block itself and may be called never, once or more: with the pass `cx`, or with
    /// one of other rows made of it ([`Pass::select`], [`Pass::with_rows_before`]).
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        site: &Site,
        cx: &Pass,
    ) -> Result<Tensor>;
}

/// Extra keys and values: `count` for all sequences of a route, or `count` for each of them, one sequence after another.
pub struct KeyValues {
    /// [count, kv_heads, dim] or [sequences · count, kv_heads, dim], not rotated.
    pub keys: Tensor,
    /// As the keys.
    pub values: Tensor,
}

/// → extra keys and values, optionally gated.
pub trait KeyValuePatch: Send + Sync {
    /// Number of extra rows that a sequence sees.
    fn count(&self) -> usize;
    /// The rows. `input` [tokens, width] is what the sequences' own keys and values are made of (of gated rows: what the
    /// queries are made of). With a cache, rows without a gate are made once, in the first pass.
    fn rows(&self, input: &Tensor, cx: &Pass) -> Result<KeyValues>;
    /// `None`: the rows join the sequence's own in one softmax and tokens move by `count` positions (prefix tuning).
    /// A gate `[heads]`: the rows are attended to in a softmax of their own, whose result is scaled by the gate and
    /// added, and positions stay (LLaMA-Adapter).
    fn gate(&self) -> Option<Tensor> {
        None
    }
    /// Whether tokens move by `count` positions, as in `peft`; else rows without a gate lie before the first position, as
    /// in AdapterHub.
    fn moves(&self) -> bool {
        true
    }
    /// By how many positions tokens move, where it is at the first self-attention of its stack.
    fn moved(&self) -> usize {
        if self.moves() { self.count() } else { 0 }
    }
    /// Whether, in a model of relative positions, tokens lie further behind the queries by the rows that do not move them: as
    /// AdapterHub counts the distances of a T5, whose queries it leaves where they are.
    fn widens(&self) -> bool {
        false
    }
    /// Whether rows without a gate, which do not move tokens, are to be seen from everywhere: an attention with a window cannot
    /// show them to what lies further behind, and says so.
    fn stays_in_view(&self) -> bool {
        false
    }
}

/// → rows put before the embedded tokens of every sequence of a route.
pub trait PromptPatch: Send + Sync {
    /// Number of rows before a sequence.
    fn count(&self) -> usize;
    /// [count, width] for all sequences, or [sequences · count, width], one sequence after another. `embedded`
    /// [tokens, width] are the tokens' own rows. With a cache, called in the first pass only.
    fn rows(&self, embedded: &Tensor, cx: &Pass) -> Result<Tensor>;
}

/// features → logits.
pub trait HeadPatch: Send + Sync {
    /// features [rows, in] → logits [rows, out]; `run` is the model's own head.
    fn logits(
        &self,
        features: &Tensor,
        run: &dyn Fn(&Tensor) -> Result<Tensor>,
        site: &Site,
        cx: &Pass,
    ) -> Result<Tensor>;
}

/// What sits at one site.
pub enum Patch {
    /// At a linear or embedding site.
    Weight(Box<dyn WeightPatch>),
    /// At a vector site.
    Vector(Box<dyn VectorPatch>),
    /// At a sublayer site.
    Sublayer(Box<dyn SublayerPatch>),
    /// At a block site.
    Block(Box<dyn BlockPatch>),
    /// At a key-and-value site.
    KeyValue(Box<dyn KeyValuePatch>),
    /// At the prompt site.
    Prompt(Box<dyn PromptPatch>),
    /// At the head site.
    Head(Box<dyn HeadPatch>),
}

impl Patch {
    /// Whether it can sit at a site of this kind.
    pub fn fits(&self, kind: &crate::Kind) -> bool {
        use crate::Kind;
        matches!(
            (self, kind),
            (Patch::Weight(_), Kind::Linear { .. } | Kind::Convolution { .. } | Kind::Embedding { .. })
                | (Patch::Vector(_), Kind::Vector { .. })
                | (Patch::Sublayer(_), Kind::Sublayer { .. })
                | (Patch::Block(_), Kind::Block { .. })
                | (Patch::KeyValue(_), Kind::KeyValue { .. })
                | (Patch::Prompt(_), Kind::Prompt { .. })
                | (Patch::Head(_), Kind::Head { .. })
        )
    }
}
