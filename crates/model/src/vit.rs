//! ViT (Dosovitskiy et al. 2021, arXiv:2010.11929) and DeiT (Touvron et al. 2021, arXiv:2012.12877): pre-norm encoders of
//! a picture's patches, of the trained size only.
//!
//! h ← h + O·attend(Q·x, K·x, V·x) with x = norm(h); h ← h + W₂·act(W₁·x) with x = norm(h). The class token's row, normed,
//! is classified. DeiT has a second token, of distillation, before the patches; its class with a teacher has a classifier
//! for each of the two rows, and their mean is the answer.
//!
//! Modules are called as in `transformers` 5 (`layers.0.attention.q_proj`); files and adapters may have the names of
//! version 4 (`encoder.layer.0.attention.attention.query`). Rows are tokens: h [tokens, width].

use std::sync::Arc;

use engraft_nn::{
    Inputs, Kind, Linear, Model, ModelInfo, Norm, Output, Pass, Role, SiteId, Sites, Sublayer, Task,
};
use engraft_tensor::Tensor;
use engraft_tensor::ops::{Unary, cat};

use crate::config::Config;
use crate::facts::{Facts, Flexible};
use crate::picture::{Patches, SelfAttention, Sizes, token_rows};
use crate::reader::{Reader, Renamed};
use crate::{Architecture, Head, Result};

/// ViT.
pub(crate) static VIT: Architecture = Architecture {
    name: "vit",
    classes: &[("ViTForImageClassification", Task::ImageClassification)],
    prefix: "vit.",
    trunk: &["ViTModel"],
    heads: &["classifier.", "decoder."],
    facts: Facts {
        labelled: &["classifier"],
        flexible: &[Flexible::one(Task::ImageClassification, false, &[(1, "classifier")])],
        ..Facts::NONE
    },
    build: |a, c, r, head| build(a, &["cls_token"], c, r, head),
};

/// DeiT.
pub(crate) static DEIT: Architecture = Architecture {
    name: "deit",
    classes: &[
        ("DeiTForImageClassification", Task::ImageClassification),
        (WITH_TEACHER, Task::ImageClassification),
    ],
    prefix: "deit.",
    trunk: &["DeiTModel"],
    heads: &["classifier.", "cls_classifier.", "distillation_classifier.", "decoder."],
    facts: Facts { labelled: &["classifier", "cls_classifier"], ..Facts::NONE },
    build: |a, c, r, head| build(a, &["cls_token", "distillation_token"], c, r, head),
};

/// The class with two classifiers.
const WITH_TEACHER: &str = "DeiTForImageClassificationWithTeacher";

/// What version 4 of `transformers` called the modules.
const OLDER: Renamed = &[
    (".layers.", ".encoder.layer."),
    (".attention.q_proj", ".attention.attention.query"),
    (".attention.k_proj", ".attention.attention.key"),
    (".attention.v_proj", ".attention.attention.value"),
    (".attention.o_proj", ".attention.output.dense"),
    (".mlp.fc1", ".intermediate.dense"),
    (".mlp.fc2", ".output.dense"),
];

/// The model.
struct Vit {
    info: ModelInfo,
    sites: Arc<Sites>,
    patches: Patches,
    layers: Vec<Arc<Layer>>,
    norm: Norm,
    top: Top,
    head_site: SiteId,
}

/// What lies above the blocks.
enum Top {
    /// logits = C·h of the class token.
    Class(Linear),
    /// The mean of both classifiers, each on the row of its token.
    Both { class: Linear, distillation: Linear },
}

/// One block.
struct Layer {
    site: SiteId,
    attention_norm: Norm,
    attention: SelfAttention,
    attention_site: SiteId,
    mlp_norm: Norm,
    up: Linear,
    activation: Unary,
    down: Linear,
    mlp_site: SiteId,
}

fn build(
    architecture: &Architecture,
    tokens: &[&str],
    c: &mut Config<'_>,
    r: &mut Reader<'_>,
    head: Head,
) -> Result<Arc<dyn Model>> {
    let s = Sizes::read(c, r.tensors(), (16, 1e-12));
    let (inner, activation) = (c.needed_size("intermediate_size"), c.activation("hidden_act", Unary::Gelu));
    r.initializer_range = c.number("initializer_range").unwrap_or(0.02) as f32;
    let class = c.get("architectures").and_then(|a| a.get(0)).and_then(|class| class.as_str());
    c.finish()?;
    r.rename(OLDER);
    let at = |name: &str| format!("{}{name}", architecture.path(head.task));
    let patches = Patches::embeddings(&at("embeddings"), tokens, &s, r)?;
    let block =
        |i: usize| Ok(Arc::new(Layer::build(i, &at("encoder"), &at("layers"), &s, (inner, activation), r)?));
    let layers = (0..s.layers).map(block).collect::<Result<_>>()?;
    let norm = r.norm(&at("layernorm"), None, s.width, s.eps, true)?;
    let labels = (head.labels, s.width);
    let top = if class == Some(WITH_TEACHER) {
        Top::Both {
            class: r.head("cls_classifier", Role::Head, labels, true)?,
            distillation: r.head("distillation_classifier", Role::Head, labels, true)?,
        }
    } else {
        Top::Class(r.head("classifier", Role::Head, labels, true)?)
    };
    let inn = if matches!(top, Top::Both { .. }) { 2 * s.width } else { s.width };
    let head_site = r.sites.add("head", Role::Head, None, Kind::Head { inn, out: head.labels });
    let (info, sites) = (s.info(architecture, head, patches.tokens()), r.finish());
    Ok(Arc::new(Vit { info, sites, patches, layers, norm, top, head_site }))
}

impl Layer {
    /// Block `i`; sites of sublayers are called as in AdapterHub, which has the names of version 4.
    fn build(
        i: usize,
        encoder: &str,
        layers: &str,
        s: &Sizes,
        (inner, activation): (usize, Unary),
        r: &mut Reader<'_>,
    ) -> Result<Layer> {
        let layer = Some(i);
        let at = |name: &str| format!("{layers}.{i}.{name}");
        let hub = |name: &str| format!("{encoder}.layer.{i}.{name}");
        let site = r.sites.add(format!("{layers}.{i}"), Role::Block, layer, Kind::Block { width: s.width });
        let sublayer = Kind::Sublayer { width: s.width };
        Ok(Layer {
            site,
            attention_norm: r.norm(&at("layernorm_before"), layer, s.width, s.eps, true)?,
            attention: SelfAttention::build(i, &at("attention"), s, r)?,
            attention_site: r.sites.add(hub("attention_adapters"), Role::Attention, layer, sublayer.clone()),
            mlp_norm: r.norm(&at("layernorm_after"), layer, s.width, s.eps, true)?,
            up: r.linear(&at("mlp.fc1"), Role::Up, layer, (inner, s.width), true)?,
            activation,
            down: r.linear(&at("mlp.fc2"), Role::Down, layer, (s.width, inner), true)?,
            mlp_site: r.sites.add(hub("output.output_adapters"), Role::Mlp, layer, sublayer),
        })
    }

    /// h [tokens, width] → [tokens, width].
    fn forward(&self, h: &Tensor, sites: &Sites, cx: &Pass) -> engraft_nn::Result<Tensor> {
        let x = self.attention_norm.forward(h, cx)?;
        let y = self.attention.forward(&x, sites, cx)?;
        let s = Sublayer { residual: h, input: &x, output: y, norm: None };
        let h = cx.sublayer(sites, self.attention_site, s)?.plus(h)?;
        let x = self.mlp_norm.forward(&h, cx)?;
        let y = self.up.forward(&x, sites, cx)?.unary(self.activation)?;
        let y = self.down.forward(&y, sites, cx)?;
        let s = Sublayer { residual: &h, input: &x, output: y, norm: None };
        Ok(cx.sublayer(sites, self.mlp_site, s)?.plus(&h)?)
    }
}

impl Model for Vit {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn sites(&self) -> &Arc<Sites> {
        &self.sites
    }

    /// The normed rows of the class token [pictures, width], with a teacher beside those of its token [pictures, 2·width].
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
        let normed = |number: usize| -> engraft_nn::Result<(Tensor, Pass)> {
            let rows = token_rows(cx.layout(), number);
            let (pass, count) = (cx.select(&rows)?, rows.len());
            let x = self.norm.forward(&h.gather(&Tensor::from_i64(rows, [count])?)?, &pass)?;
            Ok((x, pass))
        };
        let (class, pass) = normed(0)?;
        let features = match self.top {
            Top::Class(_) => class,
            Top::Both { .. } => cat(&[&class, &normed(1)?.0], 1)?,
        };
        Ok(Output { features, states: None, pass })
    }

    fn logits(&self, features: &Tensor, cx: &Pass) -> engraft_nn::Result<Tensor> {
        let sites = &self.sites;
        cx.head(sites, self.head_site, features, |x, cx| match &self.top {
            Top::Class(classifier) => classifier.forward(x, sites, cx),
            Top::Both { class, distillation } => {
                let half = x.width() / 2;
                let a = class.forward(&x.narrow(1, 0, half)?, sites, cx)?;
                let b = distillation.forward(&x.narrow(1, half, half)?, sites, cx)?;
                Ok(a.add(&b)?.scale(0.5)?)
            }
        })
    }
}
