//! OFT: the inputs of a frozen weight turned by a block-diagonal orthogonal matrix.
//!
//! W′ = W·Rᵀ, y = (x·R)·Wᵀ; R has blocks of size b, made from skew-symmetric Q with b(b − 1)/2 free numbers each:
//! R = (I − Q)(I + Q)⁻¹ (Cayley), or by default the first terms of (I + Q)(I − Q)⁻¹ = I + 2Q + 2Q² + … (OFTv2), without an
//! inverse. The two differ in the sign of Q, so an adapter of one is not one of the other. Q starts as zero, so W′ = W.
//! COFT holds every block within ‖Q‖ ≤ ε/√blocks: projected before each use and each update, as in `peft`.
//! Rows are turned, never W: b products a number of x. `module_dropout` leaves blocks out while training; `peft` 0.21 reads it
//! and leaves out none.
//!
//! Qiu et al. 2023, arXiv:2306.07280; OFTv2: Qiu et al. 2025, arXiv:2506.19847.
//!
//! `oft_R.weight` [blocks, b(b − 1)/2], the parts above the diagonals row by row; one row where blocks share it. At a table
//! `oft_embedding_R.weight`: its rows are turned, W′ = W·R.

use engraft_nn::{Adapter, Base, Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Gradients, Param, Tensor, no_grad};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::kept::Kept;
use crate::shared::orthogonal::{self, Side};
use crate::shared::sizes;
use crate::shared::{divisors, matrices};
use crate::{Described, Entry, Info, Loaded, Method, Step, peft};

const SIZE_MAX: usize = 1 << 16;
/// What stands for the biases of the targets.
const OWN: &str = "oft_only";
/// The group of parameters that COFT projects.
const CONSTRAINED: &str = "coft";

struct Oft {
    size: Size,
    /// Terms of the series; `None` for the exact transform.
    series: Option<usize>,
    /// Kept where the transform is exact, as in the file.
    terms: usize,
    dropout: f32,
    share: bool,
    /// ε, where COFT is on.
    constrained: bool,
    eps: f64,
    bias: Biases,
    init_weights: bool,
}

/// How inputs are cut into blocks.
#[derive(Clone, Copy, PartialEq)]
enum Size {
    Of(usize),
    Count(usize),
}

static INFO: Info = Info {
    name: "oft",
    title: "OFT",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2306.07280",
    summary: "W′ = W·Rᵀ, R block diagonal and orthogonal",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "OFT",
    fields: &[
        int(
            "block_size",
            (2, SIZE_MAX as i64),
            None,
            "Size b of the blocks, 32 unless `blocks` is given; where it does not divide the inputs, the nearest size that does.",
        ),
        int("blocks", (1, SIZE_MAX as i64), None, "Number of blocks, instead of their size."),
        flag(
            "use_cayley_neumann",
            "true",
            "The first terms of a series (OFTv2) instead of the exact Cayley transform.",
        ),
        int("num_cayley_neumann_terms", (1, 64), Some("5"), "Terms of the series."),
        float("module_dropout", (0.0, 0.999), "0", "Probability of leaving a block out while training."),
        flag("block_share", "false", "One block for all."),
        flag("coft", "false", "Hold the blocks near the identity."),
        float("eps", (0.0, 1e9), "6e-5", "How far from the identity coft lets all blocks together go."),
        choice("bias", &["none", "all", OWN], "\"none\"", "Which biases of the model are trained too."),
        flag("init_weights", "true", "Start Q as zero; otherwise it is drawn."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let (size, count) = (r.whole("block_size", 0, SIZE_MAX), r.whole("blocks", 0, SIZE_MAX));
    let size = match (size, count) {
        (0, 0) => Size::Of(32),
        (size, 0) => Size::Of(size),
        (0, count) => Size::Count(count),
        _ => {
            r.problem("`block_size` and `blocks`: one follows from the other, so give one of them");
            Size::Of(32)
        }
    };
    let oft = read(&mut r, size);
    r.finish()?;
    Ok(Box::new(oft))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.ignore(&["fan_in_fan_out"]);
    let (count, size) = (r.whole("r", 0, SIZE_MAX), r.whole("oft_block_size", 0, SIZE_MAX));
    if r.value("oft_block_size").is_none() {
        r.problem("`oft_block_size` is absent: OFT of peft before 0.14 has other weights; train it again with a newer one");
    }
    let size = match (count, size) {
        (0, size) if size > 0 => Size::Of(size),
        (count, 0) if count > 0 => Size::Count(count),
        _ => {
            r.problem(format!(
                "`r` and `oft_block_size`: expected one of them to be 0, found {count} and {size}"
            ));
            Size::Of(32)
        }
    };
    let oft = read(&mut r, size);
    if oft.series.is_some() && before_the_series_changed(config) {
        r.problem(
            "`use_cayley_neumann` with a `peft_version` before 0.18: the series had other terms there; train it again with a newer one",
        );
    }
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(oft), targets, train_also }))
}

/// `peft` 0.18 gave the last term of the series half its weight; files from before it do not name their version.
fn before_the_series_changed(config: &Value) -> bool {
    let version = config.get("peft_version").and_then(Value::as_str).unwrap_or("0.0");
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) < (0, 18)
}

/// The keys that are the same in recipes and files.
fn read(r: &mut Reader<'_>, size: Size) -> Oft {
    let (series, terms) =
        (r.flag("use_cayley_neumann", true), r.count("num_cayley_neumann_terms", 5, 1 << 10));
    Oft {
        size,
        series: series.then_some(terms),
        terms,
        dropout: r.dropout("module_dropout"),
        share: r.flag("block_share", false),
        constrained: r.flag("coft", false),
        eps: r.float("eps", 6e-5),
        bias: Biases::read(r, OWN),
        init_weights: r.flag("init_weights", true),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(Oft {
        size: Size::Of(4),
        series: None,
        terms: 5,
        dropout: 0.0,
        share: false,
        constrained: false,
        eps: 6e-5,
        bias: Biases::None,
        init_weights: true,
    })
}

impl Method for Oft {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        for site in b.targets() {
            let (turned, name, table) = match site.kind {
                Kind::Embedding { width, .. } => (width, "oft_embedding_R", true),
                Kind::Convolution { .. } => {
                    let message = "OFT of `peft` turns the windows of a convolution one pixel apart, whatever its stride, and adds them up \
                                   where they overlap: even before training a pixel counts as often as windows of k·k hold it, and merging \
                                   gives another model than the one that was trained. No file of it has one meaning; leave the convolution \
                                   out of the targets, or use boft, which turns the windows that it reads";
                    return Err(Error::Site { path: site.path.clone(), message: message.into() });
                }
                _ => (matrices::linear(site, INFO.title)?.1, "oft_R", false),
            };
            let size = self.size.of(turned);
            let blocks = if self.share { 1 } else { turned / size };
            let start = if self.init_weights { Init::Zeros } else { Init::Normal(0.1) };
            let group = if self.constrained { CONSTRAINED } else { "" };
            let (name, shape) = (format!("{}.{name}.weight", site.path), [blocks, size * (size - 1) / 2]);
            if size == 1 {
                // One input cannot be turned. `peft` has a tensor without numbers there.
                b.fixed(&name, &shape, Init::Values(Tensor::zeros(shape)))?;
                continue;
            }
            let q = b.param_in_group(&name, &shape, start, group)?;
            let eps = self.constrained.then_some(self.eps as f32);
            let patch =
                Turned { q, size, series: self.series, eps, dropout: self.dropout, table, kept: Kept::new() };
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let (key, asked) = match self.size {
            Size::Of(size) => ("block_size", size),
            Size::Count(count) => ("blocks", count),
        };
        let moved = |_: &Site, (_, inn): (usize, usize)| !inn.is_multiple_of(asked);
        let Some((site, (_, inn), more)) = sizes::first_of(targets, moved) else { return vec![] };
        let path = &site.path;
        let size = match self.size.of(inn) {
            1 => "1, and nothing is trained there".to_owned(),
            size => size.to_string(),
        };
        vec![format!(
            "`{key}` is {asked}, which does not divide the {inn} inputs of {path}{more}: blocks there have the nearest size, {size}"
        )]
    }

    /// COFT: what is updated is what was used.
    fn after_backward(&self, adapter: &Adapter, _gradients: &mut Gradients, _step: Step) -> Result<()> {
        let constrained = |p: &&engraft_nn::NamedParam| p.group == CONSTRAINED && self.constrained;
        for p in adapter.trainable().filter(constrained) {
            p.param.set(no_grad(|| projected(&p.param.value(), self.eps as f32))?)?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let (count, size) = match self.size {
            Size::Of(size) => (0, size),
            Size::Count(count) => (count, 0),
        };
        let own = json!({
            "bias": self.bias.name(OWN), "block_share": self.share, "coft": self.constrained, "eps": number(self.eps),
            "fan_in_fan_out": false, "init_weights": self.init_weights, "layers_pattern": null, "layers_to_transform": null,
            "module_dropout": as_written(self.dropout), "num_cayley_neumann_terms": self.terms, "oft_block_size": size,
            "r": count, "use_cayley_neumann": self.series.is_some(),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Size {
    /// The size of blocks of `inn` inputs.
    fn of(self, inn: usize) -> usize {
        match self {
            Size::Of(size) => divisors::nearest(inn, size),
            Size::Count(count) => inn / divisors::nearest(inn, count).max(1),
        }
    }
}

/// Each row of q times what brings ‖Q‖ within eps/√rows.
fn projected(q: &Tensor, eps: f32) -> Result<Tensor> {
    let bound = eps / (q.dim(0) as f32).sqrt();
    // Every number of q stands twice in Q.
    let norms = q.unary(Unary::Square)?.sum_dim(1)?.scale(2.0)?.unary(Unary::Sqrt)?;
    let ratio = norms.unary(Unary::Recip)?.scale(bound)?;
    // min(1, ratio), also where the ratio is infinite.
    let beyond = ratio.scale(-1.0)?.unary(Unary::Shift(1.0))?.unary(Unary::Relu)?;
    Ok(q.mul(&beyond.scale(-1.0)?.unary(Unary::Shift(1.0))?)?)
}

struct Turned {
    q: Param,
    size: usize,
    series: Option<usize>,
    eps: Option<f32>,
    dropout: f32,
    /// Of a table, whose rows are turned.
    table: bool,
    kept: Kept<Tensor>,
}

impl Turned {
    /// R [blocks, b, b].
    fn blocks(&self) -> Result<Tensor> {
        self.kept.of(&[&self.q], || self.rotations())
    }

    fn rotations(&self) -> Result<Tensor> {
        let mut q = self.q.get();
        if let Some(eps) = self.eps {
            // The gradient is the one at the projected Q.
            let moved = no_grad(|| -> Result<Tensor> { Ok(projected(&q.detach(), eps)?.sub(&q.detach())?) })?;
            q = q.add(&moved)?;
        }
        let q = orthogonal::skew(&q, self.size)?;
        match self.series {
            Some(terms) => orthogonal::cayley_neumann(&q, terms),
            None => orthogonal::cayley(&q),
        }
    }

    fn turned(&self, x: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor> {
        let r = orthogonal::drop_blocks(&self.blocks()?, self.dropout, site, cx, 0)?;
        orthogonal::turn_blocks(x, &r, Side::Plain)
    }
}

impl WeightPatch for Turned {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let side = if self.table { Side::Plain } else { Side::Transposed };
        orthogonal::turn_blocks(&base.dense()?, &self.blocks()?, side)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        base.forward(&self.turned(x, site, cx)?)
    }

    fn lookup(&self, ids: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        self.turned(&base.lookup(ids)?, site, cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Targets;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn inputs_turn_and_rows_keep_lengths_and_angles() {
        let x = sample(&[5, 6], 3);
        let w = frozen("layers.0.attn.q");
        let exact = json!({ "use_cayley_neumann": false });
        for (settings, count) in [
            (with(exact.clone(), json!({ "block_size": 3 })), 2 * 3),
            (with(exact.clone(), json!({ "blocks": 3 })), 3),
            (with(exact, json!({ "block_size": 3, "block_share": true })), 3),
            (json!({ "block_size": 2, "num_cayley_neumann_terms": 40 }), 3),
        ] {
            let a = attached(&[chosen("oft", settings.clone())], &[]);
            assert_eq!(names(&a)[0], "layers.0.attn.q.oft_R.weight");
            assert_eq!(a.adapter.trained_count(), 4 * count, "{settings}");
            close(&both_ways(&a, "layers.0.attn.q", &x).0, &x.matmul_t(&w).unwrap(), 1e-6);
            stir(&a, 0.4);
            let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
            close(&fast, &defined, 1e-5);
            let (sites, _) = toy();
            let merged = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
            let q = &merged.iter().find(|m| m.site.path == "layers.0.attn.q").unwrap().value;
            close(&q.matmul_t(q).unwrap(), &w.matmul_t(&w).unwrap(), 1e-4);
            assert!(q.sub(&w).unwrap().to_vec().unwrap().iter().any(|v| v.abs() > 0.05));
        }
    }

    #[test]
    fn tables_turn_their_rows() {
        let methods = [(chosen("oft", json!({ "block_size": 3 })).0, Some(Targets::names(["tok"])))];
        let a = attached(&methods, &[]);
        stir(&a, 0.4);
        let ids = Tensor::from_i64(vec![3, 0, 10, 3], [4]).unwrap();
        let (fast, defined) = both_ways(&a, "tok", &ids);
        close(&fast, &defined, 1e-6);
        survives_saving(&methods, &[]);
    }

    #[test]
    fn coft_holds_the_blocks_where_they_are_used_and_updated() {
        let settings = json!({ "block_size": 3, "coft": true, "eps": 0.01 });
        let methods = [chosen("oft", settings.clone())];
        let a = attached(&methods, &[]);
        let free = attached(&[chosen("oft", json!({ "block_size": 3 }))], &[]);
        stir(&a, 0.5);
        let mut gradients = Gradients::default();
        let x = sample(&[5, 6], 3);
        let before = both_ways(&a, "layers.0.attn.q", &x).0;
        methods[0]
            .0
            .after_backward(&a.adapter, &mut gradients, Step { number: 1, total: 1, seed: 0 })
            .unwrap();
        close(&both_ways(&a, "layers.0.attn.q", &x).0, &before, 1e-6);
        for (p, other) in a.adapter.trainable().zip(free.adapter.trainable()) {
            let norms = matrices::norms(&p.param.value(), 1).unwrap().scale(2f32.sqrt()).unwrap();
            let bound = 0.01 / 2f32.sqrt();
            assert!(norms.to_vec().unwrap().iter().all(|n| (n - bound).abs() < 1e-6));
            other.param.set(p.param.value()).unwrap();
        }
        close(&both_ways(&free, "layers.0.attn.q", &x).0, &before, 1e-6);
        // Zero stays zero.
        close(&projected(&Tensor::zeros([2, 3]), 0.01).unwrap(), &Tensor::zeros([2, 3]), 0.0);
    }

    #[test]
    fn blocks_of_one_input_turn_nothing() {
        // Six inputs of the queries, eight of the other matrix.
        let targets = Some(Targets::names(["attn.q", "mlp.down"]));
        let methods = [(chosen("oft", json!({ "blocks": 6 })).0, targets)];
        let a = attached(&methods, &[]);
        let shape = |at: usize| a.adapter.params()[at].param.value().shape().to_vec();
        let (q, down) = (shape(0), shape(1));
        assert_eq!((names(&a)[0], q), ("layers.0.attn.q.oft_R.weight", vec![6, 0]));
        assert!(down[1] > 0 && a.adapter.trained_count() > 0, "{down:?}");
        stir(&a, 0.5);
        let (x, w) = (sample(&[5, 6], 3), frozen("layers.0.attn.q"));
        close(&x.matmul_t(&w).unwrap(), &both_ways(&a, "layers.0.attn.q", &x).0, 1e-6);
        survives_saving(&methods, &[]);
        let mut file = config(&methods, &[]);
        (file["r"], file["oft_block_size"]) = (json!(0), json!(1));
        assert!(from_file(&file).unwrap().is_some());
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({}),
            json!({ "blocks": 2, "use_cayley_neumann": false, "module_dropout": 0.1, "bias": "all" }),
            json!({ "block_size": 2, "block_share": true, "coft": true, "eps": 1e-3, "bias": "oft_only", "init_weights": false }),
        ] {
            survives_saving(&[chosen("oft", settings)], &["head"]);
        }
        let both = json!({ "block_size": 2, "blocks": 3 });
        assert!(from_settings(both.as_object().unwrap()).is_err());
        let good = config(&[chosen("oft", json!({}))], &[]);
        assert_eq!(
            (&good["r"], &good["oft_block_size"], &good["eps"]),
            (&json!(0), &json!(32), &json!(6e-5))
        );
        for (bad, word) in [
            (json!({ "r": 3 }), "expected one of them to be 0"),
            (json!({ "oft_block_size": null }), "before 0.14"),
            (json!({ "peft_version": "0.17.1" }), "before 0.18"),
            (json!({ "peft_version": null }), "before 0.18"),
        ] {
            let error = from_file(&with(good.clone(), bad)).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(
            from_file(&with(good, json!({ "peft_version": "0.18.0.dev0", "use_cayley_neumann": true })))
                .is_ok()
        );
    }
}
