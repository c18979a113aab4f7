//! LoKr: a frozen weight plus a Kronecker product, whose factors may be low-rank products themselves.
//!
//! W′ = W + (α/r)·W₁⊗W₂. With out = l·k and in = m·n (the two divisors that `decompose_factor` finds, the smaller one first),
//! W₁ is [l, m], or C₁·D₁ with `decompose_both` and r < max(l, m)/2; W₂ is [k, n], or C₂·D₂ where r < max(k, n)/2.
//! W₁ (or C₁) starts as zero and the rest as Kaiming-uniform noise, so W′ = W; `init = "lycoris"` starts W₂ (or D₂) as zero
//! instead. The forward reads x as a matrix [m, n] and never forms the product. Rank dropout leaves out outputs of ΔW,
//! module dropout all of it.
//!
//! Yeh et al. 2024 (LyCORIS), arXiv:2309.14859; Edalati et al. 2022 (KronA), arXiv:2212.10650. As `peft` has it.
//!
//! lokr_w1 [l, m] or lokr_w1_a (C₁) [l, r], lokr_w1_b (D₁) [r, m]; lokr_w2 [k, n] or lokr_w2_a (C₂) [k, r], lokr_w2_b (D₂)
//! [r, n]. Of a convolution m·n are its channels, lokr_w2 is [k, n, height, width] and D₂ [r, n · height · width]; with
//! `use_effective_conv2d` C₂ [r, k], D₂ [r, n] and a core lokr_t2 [r, r, height, width].

use engraft_nn::{Base, Builder, Init, Kind, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Pattern, Reader, as_written, number};
use crate::reparameterized::loha::cored;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::sizes;
use crate::shared::{kronecker, places};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1 << 16;
const RECIPE_RANK_MAX: usize = 1024;
const FACTOR_MAX: i64 = 1 << 16;

struct Lokr {
    rank: usize,
    alpha: f64,
    rank_dropout: f32,
    rank_dropout_scale: bool,
    module_dropout: f32,
    effective: bool,
    decompose_both: bool,
    decompose_factor: i64,
    start: Start,
    rank_pattern: Vec<Pattern>,
    alpha_pattern: Vec<Pattern>,
}

/// Which factor starts as zero.
#[derive(Clone, Copy, PartialEq)]
enum Start {
    Left,
    Right,
    /// None: the adapter changes the model from the start.
    Neither,
}

static INFO: Info = Info {
    name: "lokr",
    title: "LoKr",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2309.14859",
    summary: "W′ = W + (α/r)·W₁⊗W₂, each factor whole or of low rank",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "LOKR",
    fields: &[
        int(
            "rank",
            (1, RECIPE_RANK_MAX as i64),
            Some("8"),
            "Inner size r of a factor; factors whose sizes are at most 2r stay whole.",
        ),
        float("alpha", (0.0, 1e9), "8", "The change is scaled by alpha/rank."),
        int(
            "decompose_factor",
            (-1, FACTOR_MAX),
            Some("-1"),
            "Size of the first factor; -1 takes the divisors closest to each other.",
        ),
        flag("decompose_both", "false", "Give the first factor a low rank too."),
        flag(
            "use_effective_conv2d",
            "false",
            "Give the windows of convolutions a core tensor instead of long rows.",
        ),
        float("rank_dropout", (0.0, 0.999), "0", "Share of outputs left out of the change while training."),
        flag("rank_dropout_scale", "false", "Scale up the outputs that rank dropout keeps."),
        float(
            "module_dropout",
            (0.0, 0.999),
            "0",
            "How often a module goes without its change while training.",
        ),
        choice(
            "init",
            &["default", "lycoris"],
            "\"default\"",
            "Which factor starts as zero: the first, or as in LyCORIS the second.",
        ),
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
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let start = r.one_of("init", &[("default", Start::Left), ("lycoris", Start::Right)]);
    let lokr = Lokr { start, ..read(&mut r, "rank", RECIPE_RANK_MAX) };
    r.finish()?;
    Ok(Box::new(lokr))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    let start = match r.value("init_weights").cloned() {
        None | Some(Value::Bool(true)) => Start::Left,
        Some(Value::Bool(false)) => Start::Neither,
        Some(Value::String(s)) if s == "lycoris" => Start::Right,
        Some(other) => {
            r.problem(format!("`init_weights`: expected true, false or \"lycoris\", found {other}"));
            Start::Left
        }
    };
    let lokr = Lokr { start, ..read(&mut r, "r", RANK_MAX) };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(lokr), targets, train_also }))
}

fn read(r: &mut Reader<'_>, rank: &'static str, most: usize) -> Lokr {
    let decompose_factor = match r.value("decompose_factor").cloned() {
        None => -1,
        Some(v) => v.as_i64().filter(|f| (-1..=FACTOR_MAX).contains(f) && *f != 0).unwrap_or_else(|| {
            r.problem(format!(
                "`decompose_factor`: expected -1 or a whole number from 1 to {FACTOR_MAX}, found {v}"
            ));
            -1
        }),
    };
    let lokr = Lokr {
        rank: r.count(rank, 8, most),
        alpha: r.float("alpha", 8.0),
        rank_dropout: r.dropout("rank_dropout"),
        rank_dropout_scale: r.flag("rank_dropout_scale", false),
        module_dropout: r.dropout("module_dropout"),
        effective: r.flag("use_effective_conv2d", false),
        decompose_both: r.flag("decompose_both", false),
        decompose_factor,
        start: Start::Left,
        rank_pattern: r.patterns("rank_pattern"),
        alpha_pattern: r.scales("alpha_pattern"),
    };
    for p in lokr.rank_pattern.iter().filter_map(|p| p.not_a_count(RANK_MAX)) {
        r.problem(format!("`rank_pattern`: expected a whole number from 1 to {RANK_MAX}, found {p}"));
    }
    lokr
}

fn example() -> Box<dyn Method> {
    Box::new(Lokr {
        rank: 1,
        alpha: 2.0,
        rank_dropout: 0.0,
        rank_dropout_scale: false,
        module_dropout: 0.0,
        effective: false,
        decompose_both: true,
        decompose_factor: -1,
        start: Start::Left,
        rank_pattern: vec![],
        alpha_pattern: vec![],
    })
}

/// Two divisors of `n`, the smaller one first unless `factor` divides it: `factor` and the rest, else those with the least
/// sum whose smaller one is at most `factor` (-1: any).
fn factorization(n: usize, factor: i64) -> (usize, usize) {
    if factor > 0 && n.is_multiple_of(factor as usize) {
        return (factor as usize, n / factor as usize);
    }
    let most = if factor < 0 { n } else { factor as usize };
    let divisors = (1..=n).take_while(|d| d * d <= n).filter(|&d| n.is_multiple_of(d) && d <= most);
    let small = divisors.last().unwrap_or(1);
    (small, n / small)
}

impl Method for Lokr {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let rank = |path: &str| Pattern::find(&self.rank_pattern, path).map_or(self.rank, |r| r as usize);
        let most = |(out, inn)| {
            let [(_, k), (_, n)] = [out, inn].map(|size| factorization(size, self.decompose_factor));
            k.min(n)
        };
        sizes::beyond(targets, "rank", rank, most, "the larger factor is trained as a whole there")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let (out, inn, window) = match site.kind {
                Kind::Linear { out, inn, .. } => (out, inn, None),
                Kind::Convolution { out, shape: [_, channels, height, width], .. } => {
                    (out, channels, Some([height, width]))
                }
                _ => {
                    return places::unfit(
                        site,
                        "LoKr changes linear layers and convolutions; leave the embedding out of the targets",
                    );
                }
            };
            let rank = Pattern::find(&self.rank_pattern, &site.path).map_or(self.rank, |r| r as usize);
            let alpha = Pattern::find(&self.alpha_pattern, &site.path).unwrap_or(self.alpha);
            let (l, k) = factorization(out, self.decompose_factor);
            let (m, n) = factorization(inn, self.decompose_factor);
            let patch = Kronecker {
                left: self.left(b, site, rank, [l, m])?,
                right: self.right(b, site, rank, [k, n], window)?,
                scale: (alpha / rank as f64) as f32,
                rank_dropout: self.rank_dropout,
                rank_dropout_scale: self.rank_dropout_scale,
                module_dropout: self.module_dropout,
            };
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    /// What is left out in a step has no gradient then, as in `peft`, and stays.
    fn rests(&self) -> bool {
        self.module_dropout > 0.0
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let start = match self.start {
            Start::Left => json!(true),
            Start::Right => json!("lycoris"),
            Start::Neither => json!(false),
        };
        let own = json!({
            "alpha": number(self.alpha), "alpha_pattern": Pattern::table(&self.alpha_pattern),
            "decompose_both": self.decompose_both, "decompose_factor": self.decompose_factor, "init_weights": start,
            "layers_pattern": null, "layers_to_transform": null, "module_dropout": as_written(self.module_dropout),
            "r": self.rank, "rank_dropout": as_written(self.rank_dropout), "rank_dropout_scale": self.rank_dropout_scale,
            "rank_pattern": Pattern::table(&self.rank_pattern), "use_effective_conv2d": self.effective,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Lokr {
    fn left(&self, b: &mut Builder<'_>, site: &Site, rank: usize, [l, m]: [usize; 2]) -> Result<Factor> {
        let name = format!("{}.lokr_w1", site.path);
        let zero = self.start == Start::Left;
        let start = |fan_in| if zero { Init::Zeros } else { Init::kaiming(fan_in) };
        if !self.decompose_both || 2 * rank >= l.max(m) {
            return Ok(Factor::Whole(b.param(&name, &[l, m], start(m))?));
        }
        let up = b.param(&format!("{name}_a"), &[l, rank], start(rank))?;
        let down = b.param(&format!("{name}_b"), &[rank, m], Init::kaiming(m))?;
        Ok(Factor::Thin { up, down })
    }

    fn right(
        &self,
        b: &mut Builder<'_>,
        site: &Site,
        rank: usize,
        [k, n]: [usize; 2],
        window: Option<[usize; 2]>,
    ) -> Result<Factor> {
        let name = format!("{}.lokr_w2", site.path);
        let zero = self.start == Start::Right;
        let start = |fan_in| if zero { Init::Zeros } else { Init::kaiming(fan_in) };
        let inner = window.map_or(1, |[height, width]| height * width);
        if 2 * rank >= k.max(n) {
            let shape = [&[k, n][..], window.as_ref().map_or(&[], |w| &w[..])].concat();
            return Ok(Factor::Whole(b.param(&name, &shape, start(n * inner))?));
        }
        if let Some([height, width]) = window.filter(|_| self.effective && inner > 1) {
            let core = b.param(
                &format!("{}.lokr_t2", site.path),
                &[rank, rank, height, width],
                Init::kaiming(rank * inner),
            )?;
            let up = b.param(&format!("{name}_a"), &[rank, k], Init::kaiming(k))?;
            let down = b.param(&format!("{name}_b"), &[rank, n], start(n))?;
            return Ok(Factor::Cored { core, up, down });
        }
        let up = b.param(&format!("{name}_a"), &[k, rank], Init::kaiming(rank))?;
        let down = b.param(&format!("{name}_b"), &[rank, n * inner], start(n * inner))?;
        Ok(Factor::Thin { up, down })
    }
}

/// One of the two factors.
enum Factor {
    Whole(Param),
    Thin { up: Param, down: Param },
    Cored { core: Param, up: Param, down: Param },
}

impl Factor {
    /// As a matrix; what follows the first two sizes belongs to the columns.
    fn matrix(&self) -> Result<Tensor> {
        match self {
            Factor::Whole(whole) => {
                let whole = whole.get();
                let rows = whole.dim(0);
                Ok(whole.reshape([rows, whole.len() / rows])?)
            }
            Factor::Thin { up, down } => Ok(up.get().matmul(&down.get())?),
            Factor::Cored { core, up, down } => cored(&core.get(), &up.get(), &down.get()),
        }
    }
}

/// s·W₁⊗W₂.
struct Kronecker {
    left: Factor,
    right: Factor,
    scale: f32,
    rank_dropout: f32,
    rank_dropout_scale: bool,
    module_dropout: f32,
}

impl WeightPatch for Kronecker {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let product = kronecker::kron(&self.left.matrix()?, &self.right.matrix()?)?;
        Ok(base.dense()?.add(&product.scale(self.scale)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let y = base.forward(x)?;
        if places::left_out(cx, self.module_dropout, site) {
            return Ok(y);
        }
        // The smaller factor is the one to scale.
        let left = self.left.matrix()?.scale(self.scale)?;
        let moved = match &self.right {
            Factor::Thin { up, down } => kronecker::multiply_thin(x, &left, &up.get(), &down.get())?,
            right => kronecker::multiply(x, &left, &right.matrix()?)?,
        };
        match places::kept_outputs(cx, self.rank_dropout, self.rank_dropout_scale, moved.width(), site)? {
            Some(kept) => Ok(y.plus(&moved.mul(&kept)?)?),
            None => Ok(y.plus(&moved)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn trained_numbers() {
        let count = |rank| trained("lokr", json!({ "rank": rank }));
        // q is (2·3)×(2·3), v (2·2)×(2·3), of two layers; a thin second factor has rank·(3 + 3) and rank·(2 + 3) numbers.
        assert_eq!(count(2), 2 * ((2 * 2 + 3 * 3) + (2 * 2 + 2 * 3)));
        assert_eq!(count(1), 2 * ((2 * 2 + (3 + 3)) + (2 * 2 + (2 + 3))));
    }

    #[test]
    fn divisors_multiply_to_the_size_and_the_first_is_as_large_as_may_be() {
        let cases = [
            (256, -1, 16, 16),
            (128, -1, 8, 16),
            (127, -1, 1, 127),
            (128, 4, 4, 32),
            (48, 5, 4, 12),
            (6, 8, 2, 3),
        ];
        for (n, factor, small, large) in cases {
            assert_eq!(factorization(n, factor), (small, large), "{n} by {factor}");
        }
        for n in 1..200usize {
            for factor in [-1, 1, 3, 8, 300] {
                let (a, b) = factorization(n, factor);
                assert_eq!(a * b, n);
                assert!(factor < 0 || a <= factor as usize || a == n.min(factor as usize));
            }
        }
    }

    #[test]
    fn is_a_kronecker_product_whole_or_thin() {
        // q is 6 = 2·3 by 6 = 2·3, v is 4 = 2·2 by 6.
        let cases = [
            (json!({ "rank": 2 }), vec![("w1", vec![2, 2]), ("w2", vec![3, 3])]),
            (json!({ "rank": 1 }), vec![("w1", vec![2, 2]), ("w2_a", vec![3, 1]), ("w2_b", vec![1, 3])]),
            (
                json!({ "rank": 1, "decompose_factor": 3, "decompose_both": true }),
                vec![("w1_a", vec![3, 1]), ("w1_b", vec![1, 3]), ("w2", vec![2, 2])],
            ),
            (
                json!({ "rank": 1, "init": "lycoris" }),
                vec![("w1", vec![2, 2]), ("w2_a", vec![3, 1]), ("w2_b", vec![1, 3])],
            ),
        ];
        let q = "layers.0.attn.q";
        let x = sample(&[5, 6], 3);
        for (settings, expected) in cases {
            let a = attached(&[chosen("lokr", settings)], &[]);
            let own: Vec<_> = a.adapter.params().iter().filter(|p| p.name.starts_with(q)).collect();
            assert_eq!(own.len(), expected.len());
            for (end, shape) in &expected {
                let p = own.iter().find(|p| p.name == format!("{q}.lokr_{end}")).unwrap();
                assert_eq!(p.param.value().shape(), shape);
            }
            close(&both_ways(&a, q, &x).0, &x.matmul_t(&frozen(q)).unwrap(), 1e-6);
            stir(&a, 0.5);
            let (fast, defined) = both_ways(&a, q, &x);
            close(&fast, &defined, 1e-5);
        }
    }

    #[test]
    fn configurations() {
        let settings =
            json!({ "rank": 1, "decompose_both": true, "rank_dropout_scale": true, "rank_dropout": 0.2 });
        survives_saving(&[chosen("lokr", settings)], &["head"]);
        survives_saving(&[chosen("lokr", json!({ "init": "lycoris" }))], &[]);
        let written = config(&[chosen("lokr", json!({}))], &[]);
        assert_eq!(written["decompose_factor"], json!(-1));
        for bad in [json!({ "decompose_factor": 0 }), json!({ "init_weights": "other" }), json!({ "r": -1 })]
        {
            assert!(from_file(&with(written.clone(), bad)).is_err());
        }
        let (sites, info) = toy();
        let table = [(chosen("lokr", json!({})).0, Some(engraft_nn::Targets::names(["tok"])))];
        assert!(crate::attach(&table, &[], &sites, &info, 0).is_err(), "a table has no such form");
    }
}
