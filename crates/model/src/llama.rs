//! Llama (Touvron et al. 2023, arXiv:2302.13971) and its relatives Mistral, Qwen2 and Qwen3: pre-norm decoders.
//!
//! h ← h + O·attend(rope(Q·x), rope(K·x), V·x) with x = rms(h); h ← h + D·(act(G·x) ⊙ U·x) with x = rms(h); grouped
//! heads share keys and values. Mistral sees a window of positions, Qwen2 has biases on q, k and v, Qwen3 an RMS norm over
//! each head of q and k. Checked against `transformers` 5. Rows are tokens: h [tokens, width], q [tokens, heads, dim].

use std::sync::Arc;

use engraft_nn::{
    Attend, Embedding, Inputs, Kind, Layout, Linear, Model, ModelInfo, Norm, Output, Pass, Role, SiteId,
    Sites, Sublayer, Task,
};
use engraft_tensor::Tensor;
use engraft_tensor::cpu::attention::AttentionSpec;
use engraft_tensor::ops::{Unary, rope, silu_mul};

use crate::config::Config;
use crate::facts::{Facts, Flexible, Length};
use crate::pooling;
use crate::reader::Reader;
use crate::rope::{Rope, Tables};
use crate::{Architecture, Head, Result};

/// The heads of `transformers`' classes for causal models: words, sequence or token classes, spans.
const HEADS: &[&str] = &["lm_head.weight", "score.weight", "score.bias", "qa_outputs."];

/// The sizes of its tables are no limit: positions are rotations.
const FACTS: Facts = Facts {
    labelled: &["score"],
    length: Length::Trained("max_position_embeddings"),
    flexible: &[Flexible::one(Task::SequenceClassification, false, &[(1, "score")])],
    ..Facts::NONE
};

/// Those of the two models that AdapterHub's library has classes of its own for.
const OWN_CLASS: Facts = Facts { mlp_reversed: true, ..FACTS };

/// Llama.
pub(crate) static LLAMA: Architecture = Architecture {
    name: "llama",
    classes: &[
        ("LlamaForCausalLM", Task::CausalLm),
        ("LlamaForSequenceClassification", Task::SequenceClassification),
    ],
    prefix: "model.",
    trunk: &["LlamaModel"],
    heads: HEADS,
    facts: OWN_CLASS,
    build: |a, c, r, head| build(a, Family { kv_heads: None, ..OTHERS }, c, r, head),
};

/// Mistral.
pub(crate) static MISTRAL: Architecture = Architecture {
    name: "mistral",
    classes: &[
        ("MistralForCausalLM", Task::CausalLm),
        ("MistralForSequenceClassification", Task::SequenceClassification),
    ],
    prefix: "model.",
    trunk: &["MistralModel"],
    heads: HEADS,
    facts: OWN_CLASS,
    build: |a, c, r, head| {
        build(a, Family { kv_heads: Some(8), window: Window::Everywhere, ..OTHERS }, c, r, head)
    },
};

/// Qwen2 and Qwen2.5.
pub(crate) static QWEN2: Architecture = Architecture {
    name: "qwen2",
    classes: &[
        ("Qwen2ForCausalLM", Task::CausalLm),
        ("Qwen2ForSequenceClassification", Task::SequenceClassification),
    ],
    prefix: "model.",
    trunk: &["Qwen2Model"],
    heads: HEADS,
    facts: FACTS,
    build: |a, c, r, head| build(a, Family { qkv_bias: true, window: Window::ByLayer, ..OTHERS }, c, r, head),
};

/// Qwen3.
pub(crate) static QWEN3: Architecture = Architecture {
    name: "qwen3",
    classes: &[
        ("Qwen3ForCausalLM", Task::CausalLm),
        ("Qwen3ForSequenceClassification", Task::SequenceClassification),
    ],
    prefix: "model.",
    trunk: &["Qwen3Model"],
    heads: HEADS,
    facts: FACTS,
    build: |a, c, r, head| {
        let family = Family { head_dim: Some(128), head_norms: true, window: Window::ByLayer, ..OTHERS };
        build(a, family, c, r, head)
    },
};

/// What the relatives differ in beyond their `config.json`.
struct Family {
    /// Defaults where `config.json` is silent; `None` follows from the other sizes.
    kv_heads: Option<usize>,
    head_dim: Option<usize>,
    /// Biases on q, k and v whatever `config.json` says.
    qkv_bias: bool,
    /// Norms over the heads of q and k.
    head_norms: bool,
    window: Window,
}

const OTHERS: Family = Family {
    kv_heads: Some(32),
    head_dim: None,
    qkv_bias: false,
    head_norms: false,
    window: Window::Nowhere,
};

/// Which layers see a window of positions only.
enum Window {
    Nowhere,
    Everywhere,
    /// As `layer_types` says, or from `max_window_layers` on.
    ByLayer,
}

/// The sizes in `config.json`.
struct Sizes {
    vocabulary: usize,
    width: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    positions: usize,
    eps: f64,
    /// Biases of q, k and v; of o; of the MLP.
    bias: (bool, bool, bool),
    head_norms: bool,
    tied: bool,
    activation: Unary,
    /// Window of each layer.
    windows: Vec<Option<usize>>,
}

impl Sizes {
    fn read(family: &Family, c: &mut Config<'_>, tensors: usize) -> Sizes {
        let (width, heads) = (c.needed_size("hidden_size"), c.needed_size("num_attention_heads"));
        let layers = c.layers("num_hidden_layers", None, tensors);
        let kv_heads = c.size("num_key_value_heads").or(family.kv_heads).unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            c.problem(format!(
                "`num_attention_heads` ({heads}) must be a multiple of `num_key_value_heads` ({kv_heads})"
            ));
        }
        let given_dim = c.size("head_dim").or(family.head_dim);
        if given_dim.is_none() && !width.is_multiple_of(heads) {
            c.problem(format!(
                "`hidden_size` ({width}) must be a multiple of `num_attention_heads` ({heads})"
            ));
        }
        let attention_bias = c.flag("attention_bias", false);
        Sizes {
            vocabulary: c.needed_count("vocab_size"),
            width,
            inner: c.needed_size("intermediate_size"),
            layers,
            heads,
            kv_heads,
            dim: given_dim.unwrap_or(width / heads),
            positions: c.count("max_position_embeddings").unwrap_or(2048),
            eps: c.number("rms_norm_eps").unwrap_or(1e-6),
            bias: (
                attention_bias || family.qkv_bias,
                attention_bias && !family.qkv_bias,
                c.flag("mlp_bias", false),
            ),
            head_norms: family.head_norms,
            tied: c.flag("tie_word_embeddings", false),
            activation: c.activation("hidden_act", Unary::Silu),
            windows: windows(&family.window, c, layers),
        }
    }
}

/// The window of each layer.
fn windows(family: &Window, c: &mut Config<'_>, layers: usize) -> Vec<Option<usize>> {
    let window = c.count("sliding_window");
    match family {
        Window::Nowhere => vec![None; layers],
        Window::Everywhere => vec![window; layers],
        Window::ByLayer => {
            let window = if c.flag("use_sliding_window", false) { window.or(Some(4096)) } else { None };
            let first = c.index("max_window_layers").unwrap_or(28);
            match c.texts("layer_types") {
                None => (0..layers).map(|i| window.filter(|_| i >= first)).collect(),
                Some(types) if types.len() == layers => {
                    types.iter().map(|t| window.filter(|_| *t == "sliding_attention")).collect()
                }
                Some(types) => {
                    c.problem(format!(
                        "`layer_types` names {} layers, `num_hidden_layers` is {layers}",
                        types.len()
                    ));
                    vec![None; layers]
                }
            }
        }
    }
}

/// The model.
struct Llama {
    info: ModelInfo,
    sites: Arc<Sites>,
    embed: Embedding,
    prompt: SiteId,
    layers: Vec<Arc<Layer>>,
    norm: Norm,
    head: Linear,
    head_site: SiteId,
    rope: Arc<Rope>,
}

/// One block.
struct Layer {
    site: SiteId,
    attention_norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    /// Norms over the heads of q and k.
    head_norms: Option<(Norm, Norm)>,
    attend: Attend,
    o: Linear,
    attention_site: SiteId,
    mlp_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
    mlp_site: SiteId,
    activation: Unary,
    dim: usize,
}

fn build(
    architecture: &Architecture,
    family: Family,
    c: &mut Config<'_>,
    r: &mut Reader<'_>,
    head: Head,
) -> Result<Arc<dyn Model>> {
    let s = Sizes::read(&family, c, r.tensors());
    let rope = Rope::read(c, s.dim, s.positions);
    r.initializer_range = c.number("initializer_range").unwrap_or(0.02) as f32;
    c.finish()?;
    let classifier = head.task == Task::SequenceClassification;
    r.sites.set_ties_words(s.tied);
    let tied = !classifier && r.tied(s.tied, "lm_head", "model.embed_tokens");
    let embed = r.embedding("model.embed_tokens", Role::Embed, (s.vocabulary, s.width), tied)?;
    let prompt =
        r.sites.add("model.embed_tokens.prompt", Role::Prompt, None, Kind::Prompt { width: s.width });
    let layers = (0..s.layers).map(|i| Ok(Arc::new(Layer::build(i, &s, r)?))).collect::<Result<_>>()?;
    let norm = r.norm("model.norm", None, s.width, s.eps, false)?;
    let outputs = if classifier { head.labels } else { s.vocabulary };
    let lm_head = if classifier {
        r.head("score", Role::Head, (outputs, s.width), false)?
    } else {
        let shared = tied.then_some((&embed, "model.embed_tokens"));
        let (weight, tensor) = r.decoder("lm_head", shared, (outputs, s.width))?;
        Linear::declare_named(&mut r.sites, ("lm_head", &tensor), Role::Head, None, weight, None)
    };
    let head_site = r.sites.add("head", Role::Head, None, Kind::Head { inn: s.width, out: outputs });
    let info = ModelInfo {
        architecture: architecture.name.into(),
        class: architecture.class_for(head.task, None),
        task: head.task,
        width: s.width,
        layers: s.layers,
        heads: s.heads,
        kv_heads: s.kv_heads,
        head_dim: s.dim,
        vocabulary: s.vocabulary,
        outputs,
        picture: None,
        any_size: None,
        max_positions: rope.reach(s.positions),
    };
    let sites = Arc::new(std::mem::take(&mut r.sites));
    Ok(Arc::new(Llama {
        info,
        sites,
        embed,
        prompt,
        layers,
        norm,
        head: lm_head,
        head_site,
        rope: Arc::new(rope),
    }))
}

impl Layer {
    fn build(i: usize, s: &Sizes, r: &mut Reader<'_>) -> Result<Layer> {
        let path = format!("model.layers.{i}");
        let (layer, queries, keys) = (Some(i), s.heads * s.dim, s.kv_heads * s.dim);
        let at = |name: &str| format!("{path}.{name}");
        let site = r.sites.add(&path, Role::Block, layer, Kind::Block { width: s.width });
        let attention_norm = r.norm(&at("input_layernorm"), layer, s.width, s.eps, false)?;
        let q = r.linear(&at("self_attn.q_proj"), Role::Q, layer, (queries, s.width), s.bias.0)?;
        let k = r.linear(&at("self_attn.k_proj"), Role::K, layer, (keys, s.width), s.bias.0)?;
        let v = r.linear(&at("self_attn.v_proj"), Role::V, layer, (keys, s.width), s.bias.0)?;
        let head_norms = if s.head_norms {
            let q_norm = r.norm(&at("self_attn.q_norm"), layer, s.dim, s.eps, false)?;
            Some((q_norm, r.norm(&at("self_attn.k_norm"), layer, s.dim, s.eps, false)?))
        } else {
            None
        };
        let spec = AttentionSpec {
            heads: s.heads,
            kv_heads: s.kv_heads,
            dim: s.dim,
            scale: (s.dim as f32).powf(-0.5),
            causal: true,
            window: s.windows[i],
        };
        let attend = Attend::declare(&mut r.sites, &at("self_attn"), i, spec);
        let o = r.linear(&at("self_attn.o_proj"), Role::O, layer, (s.width, queries), s.bias.1)?;
        let sublayer = Kind::Sublayer { width: s.width };
        let attention_site = r.sites.add(at("attention_adapters"), Role::Attention, layer, sublayer.clone());
        let mlp_norm = r.norm(&at("post_attention_layernorm"), layer, s.width, s.eps, false)?;
        let gate = r.linear(&at("mlp.gate_proj"), Role::Gate, layer, (s.inner, s.width), s.bias.2)?;
        let up = r.linear(&at("mlp.up_proj"), Role::Up, layer, (s.inner, s.width), s.bias.2)?;
        let down = r.linear(&at("mlp.down_proj"), Role::Down, layer, (s.width, s.inner), s.bias.2)?;
        let mlp_site = r.sites.add(at("output_adapters"), Role::Mlp, layer, sublayer);
        let (activation, dim) = (s.activation, s.dim);
        Ok(Layer {
            site,
            attention_norm,
            q,
            k,
            v,
            head_norms,
            attend,
            o,
            attention_site,
            mlp_norm,
            gate,
            up,
            down,
            mlp_site,
            activation,
            dim,
        })
    }

    /// h [tokens, width] → [tokens, width].
    fn forward(&self, h: &Tensor, sites: &Sites, tables: &Tables, cx: &Pass) -> engraft_nn::Result<Tensor> {
        let x = self.attention_norm.forward(h, cx)?;
        let y = self.attention(&x, sites, tables, cx)?;
        let y = cx.sublayer(
            sites,
            self.attention_site,
            Sublayer { residual: h, input: &x, output: y, norm: None },
        )?;
        let h = y.plus(h)?;
        let x = self.mlp_norm.forward(&h, cx)?;
        let (gate, up) = (self.gate.forward(&x, sites, cx)?, self.up.forward(&x, sites, cx)?);
        let y = match self.activation {
            Unary::Silu => silu_mul(&gate, &up)?,
            other => gate.unary(other)?.mul(&up)?,
        };
        let y = self.down.forward(&y, sites, cx)?;
        let y =
            cx.sublayer(sites, self.mlp_site, Sublayer { residual: &h, input: &x, output: y, norm: None })?;
        Ok(y.plus(&h)?)
    }

    /// x [tokens, width] → [tokens, width].
    fn attention(
        &self,
        x: &Tensor,
        sites: &Sites,
        (cos, sin): &Tables,
        cx: &Pass,
    ) -> engraft_nn::Result<Tensor> {
        let split = |t: Tensor| t.reshape([t.dim(0), t.width() / self.dim, self.dim]); // [tokens, heads, dim]
        let mut q = split(self.q.forward(x, sites, cx)?)?;
        let mut k = split(self.k.forward(x, sites, cx)?)?;
        let v = split(self.v.forward(x, sites, cx)?)?;
        if let Some((q_norm, k_norm)) = &self.head_norms {
            (q, k) = (q_norm.forward(&q, cx)?, k_norm.forward(&k, cx)?);
        }
        let positions = cx.layout().positions_tensor();
        let (q, k) = (rope(&q, cos, sin, positions)?, rope(&k, cos, sin, positions)?);
        let y = self.attend.forward(x, [&q, &k, &v], cx)?;
        self.o.forward(&y.reshape([y.dim(0), y.dim(1) * y.dim(2)])?, sites, cx)
    }
}

/// Positions of rows that lie so.
fn longest(layout: &Layout) -> usize {
    layout.positions().iter().max().map_or(1, |p| (p + 1).max(1) as usize)
}

impl Model for Llama {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn sites(&self) -> &Arc<Sites> {
        &self.sites
    }

    fn features(&self, inputs: &Inputs, cx: &Pass) -> engraft_nn::Result<Output> {
        inputs.layout.expect_filled()?;
        let cx = cx.with_prefixes(self.layers[0].attend.site())?;
        let h = self.embed.forward(inputs.ids()?, &self.sites, &cx)?;
        let (mut h, cx) = cx.with_prompts(self.prompt, &h)?;
        // Padding counts too, as in `transformers`; prompts and prefixes move it like the tokens.
        let (given, moved) = (longest(&inputs.layout), longest(cx.layout()));
        let padded = inputs.layout.columns().unwrap_or(0) + moved.saturating_sub(given);
        let tables = self.rope.tables(moved.max(padded))?;
        for layer in &self.layers {
            let (this, sites, tables) = (layer.clone(), self.sites.clone(), tables.clone());
            let rope = self.rope.clone();
            h = cx.block(&self.sites, layer.site, &h, move |h, cx| {
                // Rows that enter at this block move its tokens further than the first ones.
                let positions = longest(cx.layout());
                if positions > tables.0.dim(0) {
                    return this.forward(h, &sites, &rope.tables(positions)?, cx);
                }
                this.forward(h, &sites, &tables, cx)
            })?;
        }
        let features = self.norm.forward(&h, &cx)?;
        if !self.info.task.per_sequence() {
            return Ok(Output { features, states: None, pass: cx });
        }
        pooling::lasts(&features, &cx)
    }

    fn logits(&self, features: &Tensor, cx: &Pass) -> engraft_nn::Result<Tensor> {
        cx.head(&self.sites, self.head_site, features, |x, cx| self.head.forward(x, &self.sites, cx))
    }
}
