//! Bottleneck adapters: a small MLP with a residual after, or beside, a sublayer.
//!
//! A(x) = s·(σ(x·W_dᵀ + b_d)·W_uᵀ + b_u), r = width/reduction. With u the stream, g the sublayer's output and N the norm
//! of a post-norm model (the identity elsewhere), the next stream is
//!   Houlsby, after attention and MLP:  N(u + g + A(g))
//!   Pfeiffer, after the MLP:           N(u + g + A(N(u + g)))
//!   residual, after the layer:         y + A(N'(y)), y = N(u + g), N' a layer norm of its own
//!   parallel, beside the MLP:          N(u + g + A(u))
//!
//! Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247; Bapna and Firat 2019, arXiv:1909.08478, and
//! Lin et al. 2020, arXiv:2004.03829 (residual); He et al. 2022, arXiv:2110.04366 (parallel); AdapterDrop, Rücklé et al. 2021,
//! arXiv:2010.11918; MAD-X's invertible adapters: `invertible.rs`; the variants and the file form are those of AdapterHub's `adapters` 1.3.
//!
//! W_d [r, width], b_d `[r]`, W_u [width, r], b_u `[width]`; own norms `[width]`; a learned s `[1]` or `[width]`; a gate's
//! weight [1, width] and bias `[1]`. Compacter's layers in their place: `compacter.rs`.

mod file;
mod invertible;
mod layer;
mod phm;
mod settings;
#[cfg(test)]
mod tests;

use engraft_nn::{Adapter, Builder, Error, Kind, Patch, Result, Site, Stack};
use serde_json::{Map, Value};

pub(crate) use file::{around, from_adapter_hub, read_file};
pub(crate) use phm::Phm;
pub(crate) use settings::{Bottleneck, Form};

use crate::additive::compacter;
use crate::read::Reader;
use crate::shared::activations::{ACTIVATIONS, NAMES};
use crate::shared::branches::Branches;
use crate::shared::fields::{choice, flag, float, int};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method};
use settings::{FORMS, Scaling, Start};

pub(crate) static INFO: Info = Info {
    name: "bottleneck",
    title: "Bottleneck adapter",
    class: "additive",
    sites: "sublayer",
    paper: "arXiv:1902.00751",
    summary: "a small MLP with a residual after (Houlsby, Pfeiffer, residual) or beside (parallel) a sublayer",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_BOTTLENECK",
    fields: &[
        choice(
            "form",
            &["pfeiffer", "houlsby", "residual", "parallel"],
            "\"pfeiffer\"",
            "After the MLP, after attention and MLP, after the layer with a norm of its own, or beside the MLP.",
        ),
        Field {
            name: "reduction",
            kind: FieldKind::Float { min: 0.01, max: 1e6 },
            default: None,
            doc: "Width of the model over width of the bottleneck; 16, and 2 for parallel.",
        },
        Field {
            name: "activation",
            kind: FieldKind::OneOf(NAMES),
            default: None,
            doc: "Function in the middle; relu, and swish for houlsby.",
        },
        Field {
            name: "scaling",
            kind: FieldKind::Float { min: 0.0, max: 1e6 },
            default: None,
            doc: "Factor on what is added; 1, and 4 for parallel.",
        },
        flag("learned_scaling", "false", "Train the factor, from 1, instead."),
        float("dropout", (0.0, 0.999), "0", "Dropout on what is added, while training."),
        flag(
            "zero_init",
            "false",
            "Start with W_u = 0, so that nothing changes at first; always so for parallel.",
        ),
        Field {
            name: "ln_before",
            kind: FieldKind::Bool,
            default: None,
            doc: "A trained layer norm before W_d; true for residual.",
        },
        flag("ln_after", "false", "A trained layer norm on what is added."),
        flag(
            "gating",
            "false",
            "Times the mean of a trained gate σ(w·x + b) over the tokens of the sequence; in training, not over those that are to be predicted.",
        ),
        flag(
            "invertible",
            "false",
            "An invertible adapter behind the embeddings too (MAD-X), each of its two networks half as wide inside.",
        ),
        LEAVE_OUT,
        DROP,
        ROBUST_DROP,
    ],
};

/// Leaves out more blocks.
pub(crate) fn add_blocks(left_out: &mut Vec<usize>, more: &[usize]) {
    left_out.extend(more);
    left_out.sort_unstable();
    left_out.dedup();
}

/// Blocks of one's choice.
pub(crate) const LEAVE_OUT: Field = Field {
    name: "leave_out",
    kind: FieldKind::IntList,
    default: None,
    doc: "Layers without an adapter, from 0; an encoder's layers come before a decoder's.",
};

/// AdapterDrop, specialised.
pub(crate) const DROP: Field = int(
    "drop",
    (0, 1 << 16),
    Some("0"),
    "AdapterDrop: how many of the first layers have no adapter; an encoder's layers come before a decoder's.",
);

/// AdapterDrop, robust.
pub(crate) const ROBUST_DROP: Field = flag(
    "robust_drop",
    "false",
    "AdapterDrop: in every batch leave out the adapters of the first m layers, m drawn evenly from 0 to all but one.",
);

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let mut method = Bottleneck::of(r.one_of("form", FORMS));
    method.reduction = r.reduction("reduction", method.reduction);
    if r.value("activation").is_some() {
        method.activation = r.one_of("activation", ACTIVATIONS);
    }
    let fixed = match method.scaling {
        Scaling::Fixed(s) => s,
        _ => 1.0,
    };
    method.scaling = Scaling::Fixed(r.float("scaling", fixed));
    if r.flag("learned_scaling", false) {
        method.scaling = Scaling::Learned;
    }
    method.dropout = r.dropout("dropout");
    if r.flag("zero_init", false) {
        method.start = Start::ZeroUp;
    }
    method.ln_before = r.flag("ln_before", method.ln_before);
    method.ln_after = r.flag("ln_after", false);
    method.gating = r.flag("gating", false);
    method.invertible = r.flag("invertible", false).then_some(2.0);
    method.read_drop(&mut r);
    r.finish()?;
    Ok(Box::new(method))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    read_file(config, &INFO, false)
}

fn example() -> Box<dyn Method> {
    Box::new(Bottleneck {
        ln_after: true,
        scaling: Scaling::Learned,
        gating: true,
        reduction: 4.0,
        ..Bottleneck::of(Form::Houlsby)
    })
}

impl Method for Bottleneck {
    fn info(&self) -> &'static Info {
        if self.phm.is_some() { &compacter::INFO } else { &INFO }
    }

    fn formula(&self) -> Option<&'static str> {
        Some(match self.phm {
            Some(_) => "n^3 + 2·L·(2·rank·(d + r) + r + d), r = ⌊d/reduction⌋",
            None => "L·(2·d·r + r + d), r = ⌊d/reduction⌋",
        })
    }

    fn by_layers(&self) -> bool {
        true
    }

    fn leave_out(&mut self, blocks: &[usize]) -> bool {
        add_blocks(&mut self.leave_out, blocks);
        true
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let sublayers: Vec<_> = b.sites().of_kind(|k| matches!(k, Kind::Sublayer { .. })).collect();
        if sublayers.is_empty() {
            let message = format!("{}s need a model with sublayers", self.info().title);
            return Err(Error::Unsupported(message));
        }
        if let Some(reduction) = self.invertible {
            invertible::attach(b, &self.name, self.activation, reduction)?;
        }
        let shared = self.shared(b)?;
        let wanted = |site: &&Site| self.wants(site, b.sites().number(site));
        let wanted: Vec<&Site> = sublayers.into_iter().filter(wanted).collect();
        if wanted.is_empty() && !self.leave_out.is_empty() {
            let message = "`layers`, `leave_out` and `drop` leave no layer that has an adapter";
            return Err(Error::Unsupported(message.into()));
        }
        for site in wanted {
            let patch = layer::AtSublayer::build(self, b, site, &shared)?;
            b.patch(site.id, Patch::Sublayer(Box::new(patch)))?;
        }
        Ok(())
    }

    /// With robust dropping, the first layers rest in many steps.
    fn rests(&self) -> bool {
        self.robust_drop
    }

    fn doubts(&self, sites: &[&Site]) -> Vec<String> {
        let blocks = sites.iter().filter_map(|s| s.layer).max().map_or(1, |last| last + 1);
        let stacks = if sites.iter().any(|s| s.stack == Stack::Decoder) { 2 } else { 1 };
        let far = self.leave_out.iter().max().filter(|layer| **layer >= stacks * blocks);
        far.map(|far| {
            format!("`leave_out` or `drop` name layer {far}, and there are 0 to {}", stacks * blocks - 1)
        })
        .into_iter()
        .collect()
    }

    fn branches(&self) -> Option<Box<dyn Branches>> {
        Some(Box::new(self.clone()))
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        self.to_file(model)
    }

    fn file_name(&self, name: &str) -> String {
        let own = ["adapters.", "shared_parameters."].iter().any(|part| name.contains(part));
        if own { name.into() } else { format!("base_model.model.{name}") }
    }

    /// `adapters` keeps the norm before the bottleneck in two places.
    fn file_copies(&self, name: &str, _adapter: &Adapter) -> Vec<String> {
        let own = name.contains(".adapter_norm_before.");
        own.then(|| name.replace(".adapter_norm_before.", ".adapter_down.0.")).into_iter().collect()
    }
}
