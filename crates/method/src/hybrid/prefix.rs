//! AdapterHub's prefix: keys and values before those of every attention, trained through a network that makes them of
//! embeddings, or as they are (flat), times a gate of the sequence or not.
//!
//! [P_k; P_v] of layer i = G·(σ(E·W₁ᵀ + b₁)·W₂ᵀ + b₂), the columns of i, σ mostly tanh; or a G for keys and one for values. Tokens keep their positions, and the prefix lies
//! before the first. In models of two stacks the encoder, the decoder and what the decoder reads of the encoder have an E, W and
//! b each; the gate of the last sees what the queries are made of. A T5 counts the prefix's rows into the distance of a key, not
//! into that of a query, so that keys seem so much later than they are: AdapterHub's models were trained so.

use engraft_nn::{
    Base, Builder, Error, Init, KeyValuePatch, KeyValues, Kind, Pass, Patch, Result, Role, Site, SiteId,
    Sites, Stack, WeightPatch,
};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::adapter_hub::hub_name;
use crate::prompts::prompt::TOKENS_MAX;
use crate::read::{Reader, as_written};
use crate::shared::activations::{ACTIVATIONS, Activation};
use crate::shared::gate::Gate;

pub(super) const INNER_MAX: usize = 1 << 14;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Prefix {
    pub length: usize,
    /// Width of the network; kept where there is none, for the file.
    pub inner: usize,
    pub flat: bool,
    pub gated: bool,
    pub dropout: f32,
    /// Layers without, the decoder's counted on from the encoder's.
    pub leave_out: Vec<usize>,
    /// Whether an encoder, and what a decoder reads of it, have a prefix.
    pub at: [bool; 2],
    /// Whether all self-attentions share one set of tensors, and nothing else has a prefix: no form of AdapterHub's.
    pub one_set: bool,
    /// Whether AdapterHub made it, where a window of the model does not hide it.
    pub in_view: bool,
    /// Between the network's layers.
    pub activation: Activation,
    /// Whether keys and values have a gate each.
    pub two_gates: bool,
}

impl Prefix {
    pub fn new(length: usize, inner: usize, gated: bool) -> Prefix {
        Prefix {
            length,
            inner: inner.max(1),
            flat: inner == 0,
            gated,
            dropout: 0.0,
            leave_out: vec![],
            at: [true; 2],
            one_set: false,
            in_view: false,
            activation: Activation::TANH,
            two_gates: false,
        }
    }

    pub fn read(map: &Map<String, Value>) -> Result<Prefix> {
        let mut r = Reader::file(map);
        r.ignore(&["architecture", "init_weights_seed"]);
        let named = r.value("non_linearity").is_some();
        let activation = if named { r.one_of("non_linearity", ACTIVATIONS) } else { Activation::TANH };
        let (gated, shared) = (r.flag("use_gating", false), r.flag("shared_gating", true));
        let prefix = Prefix {
            length: r.count("prefix_length", 30, TOKENS_MAX),
            inner: r.count("bottleneck_size", 512, INNER_MAX),
            flat: r.flag("flat", false),
            gated,
            dropout: r.dropout("dropout"),
            leave_out: r.counts("leave_out").unwrap_or_default(),
            at: ["encoder_prefix", "cross_prefix"].map(|key| r.flag(key, true)),
            one_set: false,
            in_view: false,
            activation,
            two_gates: !shared,
        };
        r.finish()?;
        Ok(prefix)
    }

    pub fn config(&self) -> Value {
        json!({
            "architecture": "prefix_tuning", "bottleneck_size": self.inner, "cross_prefix": self.at[1],
            "dropout": as_written(self.dropout), "encoder_prefix": self.at[0], "flat": self.flat, "init_weights_seed": null,
            "leave_out": self.leave_out, "non_linearity": self.activation.name(), "prefix_length": self.length,
            "shared_gating": !self.two_gates,
            "use_gating": self.gated,
        })
    }

    /// Attaches it as `name`; gives the paths of all attentions.
    pub fn attach(&self, b: &mut Builder<'_>, name: &str) -> Result<Vec<String>> {
        let sites = b.sites();
        let two_stacks = sites.iter().any(|s| s.stack == Stack::Decoder);
        let attentions: Vec<&Site> = sites.of_kind(|k| matches!(k, Kind::KeyValue { .. })).collect();
        let places: Vec<Place> = attentions.iter().filter_map(|s| self.place(sites, s)).collect();
        let Some(first) = attentions.first().filter(|_| !places.is_empty()) else {
            return Err(Error::Unsupported("a prefix needs a model with attention".into()));
        };
        if two_stacks && !self.one_set && !self.leave_out.is_empty() {
            return Err(Error::Unsupported(
                "`layers`, or `leave_out`, of a prefix in AdapterHub's form needs a model of one stack: there, layers without one lose the \
                 model's relative positions"
                    .into(),
            ));
        }
        let stem = stem(sites, first, name);
        for part in PARTS {
            let own: Vec<&Place> = places.iter().filter(|p| p.part == part).collect();
            if own.is_empty() {
                continue;
            }
            let columns = own.iter().map(|p| 2 * p.heads * p.dim).sum();
            let rows = self.tensors(b, &format!("{stem}.{part}"), columns)?;
            let mut first = 0;
            for place in own {
                let gate = self.gate(b, place, name)?;
                let widens = two_stacks && !self.one_set && part != CROSS;
                let patch = Rows {
                    prefix: self.clone(),
                    rows: rows.clone(),
                    gate,
                    place: place.clone(),
                    first,
                    widens,
                };
                b.patch(place.site, Patch::KeyValue(Box::new(patch)))?;
                first += 2 * place.heads * place.dim;
            }
        }
        Ok(attentions.into_iter().map(|s| module(sites, s)).collect())
    }

    /// What the rows of a flat prefix called `name` are called in a model of one stack.
    pub fn flat_name(sites: &Sites, name: &str) -> Result<String> {
        let first = sites.of_kind(|k| matches!(k, Kind::KeyValue { .. })).next();
        let first =
            first.ok_or_else(|| Error::Unsupported("a prefix needs a model with attention".into()))?;
        Ok(format!("{}.{OWN}.{ROWS}", stem(sites, first, name)))
    }

    /// The gate of one attention. What the decoder reads of the encoder is made once and before a text is written, by other
    /// rows than those its gate sees: these are met where they become queries.
    fn gate(&self, b: &mut Builder<'_>, place: &Place, name: &str) -> Result<Option<Opens>> {
        if !self.gated {
            return Ok(None);
        }
        let width = b.info().width;
        let stem = format!("{}.prefix_tuning.prefix_gates.{name}", place.path);
        let gate = Gate::new(b, &stem, (if self.two_gates { 2 } else { 1 }, width))?;
        if place.part != CROSS {
            return Ok(Some(Opens::Here(gate)));
        }
        let is_its = |s: &&Site| s.role == Role::CrossQ && s.is_weight() && s.layer == place.layer;
        let Some(queries) = b.sites().iter().find(is_its).map(|s| s.id) else {
            let message = "a gated prefix needs queries that are a matrix of their own".into();
            return Err(Error::Site { path: place.path.clone(), message });
        };
        let key = format!("{}{}.prefix_gate", b.prefix(), place.path);
        b.patch(queries, Patch::Weight(Box::new(Queries { gate, key: key.clone() })))?;
        Ok(Some(Opens::AtQueries(key)))
    }

    fn place(&self, sites: &Sites, s: &Site) -> Option<Place> {
        let Kind::KeyValue { heads, dim } = s.kind else { return None };
        let part = match (s.role, s.stack) {
            (Role::Attention, Stack::Encoder) if !self.one_set => ENCODER,
            (Role::Attention, _) => OWN,
            (Role::CrossAttention, _) if !self.one_set => CROSS,
            _ => return None,
        };
        let wanted = (part != ENCODER || self.at[0]) && (part != CROSS || self.at[1]);
        let here = sites.number(s).is_none_or(|layer| !self.leave_out.contains(&layer));
        let (site, path, layer) = (s.id, module(sites, s), s.layer);
        (wanted && here).then_some(Place { site, path, layer, part, heads, dim })
    }

    fn tensors(&self, b: &mut Builder<'_>, stem: &str, columns: usize) -> Result<Tensors> {
        if self.flat {
            let all = b.param(&format!("{stem}.{ROWS}"), &[self.length * columns], Init::Normal(1.0))?;
            return Ok(Tensors::Flat(all));
        }
        let (width, inner) = (b.info().width, self.inner);
        let table = b.param(&format!("{stem}.wte.weight"), &[self.length, width], Init::Normal(1.0))?;
        let mut linear = |number: usize, (out, inn): (usize, usize)| -> Result<(Param, Param)> {
            let name = format!("{stem}.control_trans.{number}");
            let weight = b.param(&format!("{name}.weight"), &[out, inn], Init::kaiming(inn))?;
            Ok((weight, b.param(&format!("{name}.bias"), &[out], Init::kaiming(inn))?))
        };
        Ok(Tensors::Made { table, inner: linear(0, (inner, width))?, outer: linear(2, (columns, inner))? })
    }
}

/// What the names of the tensors of a prefix called `name` begin with, `first` being the model's first attention.
fn stem(sites: &Sites, first: &Site, name: &str) -> String {
    format!("{}prefix_tuning.prefix_tunings.{name}", trunk(&module(sites, first)))
}

/// AdapterHub's name of an attention: that of the module with its queries.
fn module(sites: &Sites, attention: &Site) -> String {
    let role = if attention.role == Role::CrossAttention { Role::CrossQ } else { Role::Q };
    let its = |s: &&Site| (s.role == role || s.role == Role::Qkv) && s.is_weight();
    let here = |s: &&Site| s.layer == attention.layer && s.stack == attention.stack;
    let queries = sites.iter().find(|s| its(s) && here(s)).map(|s| hub_name(sites, s));
    match queries.as_ref().and_then(|path| path.rsplit_once('.')) {
        Some((parent, _)) => parent.to_owned(),
        None => hub_name(sites, attention),
    }
}

/// What precedes the names of what AdapterHub keeps for all layers: the trunk's, which a bare encoder is itself.
pub(super) fn trunk(path: &str) -> String {
    match path.split('.').next() {
        Some(trunk) if !["encoder", "decoder"].contains(&trunk) => format!("{trunk}."),
        _ => String::new(),
    }
}

/// The sets of tensors, by AdapterHub's names and in its order.
const PARTS: [&str; 3] = [ENCODER, OWN, CROSS];
const ENCODER: &str = "encoder_prefix";
const OWN: &str = "self_prefix";
const CROSS: &str = "cross_prefix";
/// The rows of a flat prefix.
const ROWS: &str = "control_trans";

/// One attention.
#[derive(Clone)]
struct Place {
    site: SiteId,
    path: String,
    layer: Option<usize>,
    part: &'static str,
    heads: usize,
    dim: usize,
}

/// What the rows of all layers come from.
#[derive(Clone)]
enum Tensors {
    /// [length · layers · 2 · heads · dim], length outermost.
    Flat(Param),
    /// E, and W and b of the two layers.
    Made { table: Param, inner: (Param, Param), outer: (Param, Param) },
}

/// The prefix of one layer.
struct Rows {
    prefix: Prefix,
    rows: Tensors,
    gate: Option<Opens>,
    place: Place,
    first: usize,
    widens: bool,
}

/// Where a gate sees its rows.
enum Opens {
    /// Here.
    Here(Gate),
    /// At the queries, which leave what it gives under this key.
    AtQueries(String),
}

/// The gate of a prefix, at the matrix that its queries come from.
struct Queries {
    gate: Gate,
    key: String,
}

impl WeightPatch for Queries {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        base.dense()
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, cx: &Pass) -> Result<Tensor> {
        cx.put(self.key.clone(), self.gate.of(x, cx)?);
        base.forward(x)
    }

    fn mergeable(&self) -> bool {
        false
    }
}

impl Rows {
    /// Keys beside values [length, 2 · heads · dim].
    fn own(&self) -> Result<Tensor> {
        let (length, count) = (self.prefix.length, 2 * self.place.heads * self.place.dim);
        match &self.rows {
            Tensors::Flat(all) => {
                let all = all.get();
                Ok(all.reshape([length, all.len() / length])?.narrow(1, self.first, count)?)
            }
            Tensors::Made { table, inner, outer } => {
                let h = table.get().matmul_t(&inner.0.get())?.plus(&inner.1.get())?;
                let h = self.prefix.activation.apply(h)?;
                // Only this layer's rows of W₂ are multiplied by.
                let (weight, bias) = (outer.0.get(), outer.1.get());
                let end = self.first + count;
                Ok(h.matmul_t(&weight.rows_between(self.first, end)?)?
                    .plus(&bias.rows_between(self.first, end)?)?)
            }
        }
    }
}

impl KeyValuePatch for Rows {
    fn count(&self) -> usize {
        self.prefix.length
    }

    fn rows(&self, input: &Tensor, cx: &Pass) -> Result<KeyValues> {
        let Place { heads, dim, site, ref path, .. } = self.place;
        let (length, width) = (self.prefix.length, heads * dim);
        let own = cx.dropout(&self.own()?, self.prefix.dropout, site, 3)?.reshape([1, length, 2 * width])?;
        let gates = match &self.gate {
            Some(Opens::Here(gate)) => Some(gate.of(input, cx)?),
            Some(Opens::AtQueries(key)) => Some(cx.find(key).ok_or_else(|| Error::Site {
                path: path.clone(),
                message: "the gate of its prefix has seen no queries".into(),
            })?),
            None => None,
        };
        let part = |number: usize| -> Result<Tensor> {
            let rows = own.narrow(2, number * width, width)?;
            let rows = match &gates {
                Some(gates) => {
                    let own = gates.narrow(1, number.min(gates.dim(1) - 1), 1)?;
                    rows.mul(&own.reshape([gates.dim(0), 1, 1])?)?
                }
                None => rows,
            };
            Ok(rows.reshape([rows.dim(0) * length, heads, dim])?)
        };
        Ok(KeyValues { keys: part(0)?, values: part(1)? })
    }

    fn moves(&self) -> bool {
        false
    }

    fn stays_in_view(&self) -> bool {
        self.prefix.in_view
    }

    fn widens(&self) -> bool {
        self.widens
    }
}
