//! The settings of a recipe.

use engraft_nn::{Result, Role};
use serde_json::{Map, Value};

use super::{Biases, Lora, Start};
use crate::read::Reader;
use crate::{Field, FieldKind, Info, Method};

pub(super) const RANK_MAX: usize = 1 << 16;
/// The largest rank that a recipe may ask for: above it a matrix is better trained whole.
const RECIPE_RANK_MAX: usize = 1024;

pub(super) const BIASES: &[(&str, Biases)] =
    &[("none", Biases::None), ("all", Biases::All), ("lora_only", Biases::OfTargets)];
const STARTS: &[(&str, Start)] =
    &[("kaiming", Start::Kaiming), ("gaussian", Start::Gaussian), ("random", Start::Random)];

pub(super) static INFO: Info = Info {
    name: "lora",
    title: "LoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2106.09685",
    summary: "W′ = W + (α/r)·B·A; with rslora α/√r; with dora magnitude and direction apart",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "LORA",
    fields: &[
        Field {
            name: "rank",
            kind: FieldKind::Int { min: 1, max: RECIPE_RANK_MAX as i64 },
            default: Some("8"),
            doc: "Inner size r of the product.",
        },
        Field {
            name: "alpha",
            kind: FieldKind::Float { min: 0.0, max: 1e9 },
            default: Some("16"),
            doc: "The product is scaled by alpha/rank.",
        },
        Field {
            name: "dropout",
            kind: FieldKind::Float { min: 0.0, max: 0.999 },
            default: Some("0"),
            doc: "Dropout on the input of A while training.",
        },
        Field {
            name: "rslora",
            kind: FieldKind::Bool,
            default: Some("false"),
            doc: "Scale by alpha/√rank instead.",
        },
        Field {
            name: "dora",
            kind: FieldKind::Bool,
            default: Some("false"),
            doc: "Train the rows' magnitudes apart from their directions.",
        },
        Field {
            name: "rank_pattern",
            kind: FieldKind::IntMap,
            default: Some("{}"),
            doc: "Other ranks for modules that a pattern matches.",
        },
        Field {
            name: "alpha_pattern",
            kind: FieldKind::FloatMap,
            default: Some("{}"),
            doc: "Other alphas for modules that a pattern matches.",
        },
        Field {
            name: "bias",
            kind: FieldKind::OneOf(&["none", "all", "lora_only"]),
            default: Some("\"none\""),
            doc: "Which biases of the model are trained too.",
        },
        Field {
            name: "lora_bias",
            kind: FieldKind::Bool,
            default: Some("false"),
            doc: "Give the product a bias of its own.",
        },
        Field {
            name: "init",
            kind: FieldKind::OneOf(&["kaiming", "gaussian", "random"]),
            default: Some("\"kaiming\""),
            doc: "How A starts; random starts B too.",
        },
    ],
};

pub(super) fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let lora = Lora {
        rank: r.count("rank", 8, RECIPE_RANK_MAX),
        alpha: r.float("alpha", 16.0),
        root_scaling: r.flag("rslora", false),
        dropout: r.dropout("dropout"),
        rank_pattern: r.patterns("rank_pattern"),
        alpha_pattern: r.patterns("alpha_pattern"),
        bias: r.one_of("bias", BIASES),
        product_bias: r.flag("lora_bias", false),
        start: r.one_of("init", STARTS),
        dora: r.flag("dora", false),
        tied: false,
    };
    check(&lora, &mut r);
    r.finish()?;
    Ok(Box::new(lora))
}

pub(super) fn check(lora: &Lora, r: &mut Reader<'_>) {
    for p in lora.rank_pattern.iter().filter_map(|p| p.not_a_count(RANK_MAX)) {
        r.problem(format!("`rank_pattern`: expected a whole number from 1 to {RANK_MAX}, found {p}"));
    }
    if lora.dora && lora.product_bias {
        r.problem("`lora_bias` and DoRA cannot be combined");
    }
}
