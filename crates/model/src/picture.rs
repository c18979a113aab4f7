//! What image classifiers share: sizes of pictures, patches with tokens before them, learned positions, attention.
//!
//! A picture [channels, height, width] is cut into patches, each a row; class tokens are put before them, and learned
//! positions are added (Dosovitskiy et al. 2021, arXiv:2010.11929, equation 1). Rows of a soft prompt come before all
//! others and have no position, as in visual prompt tuning; attention has no order, so the class token's row is the
//! first after them. Rows are tokens of all pictures: h [tokens, width].

use engraft_nn::{
    Attend, Convolution, Error as NnError, Inputs, Kind, Layout, Linear, ModelInfo, Parameter, Pass, Picture,
    Role, SiteId, Sites,
};
use engraft_tensor::Tensor;
use engraft_tensor::cpu::attention::AttentionSpec;
use engraft_tensor::ops::cat;
use serde_json::Value;

use crate::config::Config;
use crate::reader::Reader;
use crate::{Architecture, Head, Result};

/// The sizes that the `config.json` of every image classifier has.
pub(crate) struct Sizes {
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    pub eps: f64,
    /// Biases of queries, keys and values.
    pub bias: bool,
    pub picture: Picture,
    /// Height and width of a patch.
    pub patch: (usize, usize),
    /// Whether pictures of other sizes are read as well.
    pub any_size: bool,
}

impl Sizes {
    /// `patch` and `eps` are the defaults.
    pub fn read(c: &mut Config<'_>, tensors: usize, (patch, eps): (usize, f64)) -> Sizes {
        let (width, heads) = (c.needed_size("hidden_size"), c.needed_size("num_attention_heads"));
        if !width.is_multiple_of(heads) {
            c.problem(format!(
                "`hidden_size` ({width}) must be a multiple of `num_attention_heads` ({heads})"
            ));
        }
        let layers = c.layers("num_hidden_layers", None, tensors);
        let (image, patch) = (sides(c, "image_size", 224), sides(c, "patch_size", patch));
        if image.0 < patch.0 || image.1 < patch.1 {
            c.problem(format!(
                "`patch_size` ({} × {}) must not be larger than `image_size` ({} × {})",
                patch.0, patch.1, image.0, image.1
            ));
        }
        let channels = c.size("num_channels").unwrap_or(3);
        Sizes {
            width,
            layers,
            heads,
            eps: c.number("layer_norm_eps").unwrap_or(eps),
            bias: c.flag("qkv_bias", true),
            picture: Picture { channels, height: image.0, width: image.1 },
            patch,
            any_size: false,
        }
    }

    /// Patches down and across a picture of the trained size.
    pub fn grid(&self) -> (usize, usize) {
        (self.picture.height / self.patch.0, self.picture.width / self.patch.1)
    }

    /// What a classifier of these sizes tells of itself; `tokens` lie before the patches.
    pub fn info(&self, architecture: &Architecture, head: Head, tokens: usize) -> ModelInfo {
        let (down, across) = self.grid();
        ModelInfo {
            architecture: architecture.name.into(),
            class: architecture.class_for(head.task, None),
            task: head.task,
            width: self.width,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.heads,
            head_dim: self.dim(),
            vocabulary: 0,
            outputs: head.labels,
            max_positions: tokens + down * across,
            picture: Some(self.picture),
            any_size: self.any_size.then_some(self.patch),
        }
    }

    /// Width of a head.
    pub fn dim(&self) -> usize {
        self.width / self.heads
    }
}

/// Height and width: one number for both, or a list of the two.
fn sides(c: &mut Config<'_>, key: &str, default: usize) -> (usize, usize) {
    const LARGEST: u64 = 1 << 16;
    let size = |v: &Value| v.as_u64().filter(|n| (1..=LARGEST).contains(n)).map(|n| n as usize);
    let expected = format!("a whole number from 1 to {LARGEST}, or a list of two, height and width");
    let found = c.read(key, &expected, |v| match v {
        Value::Array(both) => match both.as_slice() {
            [high, wide] => size(high).zip(size(wide)),
            _ => None,
        },
        one => size(one).map(|n| (n, n)),
    });
    found.unwrap_or((default, default))
}

/// Pictures → rows: patches, the tokens before them, positions.
pub(crate) struct Patches {
    /// The tokens before the patches, in order: the class token, and DeiT's second.
    tokens: Vec<Parameter>,
    prompt: SiteId,
    convolution: Convolution,
    positions: Parameter,
    grid: (usize, usize),
    width: usize,
}

/// Where the parts of [`Patches`] lie.
pub(crate) struct PatchPaths<'a> {
    /// The tokens before the patches, in order.
    pub tokens: &'a [&'a str],
    pub prompt: &'a str,
    pub projection: &'a str,
    pub positions: &'a str,
    /// Whether the file holds the projection's kernels flat, [width, channels · height · width].
    pub flat: bool,
}

impl Patches {
    /// Declares the module `path` as `transformers` names its parts; `tokens` are the names of the tokens before the
    /// patches.
    pub fn embeddings(path: &str, tokens: &[&str], s: &Sizes, r: &mut Reader<'_>) -> Result<Patches> {
        let at = |name: &str| format!("{path}.{name}");
        let tokens: Vec<String> = tokens.iter().map(|name| at(name)).collect();
        let paths = PatchPaths {
            tokens: &tokens.iter().map(String::as_str).collect::<Vec<_>>(),
            prompt: &at("prompt"),
            projection: &at("patch_embeddings.projection"),
            positions: &at("position_embeddings"),
            flat: false,
        };
        let patches = Self::build(&paths, s, r)?;
        // Only pretraining hides patches.
        r.pass_over(&at("mask_token"));
        Ok(patches)
    }

    /// Declares the parts at their paths.
    pub fn build(paths: &PatchPaths<'_>, s: &Sizes, r: &mut Reader<'_>) -> Result<Patches> {
        let token = |path: &&str| r.parameter(path, Role::Embed, None, &[1, 1, s.width]);
        let tokens: Vec<Parameter> = paths.tokens.iter().map(token).collect::<Result<_>>()?;
        let prompt = r.sites.add(paths.prompt, Role::Prompt, None, Kind::Prompt { width: s.width });
        let window = [s.picture.channels, s.patch.0, s.patch.1];
        let convolution = r.convolution(paths.projection, s.width, window, paths.flat)?;
        let (down, across) = s.grid();
        let rows = tokens.len() + down * across;
        let positions = r.parameter(paths.positions, Role::PositionEmbed, None, &[1, rows, s.width])?;
        Ok(Patches { tokens, prompt, convolution, positions, grid: (down, across), width: s.width })
    }

    /// Number of tokens before the patches.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Patches down and across a picture of the trained size.
    pub fn grid(&self) -> (usize, usize) {
        self.grid
    }

    /// Rows of a picture's patches and tokens, those of the prompt included, and the pass that describes them. `first` is
    /// the key-and-value site of the first attention; `positions` makes those of a grid out of the learned ones
    /// [tokens + patches, width].
    pub fn forward(
        &self,
        inputs: &Inputs,
        first: SiteId,
        positions: impl Fn(&Tensor, (usize, usize)) -> engraft_nn::Result<Tensor>,
        sites: &Sites,
        cx: &Pass,
    ) -> engraft_nn::Result<(Tensor, Pass)> {
        let pixels = inputs.pictures()?;
        let grid = self.convolution.grid(pixels)?;
        let mut count = grid.0 * grid.1;
        let pictures = pixels.dim(0);
        let mut cx = cx.over(Layout::counted(&vec![count; pictures])?)?;
        let mut h = self.convolution.forward(pixels, sites, &cx)?;
        for token in self.tokens.iter().rev() {
            h = token.apply(&h, &cx, |h, token, cx| first_of_each(token, h, cx.layout()))?;
            count += 1;
            cx = cx.over(Layout::counted(&vec![count; pictures])?)?;
        }
        let rows = self.tokens.len() + self.grid.0 * self.grid.1;
        let h = self.positions.apply(&h, &cx, |h, learned, _| {
            let all = positions(&learned.reshape([rows, self.width])?, grid)?;
            let flat = [h.dim(0) / count, count * self.width];
            Ok(h.reshape(flat)?.add(&all.reshape([count * self.width])?)?.reshape(h.shape())?)
        })?;
        cx.with_prefixes(first)?.with_prompts(self.prompt, &h)
    }

    /// An error unless the pictures have the size that the model was trained on.
    pub fn expect_trained_size(&self, inputs: &Inputs, trained: Picture) -> engraft_nn::Result<()> {
        let pixels = inputs.pictures()?;
        self.convolution.grid(pixels)?;
        let (height, width) = (pixels.dim(2), pixels.dim(3));
        if (height, width) == (trained.height, trained.width) {
            return Ok(());
        }
        Err(NnError::Unsupported(format!(
            "expected pictures of {} × {} pixels (`image_size` in config.json), found {height} × {width}: resize them",
            trained.height, trained.width
        )))
    }
}

/// `token` [width] before the rows of each sequence.
fn first_of_each(token: &Tensor, h: &Tensor, layout: &Layout) -> engraft_nn::Result<Tensor> {
    let mut index = Vec::with_capacity(h.dim(0) + layout.sequences().len());
    for s in layout.sequences() {
        index.push(0);
        index.extend(s.clone().map(|row| row as i64 + 1));
    }
    let count = index.len();
    Ok(cat(&[&token.reshape([1, token.len()])?, h], 0)?.gather(&Tensor::from_i64(index, [count])?)?)
}

/// The row of the `number`th token of each picture, after the rows of its prompt.
pub(crate) fn token_rows(layout: &Layout, number: usize) -> Vec<i64> {
    let rows = layout.sequences().iter().zip(layout.virtual_counts());
    rows.map(|(s, prompt)| (s.start + prompt + number) as i64).collect()
}

/// Self-attention in which every row sees every row of its picture.
#[derive(Clone)]
pub(crate) struct SelfAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    attend: Attend,
    o: Linear,
    dim: usize,
}

impl SelfAttention {
    /// Declares the module `path`.
    pub fn build(layer: usize, path: &str, s: &Sizes, r: &mut Reader<'_>) -> Result<SelfAttention> {
        let (square, dim) = ((s.width, s.width), s.dim());
        let at = |name: &str| format!("{path}.{name}");
        let q = r.linear(&at("q_proj"), Role::Q, Some(layer), square, s.bias)?;
        let k = r.linear(&at("k_proj"), Role::K, Some(layer), square, s.bias)?;
        let v = r.linear(&at("v_proj"), Role::V, Some(layer), square, s.bias)?;
        let scale = (dim as f32).powf(-0.5);
        let spec =
            AttentionSpec { heads: s.heads, kv_heads: s.heads, dim, scale, causal: false, window: None };
        let attend = Attend::declare(&mut r.sites, path, layer, spec);
        let o = r.linear(&at("o_proj"), Role::O, Some(layer), square, true)?;
        Ok(SelfAttention { q, k, v, attend, o, dim })
    }

    /// The key-and-value site.
    pub fn site(&self) -> SiteId {
        self.attend.site()
    }

    /// x [tokens, width] → [tokens, width].
    pub fn forward(&self, x: &Tensor, sites: &Sites, cx: &Pass) -> engraft_nn::Result<Tensor> {
        let split = |t: Tensor| t.reshape([t.dim(0), t.width() / self.dim, self.dim]); // [tokens, heads, dim]
        let q = split(self.q.forward(x, sites, cx)?)?;
        let k = split(self.k.forward(x, sites, cx)?)?;
        let v = split(self.v.forward(x, sites, cx)?)?;
        let y = self.attend.forward(x, [&q, &k, &v], cx)?;
        self.o.forward(&y.reshape(x.shape())?, sites, cx)
    }
}
