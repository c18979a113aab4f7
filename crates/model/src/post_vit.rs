//! A small ViT as plain PyTorch code builds it: post-norm blocks, no class token, the mean of all patches classified.
//!
//! h ← norm(h + O·attend(q, k, v)) with (q, k, v) = C·h, one fused projection (`torch.nn.MultiheadAttention`, whose tensors
//! are `in_proj_weight` and `in_proj_bias`); h ← norm(h + W₂·act(W₁·h)), as in Vaswani et al. 2017 (arXiv:1706.03762). The
//! patches are those of Dosovitskiy et al. 2021 (arXiv:2010.11929), their kernels stored flat, [width, channels · height ·
//! width of a patch]. Classified is the mean of the normed rows of the last block.
//!
//! No class of `transformers` is like it; a `config.json` without `model_type` is known by `norm` and `pooling`.
//! Rows are tokens: h [tokens, width].

use std::sync::Arc;

use engraft_nn::{
    Attend, Inputs, Kind, Linear, Model, ModelInfo, Norm, Output, Pass, Role, SiteId, Sites, Sublayer, Task,
};
use engraft_tensor::Tensor;
use engraft_tensor::cpu::attention::AttentionSpec;
use engraft_tensor::ops::Unary;

use crate::config::Config;
use crate::facts::Facts;
use crate::fused::FusedAttention;
use crate::picture::{PatchPaths, Patches, Sizes, token_rows};
use crate::pooling::means;
use crate::reader::Reader;
use crate::{Architecture, Head, Result};

/// The post-norm ViT.
pub(crate) static POST_VIT: Architecture = Architecture {
    name: "post-norm-vit",
    classes: &[("PostNormViTForImageClassification", Task::ImageClassification)],
    prefix: "",
    trunk: &[],
    heads: &["classifier."],
    facts: Facts { labelled: &["classifier"], known_by: &KNOWN_BY, ..Facts::NONE },
    build,
};

/// What a `config.json` of it says when it names no `model_type`.
const KNOWN_BY: [(&str, &str); 2] = [("norm", "post"), ("pooling", "mean")];

/// The model.
struct PostVit {
    info: ModelInfo,
    sites: Arc<Sites>,
    patches: Patches,
    layers: Vec<Arc<Layer>>,
    norm: Norm,
    classifier: Linear,
    head_site: SiteId,
}

/// One block.
struct Layer {
    site: SiteId,
    attention: FusedAttention,
    attention_norm: Norm,
    attention_site: SiteId,
    up: Linear,
    activation: Unary,
    down: Linear,
    mlp_norm: Norm,
    mlp_site: SiteId,
}

fn build(
    architecture: &Architecture,
    c: &mut Config<'_>,
    r: &mut Reader<'_>,
    head: Head,
) -> Result<Arc<dyn Model>> {
    let s = Sizes::read(c, r.tensors(), (16, 1e-5));
    let (inner, activation) = (c.needed_size("intermediate_size"), c.activation("hidden_act", Unary::Gelu));
    for (key, value) in KNOWN_BY {
        if c.text(key).is_some_and(|found| found != value) {
            c.problem(format!("`{key}` must be \"{value}\"; another is not there"));
        }
    }
    c.finish()?;
    let paths = PatchPaths {
        tokens: &[],
        prompt: "patch_embed.prompt",
        projection: "patch_embed.proj",
        positions: "pos_embed",
        flat: true,
    };
    let patches = Patches::build(&paths, &s, r)?;
    let block = |i: usize| Ok(Arc::new(Layer::build(i, &s, (inner, activation), r)?));
    let layers = (0..s.layers).map(block).collect::<Result<_>>()?;
    let norm = r.norm("norm", None, s.width, s.eps, true)?;
    let classifier = r.head("classifier", Role::Head, (head.labels, s.width), true)?;
    let head_site = r.sites.add("head", Role::Head, None, Kind::Head { inn: s.width, out: head.labels });
    // A class of plain PyTorch.
    let (info, sites) = (ModelInfo { class: None, ..s.info(architecture, head, 0) }, r.finish());
    Ok(Arc::new(PostVit { info, sites, patches, layers, norm, classifier, head_site }))
}

impl Layer {
    fn build(i: usize, s: &Sizes, (inner, activation): (usize, Unary), r: &mut Reader<'_>) -> Result<Layer> {
        let path = format!("encoder.{i}");
        let (layer, dim) = (Some(i), s.dim());
        let at = |name: &str| format!("{path}.{name}");
        let site = r.sites.add(&path, Role::Block, layer, Kind::Block { width: s.width });
        let qkv = r.linear_underscored(&at("attn.in_proj"), Role::Qkv, layer, (3 * s.width, s.width))?;
        let (heads, scale) = (s.heads, (dim as f32).powf(-0.5));
        let spec = AttentionSpec { heads, kv_heads: heads, dim, scale, causal: false, window: None };
        let attend = Attend::declare(&mut r.sites, &at("attn"), i, spec);
        let o = r.linear(&at("attn.out_proj"), Role::O, layer, (s.width, s.width), true)?;
        let sublayer = Kind::Sublayer { width: s.width };
        let attention = FusedAttention { qkv, attend, o, heads };
        let attention_site = r.sites.add(at("attention_adapters"), Role::Attention, layer, sublayer.clone());
        let attention_norm = r.norm(&at("norm1"), layer, s.width, s.eps, true)?;
        let up = r.linear(&at("ffn.fc1"), Role::Up, layer, (inner, s.width), true)?;
        let down = r.linear(&at("ffn.fc2"), Role::Down, layer, (s.width, inner), true)?;
        let mlp_site = r.sites.add(at("output_adapters"), Role::Mlp, layer, sublayer);
        let mlp_norm = r.norm(&at("norm2"), layer, s.width, s.eps, true)?;
        Ok(Layer {
            site,
            attention,
            attention_norm,
            attention_site,
            up,
            activation,
            down,
            mlp_norm,
            mlp_site,
        })
    }

    /// h [tokens, width] → [tokens, width].
    fn forward(&self, h: &Tensor, sites: &Sites, cx: &Pass) -> engraft_nn::Result<Tensor> {
        let y = self.attention.forward(h, sites, cx)?;
        let seen = Sublayer { residual: h, input: h, output: y, norm: None };
        let h = cx.post_norm(sites, self.attention_site, seen, &self.attention_norm)?;
        let y = self.up.forward(&h, sites, cx)?.unary(self.activation)?;
        let y = self.down.forward(&y, sites, cx)?;
        let seen = Sublayer { residual: &h, input: &h, output: y, norm: None };
        cx.post_norm(sites, self.mlp_site, seen, &self.mlp_norm)
    }
}

impl Model for PostVit {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn sites(&self) -> &Arc<Sites> {
        &self.sites
    }

    /// The mean of the normed rows of each picture [pictures, width], those of a prompt left out.
    fn features(&self, inputs: &Inputs, cx: &Pass) -> engraft_nn::Result<Output> {
        inputs.layout.expect_filled()?;
        if let Some(trained) = self.info.picture {
            self.patches.expect_trained_size(inputs, trained)?;
        }
        let first = self.layers[0].attention.site();
        let learned = |all: &Tensor, _: (usize, usize)| Ok(all.clone());
        let (mut h, cx) = self.patches.forward(inputs, first, learned, &self.sites, cx)?;
        for layer in &self.layers {
            let (this, sites) = (layer.clone(), self.sites.clone());
            h = cx.block(&self.sites, layer.site, &h, move |h, cx| this.forward(h, &sites, cx))?;
        }
        let h = self.norm.forward(&h, &cx)?;
        // One row for each picture, whichever it is: the pass tells whose they are.
        let pass = cx.select(&token_rows(cx.layout(), 0))?;
        Ok(Output { features: means(&h, cx.layout(), 0)?, states: None, pass })
    }

    fn logits(&self, features: &Tensor, cx: &Pass) -> engraft_nn::Result<Tensor> {
        let sites = &self.sites;
        cx.head(sites, self.head_site, features, |x, cx| self.classifier.forward(x, sites, cx))
    }
}
