//! Prompts inside attention, in a softmax of their own behind gates that start closed (LLaMA-Adapter).
//!
//! o = softmax(q·Kᵀ/√d)·V + g·softmax(q·K_pᵀ/√d)·V_p, [K_p; V_p] = P·[W_k; W_v]ᵀ by the layer's own frozen projections, no
//! rotation. Every token sees all of P. g is tanh of a number a head, as in the paper, or one number, as in `peft`.

use std::sync::Arc;

use engraft_nn::{
    Base, Builder, Error, Init, KeyValuePatch, KeyValues, Kind, Pass, Patch, Result, Role, Site, Sites,
    Stack, Sublayer, SublayerPatch, Value, Weight,
};
use engraft_tensor::cpu::attention::{AttentionSpec, Span};
use engraft_tensor::ops::{Attention, Spans, Unary, attention};
use engraft_tensor::{Param, Tensor};

/// What opens the way for a prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Gate {
    /// tanh of a number a head.
    Tanh,
    /// A number a layer. Where queries, keys and values are one matrix, what the prompt gives goes past the output
    /// projection, as `peft` has it for GPT-2.
    Scalar,
}

/// The names of gates in recipes and files.
pub(crate) const GATES: &[(&str, Gate)] = &[("scalar", Gate::Scalar), ("tanh", Gate::Tanh)];

/// The self-attentions that can have prompts, in model order: those of the only stack, or of the decoder.
pub(crate) fn attentions(sites: &Sites) -> Vec<&Site> {
    let all = sites.of_kind(|k| matches!(k, Kind::KeyValue { .. })).filter(|s| s.role == Role::Attention);
    let all: Vec<&Site> = all.collect();
    let decodes = all.iter().any(|s| s.stack == Stack::Decoder);
    all.into_iter().filter(|s| !decodes || s.stack == Stack::Decoder).collect()
}

/// The last `layers` of `places`.
pub(crate) fn top<'s>(places: &[&'s Site], layers: usize, title: &str) -> Result<Vec<&'s Site>> {
    if places.is_empty() {
        return Err(Error::Unsupported(format!(
            "{title} needs attention to put its prompts in, and this model has none"
        )));
    }
    if layers > places.len() {
        return Err(Error::Unsupported(format!(
            "`adapter_layers`: expected at most {}, the attentions there are; found {layers}",
            places.len()
        )));
    }
    Ok(places[places.len() - layers..].to_vec())
}

/// What is done to the output of the projection at a site, where its method changes that.
pub(crate) type Tuned = Arc<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

/// Puts a prompt of `tokens` rows into the attention at `place`: its rows [1, tokens, width], N(0, 1), and its gate, zero.
/// Its keys and values pass what `tuned` says of their projections.
pub(crate) fn attach(
    b: &mut Builder<'_>,
    place: &Site,
    tokens: usize,
    gate: Gate,
    tuned: &dyn Fn(&Site) -> Option<Tuned>,
) -> Result<()> {
    let Kind::KeyValue { heads: kv_heads, dim } = place.kind else {
        return Err(Error::Site { path: place.path.clone(), message: "expected keys and values".into() });
    };
    let (heads, sites) = (b.info().heads, b.sites());
    let spec =
        AttentionSpec { heads, kv_heads, dim, scale: (dim as f32).powf(-0.5), causal: false, window: None };
    let at = |role: Role| {
        sites.iter().find(|s| s.role == role && s.layer == place.layer && s.stack == place.stack)
    };
    let (queries, width) = (heads * dim, kv_heads * dim);
    let fused = at(Role::Qkv);
    let (keys, values) = match (fused, at(Role::K), at(Role::V)) {
        (Some(all), _, _) => (
            Projection::of(all, sites, queries, width, tuned)?,
            Projection::of(all, sites, queries + width, width, tuned)?,
        ),
        (None, Some(k), Some(v)) => {
            (Projection::of(k, sites, 0, width, tuned)?, Projection::of(v, sites, 0, width, tuned)?)
        }
        _ => {
            let message =
                "this attention has no projections of keys and values of its own; choose `prefix`".into();
            return Err(Error::Site { path: place.path.clone(), message });
        }
    };
    let outer = gate == Gate::Scalar && fused.is_some();
    let doubled = at(Role::O).filter(|o| gate == Gate::Scalar && !outer && sites.bias_of(&o.path).is_some());
    if let Some(o) = doubled {
        return Err(Error::Unsupported(format!(
            "`{}` has a bias, which `peft` adds once more for a prompt behind one number, so that a closed gate would not be closed; write `gate = \"tanh\"`",
            o.path
        )));
    }
    let rows = b.param(
        &format!("{}.adaption_prompt", place.path),
        &[1, tokens, keys.weight.shape().1],
        Init::Normal(1.0),
    )?;
    let size = if gate == Gate::Tanh { heads } else { 1 };
    let opening = b.param(&format!("{}.adaption_gate", place.path), &[size], Init::Zeros)?;
    let prompt = GatedPrompt { rows, opening, gate, tokens, keys, values, spec };
    let (true, Some(all)) = (outer, fused) else {
        return b.patch(place.id, Patch::KeyValue(Box::new(prompt)));
    };
    let Some(sublayer) = sites
        .of_kind(|k| matches!(k, Kind::Sublayer { .. }))
        .find(|s| s.role == Role::Attention && s.layer == place.layer && s.stack == place.stack)
    else {
        let message =
            "this attention is no sublayer that a prompt can be added to; write `gate = \"tanh\"`".into();
        return Err(Error::Site { path: place.path.clone(), message });
    };
    let queries = Projection::of(all, sites, 0, queries, tuned)?;
    b.patch(sublayer.id, Patch::Sublayer(Box::new(Outside { prompt, queries })))
}

/// Rows of a frozen projection and of its bias.
struct Projection {
    weight: Arc<Weight>,
    bias: Option<Tensor>,
    tuned: Option<Tuned>,
    first: usize,
    rows: usize,
}

impl Projection {
    fn of(
        site: &Site,
        sites: &Sites,
        first: usize,
        rows: usize,
        tuned: &dyn Fn(&Site) -> Option<Tuned>,
    ) -> Result<Projection> {
        let Value::Weight(weight) = &site.value else {
            return Err(Error::Site {
                path: site.path.clone(),
                message: "expected a weight, found none".into(),
            });
        };
        let bias = match sites.bias_of(&site.path).map(|s| &s.value) {
            Some(Value::Vector(bias)) => Some(bias.clone()),
            _ => None,
        };
        Ok(Projection { weight: weight.clone(), bias, tuned: tuned(site), first, rows })
    }

    /// x [rows, width] → [rows, heads, dim].
    fn apply(&self, x: &Tensor, dim: usize) -> Result<Tensor> {
        let mut y = self.weight.forward(x)?;
        if let Some(bias) = &self.bias {
            y = y.plus(bias)?;
        }
        if let Some(tuned) = &self.tuned {
            y = tuned(&y)?;
        }
        if self.rows != y.width() {
            y = y.narrow(1, self.first, self.rows)?;
        }
        Ok(y.reshape([x.dim(0), self.rows / dim, dim])?)
    }
}

/// The prompt of one attention.
struct GatedPrompt {
    rows: Param,
    opening: Param,
    gate: Gate,
    tokens: usize,
    keys: Projection,
    values: Projection,
    spec: AttentionSpec,
}

impl GatedPrompt {
    fn keys_and_values(&self) -> Result<KeyValues> {
        let rows = self.rows.get();
        let rows = rows.reshape([self.tokens, rows.width()])?;
        let dim = self.spec.dim;
        Ok(KeyValues { keys: self.keys.apply(&rows, dim)?, values: self.values.apply(&rows, dim)? })
    }

    /// g `[heads]`.
    fn opened(&self) -> Result<Tensor> {
        let opening = self.opening.get();
        Ok(match self.gate {
            Gate::Tanh => opening.unary(Unary::Tanh)?,
            Gate::Scalar => opening.mul(&Tensor::full(1.0, [self.spec.heads]))?,
        })
    }
}

impl KeyValuePatch for GatedPrompt {
    fn count(&self) -> usize {
        self.tokens
    }

    fn rows(&self, _input: &Tensor, _cx: &Pass) -> Result<KeyValues> {
        self.keys_and_values()
    }

    fn gate(&self) -> Option<Tensor> {
        self.opened().ok()
    }
}

/// A prompt whose part is added after the output projection.
struct Outside {
    prompt: GatedPrompt,
    queries: Projection,
}

impl SublayerPatch for Outside {
    fn output(&self, s: &Sublayer<'_>, _site: &Site, cx: &Pass) -> Result<Tensor> {
        let spec = self.prompt.spec;
        let q = self.queries.apply(s.input, spec.dim)?;
        let KeyValues { keys, values } = self.prompt.keys_and_values()?;
        let found = seen_by_all(&q, &keys, &values, spec, cx)?;
        let found = found.mul(&self.prompt.opened()?.reshape([1, spec.heads, 1])?)?;
        Ok(s.output.add(&found.reshape([q.dim(0), spec.heads * spec.dim])?)?)
    }
}

/// q [tokens, heads, dim] attends to the same keys and values [count, heads, dim], whatever its sequence.
fn seen_by_all(q: &Tensor, keys: &Tensor, values: &Tensor, spec: AttentionSpec, cx: &Pass) -> Result<Tensor> {
    let count = keys.dim(0);
    let sequences = cx.layout().sequences();
    // Every sequence gets rows of its own, so that their gradients are summed by the gather.
    let copies = sequences.len() * count;
    let index = Tensor::from_i64((0..copies).map(|i| (i % count) as i64).collect(), [copies])?;
    let own =
        |(i, s): (usize, &std::ops::Range<usize>)| Span { q: s.clone(), kv: i * count..(i + 1) * count };
    let spans = Spans {
        spans: sequences.iter().enumerate().map(own).collect(),
        query_positions: cx.layout().positions_tensor().clone(),
        key_positions: Tensor::from_i32(vec![0; copies], [copies])?,
    };
    let (keys, values) = (keys.gather(&index)?, values.gather(&index)?);
    Ok(attention(&Attention { spans, spec, bias: None }, q, &keys, &values)?)
}
