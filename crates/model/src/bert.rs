//! BERT (Devlin et al. 2019, arXiv:1810.04805) and RoBERTa (Liu et al. 2019, arXiv:1907.11692): post-norm encoders.
//!
//! h ← norm(h + O·attend(Q·h, K·h, V·h)); h ← norm(h + W₂·act(W₁·h)). The input is the norm of the sum of token, type and
//! position embeddings; a soft prompt comes first and gets type and position like real tokens. BERT's positions are the
//! tokens' columns; RoBERTa's count tokens other than padding from `pad_token_id` + 1 (given embeddings: columns, as `transformers` does).
//!
//! Heads: BERT classifies tanh(W·h₀) of the first row, RoBERTa has that layer in its head; tokens are classified by one
//! matrix; the masked-word head shares the word embedding; a sentence embedding is the mean of its real tokens' states.
//!
//! Rows padded on the left are classified by their first column, padding, as in `transformers`.
//!
//! The dropouts of `config.json` are not applied in training: `peft`'s curves that we compare with are without, a step is
//! reproducible and faster, and methods bring dropout of their own. Rows are tokens: h [tokens, width].

use std::sync::Arc;

use engraft_nn::{
    Attend, Embedding, Inputs, Kind, Linear, Model, ModelInfo, Norm, Output, Pass, Role, SiteId, Sites,
    Sublayer, Task,
};
use engraft_tensor::Tensor;
use engraft_tensor::cpu::attention::AttentionSpec;
use engraft_tensor::ops::{Unary, cat};

use crate::config::Config;
use crate::facts::{Facts, Flexible, Length};
use crate::pooling;
use crate::positions::Numbering;
use crate::reader::Reader;
use crate::{Architecture, Head, Result};

/// A flexible head of one layer: dropout comes first.
const CLASSIFIER: &[(usize, &str)] = &[(1, "classifier")];

/// BERT.
pub(crate) static BERT: Architecture = Architecture {
    name: "bert",
    classes: &[
        ("BertForSequenceClassification", Task::SequenceClassification),
        ("BertForTokenClassification", Task::TokenClassification),
        ("BertForMaskedLM", Task::MaskedLm),
        ("BertForPreTraining", Task::MaskedLm),
        ("BertModel", Task::Embedding),
    ],
    prefix: "bert.",
    trunk: &["BertModel"],
    heads: &["cls.predictions.", "cls.seq_relationship.", "classifier.", "qa_outputs."],
    facts: Facts {
        labelled: &["classifier"],
        length: Length::Table("max_position_embeddings"),
        flexible: &[
            Flexible::one(Task::SequenceClassification, true, CLASSIFIER),
            Flexible::one(Task::TokenClassification, false, CLASSIFIER),
        ],
        ..Facts::NONE
    },
    build,
};

/// RoBERTa.
pub(crate) static ROBERTA: Architecture = Architecture {
    name: "roberta",
    classes: &[
        ("RobertaForSequenceClassification", Task::SequenceClassification),
        ("RobertaForTokenClassification", Task::TokenClassification),
        ("RobertaForMaskedLM", Task::MaskedLm),
        ("RobertaModel", Task::Embedding),
    ],
    prefix: "roberta.",
    trunk: &["RobertaModel"],
    heads: &["lm_head.", "classifier.", "qa_outputs."],
    facts: Facts {
        labelled: &["classifier", "classifier.out_proj"],
        length: Length::TableAfterPad("max_position_embeddings"),
        flexible: &[
            Flexible {
                task: Task::SequenceClassification,
                layers: 2,
                pooled: false,
                activation: "tanh",
                modules: &[(1, "classifier.dense"), (4, "classifier.out_proj")],
            },
            Flexible::one(Task::TokenClassification, false, CLASSIFIER),
        ],
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
    types: usize,
    eps: f64,
    activation: Unary,
    /// The number of the first position: 0, or RoBERTa's `pad_token_id` + 1.
    first_position: usize,
    pad: usize,
    tied: bool,
}

impl Sizes {
    fn read(roberta: bool, c: &mut Config<'_>, tensors: usize) -> Sizes {
        let (width, heads) = (c.needed_size("hidden_size"), c.needed_size("num_attention_heads"));
        if !width.is_multiple_of(heads) {
            c.problem(format!(
                "`hidden_size` ({width}) must be a multiple of `num_attention_heads` ({heads})"
            ));
        }
        let layers = c.layers("num_hidden_layers", None, tensors);
        if c.flag("is_decoder", false) || c.flag("add_cross_attention", false) {
            c.problem(
                "`is_decoder` and `add_cross_attention` must be false: decoders of this family are not there",
            );
        }
        if c.text("position_embedding_type").is_some_and(|kind| kind != "absolute") {
            c.problem("`position_embedding_type` must be \"absolute\"");
        }
        let positions = c.count("max_position_embeddings").unwrap_or(512);
        let pad = c.index("pad_token_id").unwrap_or(usize::from(roberta));
        let first_position = if roberta { pad + 1 } else { 0 };
        if first_position >= positions {
            c.problem(format!("`pad_token_id` must be below `max_position_embeddings` ({positions})"));
        }
        Sizes {
            vocabulary: c.needed_count("vocab_size"),
            width,
            inner: c.needed_size("intermediate_size"),
            layers,
            heads,
            positions,
            types: c.size("type_vocab_size").unwrap_or(2),
            eps: c.number("layer_norm_eps").unwrap_or(1e-12),
            activation: c.activation("hidden_act", Unary::Gelu),
            first_position,
            pad,
            tied: c.flag("tie_word_embeddings", true),
        }
    }
}

/// The model.
struct Bert {
    info: ModelInfo,
    sites: Arc<Sites>,
    words: Embedding,
    prompt: SiteId,
    types: Embedding,
    positions: Embedding,
    norm: Norm,
    layers: Vec<Arc<Layer>>,
    top: Top,
    head_site: SiteId,
    numbering: Numbering,
}

/// What lies above the blocks.
enum Top {
    /// BERT: logits = C·tanh(P·h₀); the pooler P belongs to the trunk.
    Pooled { pooler: Linear, classifier: Linear },
    /// RoBERTa: logits = C·tanh(D·h₀), both in the head.
    First { dense: Linear, classifier: Linear },
    /// logits = C·h.
    Tokens(Linear),
    /// logits = E·norm(act(T·h)) + b, with E the word embedding.
    Words { dense: Linear, norm: Norm, activation: Unary, decoder: Linear },
    /// The mean over real tokens. A pooler may be in the files; it is a site that this output does not use.
    Mean,
}

/// One block.
struct Layer {
    site: SiteId,
    q: Linear,
    k: Linear,
    v: Linear,
    attend: Attend,
    o: Linear,
    attention_site: SiteId,
    attention_norm: Norm,
    up: Linear,
    activation: Unary,
    down: Linear,
    mlp_site: SiteId,
    mlp_norm: Norm,
    dim: usize,
}

fn build(
    architecture: &Architecture,
    c: &mut Config<'_>,
    r: &mut Reader<'_>,
    head: Head,
) -> Result<Arc<dyn Model>> {
    let roberta = architecture.name == "roberta";
    let s = Sizes::read(roberta, c, r.tensors());
    r.initializer_range = c.number("initializer_range").unwrap_or(0.02) as f32;
    c.finish()?;
    let at = |name: &str| format!("{}{name}", architecture.path(head.task));
    let words_path = at("embeddings.word_embeddings");
    let decoder_path = if roberta { "lm_head.decoder" } else { "cls.predictions.decoder" };
    r.sites.set_ties_words(s.tied);
    let tied = head.task == Task::MaskedLm && r.tied(s.tied, decoder_path, &words_path);
    let words = r.embedding(&words_path, Role::Embed, (s.vocabulary, s.width), tied)?;
    let prompt =
        r.sites.add(format!("{words_path}.prompt"), Role::Prompt, None, Kind::Prompt { width: s.width });
    let position = ("embeddings.position_embeddings", Role::PositionEmbed, s.positions);
    let kind = ("embeddings.token_type_embeddings", Role::TypeEmbed, s.types);
    // In the order of the modules.
    let order = if roberta { [kind, position] } else { [position, kind] };
    let [first, second] =
        order.map(|(name, role, rows)| r.embedding(&at(name), role, (rows, s.width), false));
    let (positions, types) = if roberta { (second?, first?) } else { (first?, second?) };
    let norm = r.norm(&at("embeddings.LayerNorm"), None, s.width, s.eps, true)?;
    let blocks = |i: usize| Ok(Arc::new(Layer::build(i, &at(&format!("encoder.layer.{i}")), &s, r)?));
    let layers = (0..s.layers).map(blocks).collect::<Result<_>>()?;
    let shared = tied.then_some((&words, words_path.as_str()));
    let (top, outputs) = Top::build(roberta, head, &s, shared, &at("pooler.dense"), r)?;
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
        max_positions: s.positions - s.first_position,
    };
    let sites = Arc::new(std::mem::take(&mut r.sites));
    let numbering = Numbering {
        by_token: roberta,
        first: s.first_position as i64,
        pad: s.pad as i64,
        reach: info.max_positions,
    };
    Ok(Arc::new(Bert {
        info,
        sites,
        words,
        prompt,
        types,
        positions,
        norm,
        layers,
        top,
        head_site,
        numbering,
    }))
}

impl Top {
    /// The head of a task and its number of logits.
    fn build(
        roberta: bool,
        head: Head,
        s: &Sizes,
        words: Option<(&Embedding, &str)>,
        pooler: &str,
        r: &mut Reader<'_>,
    ) -> Result<(Top, usize)> {
        let (square, labels) = ((s.width, s.width), (head.labels, s.width));
        let top = match head.task {
            Task::SequenceClassification if roberta => Top::First {
                dense: r.head("classifier.dense", Role::Head, square, true)?,
                classifier: r.head("classifier.out_proj", Role::Head, labels, true)?,
            },
            Task::SequenceClassification => Top::Pooled {
                pooler: r.head(pooler, Role::Pool, square, true)?,
                classifier: r.head("classifier", Role::Head, labels, true)?,
            },
            Task::TokenClassification => Top::Tokens(r.head("classifier", Role::Head, labels, true)?),
            Task::MaskedLm => return Ok((Self::words(roberta, s, words, r)?, s.vocabulary)),
            Task::Embedding | Task::CausalLm | Task::Seq2Seq | Task::ImageClassification => {
                if r.has(&format!("{}.weight", r.name(pooler))) {
                    r.linear(pooler, Role::Pool, None, square, true)?;
                }
                return Ok((Top::Mean, s.width));
            }
        };
        Ok((top, head.labels))
    }

    /// The masked-word head. Its bias is a tensor beside the decoder.
    fn words(roberta: bool, s: &Sizes, words: Option<(&Embedding, &str)>, r: &mut Reader<'_>) -> Result<Top> {
        let (dense, norm, decoder, bias) = if roberta {
            ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")
        } else {
            let transform = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm");
            (transform.0, transform.1, "cls.predictions.decoder", "cls.predictions.bias")
        };
        // `peft`'s all-linear leaves out the output embedding alone.
        let dense = r.linear(dense, Role::Pool, None, (s.width, s.width), true)?;
        let norm = r.norm(norm, None, s.width, s.eps, true)?;
        let (weight, tensor) = r.decoder(decoder, words, (s.vocabulary, s.width))?;
        // Many files hold the bias under both names, one of them for the other; an untied head adds `decoder.bias`.
        let inner = format!("{decoder}.bias");
        let own = r.has(&inner) && (!s.tied || !r.has(bias) || !r.same(&inner, bias));
        let bias_name = if own { inner.clone() } else { bias.to_owned() };
        let values = r.vector(&bias_name, s.vocabulary)?;
        r.used.extend([inner, bias.to_owned()]);
        let bias = Some((values, (bias, bias_name.as_str())));
        let decoder = Linear::declare_named(&mut r.sites, (decoder, &tensor), Role::Head, None, weight, bias);
        let activation = if roberta { Unary::Gelu } else { s.activation };
        Ok(Top::Words { dense, norm, activation, decoder })
    }
}

impl Layer {
    fn build(i: usize, path: &str, s: &Sizes, r: &mut Reader<'_>) -> Result<Layer> {
        let (layer, square, dim) = (Some(i), (s.width, s.width), s.width / s.heads);
        let at = |name: &str| format!("{path}.{name}");
        let site = r.sites.add(path, Role::Block, layer, Kind::Block { width: s.width });
        let q = r.linear(&at("attention.self.query"), Role::Q, layer, square, true)?;
        let k = r.linear(&at("attention.self.key"), Role::K, layer, square, true)?;
        let v = r.linear(&at("attention.self.value"), Role::V, layer, square, true)?;
        let scale = (dim as f32).powf(-0.5);
        let spec =
            AttentionSpec { heads: s.heads, kv_heads: s.heads, dim, scale, causal: false, window: None };
        let attend = Attend::declare(&mut r.sites, &at("attention.self"), i, spec);
        let o = r.linear(&at("attention.output.dense"), Role::O, layer, square, true)?;
        let sublayer = Kind::Sublayer { width: s.width };
        let attention_site = r.sites.add(at("attention.output"), Role::Attention, layer, sublayer.clone());
        let attention_norm = r.norm(&at("attention.output.LayerNorm"), layer, s.width, s.eps, true)?;
        let up = r.linear(&at("intermediate.dense"), Role::Up, layer, (s.inner, s.width), true)?;
        let down = r.linear(&at("output.dense"), Role::Down, layer, (s.width, s.inner), true)?;
        let mlp_site = r.sites.add(at("output"), Role::Mlp, layer, sublayer);
        let mlp_norm = r.norm(&at("output.LayerNorm"), layer, s.width, s.eps, true)?;
        let activation = s.activation;
        Ok(Layer {
            site,
            q,
            k,
            v,
            attend,
            o,
            attention_site,
            attention_norm,
            up,
            activation,
            down,
            mlp_site,
            mlp_norm,
            dim,
        })
    }

    /// h [tokens, width] → [tokens, width].
    fn forward(&self, h: &Tensor, sites: &Sites, cx: &Pass) -> engraft_nn::Result<Tensor> {
        let split = |t: Tensor| t.reshape([t.dim(0), t.width() / self.dim, self.dim]); // [tokens, heads, dim]
        let q = split(self.q.forward(h, sites, cx)?)?;
        let k = split(self.k.forward(h, sites, cx)?)?;
        let v = split(self.v.forward(h, sites, cx)?)?;
        let y = self.attend.forward(h, [&q, &k, &v], cx)?;
        let y = self.o.forward(&y.reshape(h.shape())?, sites, cx)?;
        let h = self.joined(self.attention_site, h, y, &self.attention_norm, sites, cx)?;
        let x = self.up.forward(&h, sites, cx)?.unary(self.activation)?;
        let y = self.down.forward(&x, sites, cx)?;
        self.joined(self.mlp_site, &h, y, &self.mlp_norm, sites, cx)
    }

    /// norm(h + y), y after the patches of its site.
    fn joined(
        &self,
        site: SiteId,
        h: &Tensor,
        y: Tensor,
        norm: &Norm,
        sites: &Sites,
        cx: &Pass,
    ) -> engraft_nn::Result<Tensor> {
        cx.post_norm(sites, site, Sublayer { residual: h, input: h, output: y, norm: None }, norm)
    }
}

impl Bert {
    /// Embedded input, prompts included, and the pass that describes its rows.
    fn embedded(&self, inputs: &Inputs, plain: &Pass) -> engraft_nn::Result<(Tensor, Pass)> {
        let words = self.words.forward(inputs.ids()?, &self.sites, plain)?;
        let first = self.layers[0].attend.site();
        let (h, all) = plain.with_prefixes(first)?.with_prompts(self.prompt, &words)?;
        let (h, all) = self.padded(h, all, plain)?;
        let rows = all.layout().tokens();
        let zeros = || Tensor::from_i64(vec![0; rows], [rows]);
        let types = match (inputs.types(), all.layout().real_rows()) {
            (None, _) => self.types.forward(&zeros()?, &self.sites, &all)?,
            (Some(ids), None) => self.types.forward(ids, &self.sites, &all)?,
            (Some(ids), Some(real)) => {
                // Rows that are no tokens have type 0.
                let mut of_token = vec![None; rows];
                real.into_iter().enumerate().for_each(|(token, row)| of_token[row as usize] = Some(token));
                let other = self.types.forward(&zeros()?, &self.sites, &all)?;
                mixed(&other, &self.types.forward(ids, &self.sites, plain)?, &of_token)?
            }
        };
        let positions = self.numbering.rows(inputs.ids()?.ids()?, plain, &all)?;
        let positions = self.positions.forward(&positions, &self.sites, &all)?;
        let h = self.norm.forward(&h.add(&types)?.add(&positions)?, &all)?;
        Ok((h, all))
    }

    /// Where a classifier reads the first column of a row that is padded on the left, puts that padding back: it sees the
    /// tokens, and they do not see it.
    fn padded(&self, h: Tensor, all: Pass, plain: &Pass) -> engraft_nn::Result<(Tensor, Pass)> {
        let layout = plain.layout();
        let later = |s: &std::ops::Range<usize>| {
            layout.positions().get(s.start).is_some_and(|&p| p > 0 && !s.is_empty())
        };
        let lacks = |(s, &prompt): (_, &usize)| prompt == 0 && later(s);
        let which: Vec<bool> =
            layout.sequences().iter().zip(all.layout().virtual_counts()).map(lacks).collect();
        if self.info.task != Task::SequenceClassification || !which.contains(&true) {
            return Ok((h, all));
        }
        let (from, all) = all.with_padding(&which)?;
        let pad = Tensor::from_i64(vec![self.numbering.pad; from.len()], [from.len()])?;
        Ok((mixed(&self.words.forward(&pad, &self.sites, &all)?, &h, &from)?, all))
    }
}

/// Row i is row `from[i]` of `tokens`, or, where there is none, row i of `others`.
fn mixed(others: &Tensor, tokens: &Tensor, from: &[Option<usize>]) -> engraft_nn::Result<Tensor> {
    let rows = others.dim(0);
    let index: Vec<i64> = (0..rows).map(|i| from[i].map_or(i, |token| rows + token) as i64).collect();
    Ok(cat(&[others, tokens], 0)?.gather(&Tensor::from_i64(index, [rows])?)?)
}

impl Model for Bert {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn sites(&self) -> &Arc<Sites> {
        &self.sites
    }

    fn features(&self, inputs: &Inputs, cx: &Pass) -> engraft_nn::Result<Output> {
        inputs.layout.expect_filled()?;
        let (mut h, cx) = self.embedded(inputs, cx)?;
        for layer in &self.layers {
            let (this, sites) = (layer.clone(), self.sites.clone());
            h = cx.block(&self.sites, layer.site, &h, move |h, cx| this.forward(h, &sites, cx))?;
        }
        if !self.info.task.per_sequence() {
            return Ok(Output { features: h, states: None, pass: cx });
        }
        // The first row of each sequence, virtual or not, stands for it.
        let rows: Vec<i64> = cx.layout().sequences().iter().map(|s| s.start as i64).collect();
        let pass = cx.select(&rows)?;
        let count = rows.len();
        let first = |h: &Tensor| h.gather(&Tensor::from_i64(rows, [count])?);
        let features = match &self.top {
            Top::Pooled { pooler, .. } => {
                pooler.forward(&first(&h)?, &self.sites, &pass)?.unary(Unary::Tanh)?
            }
            Top::Mean => pooling::means(&h, cx.layout(), 0)?,
            _ => first(&h)?,
        };
        Ok(Output { features, states: Some(h), pass })
    }

    fn logits(&self, features: &Tensor, cx: &Pass) -> engraft_nn::Result<Tensor> {
        let sites = &self.sites;
        cx.head(sites, self.head_site, features, |x, cx| match &self.top {
            Top::Pooled { classifier, .. } | Top::Tokens(classifier) => classifier.forward(x, sites, cx),
            Top::First { dense, classifier } => {
                classifier.forward(&dense.forward(x, sites, cx)?.unary(Unary::Tanh)?, sites, cx)
            }
            Top::Words { dense, norm, activation, decoder } => {
                let x = dense.forward(x, sites, cx)?.unary(*activation)?;
                decoder.forward(&norm.forward(&x, cx)?, sites, cx)
            }
            Top::Mean => Ok(x.clone()),
        })
    }
}
