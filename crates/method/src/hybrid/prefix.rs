//! AdapterHub's prefix: keys and values before those of every attention, trained through a network that makes them of
//! embeddings, or as they are (flat), times a gate of the sequence or not.
//!
//! [P_k; P_v] of layer i = G·(tanh(E·W₁ᵀ + b₁)·W₂ᵀ + b₂), the columns of i. Tokens keep their positions, and the prefix lies
//! before the first.

use engraft_nn::{
    Builder, Error, Init, KeyValuePatch, KeyValues, Kind, Pass, Patch, Result, Role, Site, SiteId, Sites,
    Stack,
};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::layer_number;
use crate::prompts::prompt::TOKENS_MAX;
use crate::read::{Reader, as_written};
use crate::shared::gate::Gate;

pub(super) const INNER_MAX: usize = 1 << 20;

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
    /// Whether the self-attentions of a decoder have one too, for which AdapterHub's file has another form.
    pub every_stack: bool,
}

impl Prefix {
    pub fn new(length: usize, inner: usize, gated: bool) -> Prefix {
        let (flat, inner, leave_out) = (inner == 0, inner.max(1), vec![]);
        Prefix { length, inner, flat, gated, dropout: 0.0, leave_out, every_stack: false }
    }

    pub fn read(map: &Map<String, Value>) -> Result<Prefix> {
        let mut r = Reader::file(map);
        r.ignore(&["architecture", "init_weights_seed", "encoder_prefix", "cross_prefix"]);
        r.one_of("non_linearity", &[("tanh", ())]);
        let gated = r.flag("use_gating", false);
        if gated && !r.flag("shared_gating", true) {
            r.problem("`shared_gating` is false: one gate for keys and values is there, not two");
        }
        r.ignore(&["shared_gating"]);
        let prefix = Prefix {
            length: r.count("prefix_length", 30, TOKENS_MAX),
            inner: r.count("bottleneck_size", 512, INNER_MAX),
            flat: r.flag("flat", false),
            gated,
            dropout: r.dropout("dropout"),
            leave_out: r.counts("leave_out").unwrap_or_default(),
            every_stack: false,
        };
        r.finish()?;
        Ok(prefix)
    }

    pub fn config(&self) -> Value {
        json!({
            "architecture": "prefix_tuning", "bottleneck_size": self.inner, "cross_prefix": true,
            "dropout": as_written(self.dropout), "encoder_prefix": true, "flat": self.flat, "init_weights_seed": null,
            "leave_out": self.leave_out, "non_linearity": "tanh", "prefix_length": self.length, "shared_gating": true,
            "use_gating": self.gated,
        })
    }

    /// Attaches it as `name`; gives the paths of the attentions.
    pub fn attach(&self, b: &mut Builder<'_>, name: &str) -> Result<Vec<String>> {
        let sites = b.sites();
        let places: Vec<Place> = sites.iter().filter_map(|s| self.place(sites, s)).collect();
        let decodes = sites.iter().any(|s| s.stack == Stack::Decoder);
        if decodes && !self.every_stack || places.is_empty() {
            return Err(Error::Unsupported(
                "a prefix in AdapterHub's form needs a model with one stack and attention; name the methods `prefix` and `bottleneck` together instead".into(),
            ));
        }
        let columns = places.iter().map(|p| 2 * p.heads * p.dim).sum();
        let stem = format!("{}.prefix_tunings.{name}.self_prefix", pool(&places[0].path));
        let rows = self.tensors(b, &stem, columns)?;
        let (mut first, width) = (0, b.info().width);
        for place in &places {
            let gate = match self.gated {
                true => {
                    let stem = format!("{}.prefix_tuning.prefix_gates.{name}", place.path);
                    Some(Gate::new(b, &stem, (1, width))?)
                }
                false => None,
            };
            let own = Rows { prefix: self.clone(), rows: rows.clone(), gate, place: place.clone(), first };
            b.patch(place.site, Patch::KeyValue(Box::new(own)))?;
            first += 2 * place.heads * place.dim;
        }
        Ok(places.into_iter().map(|p| p.path).collect())
    }

    fn place(&self, sites: &Sites, s: &Site) -> Option<Place> {
        let own = s.role == Role::Attention;
        let wanted = own && layer_number(sites, s).is_none_or(|layer| !self.leave_out.contains(&layer));
        match s.kind {
            Kind::KeyValue { heads, dim } if wanted => {
                Some(Place { site: s.id, path: s.path.clone(), heads, dim })
            }
            _ => None,
        }
    }

    fn tensors(&self, b: &mut Builder<'_>, stem: &str, columns: usize) -> Result<Tensors> {
        if self.flat {
            let all =
                b.param(&format!("{stem}.control_trans"), &[self.length * columns], Init::Normal(1.0))?;
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

/// Where AdapterHub keeps what all layers share: in the trunk, which a bare encoder is itself.
fn pool(path: &str) -> String {
    match path.split('.').next() {
        Some(trunk) if trunk != "encoder" => format!("{trunk}.prefix_tuning"),
        _ => "prefix_tuning".into(),
    }
}

/// One attention.
#[derive(Clone)]
struct Place {
    site: SiteId,
    path: String,
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
    gate: Option<Gate>,
    place: Place,
    first: usize,
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
                let h = table.get().matmul_t(&inner.0.get())?.plus(&inner.1.get())?.unary(Unary::Tanh)?;
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
        let Place { heads, dim, site, .. } = self.place;
        let (length, width) = (self.prefix.length, heads * dim);
        let own = cx.dropout(&self.own()?, self.prefix.dropout, site, 3)?.reshape([1, length, 2 * width])?;
        let rows = match &self.gate {
            Some(gate) => {
                let gates = gate.of(input, cx)?;
                own.mul(&gates.reshape([gates.dim(0), 1, 1])?)?
            }
            None => own,
        };
        let count = rows.dim(0) * length;
        let rows = rows.reshape([count, 2 * width])?;
        let part = |first: usize| rows.narrow(1, first, width)?.reshape([count, heads, dim]);
        Ok(KeyValues { keys: part(0)?, values: part(width)? })
    }

    fn moves(&self) -> bool {
        false
    }
}
