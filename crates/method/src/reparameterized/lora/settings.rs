//! The settings of a recipe.

use engraft_nn::{Result, Role};
use serde_json::{Map, Value};

use super::factors::Dropout;
use super::file::Found;
use super::form::Form;
use super::prepare::{Prior, Search};
use super::start::{STARTS, Start};
use super::variants::{Blocks, Kasa};
use super::{Lora, Mixer};
use super::{alora, monteclora, velora};
use crate::read::{Pattern, Reader};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::token_indices::Tokens;
use crate::{Field, FieldKind, Info, Method};

pub(super) const RANK_MAX: usize = 1 << 16;
/// The largest rank that a recipe may ask for: above it a matrix is better trained whole.
const RECIPE_RANK_MAX: usize = 1024;
/// The most batches that a start may look at, the most rounds and masks.
const BATCHES_MAX: usize = 1 << 16;
const ROUNDS_MAX: usize = 64;
const MASKS_MAX: usize = 64;
/// The most blocks of a matrix.
const BLOCKS_MAX: usize = 1 << 10;

const MIXERS: &[(&str, Mixer)] =
    &[("none", Mixer::None), ("kaiming", Mixer::Kaiming), ("orthogonal", Mixer::Orthogonal)];
const PRIORS: &[(&str, Prior)] = &[("ipm", Prior::Instruction), ("kpm", Prior::Knowledge)];

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
        int("rank", (1, RECIPE_RANK_MAX as i64), Some("8"), "Inner size r of the product."),
        float("alpha", (0.0, 1e9), "16", "The product is scaled by alpha/rank."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of A while training."),
        flag("rslora", "false", "Scale by alpha/√rank instead."),
        flag("dora", "false", "Train the rows' magnitudes apart from their directions."),
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
        choice(
            "bias",
            &["none", "all", "lora_only"],
            "\"none\"",
            "Which biases of the model are trained too.",
        ),
        flag("lora_bias", "false", "Give the product a bias of its own."),
        float(
            "lr_ratio",
            (1e-3, 1e3),
            "1",
            "LoRA+: the learning rate of B over that of A; its authors advise 16. Tables keep the rate.",
        ),
        flag("freeze_a", "false", "LoRA-FA: train B alone; inputs of layers need not be kept for backward."),
        choice(
            "mixer",
            &["none", "kaiming", "orthogonal"],
            "\"none\"",
            "MoSLoRA: a trained matrix between B and A, and how it starts; saved folded into A.",
        ),
        flag(
            "kasa",
            "false",
            "KaSA: take the smallest singular values off the weight and give the product values of its own.",
        ),
        float("kasa_beta", (0.0, 1e3), "1e-4", "KaSA: weight of the squares of these values in the loss."),
        float(
            "kasa_gamma",
            (0.0, 1e3),
            "1e-3",
            "KaSA: weight of how far the factors are from orthonormal in the loss.",
        ),
        int(
            "blocks",
            (1, BLOCKS_MAX as i64),
            Some("1"),
            "BD-LoRA: number of blocks on the diagonal of A or B, so that parts of a matrix are served apart.",
        ),
        Field {
            name: "blocks_of_a",
            kind: FieldKind::TextList,
            default: Some("[]"),
            doc: "BD-LoRA: parts of the names of modules whose A has blocks; usually those that end attention and MLP.",
        },
        Field {
            name: "blocks_of_b",
            kind: FieldKind::TextList,
            default: Some("[]"),
            doc: "BD-LoRA: parts of the names of modules whose B has blocks; usually queries, keys, values, gate and up.",
        },
        float(
            "structured_dropout",
            (0.0, 0.999),
            "0",
            "LoRA Dropout: share of columns of A and of rows of B left out while training.",
        ),
        int(
            "dropout_masks",
            (1, MASKS_MAX as i64),
            Some("4"),
            "Number of masks of structured_dropout that the sequences of a batch are dealt to.",
        ),
        choice(
            "init",
            &[
                "kaiming",
                "gaussian",
                "random",
                "orthogonal",
                "pissa",
                "olora",
                "mica",
                "eva",
                "corda",
                "lora-ga",
            ],
            "\"kaiming\"",
            "How A and B start: at random, from the weight, or from what the base makes of the training data.",
        ),
        int(
            "pissa_niter",
            (0, ROUNDS_MAX as i64),
            None,
            "Rounds of random projections for pissa (4 is usual); left out, the decomposition is exact.",
        ),
        int(
            "init_batches",
            (1, BATCHES_MAX as i64),
            Some("32"),
            "Most batches that eva, corda and lora-ga look at.",
        ),
        float(
            "eva_rho",
            (1.0, 64.0),
            "2",
            "Ranks are dealt out by explained variance, up to so many times rank; 1 deals none.",
        ),
        float("eva_tau", (0.0, 1.0), "0.99", "EVA stops once directions of two batches have this cosine."),
        choice(
            "corda_method",
            &["ipm", "kpm"],
            "\"ipm\"",
            "CorDA: ipm adapts what the data use most, kpm what they use least, to keep it.",
        ),
        float("lora_ga_gamma", (1e-3, 1e6), "16", "LoRA-GA: γ of the size out^(1/4)/√γ of the start."),
        velora::FIELDS[0],
        velora::FIELDS[1],
        velora::FIELDS[2],
        velora::FIELDS[3],
        monteclora::FIELDS[0],
        monteclora::FIELDS[1],
        monteclora::FIELDS[2],
        monteclora::FIELDS[3],
        monteclora::FIELDS[4],
        monteclora::FIELDS[5],
        alora::FIELDS[0],
    ],
};

impl Default for Lora {
    /// What a recipe that sets nothing has.
    fn default() -> Self {
        Lora {
            rank: 8,
            alpha: 16.0,
            root_scaling: false,
            dropout: Dropout::default(),
            rank_pattern: vec![],
            alpha_pattern: vec![],
            bias: Biases::None,
            product_bias: false,
            start: Start::Kaiming,
            search: Search::default(),
            dora: false,
            mixer: Mixer::None,
            kasa: None,
            blocks: None,
            form: Form::Plain,
            freeze_a: false,
            lr_ratio: 1.0,
            tied: false,
            tokens: Tokens::default(),
            parameters: vec![],
            from_file: false,
            kept: Map::new(),
            found: Found::default(),
        }
    }
}

pub(super) fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let rounds = r.float("pissa_niter", -1.0);
    let start = match r.one_of("init", STARTS) {
        Start::Pissa(_) if rounds >= 0.0 => Start::Pissa(Some(rounds as usize)),
        start => start,
    };
    let lora = Lora {
        rank: r.count("rank", 8, RECIPE_RANK_MAX),
        alpha: r.float("alpha", 16.0),
        root_scaling: r.flag("rslora", false),
        dropout: Dropout {
            elements: r.dropout("dropout"),
            structured: r.dropout("structured_dropout"),
            masks: r.count("dropout_masks", 4, MASKS_MAX),
        },
        rank_pattern: r.patterns("rank_pattern"),
        alpha_pattern: r.patterns("alpha_pattern"),
        bias: Biases::read(&mut r, "lora_only"),
        product_bias: r.flag("lora_bias", false),
        start,
        search: Search {
            batches: r.count("init_batches", 32, BATCHES_MAX),
            rho: r.float("eva_rho", 2.0),
            tau: r.float("eva_tau", 0.99),
            prior: r.one_of("corda_method", PRIORS),
            gamma: r.float("lora_ga_gamma", 16.0),
            eva_config: None,
        },
        dora: r.flag("dora", false),
        mixer: r.one_of("mixer", MIXERS),
        kasa: read_kasa(&mut r),
        blocks: read_blocks(&mut r),
        form: Form::read(&mut r),
        freeze_a: r.flag("freeze_a", false),
        lr_ratio: r.float("lr_ratio", 1.0),
        tied: false,
        tokens: Tokens::default(),
        parameters: vec![],
        from_file: false,
        kept: Map::new(),
        found: Found::default(),
    };
    check(&lora, &mut r);
    if rounds >= 0.0 && !matches!(lora.start, Start::Pissa(_)) {
        r.problem("`pissa_niter` is for `init = \"pissa\"`");
    }
    r.finish()?;
    Ok(Box::new(lora))
}

fn read_kasa(r: &mut Reader<'_>) -> Option<Kasa> {
    let kasa = Kasa { beta: r.float("kasa_beta", 1e-4), gamma: r.float("kasa_gamma", 1e-3) };
    r.flag("kasa", false).then_some(kasa)
}

/// Modules in neither list keep whole factors.
fn read_blocks(r: &mut Reader<'_>) -> Option<Blocks> {
    let count = r.count("blocks", 1, BLOCKS_MAX);
    let [of_a, of_b] = ["blocks_of_a", "blocks_of_b"].map(|key| r.texts(key).unwrap_or_default());
    let none = of_a.is_empty() && of_b.is_empty();
    if none != (count == 1) {
        r.problem("`blocks` above 1 and a list, `blocks_of_a` or `blocks_of_b`, belong together");
    }
    (count > 1 && !none).then_some(Blocks { of_a, of_b, count, strict: false })
}

/// What cannot be.
pub(super) fn check(lora: &Lora, r: &mut Reader<'_>) {
    for p in lora.rank_pattern.iter().filter_map(|p| p.not_a_count(RANK_MAX)) {
        r.problem(format!("`rank_pattern`: expected a whole number from 1 to {RANK_MAX}, found {p}"));
    }
    lora.check_parameters(r);
    if lora.dora && lora.product_bias {
        r.problem("`lora_bias` and DoRA cannot be combined");
    }
    if lora.dora && lora.dropout.structured > 0.0 {
        r.problem("`structured_dropout` and DoRA cannot be combined; `dropout` can");
    }
    if lora.mixer != Mixer::None && (lora.start.is_taken_off() || lora.start == Start::Eva) {
        r.problem("`mixer` needs an `init` that is drawn at random");
    }
    check_form(lora, r);
    let several = [lora.dora, lora.mixer != Mixer::None, lora.kasa.is_some(), lora.blocks.is_some()];
    if several[1..].iter().filter(|on| **on).count() > 1 || several[0] && several[2..].contains(&true) {
        r.problem("DoRA, a mixer, KaSA and blocks cannot be combined, but for DoRA with a mixer");
    }
    let special = lora.kasa.is_some() || lora.blocks.is_some();
    if special && !matches!(lora.start, Start::Kaiming | Start::Gaussian | Start::Random) {
        r.problem("`init` must be `kaiming` with KaSA or blocks");
    }
    if lora.kasa.is_some() && lora.alpha <= 0.0 {
        r.problem("`alpha` must be above 0 with KaSA");
    }
    if lora.freeze_a && lora.start == Start::Mica {
        r.problem("`freeze_a` and `init = \"mica\"`, which trains A alone, leave nothing to train");
    }
    if lora.start.is_taken_off() && (lora.alpha <= 0.0 || lora.alpha_pattern.iter().any(|p| p.value() <= 0.0))
    {
        r.problem("`alpha` must be above 0 for an `init` that is taken off the weight");
    }
    let odd = |ranks: &[Pattern]| lora.rank % 2 == 1 || ranks.iter().any(|p| p.value() % 2.0 != 0.0);
    if lora.start == Start::Orthogonal && odd(&lora.rank_pattern) {
        r.problem("`rank` must be even for `init = \"orthogonal\"`");
    }
}

/// What cannot be with VeLoRA, MonteCLoRA or aLoRA.
fn check_form(lora: &Lora, r: &mut Reader<'_>) {
    let Some(name) = lora.form.name() else { return };
    if lora.dora || lora.mixer != Mixer::None || lora.kasa.is_some() || lora.blocks.is_some() {
        r.problem(format!("{name} cannot be combined with DoRA, a mixer, KaSA or blocks"));
    }
    if lora.dropout.structured > 0.0 {
        r.problem(format!("`structured_dropout` and {name} cannot be combined; `dropout` can"));
    }
    // A file may name any start but MiCA, which is a variant of its own.
    let drawn = !lora.start.is_taken_off() && lora.start != Start::Eva || lora.from_file;
    if lora.start == Start::Mica || !drawn {
        r.problem(format!("`init` must be drawn at random with {name}, as `kaiming` is"));
    }
    if matches!(lora.form, Form::Velora(_)) && lora.freeze_a {
        r.problem(
            "VeLoRA saves memory where A is trained; leave out `freeze_a`, which saves more, or `velora`",
        );
    }
}
