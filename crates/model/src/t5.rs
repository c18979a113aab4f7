//! T5 (Raffel et al. 2020, arXiv:1910.10683), T5 1.1 and FLAN-T5: an encoder and a decoder, pre-norm, without positions
//! but for a bias on the scores.
//!
//! Encoder: h ← h + O·attend(Q·x, K·x, V·x), h ← h + W_o·act(W_i·x), x = rms(h). Decoder: the same with a causal attention,
//! and between them h ← h + O·attend(Q·x, K·m, V·m), m the encoder's states. Scores are not scaled; self-attention adds
//! b[bucket(j − i)], one table for all layers of a stack, in its first layer. FLAN's MLP is gated: W_o·(act(W_0·x) ⊙ W_1·x).
//! The head is the token embedding, on h·width^−½, or a matrix of its own.
//!
//! Rows are tokens: h [tokens, width], q [tokens, heads, dim]; heads · dim need not be the width.

use std::sync::Arc;

use engraft_nn::{
    Attend, Embedding, Inputs, Kind, Linear, Memory, Model, ModelInfo, Norm, Output, Pass, Role, SiteId,
    Sites, Stack, Sublayer, Task,
};
use engraft_tensor::Tensor;
use engraft_tensor::cpu::attention::AttentionSpec;
use engraft_tensor::ops::{RelativeBias, Unary};

use crate::config::Config;
use crate::facts::Facts;
use crate::reader::Reader;
use crate::relative::Buckets;
use crate::{Architecture, Head, Result, pooling};

/// T5.
pub(crate) static T5: Architecture = Architecture {
    name: "t5",
    classes: &[("T5ForConditionalGeneration", Task::Seq2Seq), ("T5EncoderModel", Task::Embedding)],
    prefix: "",
    trunk: &["T5Model"],
    heads: &["lm_head.", "classification_head.", "classifier.", "decoder."],
    // The key says whether what a tied head reads is scaled.
    facts: Facts { ties_by_values: true, ..Facts::NONE },
    build,
};

/// The sizes in `config.json`.
struct Sizes {
    vocabulary: usize,
    width: usize,
    inner: usize,
    heads: usize,
    dim: usize,
    /// Layers of the encoder and of the decoder.
    layers: (usize, usize),
    buckets: usize,
    farthest: usize,
    eps: f64,
    activation: Unary,
    gated: bool,
    tied: bool,
    /// The factor on what a tied head reads.
    head_scale: f32,
}

impl Sizes {
    fn read(c: &mut Config<'_>, tensors: usize) -> Sizes {
        let width = c.needed_size("d_model");
        let encoder = c.layers("num_layers", None, tensors);
        let decoder = c.layers("num_decoder_layers", Some(encoder), tensors);
        let (activation, gated) = feed_forward(c);
        let buckets = c.size("relative_attention_num_buckets").unwrap_or(32);
        let farthest = c.size("relative_attention_max_distance").unwrap_or(128);
        if buckets < 4 || farthest <= buckets / 2 {
            c.problem(format!(
                "`relative_attention_num_buckets` ({buckets}) must be 4 or more, and `relative_attention_max_distance` ({farthest}) above half of it"
            ));
        }
        let tied = c.flag("tie_word_embeddings", true);
        let scaled = c.flag("scale_decoder_outputs", tied);
        Sizes {
            vocabulary: c.needed_count("vocab_size"),
            width,
            inner: c.needed_size("d_ff"),
            heads: c.needed_size("num_heads"),
            dim: c.needed_size("d_kv"),
            layers: (encoder, decoder),
            buckets: buckets.max(4),
            farthest: farthest.max(buckets / 2 + 1),
            eps: c.number("layer_norm_epsilon").unwrap_or(1e-6),
            activation,
            gated,
            tied,
            head_scale: if scaled { (width as f32).powf(-0.5) } else { 1.0 },
        }
    }
}

/// `feed_forward_proj`: the activation, with `gated-` before it for two matrices; `gated-gelu` means the approximation.
fn feed_forward(c: &mut Config<'_>) -> (Unary, bool) {
    let known = [
        ("relu", Unary::Relu),
        ("gelu", Unary::Gelu),
        ("gelu_new", Unary::GeluTanh),
        ("silu", Unary::Silu),
        ("swish", Unary::Silu),
    ];
    let name = c.text("feed_forward_proj").unwrap_or("relu");
    let (name, gated) = name.strip_prefix("gated-").map_or((name, false), |rest| (rest, true));
    if gated && name == "gelu" {
        return (Unary::GeluTanh, true);
    }
    let found = known.iter().find(|(known, _)| *known == name);
    if found.is_none() {
        c.problem(format!(
            "`feed_forward_proj` is `{name}`, which is not there; known are relu, gelu, gelu_new, silu, each also after `gated-`"
        ));
    }
    (found.map_or(Unary::Relu, |(_, activation)| *activation), gated)
}

/// The model.
struct T5 {
    info: ModelInfo,
    sites: Arc<Sites>,
    encoder: Half,
    /// The decoder, its head and the factor on what the head reads; absent in a bare encoder.
    decoder: Option<(Half, Linear, f32)>,
    head_site: SiteId,
}

/// Encoder or decoder.
struct Half {
    words: Embedding,
    prompt: SiteId,
    /// b [buckets, heads].
    bias: Embedding,
    buckets: Buckets,
    layers: Vec<Arc<Layer>>,
    norm: Norm,
}

/// One block.
struct Layer {
    site: SiteId,
    own: Attention,
    cross: Option<Attention>,
    mlp_norm: Norm,
    gate: Option<Linear>,
    up: Linear,
    activation: Unary,
    down: Linear,
    mlp_site: SiteId,
}

/// Self- or cross-attention with its norm.
struct Attention {
    norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    attend: Attend,
    o: Linear,
    /// The table of relative positions of a half, which its first self-attention has.
    bias: Option<Embedding>,
    site: SiteId,
    dim: usize,
}

fn build(
    architecture: &Architecture,
    c: &mut Config<'_>,
    r: &mut Reader<'_>,
    head: Head,
) -> Result<Arc<dyn Model>> {
    let s = Sizes::read(c, r.tensors());
    c.finish()?;
    let both = head.task == Task::Seq2Seq;
    // Whatever the configuration says: its key is read for the factor alone.
    r.sites.set_ties_words(true);
    // A file without a head of its own is tied whatever the configuration says; that still decides about the factor.
    let stored = r.has(&format!("{}.weight", r.name("lm_head")));
    let tied = both && r.tied(s.tied || !stored, "lm_head", "shared");
    r.sites.set_stack(if both { Stack::Encoder } else { Stack::Only });
    let encoder = Half::build("encoder", &s, false, r)?;
    let decoder = if both {
        r.sites.set_stack(Stack::Decoder);
        // A merged model may have a table of its own in the decoder, while the head keeps the shared one.
        let read_by_both = tied && r.shares("decoder.embed_tokens", "shared");
        let half = Half::build("decoder", &s, read_by_both, r)?;
        let (weight, tensor) = match (tied, read_by_both) {
            (true, false) => {
                r.pass_over("lm_head.weight");
                r.decoder("shared", None, (s.vocabulary, s.width))?
            }
            (_, both) => {
                r.decoder("lm_head", both.then_some((&half.words, "shared")), (s.vocabulary, s.width))?
            }
        };
        let last = Linear::declare_named(&mut r.sites, ("lm_head", &tensor), Role::Head, None, weight, None);
        Some((half, last, s.head_scale))
    } else {
        None
    };
    let outputs = if both { s.vocabulary } else { s.width };
    let head_site = r.sites.add("head", Role::Head, None, Kind::Head { inn: s.width, out: outputs });
    let info = ModelInfo {
        architecture: architecture.name.into(),
        class: architecture.class_for(head.task, None),
        task: head.task,
        width: s.width,
        layers: if both { s.layers.1 } else { s.layers.0 },
        heads: s.heads,
        kv_heads: s.heads,
        head_dim: s.dim,
        vocabulary: s.vocabulary,
        outputs,
        picture: None,
        any_size: None,
        // Relative positions know no end; 512 is what the published models were trained with.
        max_positions: c.count("n_positions").unwrap_or(512),
    };
    let sites = Arc::new(std::mem::take(&mut r.sites));
    Ok(Arc::new(T5 { info, sites, encoder, decoder, head_site }))
}

impl Half {
    /// `name` is `encoder` or `decoder`; `head` says that the embedding is also multiplied by.
    fn build(name: &str, s: &Sizes, head: bool, r: &mut Reader<'_>) -> Result<Half> {
        let decodes = name == "decoder";
        let path = format!("{name}.embed_tokens");
        let words = r.shared_embedding(&path, "shared", Role::Embed, (s.vocabulary, s.width), head)?;
        let prompt =
            r.sites.add(format!("{path}.prompt"), Role::Prompt, None, Kind::Prompt { width: s.width });
        let count = if decodes { s.layers.1 } else { s.layers.0 };
        let block = |i: usize| Ok(Arc::new(Layer::build(i, &format!("{name}.block.{i}"), s, decodes, r)?));
        let layers: Vec<_> = (0..count).map(block).collect::<Result<_>>()?;
        let bias = layers.first().and_then(|first| first.own.bias.clone()).ok_or_else(|| {
            engraft_nn::Error::Unsupported(format!("the {name} has no blocks, and so no relative positions"))
        })?;
        let norm = r.norm(&format!("{name}.final_layer_norm"), None, s.width, s.eps, false)?;
        let buckets = Buckets { count: s.buckets, farthest: s.farthest, both_ways: !decodes };
        Ok(Half { words, prompt, bias, buckets, layers, norm })
    }

    /// ids `[tokens]` of the rows of `cx` → states [rows, width] with their pass. `memory` is what a decoder reads.
    fn forward(
        &self,
        ids: &Tensor,
        memory: Option<&Memory>,
        sites: &Arc<Sites>,
        cx: &Pass,
    ) -> engraft_nn::Result<(Tensor, Pass)> {
        let cx = cx.with_prefixes(self.layers[0].own.attend.site())?;
        let words = self.words.forward(ids, sites, &cx)?;
        let (mut h, cx) = cx.with_prompts(self.prompt, &words)?;
        for layer in &self.layers {
            let (this, all, memory) = (layer.clone(), sites.clone(), memory.cloned());
            let (bias, buckets) = (self.bias.clone(), self.buckets);
            h = cx.block(sites, layer.site, &h, move |h, cx| {
                // The table is looked up in every layer, so that a patch on it acts on its own route everywhere.
                let bias = |cx: &Pass| buckets.bias(&bias, this.own.attend.site(), &all, cx);
                this.forward(h, &bias, memory.as_ref(), &all, cx)
            })?;
        }
        Ok((self.norm.forward(&h, &cx)?, cx))
    }
}

impl Layer {
    fn build(i: usize, path: &str, s: &Sizes, decodes: bool, r: &mut Reader<'_>) -> Result<Layer> {
        let layer = Some(i);
        let site = r.sites.add(path, Role::Block, layer, Kind::Block { width: s.width });
        let own = Attention::build(i, &format!("{path}.layer.0"), s, decodes, false, r)?;
        let cross = if decodes {
            Some(Attention::build(i, &format!("{path}.layer.1"), s, false, true, r)?)
        } else {
            None
        };
        let path = format!("{path}.layer.{}", 1 + usize::from(decodes));
        let mlp_norm = r.norm(&format!("{path}.layer_norm"), layer, s.width, s.eps, false)?;
        let at = |name: &str| format!("{path}.DenseReluDense.{name}");
        let (wide, back) = ((s.inner, s.width), (s.width, s.inner));
        let (gate, up) = if s.gated {
            let gate = r.linear(&at("wi_0"), Role::Gate, layer, wide, false)?;
            (Some(gate), r.linear(&at("wi_1"), Role::Up, layer, wide, false)?)
        } else {
            (None, r.linear(&at("wi"), Role::Up, layer, wide, false)?)
        };
        let down = r.linear(&at("wo"), Role::Down, layer, back, false)?;
        let mlp_site = r.sites.add(path, Role::Mlp, layer, Kind::Sublayer { width: s.width });
        Ok(Layer { site, own, cross, mlp_norm, gate, up, activation: s.activation, down, mlp_site })
    }

    /// h [tokens, width] → [tokens, width].
    fn forward(
        &self,
        h: &Tensor,
        bias: &dyn Fn(&Pass) -> engraft_nn::Result<RelativeBias>,
        memory: Option<&Memory>,
        sites: &Sites,
        cx: &Pass,
    ) -> engraft_nn::Result<Tensor> {
        let mut h = self.own.itself(h, bias, sites, cx)?;
        if let Some(cross) = &self.cross {
            h = cross.other(&h, memory, sites, cx)?;
        }
        let x = self.mlp_norm.forward(&h, cx)?;
        let up = self.up.forward(&x, sites, cx)?;
        let y = match &self.gate {
            Some(gate) => gate.forward(&x, sites, cx)?.unary(self.activation)?.mul(&up)?,
            None => up.unary(self.activation)?,
        };
        let y = self.down.forward(&y, sites, cx)?;
        let seen = Sublayer { residual: &h, input: &x, output: y, norm: None };
        Ok(cx.sublayer(sites, self.mlp_site, seen)?.plus(&h)?)
    }
}

impl Attention {
    fn build(
        i: usize,
        path: &str,
        s: &Sizes,
        causal: bool,
        cross: bool,
        r: &mut Reader<'_>,
    ) -> Result<Attention> {
        let layer = Some(i);
        let module = format!("{path}.{}", if cross { "EncDecAttention" } else { "SelfAttention" });
        let at = |name: &str| format!("{module}.{name}");
        let roles = match cross {
            true => [Role::CrossQ, Role::CrossK, Role::CrossV, Role::CrossO],
            false => [Role::Q, Role::K, Role::V, Role::O],
        };
        let inner = s.heads * s.dim;
        let norm = r.norm(&format!("{path}.layer_norm"), layer, s.width, s.eps, false)?;
        let q = r.linear(&at("q"), roles[0], layer, (inner, s.width), false)?;
        let k = r.linear(&at("k"), roles[1], layer, (inner, s.width), false)?;
        let v = r.linear(&at("v"), roles[2], layer, (inner, s.width), false)?;
        let (heads, kv_heads, dim) = (s.heads, s.heads, s.dim);
        let spec = AttentionSpec { heads, kv_heads, dim, scale: 1.0, causal, window: None };
        let (attend, role) = if cross {
            (Attend::declare_cross(&mut r.sites, &module, i, spec), Role::CrossAttention)
        } else {
            (Attend::declare(&mut r.sites, &module, i, spec), Role::Attention)
        };
        let o = r.linear(&at("o"), roles[3], layer, (s.width, inner), false)?;
        let bias = match i == 0 && !cross {
            true => {
                let path = at("relative_attention_bias");
                Some(r.embedding(&path, Role::PositionEmbed, (s.buckets, s.heads), false)?)
            }
            false => None,
        };
        let site = r.sites.add(path, role, layer, Kind::Sublayer { width: s.width });
        if cross {
            // Left over in old files; cross-attention has no bias.
            let unused = r.name(&at("relative_attention_bias.weight"));
            r.used.insert(unused);
        }
        Ok(Attention { norm, q, k, v, attend, o, bias, site, dim })
    }

    /// [tokens, heads · dim] → [tokens, heads, dim].
    fn split(&self, t: Tensor) -> engraft_nn::Result<Tensor> {
        Ok(t.reshape([t.dim(0), t.width() / self.dim, self.dim])?)
    }

    /// h plus what its rows see of each other.
    fn itself(
        &self,
        h: &Tensor,
        bias: &dyn Fn(&Pass) -> engraft_nn::Result<RelativeBias>,
        sites: &Sites,
        cx: &Pass,
    ) -> engraft_nn::Result<Tensor> {
        let x = self.norm.forward(h, cx)?;
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|m| self.split(m.forward(&x, sites, cx)?));
        let y = self.attend.forward_biased(&x, [&q?, &k?, &v?], bias, cx)?;
        self.joined(h, &x, y, sites, cx)
    }

    /// h plus what its rows see of the memory.
    fn other(
        &self,
        h: &Tensor,
        memory: Option<&Memory>,
        sites: &Sites,
        cx: &Pass,
    ) -> engraft_nn::Result<Tensor> {
        let x = self.norm.forward(h, cx)?;
        let q = self.split(self.q.forward(&x, sites, cx)?)?;
        let keys_and_values = |m: &Memory| {
            let of = |linear: &Linear| self.split(linear.forward(&m.states, sites, &m.pass)?);
            Ok((of(&self.k)?, of(&self.v)?))
        };
        let y = self.attend.forward_cross(&x, &q, memory, keys_and_values, cx)?;
        self.joined(h, &x, y, sites, cx)
    }

    fn joined(
        &self,
        h: &Tensor,
        x: &Tensor,
        y: Tensor,
        sites: &Sites,
        cx: &Pass,
    ) -> engraft_nn::Result<Tensor> {
        let y = self.o.forward(&y.reshape([y.dim(0), y.dim(1) * y.dim(2)])?, sites, cx)?;
        let seen = Sublayer { residual: h, input: x, output: y, norm: None };
        Ok(cx.sublayer(sites, self.site, seen)?.plus(h)?)
    }
}

impl Model for T5 {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn sites(&self) -> &Arc<Sites> {
        &self.sites
    }

    fn features(&self, inputs: &Inputs, cx: &Pass) -> engraft_nn::Result<Output> {
        // Once a cache holds what cross-attention reads, the source is not encoded again.
        let memory = if cx.continues() {
            None
        } else {
            inputs.layout.expect_filled()?;
            let encoder = cx.over(inputs.layout.clone())?.uncached();
            let (states, pass) = self.encoder.forward(inputs.ids()?, None, &self.sites, &encoder)?;
            Some(Memory { states, pass })
        };
        match (&self.decoder, memory) {
            (Some((decoder, _, scale)), memory) => {
                let target = inputs.target()?;
                target.layout.expect_filled()?;
                let cx = cx.over(target.layout.clone())?;
                let (h, pass) = decoder.forward(&target.ids, memory.as_ref(), &self.sites, &cx)?;
                let features = if *scale == 1.0 { h } else { h.scale(*scale)? };
                Ok(Output { features, states: None, pass })
            }
            (None, Some(memory)) => {
                let rows: Vec<i64> =
                    memory.pass.layout().sequences().iter().map(|s| s.start as i64).collect();
                let pass = memory.pass.select(&rows)?;
                let features = pooling::means(&memory.states, memory.pass.layout(), 0)?;
                Ok(Output { features, states: Some(memory.states.clone()), pass })
            }
            (None, None) => {
                let message = "a bare encoder has nothing to continue; run it without a cache";
                Err(engraft_nn::Error::Unsupported(message.into()))
            }
        }
    }

    fn logits(&self, features: &Tensor, cx: &Pass) -> engraft_nn::Result<Tensor> {
        cx.head(&self.sites, self.head_site, features, |x, cx| match &self.decoder {
            Some((_, head, _)) => head.forward(x, &self.sites, cx),
            None => Ok(x.clone()),
        })
    }
}
