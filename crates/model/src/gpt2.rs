//! GPT-2 (Radford et al. 2019): a pre-norm decoder with learned positions.
//!
//! h ← h + O·attend(q, k, v) with (q, k, v) = C·ln(h), one fused projection; h ← h + D·act(U·ln(h)). The input is the sum
//! of token and position embeddings; positions are columns. Matrices of blocks lie in the files as [in, out] (`Conv1D`).
//! The head is the token embedding unless untied. Classifiers read the last token of a sequence, or every token.
//!
//! The dropouts of `config.json` are not applied, as in every model here. Rows are tokens: h [tokens, width].

use std::sync::Arc;

use engraft_nn::{
    Attend, Embedding, Inputs, Kind, Linear, Model, ModelInfo, Norm, Output, Pass, Role, SiteId, Sites,
    Sublayer, Task,
};
use engraft_tensor::Tensor;
use engraft_tensor::cpu::attention::AttentionSpec;
use engraft_tensor::ops::Unary;

use crate::config::Config;
use crate::facts::{Facts, Flexible, Length};
use crate::fused::FusedAttention;
use crate::reader::Reader;
use crate::{Architecture, Head, Result, pooling, positions};

/// GPT-2.
pub(crate) static GPT2: Architecture = Architecture {
    name: "gpt2",
    classes: &[
        ("GPT2LMHeadModel", Task::CausalLm),
        ("GPT2ForSequenceClassification", Task::SequenceClassification),
        ("GPT2ForTokenClassification", Task::TokenClassification),
    ],
    prefix: "transformer.",
    trunk: &["GPT2Model"],
    heads: &["lm_head.weight", "score.weight", "classifier.", "qa_outputs.", "multiple_choice_head."],
    facts: Facts {
        labelled: &["score", "classifier"],
        flexible: &[
            Flexible::one(Task::SequenceClassification, false, &[(1, "score")]),
            Flexible::one(Task::TokenClassification, false, &[(1, "classifier")]),
        ],
        length: Length::Table("n_positions"),
        buffers: &[".attn.bias", ".attn.masked_bias"],
        ..Facts::NONE
    },
    build,
};

/// The sizes in `config.json`.
struct Sizes {
    vocabulary: usize,
    width: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    positions: usize,
    eps: f64,
    activation: Unary,
    /// Whether scores are divided by √dim.
    scaled: bool,
    /// Whether scores of layer i are also divided by i + 1.
    scaled_by_layer: bool,
    tied: bool,
}

impl Sizes {
    fn read(c: &mut Config<'_>, tensors: usize) -> Sizes {
        let (width, heads) = (c.needed_size("n_embd"), c.needed_size("n_head"));
        if !width.is_multiple_of(heads) {
            c.problem(format!("`n_embd` ({width}) must be a multiple of `n_head` ({heads})"));
        }
        let layers = c.layers("n_layer", None, tensors);
        if c.flag("add_cross_attention", false) {
            c.problem("`add_cross_attention` must be false: a GPT-2 that reads an encoder is not there");
        }
        // Only says in which precision `transformers` computes scores; here they are f32.
        c.flag("reorder_and_upcast_attn", false);
        Sizes {
            vocabulary: c.needed_count("vocab_size"),
            width,
            inner: c.size("n_inner").unwrap_or(4 * width),
            layers,
            heads,
            positions: c.count("n_positions").unwrap_or(1024),
            eps: c.number("layer_norm_epsilon").unwrap_or(1e-5),
            activation: c.activation("activation_function", Unary::GeluTanh),
            scaled: c.flag("scale_attn_weights", true),
            scaled_by_layer: c.flag("scale_attn_by_inverse_layer_idx", false),
            tied: c.flag("tie_word_embeddings", true),
        }
    }

    /// The factor on the scores of layer `i`.
    fn scale(&self, i: usize) -> f32 {
        let by_width = if self.scaled { ((self.width / self.heads) as f32).powf(-0.5) } else { 1.0 };
        if self.scaled_by_layer { by_width / (i + 1) as f32 } else { by_width }
    }
}

/// The model.
struct Gpt2 {
    info: ModelInfo,
    sites: Arc<Sites>,
    words: Embedding,
    prompt: SiteId,
    positions: Embedding,
    layers: Vec<Arc<Layer>>,
    norm: Norm,
    head: Linear,
    head_site: SiteId,
}

/// One block.
struct Layer {
    site: SiteId,
    attention_norm: Norm,
    attention: FusedAttention,
    attention_site: SiteId,
    mlp_norm: Norm,
    up: Linear,
    activation: Unary,
    down: Linear,
    mlp_site: SiteId,
}

fn build(
    architecture: &Architecture,
    c: &mut Config<'_>,
    r: &mut Reader<'_>,
    head: Head,
) -> Result<Arc<dyn Model>> {
    let s = Sizes::read(c, r.tensors());
    r.initializer_range = c.number("initializer_range").unwrap_or(0.02) as f32;
    c.finish()?;
    r.sites.set_ties_words(s.tied);
    let tied = head.task == Task::CausalLm && r.tied(s.tied, "lm_head", "transformer.wte");
    let words = r.embedding("transformer.wte", Role::Embed, (s.vocabulary, s.width), tied)?;
    let prompt = r.sites.add("transformer.wte.prompt", Role::Prompt, None, Kind::Prompt { width: s.width });
    let positions = r.embedding("transformer.wpe", Role::PositionEmbed, (s.positions, s.width), false)?;
    let layers = (0..s.layers).map(|i| Ok(Arc::new(Layer::build(i, &s, r)?))).collect::<Result<_>>()?;
    let norm = r.norm("transformer.ln_f", None, s.width, s.eps, true)?;
    let labels = (head.labels, s.width);
    let (last, outputs) = match head.task {
        Task::SequenceClassification => (r.head("score", Role::Head, labels, false)?, head.labels),
        Task::TokenClassification => (r.head("classifier", Role::Head, labels, true)?, head.labels),
        _ => {
            let shared = tied.then_some((&words, "transformer.wte"));
            let (weight, tensor) = r.decoder("lm_head", shared, (s.vocabulary, s.width))?;
            let names = ("lm_head", tensor.as_str());
            (Linear::declare_named(&mut r.sites, names, Role::Head, None, weight, None), s.vocabulary)
        }
    };
    let head_site = r.sites.add("head", Role::Head, None, Kind::Head { inn: s.width, out: outputs });
    let info = ModelInfo {
        architecture: architecture.name.into(),
        class: architecture.class_for(head.task, None),
        task: head.task,
        width: s.width,
        layers: s.layers,
        heads: s.heads,
        kv_heads: s.heads,
        head_dim: s.width / s.heads,
        vocabulary: s.vocabulary,
        outputs,
        picture: None,
        any_size: None,
        max_positions: s.positions,
    };
    let sites = Arc::new(std::mem::take(&mut r.sites));
    Ok(Arc::new(Gpt2 { info, sites, words, prompt, positions, layers, norm, head: last, head_site }))
}

impl Layer {
    fn build(i: usize, s: &Sizes, r: &mut Reader<'_>) -> Result<Layer> {
        let path = format!("transformer.h.{i}");
        let (layer, dim) = (Some(i), s.width / s.heads);
        let at = |name: &str| format!("{path}.{name}");
        let site = r.sites.add(&path, Role::Block, layer, Kind::Block { width: s.width });
        let attention_norm = r.norm(&at("ln_1"), layer, s.width, s.eps, true)?;
        let qkv = r.linear_transposed(&at("attn.c_attn"), Role::Qkv, layer, (3 * s.width, s.width))?;
        let spec = AttentionSpec {
            heads: s.heads,
            kv_heads: s.heads,
            dim,
            scale: s.scale(i),
            causal: true,
            window: None,
        };
        let attend = Attend::declare(&mut r.sites, &at("attn"), i, spec);
        let o = r.linear_transposed(&at("attn.c_proj"), Role::O, layer, (s.width, s.width))?;
        let sublayer = Kind::Sublayer { width: s.width };
        let attention_site = r.sites.add(at("attention_adapters"), Role::Attention, layer, sublayer.clone());
        let mlp_norm = r.norm(&at("ln_2"), layer, s.width, s.eps, true)?;
        let up = r.linear_transposed(&at("mlp.c_fc"), Role::Up, layer, (s.inner, s.width))?;
        let down = r.linear_transposed(&at("mlp.c_proj"), Role::Down, layer, (s.width, s.inner))?;
        let mlp_site = r.sites.add(at("output_adapters"), Role::Mlp, layer, sublayer);
        let attention = FusedAttention { qkv, attend, o, heads: s.heads };
        let activation = s.activation;
        Ok(Layer {
            site,
            attention_norm,
            attention,
            attention_site,
            mlp_norm,
            up,
            activation,
            down,
            mlp_site,
        })
    }

    /// h [tokens, width] → [tokens, width].
    fn forward(&self, h: &Tensor, sites: &Sites, cx: &Pass) -> engraft_nn::Result<Tensor> {
        let x = self.attention_norm.forward(h, cx)?;
        let y = self.attention.forward(&x, sites, cx)?;
        let seen = Sublayer { residual: h, input: &x, output: y, norm: None };
        let h = cx.sublayer(sites, self.attention_site, seen)?.plus(h)?;
        let x = self.mlp_norm.forward(&h, cx)?;
        let y = self.up.forward(&x, sites, cx)?.unary(self.activation)?;
        let y = self.down.forward(&y, sites, cx)?;
        let seen = Sublayer { residual: &h, input: &x, output: y, norm: None };
        Ok(cx.sublayer(sites, self.mlp_site, seen)?.plus(&h)?)
    }
}

impl Model for Gpt2 {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn sites(&self) -> &Arc<Sites> {
        &self.sites
    }

    fn features(&self, inputs: &Inputs, cx: &Pass) -> engraft_nn::Result<Output> {
        inputs.layout.expect_filled()?;
        let cx = cx.with_prefixes(self.layers[0].attention.site())?;
        let words = self.words.forward(inputs.ids()?, &self.sites, &cx)?;
        let (words, cx) = cx.with_prompts(self.prompt, &words)?;
        let rows = positions::columns(&cx, self.info.max_positions)?;
        let mut h = words.add(&self.positions.forward(&rows, &self.sites, &cx)?)?;
        for layer in &self.layers {
            let (this, sites) = (layer.clone(), self.sites.clone());
            h = cx.block(&self.sites, layer.site, &h, move |h, cx| this.forward(h, &sites, cx))?;
        }
        let features = self.norm.forward(&h, &cx)?;
        if self.info.task.per_sequence() {
            pooling::lasts(&features, &cx)
        } else {
            Ok(Output { features, states: None, pass: cx })
        }
    }

    fn logits(&self, features: &Tensor, cx: &Pass) -> engraft_nn::Result<Tensor> {
        cx.head(&self.sites, self.head_site, features, |x, cx| self.head.forward(x, &self.sites, cx))
    }
}
