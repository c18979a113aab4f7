//! DINOv2 (Oquab et al. 2024, arXiv:2304.07193): a pre-norm encoder of a picture's patches, of any size.
//!
//! h ← h + λ₁ ⊙ O·attend(Q·x, K·x, V·x) with x = norm(h); h ← h + λ₂ ⊙ mlp(norm(h)), λ the layer scales (Touvron et al.
//! 2021, arXiv:2103.17239). mlp(x) = W₂·act(W₁·x), or D·(silu(G·x) ⊙ U·x). The learned positions of a square grid are
//! stretched to the picture's by bicubic interpolation. Classified are the class token's row and the mean of the patches',
//! side by side.
//!
//! Modules are called as in `transformers` 5 (`attention.q_proj`, `mlp.gate_proj`); files and adapters may have the names
//! of version 4 (`attention.attention.query`, and `mlp.weights_in` for gate and up together). Rows are tokens:
//! h [tokens, width].

use std::sync::Arc;

use engraft_nn::{
    Inputs, Joined, Kind, Linear, Model, ModelInfo, Norm, Output, Parameter, Pass, Role, SiteId, Sites,
    Sublayer, Task,
};
use engraft_tensor::Tensor;
use engraft_tensor::ops::{Unary, cat, silu_mul};

use crate::config::Config;
use crate::facts::Facts;
use crate::picture::{Patches, SelfAttention, Sizes, token_rows};
use crate::pooling::means;
use crate::reader::{Reader, Renamed};
use crate::stretch::stretched;
use crate::{Architecture, Head, Result};

/// DINOv2.
pub(crate) static DINOV2: Architecture = Architecture {
    name: "dinov2",
    classes: &[("Dinov2ForImageClassification", Task::ImageClassification)],
    prefix: "dinov2.",
    trunk: &["Dinov2Model"],
    heads: &["classifier."],
    facts: Facts { labelled: &["classifier"], ..Facts::NONE },
    build,
};

/// What version 4 of `transformers` called the modules; gate and up were one, `mlp.weights_in`.
const OLDER: Renamed = &[
    (".attention.q_proj", ".attention.attention.query"),
    (".attention.k_proj", ".attention.attention.key"),
    (".attention.v_proj", ".attention.attention.value"),
    (".attention.o_proj", ".attention.output.dense"),
    (".mlp.down_proj", ".mlp.weights_out"),
];

/// The model.
struct Dinov2 {
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
    attention_norm: Norm,
    attention: SelfAttention,
    attention_scale: Parameter,
    attention_site: SiteId,
    mlp_norm: Norm,
    mlp: Mlp,
    mlp_scale: Parameter,
    mlp_site: SiteId,
}

enum Mlp {
    /// W₂·act(W₁·x).
    Plain { up: Linear, activation: Unary, down: Linear },
    /// D·(silu(G·x) ⊙ U·x).
    Gated { gate_and_up: Joined, down: Linear },
}

/// The inner width of the MLP, and its kind.
#[derive(Clone, Copy)]
struct Inner {
    width: usize,
    gated: bool,
    activation: Unary,
}

impl Inner {
    fn read(width: usize, c: &mut Config<'_>) -> Inner {
        let plain = (width as f64 * c.number("mlp_ratio").unwrap_or(4.0)).min(f64::from(1 << 24)) as usize;
        let gated = c.flag("use_swiglu_ffn", false);
        // Two thirds of the plain width, rounded up to a multiple of 8.
        let width = if gated { ((plain as f64 * 2.0 / 3.0) as usize).next_multiple_of(8) } else { plain };
        if width == 0 {
            c.problem("`mlp_ratio` times `hidden_size` must be at least 1");
        }
        Inner { width, gated, activation: c.activation("hidden_act", Unary::Gelu) }
    }
}

fn build(
    architecture: &Architecture,
    c: &mut Config<'_>,
    r: &mut Reader<'_>,
    head: Head,
) -> Result<Arc<dyn Model>> {
    let mut s = Sizes::read(c, r.tensors(), (14, 1e-6));
    s.any_size = true;
    let (inner, (down, across)) = (Inner::read(s.width, c), s.grid());
    if down != across {
        c.problem(format!(
            "`image_size` and `patch_size` must give as many patches down as across, found {down} and {across}"
        ));
    }
    r.initializer_range = c.number("initializer_range").unwrap_or(0.02) as f32;
    c.finish()?;
    r.rename(OLDER);
    let at = |name: &str| format!("{}{name}", architecture.path(head.task));
    let patches = Patches::embeddings(&at("embeddings"), &["cls_token"], &s, r)?;
    let block = |i: usize| Ok(Arc::new(Layer::build(i, &at(&format!("encoder.layer.{i}")), &s, inner, r)?));
    let layers = (0..s.layers).map(block).collect::<Result<_>>()?;
    let norm = r.norm(&at("layernorm"), None, s.width, s.eps, true)?;
    let inn = 2 * s.width;
    let classifier = r.head("classifier", Role::Head, (head.labels, inn), true)?;
    let head_site = r.sites.add("head", Role::Head, None, Kind::Head { inn, out: head.labels });
    let (info, sites) = (s.info(architecture, head, patches.tokens()), r.finish());
    Ok(Arc::new(Dinov2 { info, sites, patches, layers, norm, classifier, head_site }))
}

impl Layer {
    fn build(i: usize, path: &str, s: &Sizes, inner: Inner, r: &mut Reader<'_>) -> Result<Layer> {
        let layer = Some(i);
        let at = |name: &str| format!("{path}.{name}");
        let site = r.sites.add(path, Role::Block, layer, Kind::Block { width: s.width });
        let sublayer = Kind::Sublayer { width: s.width };
        let scale = |name: &str, r: &mut Reader<'_>| {
            r.parameter(&at(&format!("{name}.lambda1")), Role::Scale, layer, &[s.width])
        };
        Ok(Layer {
            site,
            attention_norm: r.norm(&at("norm1"), layer, s.width, s.eps, true)?,
            attention: SelfAttention::build(i, &at("attention"), s, r)?,
            attention_scale: scale("layer_scale1", r)?,
            attention_site: r.sites.add(at("attention_adapters"), Role::Attention, layer, sublayer.clone()),
            mlp_norm: r.norm(&at("norm2"), layer, s.width, s.eps, true)?,
            mlp: Mlp::build(layer, &at("mlp"), s.width, inner, r)?,
            mlp_scale: scale("layer_scale2", r)?,
            mlp_site: r.sites.add(at("output_adapters"), Role::Mlp, layer, sublayer),
        })
    }

    /// h [tokens, width] → [tokens, width].
    fn forward(&self, h: &Tensor, sites: &Sites, cx: &Pass) -> engraft_nn::Result<Tensor> {
        let scaled = |scale: &Parameter, y: &Tensor| scale.apply(y, cx, |y, scale, _| Ok(y.mul(scale)?));
        let x = self.attention_norm.forward(h, cx)?;
        let y = scaled(&self.attention_scale, &self.attention.forward(&x, sites, cx)?)?;
        let s = Sublayer { residual: h, input: &x, output: y, norm: None };
        let h = cx.sublayer(sites, self.attention_site, s)?.plus(h)?;
        let x = self.mlp_norm.forward(&h, cx)?;
        let y = scaled(&self.mlp_scale, &self.mlp.forward(&x, sites, cx)?)?;
        let s = Sublayer { residual: &h, input: &x, output: y, norm: None };
        Ok(cx.sublayer(sites, self.mlp_site, s)?.plus(&h)?)
    }
}

impl Mlp {
    fn build(
        layer: Option<usize>,
        path: &str,
        width: usize,
        inner: Inner,
        r: &mut Reader<'_>,
    ) -> Result<Mlp> {
        let at = |name: &str| format!("{path}.{name}");
        let (up, down) = ((inner.width, width), (width, inner.width));
        if !inner.gated {
            return Ok(Mlp::Plain {
                up: r.linear(&at("fc1"), Role::Up, layer, up, true)?,
                activation: inner.activation,
                down: r.linear(&at("fc2"), Role::Down, layer, down, true)?,
            });
        }
        let parts = [(at("gate_proj"), Role::Gate), (at("up_proj"), Role::Up)];
        Ok(Mlp::Gated {
            gate_and_up: r.joined(&at("weights_in"), parts, layer, up)?,
            down: r.linear(&at("down_proj"), Role::Down, layer, down, true)?,
        })
    }

    /// x [tokens, width] → [tokens, width].
    fn forward(&self, x: &Tensor, sites: &Sites, cx: &Pass) -> engraft_nn::Result<Tensor> {
        match self {
            Mlp::Plain { up, activation, down } => {
                down.forward(&up.forward(x, sites, cx)?.unary(*activation)?, sites, cx)
            }
            Mlp::Gated { gate_and_up, down } => {
                let parts = gate_and_up.forward(x, sites, cx)?;
                down.forward(&silu_mul(&parts[0], &parts[1])?, sites, cx)
            }
        }
    }
}

impl Model for Dinov2 {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn sites(&self) -> &Arc<Sites> {
        &self.sites
    }

    /// The class token's normed row beside the mean of the patches' [pictures, 2·width].
    fn features(&self, inputs: &Inputs, cx: &Pass) -> engraft_nn::Result<Output> {
        inputs.layout.expect_filled()?;
        let (first, tokens) = (self.layers[0].attention.site(), self.patches.tokens());
        let positions = |all: &Tensor, grid: (usize, usize)| {
            let trained = self.patches.grid();
            if grid == trained {
                return Ok(all.clone());
            }
            let (own, patches) = (all.rows_between(0, tokens)?, all.rows_between(tokens, all.dim(0))?);
            Ok(cat(&[&own, &stretched(&patches, trained, grid)?], 0)?)
        };
        let (mut h, cx) = self.patches.forward(inputs, first, positions, &self.sites, cx)?;
        for layer in &self.layers {
            let (this, sites) = (layer.clone(), self.sites.clone());
            h = cx.block(&self.sites, layer.site, &h, move |h, cx| this.forward(h, &sites, cx))?;
        }
        let h = self.norm.forward(&h, &cx)?;
        let rows = token_rows(cx.layout(), 0);
        let (pass, count) = (cx.select(&rows)?, rows.len());
        let class = h.gather(&Tensor::from_i64(rows, [count])?)?;
        let features = cat(&[&class, &means(&h, cx.layout(), tokens)?], 1)?;
        Ok(Output { features, states: None, pass })
    }

    fn logits(&self, features: &Tensor, cx: &Pass) -> engraft_nn::Result<Tensor> {
        let sites = &self.sites;
        cx.head(sites, self.head_site, features, |x, cx| self.classifier.forward(x, sites, cx))
    }
}
