//! Where bottleneck adapters sit and how they compute; the words are those of `adapters`.

use engraft_nn::{Init, Role, Site};
use serde_json::{Map, Value};

use super::phm::Phm;
use crate::read::Reader;
use crate::shared::activations::Activation;

/// The settings.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bottleneck {
    /// Name of the adapter, part of its tensors' names.
    pub name: String,
    pub after_attention: bool,
    pub after_cross_attention: bool,
    pub after_mlp: bool,
    pub parallel: bool,
    pub activation: Activation,
    /// width/r, with exceptions by layer.
    pub reduction: f64,
    pub reduction_by_layer: Vec<(usize, f64)>,
    pub leave_out: Vec<usize>,
    /// Whether the adapters of the first layers are left out by chance.
    pub robust_drop: bool,
    pub scaling: Scaling,
    pub dropout: f32,
    /// Chance that a sequence goes without what is added, while training.
    pub depth: f32,
    /// Norms of its own before and after.
    pub ln_before: bool,
    pub ln_after: bool,
    /// Whether the input is the normed sum of stream and output, and whether the model's norm follows.
    pub original_ln_before: bool,
    pub original_ln_after: bool,
    pub residual: Residual,
    /// Whether the residual is added before the norm of its own.
    pub residual_before_own_norm: bool,
    pub gating: bool,
    pub start: Start,
    /// The reduction of invertible adapters behind the embeddings, where there are any.
    pub invertible: Option<f64>,
    /// Compacter's layers in the place of matrices.
    pub phm: Option<Phm>,
    /// Keys of a file that say nothing here, as they are.
    pub silent: Map<String, Value>,
}

/// What the adapter's own residual is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Residual {
    /// The sublayer's output.
    Output,
    /// Stream plus output.
    Sum,
    /// What the adapter reads.
    Input,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scaling {
    Fixed(f64),
    Learned,
    Channel,
}

/// How the matrices start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Start {
    /// N(0, 0.02).
    Bert,
    /// W_d Kaiming-uniform, W_u zero: no change at first.
    ZeroUp,
    /// N(0, 0.01).
    Houlsby,
}

impl Start {
    /// How W_d, of `width` columns, and W_u start.
    pub fn matrices(self, width: usize) -> [Init; 2] {
        match self {
            Start::Bert => [Init::Normal(0.02), Init::Normal(0.02)],
            Start::ZeroUp => [Init::kaiming(width), Init::Zeros],
            Start::Houlsby => [Init::Normal(0.01), Init::Normal(0.01)],
        }
    }
}

/// The usual combinations.
#[derive(Clone, Copy)]
pub(crate) enum Form {
    Pfeiffer,
    Houlsby,
    Residual,
    Parallel,
}

pub(super) const FORMS: &[(&str, Form)] = &[
    ("pfeiffer", Form::Pfeiffer),
    ("houlsby", Form::Houlsby),
    ("residual", Form::Residual),
    ("parallel", Form::Parallel),
];

impl Bottleneck {
    pub fn of(form: Form) -> Bottleneck {
        let pfeiffer = Bottleneck {
            name: "engraft".into(),
            after_attention: false,
            after_cross_attention: false,
            after_mlp: true,
            parallel: false,
            activation: Activation::RELU,
            reduction: 16.0,
            reduction_by_layer: vec![],
            leave_out: vec![],
            robust_drop: false,
            scaling: Scaling::Fixed(1.0),
            dropout: 0.0,
            depth: 0.0,
            ln_before: false,
            ln_after: false,
            original_ln_before: true,
            original_ln_after: true,
            residual: Residual::Output,
            residual_before_own_norm: false,
            gating: false,
            start: Start::Bert,
            invertible: None,
            phm: None,
            silent: Map::new(),
        };
        match form {
            Form::Pfeiffer => pfeiffer,
            Form::Houlsby => Bottleneck {
                after_attention: true,
                original_ln_before: false,
                activation: Activation::SWISH,
                ..pfeiffer
            },
            // The own norm makes the branch large whatever the stream is, so that it starts as nothing.
            Form::Residual => Bottleneck {
                ln_before: true,
                original_ln_after: false,
                residual: Residual::Input,
                start: Start::ZeroUp,
                ..pfeiffer
            },
            Form::Parallel => Bottleneck {
                parallel: true,
                original_ln_before: false,
                reduction: 2.0,
                scaling: Scaling::Fixed(4.0),
                start: Start::ZeroUp,
                ..pfeiffer
            },
        }
    }

    /// Which layers have none: what a recipe says, and AdapterDrop's settings.
    pub fn read_drop(&mut self, r: &mut Reader<'_>) {
        let first = r.whole("drop", 0, 1 << 16);
        let named = r.counts("leave_out").unwrap_or_default();
        self.leave_out = (0..first).chain(named.into_iter().filter(|layer| *layer >= first)).collect();
        self.robust_drop = r.flag("robust_drop", false);
    }

    /// Whether there is an adapter at a sublayer of layer `number`.
    pub fn wants(&self, site: &Site, number: Option<usize>) -> bool {
        let place = match site.role {
            Role::Attention => self.after_attention,
            Role::CrossAttention => self.after_cross_attention,
            Role::Mlp => self.after_mlp,
            _ => false,
        };
        place && !number.is_some_and(|layer| self.leave_out.contains(&layer))
    }

    /// r at a site of `width` in layer `number`.
    pub fn size_at(&self, number: Option<usize>, width: usize) -> usize {
        let by_layer = self.reduction_by_layer.iter().find(|(layer, _)| Some(*layer) == number);
        let reduction = by_layer.map_or(self.reduction, |(_, reduction)| *reduction);
        ((width as f64 / reduction).floor() as usize).max(1)
    }
}
