//! LoRA: a frozen weight plus a trained product of two thin matrices.
//!
//! W′ = W + s·B·A with s = α/r, or α/√r (rsLoRA); A starts as Kaiming-uniform noise, B as zero, so W′ = W.
//! DoRA: W′ = m ⊙ (W + s·B·A)/‖W + s·B·A‖, norms of rows, not differentiated; m starts as the rows' norms of W.
//! The forward never forms W′: y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ.
//!
//! Hu et al. 2022, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; DoRA: Liu et al. 2024, arXiv:2402.09353.
//!
//! A [rank, in], B [out, rank], m `[out]`; of a table with `rows` rows: A [rank, rows], B [width, rank], W′ = W + s·(B·A)ᵀ;
//! of a head tied to it (`ensure_weight_tying`): the same A and B, y = x·Wᵀ + s·(drop(x)·B)·A;
//! of a convolution with windows [channels, height, width]: A [rank, channels, height, width], B [out, rank, 1, 1],
//! m [1, out, 1, 1].

use engraft_nn::{Base, Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor, no_grad};
use serde_json::{Map, Value, json};

use crate::read::{Pattern, Reader, as_written, number};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft, tied};

const RANK_MAX: usize = 1 << 16;
/// The largest rank that a recipe may ask for: above it a matrix is better trained whole.
const RECIPE_RANK_MAX: usize = 1024;

/// What is trained, and how it starts.
#[derive(Clone, Debug)]
struct Lora {
    rank: usize,
    alpha: f64,
    root_scaling: bool,
    dropout: f32,
    rank_pattern: Vec<Pattern>,
    alpha_pattern: Vec<Pattern>,
    bias: Biases,
    product_bias: bool,
    start: Start,
    dora: bool,
    /// A head that shares the tensor of an adapted table is changed as the table is.
    tied: bool,
}

/// Which biases of the model are trained along.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Biases {
    None,
    All,
    OfTargets,
}

/// How A and B start.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Start {
    /// A Kaiming-uniform, B zero.
    Kaiming,
    /// A normal with deviation 1/r, B zero.
    Gaussian,
    /// Both random: the adapter changes the model from the start.
    Random,
}

const BIASES: &[(&str, Biases)] =
    &[("none", Biases::None), ("all", Biases::All), ("lora_only", Biases::OfTargets)];
const STARTS: &[(&str, Start)] =
    &[("kaiming", Start::Kaiming), ("gaussian", Start::Gaussian), ("random", Start::Random)];

static INFO: Info = Info {
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

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
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

/// Keys of variants that are not here.
const OFF: &[&str] = &[
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];
/// Keys that only say how the tensors started, or hold a default that matters only to a variant that is off.
const SILENT: &[&str] = &[
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
];

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.must_be_off(OFF);
    r.ignore(SILENT);
    let lora = Lora {
        rank: r.count("r", 8, RANK_MAX),
        alpha: r.float("lora_alpha", 8.0),
        root_scaling: r.flag("use_rslora", false),
        dropout: r.dropout("lora_dropout"),
        rank_pattern: r.patterns("rank_pattern"),
        alpha_pattern: r.patterns("alpha_pattern"),
        bias: r.one_of("bias", BIASES),
        product_bias: r.flag("lora_bias", false),
        start: read_start(&mut r),
        dora: r.flag("use_dora", false),
        tied: r.flag("ensure_weight_tying", false),
    };
    check(&lora, &mut r);
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(lora), targets, train_also }))
}

/// `init_lora_weights`. Starts that edit the base (PiSSA and its kin) leave a file that means nothing without that base.
fn read_start(r: &mut Reader<'_>) -> Start {
    match r.value("init_lora_weights").cloned() {
        None | Some(Value::Bool(true)) => Start::Kaiming,
        Some(Value::Bool(false)) => Start::Random,
        Some(Value::String(s)) if s == "gaussian" => Start::Gaussian,
        Some(Value::String(s)) if s == "eva" || s == "orthogonal" => Start::Kaiming,
        Some(other) => {
            r.problem(format!(
                "`init_lora_weights` is {other}: such adapters fit only a base that was changed with them; save it in peft with `path_initial_model_for_weight_conversion` first"
            ));
            Start::Kaiming
        }
    }
}

fn check(lora: &Lora, r: &mut Reader<'_>) {
    for p in lora.rank_pattern.iter().filter_map(|p| p.not_a_count(RANK_MAX)) {
        r.problem(format!("`rank_pattern`: expected a whole number from 1 to {RANK_MAX}, found {p}"));
    }
    if lora.dora && lora.product_bias {
        r.problem("`lora_bias` and DoRA cannot be combined");
    }
}

fn example() -> Box<dyn Method> {
    Box::new(Lora {
        rank: 3,
        alpha: 6.0,
        root_scaling: true,
        dropout: 0.0,
        rank_pattern: vec![],
        alpha_pattern: vec![],
        bias: Biases::All,
        product_bias: false,
        start: Start::Kaiming,
        dora: false,
        tied: false,
    })
}

impl Method for Lora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        // Before the product's own bias, which is added to what stands in the layer's.
        self.attach_biases(b)?;
        let tied = if self.tied { tied::follow(b)? } else { vec![] };
        for site in b.targets().into_iter().filter(|site| !tied.contains(&site.id)) {
            match site.kind {
                Kind::Linear { out, inn, .. } => {
                    self.attach_matrix(b, site, Shapes { a: &[inn], ones: &[] }, out)?;
                }
                Kind::Convolution { out, shape: [_, window @ ..], .. } => {
                    self.attach_matrix(b, site, Shapes { a: &window, ones: &[1, 1] }, out)?;
                }
                Kind::Embedding { rows, width } => self.attach_table(b, site, rows, width)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let start = match self.start {
            Start::Kaiming => json!(true),
            Start::Gaussian => json!("gaussian"),
            Start::Random => json!(false),
        };
        let mut map: Map<String, Value> =
            OFF.iter().chain(SILENT).map(|k| (k.to_string(), Value::Null)).collect();
        let own = json!({
            "alpha_pattern": Pattern::table(&self.alpha_pattern), "bias": name_of(BIASES, self.bias), "ensure_weight_tying": self.tied,
            "fan_in_fan_out": false, "init_lora_weights": start, "loftq_config": {}, "lora_alpha": number(self.alpha),
            "layers_pattern": null, "layers_to_transform": null, "lora_bias": self.product_bias, "lora_dropout": as_written(self.dropout), "megatron_core": "megatron.core",
            "qalora_group_size": 16, "r": self.rank, "rank_pattern": Pattern::table(&self.rank_pattern),
            "use_dora": self.dora, "use_qalora": false, "use_rslora": self.root_scaling,
        });
        map.extend(own.as_object().cloned().unwrap_or_default());
        map
    }
}

fn name_of<T: PartialEq>(names: &[(&'static str, T)], value: T) -> &'static str {
    names.iter().find(|n| n.1 == value).map_or("", |n| n.0)
}

impl Lora {
    /// (rank, s) at a site.
    fn scale_at(&self, path: &str) -> (usize, f32) {
        let rank = Pattern::find(&self.rank_pattern, path).map_or(self.rank, |r| r as usize);
        let alpha = Pattern::find(&self.alpha_pattern, path).unwrap_or(self.alpha);
        let divisor = if self.root_scaling { (rank as f64).sqrt() } else { rank as f64 };
        (rank, (alpha / divisor) as f32)
    }

    fn attach_matrix(&self, b: &mut Builder<'_>, site: &Site, shapes: Shapes<'_>, out: usize) -> Result<()> {
        let (path, inn) = (&site.path, shapes.a.iter().product());
        let (rank, scale) = self.scale_at(path);
        let (init_a, init_b) = match self.start {
            Start::Kaiming => (Init::kaiming(inn), Init::Zeros),
            Start::Gaussian => (Init::Normal(1.0 / rank as f32), Init::Zeros),
            Start::Random => (Init::kaiming(inn), Init::kaiming(rank)),
        };
        let factors = Factors {
            a: b.param(&format!("{path}.lora_A.weight"), &[&[rank], shapes.a].concat(), init_a)?,
            b: b.param(&format!("{path}.lora_B.weight"), &[&[out, rank], shapes.ones].concat(), init_b)?,
            scale,
            dropout: self.dropout,
        };
        if self.dora {
            let product = no_grad(|| factors.product())?;
            let norms = no_grad(|| row_norms(&site_weight(site)?.add(&product)?))?;
            let shape = match shapes.ones {
                [] => vec![out],
                ones => [&[1, out], ones].concat(),
            };
            let magnitude = b.param(&format!("{path}.lora_magnitude_vector"), &shape, Init::Values(norms))?;
            return b.patch(site.id, Patch::Weight(Box::new(Dora { factors, magnitude })));
        }
        if self.product_bias {
            self.attach_product_bias(b, site, out, scale)?;
        }
        b.patch(site.id, Patch::Weight(Box::new(factors)))
    }

    /// s·(B·A·x + c) = s·B·A·x + s·c: the second part belongs to the layer's bias, or to the output where there is none.
    fn attach_product_bias(&self, b: &mut Builder<'_>, site: &Site, out: usize, scale: f32) -> Result<()> {
        let init = if self.start == Start::Random { Init::kaiming(out) } else { Init::Zeros };
        let param = b.param(&format!("{}.lora_B.bias", site.path), &[out], init)?;
        match b.sites().bias_of(&site.path) {
            Some(bias) => b.patch(bias.id, Patch::Vector(Box::new(Shift { param, scale }))),
            None => b.patch(site.id, Patch::Weight(Box::new(Shift { param, scale }))),
        }
    }

    fn attach_table(&self, b: &mut Builder<'_>, site: &Site, rows: usize, width: usize) -> Result<()> {
        if self.dora {
            let message = "DoRA on an embedding is not supported; leave it out of the targets".into();
            return Err(Error::Site { path: site.path.clone(), message });
        }
        let (rank, scale) = self.scale_at(&site.path);
        let init_a = if self.start == Start::Random { Init::Normal(1.0) } else { Init::Zeros };
        let factors = Factors {
            a: b.param(&format!("{}.lora_embedding_A", site.path), &[rank, rows], init_a)?,
            b: b.param(&format!("{}.lora_embedding_B", site.path), &[width, rank], Init::Normal(1.0))?,
            scale,
            dropout: 0.0,
        };
        for head in tied::heads(b.sites(), site).filter(|_| self.tied) {
            let factors =
                Factors { scale: self.scale_at(&head.path).1, dropout: self.dropout, ..factors.clone() };
            b.patch(head.id, Patch::Weight(Box::new(Table(factors))))?;
        }
        b.patch(site.id, Patch::Weight(Box::new(Table(factors))))
    }

    /// `bias = "all"` trains every vector called `bias`, `"lora_only"` those of the targets.
    fn attach_biases(&self, b: &mut Builder<'_>) -> Result<()> {
        let targets: Vec<&str> = b.targets().iter().map(|s| s.path.as_str()).collect();
        let sites = b.sites();
        for site in sites.of_kind(|k| matches!(k, Kind::Vector { .. })) {
            let Some(module) = site.path.strip_suffix(".bias") else { continue };
            let of_target = targets.contains(&module);
            let wanted = self.bias == Biases::All || self.bias == Biases::OfTargets && of_target;
            if wanted && !b.replaced(site.id) {
                // peft moves the layers it changes one level down.
                let name = if of_target { format!("{module}.base_layer.bias") } else { site.path.clone() };
                b.replace_as(site.id, &name)?;
            }
        }
        Ok(())
    }
}

/// W as it is before any patch.
fn site_weight(site: &Site) -> Result<Tensor> {
    match &site.value {
        engraft_nn::Value::Weight(w) => w.dense(),
        _ => Err(Error::Site { path: site.path.clone(), message: "expected a weight, found none".into() }),
    }
}

/// ‖row‖ of every row of w [out, in]: `[out]`.
fn row_norms(w: &Tensor) -> Result<Tensor> {
    let out = w.dim(0);
    Ok(w.unary(Unary::Square)?.sum_to(&[out, 1])?.unary(Unary::Sqrt)?.reshape([out])?)
}

/// What `peft` has beyond matrices: the window of A and the ones that follow B's two sizes, at a convolution.
struct Shapes<'a> {
    a: &'a [usize],
    ones: &'a [usize],
}

/// A, B and their scale.
#[derive(Clone)]
struct Factors {
    a: Param,
    b: Param,
    scale: f32,
    dropout: f32,
}

impl Factors {
    /// s·B·A.
    fn product(&self) -> Result<Tensor> {
        Ok(matrix(&self.b)?.matmul(&matrix(&self.a)?)?.scale(self.scale)?)
    }

    /// y + s·(x·Aᵀ)·Bᵀ.
    fn added_to(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
        Ok(y.add_low_rank(x, &matrix(&self.a)?, &matrix(&self.b)?, self.scale)?)
    }
}

/// A factor as a matrix: what follows the first size becomes one.
fn matrix(factor: &Param) -> Result<Tensor> {
    let factor = factor.get();
    match *factor.shape() {
        [_, _] => Ok(factor),
        [rows, ..] => Ok(factor.reshape([rows, factor.len() / rows.max(1)])?),
        [] => Ok(factor.reshape([1, 1])?),
    }
}

impl WeightPatch for Factors {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.product()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        self.added_to(base.forward(x)?, &dropped)
    }
}

/// The factors at a table, and at a head that shares its tensor.
struct Table(Factors);

impl WeightPatch for Table {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.0.product()?.t()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.0.dropout, site.id, 0)?;
        let branch = dropped.matmul(&self.0.b.get())?.scale(self.0.scale)?.matmul(&self.0.a.get())?;
        Ok(base.forward(x)?.add(&branch)?)
    }

    fn lookup(&self, ids: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let chosen = self.0.a.get().t()?.gather(ids)?; // [tokens, rank]
        Ok(base.lookup(ids)?.add(&chosen.scale(self.0.scale)?.matmul_t(&self.0.b.get())?)?)
    }
}

/// Magnitude and direction.
struct Dora {
    factors: Factors,
    magnitude: Param,
}

impl Dora {
    /// m/‖W + s·B·A‖ `[out]`; the norm is a constant to the gradient.
    fn gain(&self, changed: &Tensor) -> Result<Tensor> {
        let magnitude = self.magnitude.get().reshape([changed.dim(0)])?;
        Ok(magnitude.div(&no_grad(|| row_norms(&changed.detach()))?)?)
    }
}

impl WeightPatch for Dora {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let changed = base.dense()?.add(&self.factors.product()?)?;
        let gain = self.gain(&changed)?;
        Ok(changed.mul(&gain.reshape([gain.len(), 1])?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let changed = no_grad(|| -> Result<Tensor> { Ok(base.dense()?.add(&self.factors.product()?)?) })?;
        let gain = self.gain(&changed)?;
        let dropped = cx.dropout(x, self.factors.dropout, site.id, 0)?;
        let straight = base.forward(x)?;
        if self.factors.dropout == 0.0 || cx.mode() == engraft_nn::Mode::Eval {
            return Ok(self.factors.added_to(straight, &dropped)?.mul(&gain)?);
        }
        // Dropout acts on what is added to the frozen output: (g − 1)·drop(x)·Wᵀ + g·s·(drop(x)·Aᵀ)·Bᵀ.
        let frozen = base.forward(&dropped)?;
        let moved = self.factors.added_to(frozen.clone(), &dropped)?.mul(&gain)?.sub(&frozen)?;
        Ok(straight.add(&moved)?)
    }
}

/// A scaled bias of the product: v + s·c, or x·Wᵀ + s·c where the layer has no bias to carry it.
struct Shift {
    param: Param,
    scale: f32,
}

impl Shift {
    fn vector_added(&self) -> Result<Tensor> {
        Ok(self.param.get().scale(self.scale)?)
    }
}

impl engraft_nn::VectorPatch for Shift {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        Ok(v.add(&self.vector_added()?)?)
    }
}

impl WeightPatch for Shift {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        base.dense()
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        Ok(base.forward(x)?.add(&self.vector_added()?)?)
    }

    fn mergeable(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn starts_as_the_base_and_trains_what_it_says() {
        let a = attached(&[chosen("lora", json!({ "rank": 2 }))], &[]);
        let expected = [
            "layers.0.attn.q.lora_A.weight",
            "layers.0.attn.q.lora_B.weight",
            "layers.0.attn.v.lora_A.weight",
        ];
        assert_eq!(names(&a)[..3], expected);
        assert_eq!(a.adapter.trained_count(), 2 * (2 * (6 + 6) + 2 * (6 + 4)));
        let x = sample(&[5, 6], 3);
        close(
            &both_ways(&a, "layers.0.attn.q", &x).0,
            &x.matmul_t(&frozen("layers.0.attn.q")).unwrap(),
            1e-6,
        );
    }

    #[test]
    fn forward_is_the_changed_weight_scaled_as_the_patterns_say() {
        let settings = json!({ "rank": 2, "alpha": 6, "rank_pattern": { "v": 3 }, "alpha_pattern": { "0.attn.v": 12.0 } });
        for (rslora, scales) in
            [(false, [3.0, 4.0, 2.0]), (true, [6.0 / 2f32.sqrt(), 12.0 / 3f32.sqrt(), 6.0 / 3f32.sqrt()])]
        {
            let a = attached(&[chosen("lora", with(settings.clone(), json!({ "rslora": rslora })))], &[]);
            stir(&a, 0.5);
            let x = sample(&[5, 6], 3);
            for (path, scale) in
                ["layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.v"].into_iter().zip(scales)
            {
                let (fast, defined) = both_ways(&a, path, &x);
                close(&fast, &defined, 1e-5);
                let get = |end: &str| {
                    a.adapter
                        .params()
                        .iter()
                        .find(|p| p.name == format!("{path}.{end}"))
                        .unwrap()
                        .param
                        .value()
                };
                let product =
                    get("lora_B.weight").matmul(&get("lora_A.weight")).unwrap().scale(scale).unwrap();
                close(&defined, &x.matmul_t(&frozen(path).add(&product).unwrap()).unwrap(), 1e-5);
            }
        }
    }

    #[test]
    fn tables_and_magnitudes() {
        let targets = Some(engraft_nn::Targets::names(["tok"]));
        let a = attached(&[(chosen("lora", json!({ "rank": 2 })).0, targets)], &[]);
        stir(&a, 0.5);
        let ids = Tensor::from_i64(vec![3, 0, 10, 3], [4]).unwrap();
        let (fast, defined) = both_ways(&a, "tok", &ids);
        close(&fast, &defined, 1e-5);

        let a = attached(&[chosen("lora", json!({ "rank": 2, "dora": true }))], &[]);
        let x = sample(&[5, 6], 3);
        close(
            &both_ways(&a, "layers.0.attn.q", &x).0,
            &x.matmul_t(&frozen("layers.0.attn.q")).unwrap(),
            1e-5,
        );
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
        close(&fast, &defined, 1e-5);
        let magnitude =
            a.adapter.params().iter().find(|p| p.name.ends_with("q.lora_magnitude_vector")).unwrap();
        let (sites, _) = toy();
        let merged = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
        let q = merged.iter().find(|m| m.site.path == "layers.0.attn.q").unwrap();
        close(&row_norms(&q.value).unwrap(), &magnitude.param.value().unary(Unary::Abs).unwrap(), 1e-5);
    }

    #[test]
    fn biases_are_named_as_peft_names_them() {
        let a = attached(&[chosen("lora", json!({ "bias": "all" }))], &["head"]);
        let all: Vec<&str> = names(&a).into_iter().filter(|n| n.ends_with(".bias")).collect();
        assert!(all.contains(&"layers.0.attn.q.base_layer.bias") && all.contains(&"layers.1.attn.k.bias"));
        assert!(all.contains(&"layers.1.norm.bias") && all.contains(&"head.bias"), "{all:?}");
        let a = attached(&[chosen("lora", json!({ "bias": "lora_only" }))], &[]);
        let own: Vec<&str> = names(&a).into_iter().filter(|n| n.ends_with(".bias")).collect();
        assert_eq!(own, ["layers.0.attn.q.base_layer.bias", "layers.1.attn.q.base_layer.bias"]);
        // The product's own bias moves the layer's.
        let a = attached(&[chosen("lora", json!({ "lora_bias": true, "rank": 2, "alpha": 6 }))], &[]);
        stir(&a, 0.5);
        let own = a
            .adapter
            .params()
            .iter()
            .find(|p| p.name == "layers.0.attn.q.lora_B.bias")
            .unwrap()
            .param
            .value();
        let expected = frozen("layers.0.attn.q.bias").add(&own.scale(3.0).unwrap()).unwrap();
        close(&vector(&a, "layers.0.attn.q.bias"), &expected, 1e-6);
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({}),
            json!({ "dora": true, "rank": 3 }),
            json!({ "bias": "all", "rslora": true, "dropout": 0.1 }),
        ] {
            survives_saving(&[chosen("lora", settings)], &["head"]);
        }
        let good = config(&[chosen("lora", json!({ "alpha": 12, "dropout": 0.1 }))], &[]);
        assert_eq!(good["lora_alpha"], json!(12));
        assert_eq!(good["lora_dropout"], json!(0.1));
        assert_eq!(good["target_modules"], json!(["q", "v"]));
        for bad in [
            json!({ "use_qalora": true }),
            json!({ "layer_replication": [[0, 1]] }),
            json!({ "r": 0 }),
            json!({ "r": "eight" }),
            json!({ "init_lora_weights": "pissa" }),
            json!({ "rank_pattern": { "(": 3 } }),
            json!({ "lora_dropout": 1.5 }),
            json!({ "target_modules": [3] }),
            json!({ "brand_new": [1] }),
        ] {
            let key = bad.as_object().unwrap().keys().next().unwrap().clone();
            let Err(error) = from_file(&with(good.clone(), bad)) else { panic!("{key} passed") };
            assert!(error.to_string().contains(&key), "{error}");
        }
        assert!(from_file(&with(good, json!({ "brand_new": null, "use_rslora": false }))).is_ok());
    }

    #[test]
    fn keys_are_those_of_peft() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/golden/cases/llama__lora/adapter/adapter_config.json"
        );
        let theirs: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let ours = config(&[chosen("lora", json!({}))], &[]);
        let mut keys = [&ours, &theirs].map(|c| c.as_object().unwrap().keys().cloned().collect::<Vec<_>>());
        keys.iter_mut().for_each(|k| k.sort());
        assert_eq!(keys[0], keys[1]);
        for (key, value) in theirs.as_object().unwrap() {
            let own =
                ["target_modules", "base_model_name_or_path", "r", "lora_alpha"].contains(&key.as_str());
            assert!(own || ours[key] == *value, "{key}: {} is not {value}", ours[key]);
        }
    }
}
