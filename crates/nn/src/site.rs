//! Where a method may attach. Models declare sites; methods choose among them.

mod view;

use std::ops::Range;
use std::sync::Arc;

use engraft_tensor::Tensor;

use crate::Result;
use crate::weight::Weight;

/// Index of a site in its model's [`Sites`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteId(pub usize);

/// What a site does, in words shared by all architectures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Role {
    /// Query, key, value and output projections of self-attention.
    Q,
    K,
    V,
    O,
    /// Query, key and value in one matrix.
    Qkv,
    /// The gate and up projections of a gated MLP; `Up` is also the first matrix of a plain one.
    Gate,
    Up,
    /// The last matrix of an MLP.
    Down,
    /// Cross-attention projections.
    CrossQ,
    CrossK,
    CrossV,
    CrossO,
    /// The cross-attention sublayer, and its keys and values.
    CrossAttention,
    /// Norm gain or bias.
    Norm,
    /// Bias of a linear layer.
    Bias,
    /// Token, position and type embeddings.
    Embed,
    PositionEmbed,
    TypeEmbed,
    /// The projection of a picture's patches.
    PatchEmbed,
    /// The factor on a sublayer's output (layer scale).
    Scale,
    /// A pooling layer between blocks and head.
    Pool,
    /// A matrix of the head.
    Head,
    /// The attention sublayer, the MLP sublayer, a whole block, the embedded input.
    Attention,
    Mlp,
    Block,
    Prompt,
}

impl Role {
    /// The name used in recipes.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(role, _)| *role == self).map_or("", |(_, name)| name)
    }

    /// The role of a name used in recipes.
    pub fn parse(name: &str) -> Option<Role> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(role, _)| *role)
    }

    /// Every role with its name.
    pub const ALL: &'static [(Role, &'static str)] = &[
        (Role::Q, "q"),
        (Role::K, "k"),
        (Role::V, "v"),
        (Role::O, "o"),
        (Role::Qkv, "qkv"),
        (Role::Gate, "gate"),
        (Role::Up, "up"),
        (Role::Down, "down"),
        (Role::CrossQ, "cross.q"),
        (Role::CrossK, "cross.k"),
        (Role::CrossV, "cross.v"),
        (Role::CrossO, "cross.o"),
        (Role::CrossAttention, "cross.attention"),
        (Role::Norm, "norm"),
        (Role::Bias, "bias"),
        (Role::Embed, "embed"),
        (Role::PositionEmbed, "embed.position"),
        (Role::TypeEmbed, "embed.type"),
        (Role::PatchEmbed, "embed.patch"),
        (Role::Scale, "scale"),
        (Role::Pool, "pool"),
        (Role::Head, "head"),
        (Role::Attention, "attention"),
        (Role::Mlp, "mlp"),
        (Role::Block, "block"),
        (Role::Prompt, "prompt"),
    ];
}

/// What may be attached at a site, with the sizes a patch needs.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// A frozen matrix W [out, in] multiplied as x·Wᵀ.
    Linear {
        /// Rows of W.
        out: usize,
        /// Columns of W.
        inn: usize,
        /// Stored as [in, out] (GPT-2's `Conv1D`).
        transposed: bool,
    },
    /// A frozen convolution over windows that do not overlap (a picture's patches): a matrix [out, in] on the windows.
    Convolution {
        /// Kernels.
        out: usize,
        /// Numbers in a window.
        inn: usize,
        /// Shape in the model's file, whose first number is `out`.
        shape: [usize; 4],
    },
    /// A frozen table [rows, width] that is looked up.
    Embedding {
        /// Number of rows.
        rows: usize,
        /// Width of a row.
        width: usize,
    },
    /// A frozen vector: a bias, a norm's gain or bias.
    Vector {
        /// Number of elements.
        len: usize,
    },
    /// The output of attention or MLP before it joins the residual stream.
    Sublayer {
        /// Width of the stream.
        width: usize,
    },
    /// A whole transformer block.
    Block {
        /// Width of the stream.
        width: usize,
    },
    /// Keys and values of an attention.
    KeyValue {
        /// Key and value heads.
        heads: usize,
        /// Width of a head.
        dim: usize,
    },
    /// The embedded input.
    Prompt {
        /// Width of the stream.
        width: usize,
    },
    /// Features → logits.
    Head {
        /// Width of the features.
        inn: usize,
        /// Number of logits.
        out: usize,
    },
}

impl Kind {
    /// Rows of the tensor of such a site; its length, of a vector.
    pub fn rows(&self) -> usize {
        match *self {
            Kind::Linear { out, .. } | Kind::Convolution { out, .. } => out,
            Kind::Embedding { rows, .. } => rows,
            Kind::Vector { len } => len,
            _ => 0,
        }
    }
}

/// The frozen value at a site, where there is one.
#[derive(Clone)]
pub enum Value {
    /// A matrix or table.
    Weight(Arc<Weight>),
    /// A vector.
    Vector(Tensor),
    /// The site is a place, not a tensor.
    None,
}

/// The half of an encoder–decoder model that a site belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stack {
    /// The model has one stack of blocks.
    #[default]
    Only,
    /// What reads the source.
    Encoder,
    /// What writes the target.
    Decoder,
}

/// What the numbers of a model are where it is loaded as it is: `dtype` of its configuration, else that of its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Numbers {
    #[default]
    F32,
    F16,
    BF16,
}

impl Numbers {
    /// A tensor with every number rounded to one of these.
    pub fn rounded(self, t: &Tensor) -> Result<Tensor> {
        let round = |v: f32| match self {
            Numbers::F32 => v,
            Numbers::F16 => half::f16::from_f32(v).to_f32(),
            Numbers::BF16 => half::bf16::from_f32(v).to_f32(),
        };
        if self == Numbers::F32 {
            return Ok(t.clone());
        }
        Ok(Tensor::from_vec(t.to_vec()?.into_iter().map(round).collect(), t.shape())?)
    }
}

/// Which names the modules of a model go by, where `transformers` has changed them between two of its versions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Names {
    /// Those of the version that this program follows.
    #[default]
    Current,
    /// Those of the version before; adapters and targets may use them.
    Older,
}

/// A named place of a model.
#[derive(Clone)]
pub struct Site {
    /// Index in the model.
    pub id: SiteId,
    /// Module path as in `transformers` (a vector: module path and `.weight` or `.bias`), or for sublayers as in
    /// AdapterHub.
    pub path: String,
    /// What it does.
    pub role: Role,
    /// The half of the model it belongs to.
    pub stack: Stack,
    /// Number of the block it belongs to.
    pub layer: Option<usize>,
    /// What may be attached.
    pub kind: Kind,
    /// The frozen value.
    pub value: Value,
    /// Name of the tensor in the model's files; a tied head names the embedding's.
    pub tensor: Option<String>,
    /// The rows of that tensor that are this site's, where the files hold more in it.
    pub rows: Option<Range<usize>>,
    /// The only names under which there is such a module; `None` where both have it.
    pub only: Option<Names>,
    /// The site that has this one's rows under the older names, and the first of them there.
    pub part_of: Option<(SiteId, usize)>,
}

impl Site {
    /// Whether it is a matrix or a table.
    pub fn is_weight(&self) -> bool {
        matches!(self.kind, Kind::Linear { .. } | Kind::Convolution { .. } | Kind::Embedding { .. })
    }

    /// The name of its tensor in `transformers`: `weight` of its module, or that of the vector itself.
    pub fn tensor_name(&self) -> String {
        if self.is_weight() { format!("{}.weight", self.path) } else { self.path.clone() }
    }

    /// Last component of the path.
    pub fn module(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or(&self.path)
    }
}

/// The sites of a model, under one set of names.
#[derive(Clone, Default)]
pub struct Sites {
    all: Vec<Site>,
    stack: Stack,
    names: Names,
    older: Option<Arc<Sites>>,
    numbers: Numbers,
    mlp_reversed: bool,
    /// The layers of each stack that are shown; all if absent.
    layers: Option<Vec<usize>>,
    ties_words: bool,
}

impl Sites {
    /// The half of the model that the sites declared from here on belong to.
    pub fn set_stack(&mut self, stack: Stack) {
        self.stack = stack;
    }

    /// Says what the model's numbers are.
    pub fn set_numbers(&mut self, numbers: Numbers) {
        self.numbers = numbers;
    }

    /// What the model's numbers are, and so the copies of its tensors in the files of adapters.
    pub fn numbers(&self) -> Numbers {
        self.numbers
    }

    /// Says whether AdapterHub's library calls an MLP's last matrix the intermediate one, and the first the output.
    pub fn set_mlp_reversed(&mut self, reversed: bool) {
        self.mlp_reversed = reversed;
    }

    /// Whether AdapterHub's library calls an MLP's last matrix the intermediate one, and the first the output.
    pub fn mlp_reversed(&self) -> bool {
        self.mlp_reversed
    }

    /// Says whether the model's configuration ties tables and heads of words.
    pub fn set_ties_words(&mut self, ties: bool) {
        self.ties_words = ties;
    }

    /// Whether the model's configuration ties tables and heads of words, be their values in the files equal or not:
    /// `tie_word_embeddings` as `transformers` takes it.
    pub fn ties_words(&self) -> bool {
        self.ties_words
    }

    /// Declares a site and returns its index.
    pub fn add(&mut self, path: impl Into<String>, role: Role, layer: Option<usize>, kind: Kind) -> SiteId {
        let (id, stack) = (SiteId(self.all.len()), self.stack);
        self.all.push(Site {
            id,
            path: path.into(),
            role,
            stack,
            layer,
            kind,
            value: Value::None,
            tensor: None,
            rows: None,
            only: None,
            part_of: None,
        });
        id
    }

    /// Declares a site with its frozen value and the name of its tensor.
    pub fn add_value(
        &mut self,
        path: impl Into<String>,
        role: Role,
        layer: Option<usize>,
        kind: Kind,
        value: Value,
        tensor: impl Into<String>,
    ) -> SiteId {
        let id = self.add(path, role, layer, kind);
        self.all[id.0].value = value;
        self.all[id.0].tensor = Some(tensor.into());
        id
    }

    /// Says that the file calls the tensor of the site `path` otherwise (old names of norms).
    pub fn set_tensor(&mut self, path: &str, tensor: impl Into<String>) {
        if let Some(site) = self.all.iter_mut().find(|s| s.path == path) {
            site.tensor = Some(tensor.into());
        }
    }

    /// Says that the tensor of the site `path` is `rows` of the one that the file has under this name.
    pub fn set_rows(&mut self, path: &str, rows: Range<usize>) {
        if let Some(site) = self.all.iter_mut().find(|s| s.path == path) {
            site.rows = Some(rows);
        }
    }

    /// Says that the older names have `whole` where the current ones have `parts`, one after another.
    pub(crate) fn join(&mut self, whole: SiteId, parts: &[(SiteId, usize)]) {
        self.all[whole.0].only = Some(Names::Older);
        let mut first = 0;
        for (part, rows) in parts {
            self.all[part.0].only = Some(Names::Current);
            self.all[part.0].part_of = Some((whole, first));
            first += rows;
        }
    }

    /// The same sites with a view of them under older names; `older` gives the older path of a site.
    pub fn with_older(self, older: impl Fn(&str) -> String) -> Sites {
        let renamed = |site: &Site| Site { path: older(&site.path), ..site.clone() };
        let view = Sites {
            all: self.all.iter().map(renamed).collect(),
            names: Names::Older,
            older: None,
            ..self.clone()
        };
        Sites { older: Some(Arc::new(view)), ..self }
    }

    /// The names that the paths of these sites follow.
    pub fn names(&self) -> Names {
        self.names
    }

    /// The same sites under their older names, if they have such.
    pub fn older(&self) -> Option<&Arc<Sites>> {
        self.older.as_ref()
    }

    /// The same sites under `names`.
    pub fn named(&self, names: Names) -> &Sites {
        match (names, &self.older) {
            (Names::Older, Some(older)) => older,
            _ => self,
        }
    }

    /// All sites in order of declaration. That of weights is the order of the modules of `transformers`: files of `peft` number
    /// their targets by it.
    pub fn iter(&self) -> impl Iterator<Item = &Site> {
        let shown = |s: &&Site| match (&self.layers, s.layer) {
            (Some(layers), Some(layer)) => layers.contains(&layer),
            _ => true,
        };
        self.all.iter().filter(|s| s.only.is_none_or(|only| only == self.names)).filter(shown)
    }

    /// The site of an index that this model gave.
    pub fn get(&self, id: SiteId) -> &Site {
        &self.all[id.0]
    }

    /// The vector site `path.bias` of a linear layer, if it has a bias.
    pub fn bias_of(&self, path: &str) -> Option<&Site> {
        let vector = |s: &&Site| matches!(s.kind, Kind::Vector { .. });
        self.iter().filter(vector).find(|s| s.path.strip_suffix(".bias") == Some(path))
    }

    /// The sites of the task's head: what gives the outputs, and whatever else lies in the outermost module that it is in.
    pub fn head(&self) -> impl Iterator<Item = &Site> {
        let outermost = |s: &Site| s.path.split('.').next().unwrap_or_default().to_owned();
        let of_head: Vec<String> = self.iter().filter(|s| s.role == Role::Head).map(outermost).collect();
        self.iter().filter(move |s| s.layer.is_none() && of_head.contains(&outermost(s)))
    }

    /// The number of a site's block through the whole model: a decoder's go on from the encoder's.
    pub fn number(&self, site: &Site) -> Option<usize> {
        let before = match site.stack {
            Stack::Decoder => {
                let encoder = self.all.iter().filter(|s| s.stack == Stack::Encoder);
                encoder.filter_map(|s| s.layer).max().map_or(0, |last| last + 1)
            }
            _ => 0,
        };
        site.layer.map(|layer| layer + before)
    }

    /// How many blocks are counted so.
    pub fn blocks(&self) -> usize {
        self.all.iter().filter_map(|site| self.number(site)).max().map_or(0, |last| last + 1)
    }

    /// Sites of one kind.
    pub fn of_kind<'a>(&'a self, is: impl Fn(&Kind) -> bool + 'a) -> impl Iterator<Item = &'a Site> {
        self.iter().filter(move |s| is(&s.kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_to_those_of_the_model() {
        let t = Tensor::from_vec(vec![1.0 + 1.0 / 512.0, -0.1, 3e-8], [3]).unwrap();
        let rounded = |numbers: Numbers| numbers.rounded(&t).unwrap().to_vec().unwrap();
        assert_eq!(rounded(Numbers::F32), t.to_vec().unwrap());
        assert_eq!(rounded(Numbers::BF16)[..2], [1.0, -0.100_097_656]);
        assert_eq!(rounded(Numbers::F16), [1.001_953_1, -0.099_975_586, 5.960_464_5e-8]);
    }
}
