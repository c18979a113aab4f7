//! LoHa: a frozen weight plus the elementwise product of two low-rank matrices, of rank up to r².
//!
//! W′ = W + (α/r)·(B₁·A₁)⊙(B₂·A₂). A₁, B₁ and B₂ start as Kaiming-uniform noise, A₂ as zero, so W′ = W.
//! The elementwise product is again a product of thin matrices: its columns of B are those of B₁ times those of B₂, each
//! with each, so y = x·Wᵀ + (α/r)·(x·(A₁∗A₂)ᵀ)·(B₁•B₂)ᵀ with r² inner terms, and ΔW is formed only where that is cheaper.
//! Rank dropout leaves out outputs of ΔW, module dropout all of it.
//!
//! Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098, proposition 1; of convolutions (`use_effective_conv2d`) proposition 3:
//! each factor is T ×₁ Bᵀ ×₂ Aᵀ. As `peft` and LyCORIS have it, but for training proposition 3: the gradients of B that `peft` 0.21
//! writes by hand there are not those of its forward, and here they are.
//!
//! hada_w1_a, hada_w2_a (B) [out, r], hada_w1_b, hada_w2_b (A) [r, in]; a convolution's `in` is a window, or with
//! `use_effective_conv2d` B [r, out], A [r, channels] and hada_t1, hada_t2 (T) [r, r, height, width].

use engraft_nn::{Base, Builder, Init, Kind, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Pattern, Reader, as_written, number};
use crate::shared::fields::{flag, float, int};
use crate::shared::places;
use crate::shared::sizes;
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1 << 16;
const RECIPE_RANK_MAX: usize = 1024;

struct Loha {
    rank: usize,
    alpha: f64,
    rank_dropout: f32,
    module_dropout: f32,
    effective: bool,
    /// Whether all factors start random: the adapter then changes the model from the start.
    random: bool,
    rank_pattern: Vec<Pattern>,
    alpha_pattern: Vec<Pattern>,
}

static INFO: Info = Info {
    name: "loha",
    title: "LoHa",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2108.06098",
    summary: "W′ = W + (α/r)·(B₁·A₁)⊙(B₂·A₂)",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "LOHA",
    fields: &[
        int("rank", (1, RECIPE_RANK_MAX as i64), Some("8"), "Inner size r of each of the two products."),
        float("alpha", (0.0, 1e9), "8", "The change is scaled by alpha/rank."),
        float(
            "rank_dropout",
            (0.0, 0.999),
            "0",
            "Share of outputs left out of the change while training, the others scaled up.",
        ),
        float(
            "module_dropout",
            (0.0, 0.999),
            "0",
            "How often a module goes without its change while training.",
        ),
        flag(
            "use_effective_conv2d",
            "false",
            "Give the windows of convolutions a core tensor instead of long rows.",
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
    peft::own_settings(&INFO, settings, |r| read(r, "rank", RECIPE_RANK_MAX))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| Loha {
        random: !r.flag("init_weights", true),
        ..read(r, "r", RANK_MAX)
    })
}

fn read(r: &mut Reader<'_>, rank: &'static str, most: usize) -> Loha {
    let loha = Loha {
        rank: r.count(rank, 8, most),
        alpha: r.float("alpha", 8.0),
        rank_dropout: r.dropout("rank_dropout"),
        module_dropout: r.dropout("module_dropout"),
        effective: r.flag("use_effective_conv2d", false),
        random: false,
        rank_pattern: r.patterns("rank_pattern"),
        alpha_pattern: r.scales("alpha_pattern"),
    };
    for p in loha.rank_pattern.iter().filter_map(|p| p.not_a_count(RANK_MAX)) {
        r.problem(format!("`rank_pattern`: expected a whole number from 1 to {RANK_MAX}, found {p}"));
    }
    loha
}

fn example() -> Box<dyn Method> {
    Box::new(Loha {
        rank: 2,
        alpha: 3.0,
        rank_dropout: 0.0,
        module_dropout: 0.0,
        effective: false,
        random: false,
        rank_pattern: vec![],
        alpha_pattern: vec![],
    })
}

impl Method for Loha {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let rank = |path: &str| Pattern::find(&self.rank_pattern, path).map_or(self.rank, |r| r as usize);
        sizes::beyond_rank(targets, rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let rank = Pattern::find(&self.rank_pattern, &site.path).map_or(self.rank, |r| r as usize);
            let alpha = Pattern::find(&self.alpha_pattern, &site.path).unwrap_or(self.alpha);
            let pairs = match site.kind {
                Kind::Convolution { out, shape: [_, channels, height, width], .. }
                    if self.effective && height * width > 1 =>
                {
                    let cores = [rank, rank, height, width];
                    [1, 2].map(|n| self.cores(b, site, n, [rank, out, channels], &cores))
                }
                Kind::Linear { out, inn, .. } | Kind::Convolution { out, inn, .. } => {
                    [1, 2].map(|n| self.factors(b, site, n, [rank, out, inn]))
                }
                _ => {
                    return places::unfit(
                        site,
                        "LoHa changes linear layers and convolutions; leave the embedding out of the targets",
                    );
                }
            };
            let [first, second] = pairs;
            let scale = (alpha / rank as f64) as f32;
            let patch = Hadamard {
                pairs: [first?, second?],
                scale,
                rank_dropout: self.rank_dropout,
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
        let own = json!({
            "alpha": number(self.alpha), "alpha_pattern": Pattern::table(&self.alpha_pattern), "init_weights": !self.random,
            "layers_pattern": null, "layers_to_transform": null, "module_dropout": as_written(self.module_dropout),
            "r": self.rank, "rank_dropout": as_written(self.rank_dropout),
            "rank_pattern": Pattern::table(&self.rank_pattern), "use_effective_conv2d": self.effective,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Loha {
    /// How A of the product `n` starts: the second one as zero.
    fn start(&self, n: u8, inn: usize) -> Init {
        if n == 2 && !self.random { Init::Zeros } else { Init::kaiming(inn) }
    }

    /// The factors of product `n`, with the rows of B for outputs.
    fn factors(&self, b: &mut Builder<'_>, site: &Site, n: u8, [rank, out, inn]: [usize; 3]) -> Result<Pair> {
        let name = format!("{}.hada_w{n}", site.path);
        let up = b.param(&format!("{name}_a"), &[out, rank], Init::kaiming(rank))?;
        let down = b.param(&format!("{name}_b"), &[rank, inn], self.start(n, inn))?;
        Ok(Pair { up, down, core: None })
    }

    /// The factors of product `n` around a core of the window's size.
    fn cores(
        &self,
        b: &mut Builder<'_>,
        site: &Site,
        n: u8,
        [rank, out, channels]: [usize; 3],
        core: &[usize],
    ) -> Result<Pair> {
        let name = format!("{}.hada_w{n}", site.path);
        let fan_in = core[1..].iter().product();
        let core = b.param(&format!("{}.hada_t{n}", site.path), core, Init::kaiming(fan_in))?;
        let up = b.param(&format!("{name}_a"), &[rank, out], Init::kaiming(out))?;
        let down = b.param(&format!("{name}_b"), &[rank, channels], self.start(n, channels))?;
        Ok(Pair { up, down, core: Some(core) })
    }
}

/// B and A of one product, and T.
struct Pair {
    up: Param,
    down: Param,
    core: Option<Param>,
}

impl Pair {
    /// The product [out, in].
    fn product(&self) -> Result<Tensor> {
        match &self.core {
            None => Ok(self.up.get().matmul(&self.down.get())?),
            Some(core) => cored(&core.get(), &self.up.get(), &self.down.get()),
        }
    }
}

/// Σᵢⱼ T[i, j, ·]·B[i, ·]·A[j, ·] as a matrix [out, channels · window]; B [r, out], A [r, channels].
pub(crate) fn cored(core: &Tensor, up: &Tensor, down: &Tensor) -> Result<Tensor> {
    let (rank, window) = (core.dim(0), core.dim(2) * core.dim(3));
    let (out, channels) = (up.dim(1), down.dim(1));
    let half = up.t_matmul(&core.reshape([rank, rank * window])?)?; // [out, r · window]
    let half = half.reshape([out, rank, window])?.permute(&[0, 2, 1])?.matmul(down)?; // [out, window, channels]
    Ok(half.permute(&[0, 2, 1])?.reshape([out, channels * window])?)
}

/// The elementwise product of two products.
struct Hadamard {
    pairs: [Pair; 2],
    scale: f32,
    rank_dropout: f32,
    module_dropout: f32,
}

impl Hadamard {
    /// ΔW.
    fn change(&self) -> Result<Tensor> {
        let [first, second] = &self.pairs;
        Ok(first.product()?.mul(&second.product()?)?.scale(self.scale)?)
    }

    /// (B₁•B₂, A₁∗A₂): [out, r²] and [r², in], whose product is ΔW/s; `None` where ΔW itself is the cheaper one.
    fn thin(&self) -> Result<Option<[Tensor; 2]>> {
        let [first, second] = &self.pairs;
        let (out, rank) = (first.up.value().dim(0), first.down.value().dim(0));
        let inn = first.down.value().dim(1);
        if first.core.is_some() || rank * rank * (out + inn) >= out * inn {
            return Ok(None);
        }
        let up = first.up.get().reshape([out, rank, 1])?.mul(&second.up.get().reshape([out, 1, rank])?)?;
        let down =
            first.down.get().reshape([rank, 1, inn])?.mul(&second.down.get().reshape([1, rank, inn])?)?;
        Ok(Some([up.reshape([out, rank * rank])?, down.reshape([rank * rank, inn])?]))
    }
}

impl WeightPatch for Hadamard {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.change()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let y = base.forward(x)?;
        if places::left_out(cx, self.module_dropout, site) {
            return Ok(y);
        }
        let kept = places::kept_outputs(cx, self.rank_dropout, true, y.width(), site)?;
        match (self.thin()?, kept) {
            (Some([up, down]), None) => Ok(y.add_low_rank(x, &down, &up, self.scale)?),
            (Some([up, down]), Some(kept)) => {
                let up = up.mul(&kept.reshape([kept.len(), 1])?)?;
                Ok(y.add_low_rank(x, &down, &up, self.scale)?)
            }
            (None, kept) => {
                let moved = x.matmul_t(&self.change()?)?;
                Ok(y.plus(&kept.map_or(Ok(moved.clone()), |kept| moved.mul(&kept))?)?)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn is_the_product_of_products_and_counts_so() {
        for rank in [1, 3] {
            let a = attached(&[chosen("loha", json!({ "rank": rank, "alpha": 5 }))], &[]);
            assert_eq!(a.adapter.trained_count(), 2 * 2 * rank * ((6 + 6) + (6 + 4)));
            let x = sample(&[5, 6], 3);
            let q = "layers.0.attn.q";
            close(&both_ways(&a, q, &x).0, &x.matmul_t(&frozen(q)).unwrap(), 1e-6);
            stir(&a, 0.5);
            let (fast, defined) = both_ways(&a, q, &x);
            close(&fast, &defined, 1e-5);
            let get = |end: &str| {
                let named = a.adapter.params().iter().find(|p| p.name == format!("{q}.hada_{end}"));
                named.unwrap().param.value()
            };
            let product = |n: &str| get(&format!("{n}_a")).matmul(&get(&format!("{n}_b"))).unwrap();
            let change = product("w1").mul(&product("w2")).unwrap().scale(5.0 / rank as f32).unwrap();
            close(&defined, &x.matmul_t(&frozen(q).add(&change).unwrap()).unwrap(), 1e-5);
        }
    }

    #[test]
    fn the_gradient_of_a_factor_is_the_one_of_the_definition() {
        // dB₁ = (dΔW ⊙ (B₂·A₂))·A₁ᵀ·α/r, whichever way the forward goes.
        let a = attached(&[chosen("loha", json!({ "rank": 1, "alpha": 2 }))], &[]);
        stir(&a, 0.5);
        let (x, dy) = (sample(&[5, 6], 3), sample(&[5, 6], 4));
        let q = "layers.0.attn.q";
        let (fast, _) = both_ways(&a, q, &x);
        let gradients = fast.backward_from(dy.clone()).unwrap();
        let get = |end: &str| {
            let named = a.adapter.params().iter().find(|p| p.name == format!("{q}.hada_{end}"));
            named.unwrap().param.clone()
        };
        let second = get("w2_a").value().matmul(&get("w2_b").value()).unwrap();
        let change = dy.t_matmul(&x).unwrap().mul(&second).unwrap().scale(2.0).unwrap();
        let expected = change.matmul_t(&get("w1_b").value()).unwrap();
        close(gradients.get(&get("w1_a")).unwrap(), &expected, 1e-5);
    }

    #[test]
    fn dropout_leaves_out_outputs_or_the_module() {
        use engraft_nn::{Layout, Mode, Patched, Value as Frozen};
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, "layers.0.attn.q"));
        let Frozen::Weight(weight) = &site.value else { panic!("a weight") };
        let x = sample(&[4, 6], 3);
        let moved = |settings: Value, step: u64| {
            let a = attached(&[chosen("loha", settings)], &[]);
            stir(&a, 0.5);
            let mode = Mode::Train { seed: 1, step, micro: 0 };
            let cx = Pass::new(Layout::counted(&[4]).unwrap(), None).training(mode);
            let y = Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx).forward(&x).unwrap();
            let y = y.sub(&x.matmul_t(&frozen("layers.0.attn.q")).unwrap()).unwrap();
            y.rows_between(0, 1).unwrap().to_vec().unwrap()
        };
        for rank in [1, 3] {
            let whole = moved(json!({ "rank": rank }), 1);
            let part: Vec<Vec<f32>> =
                (1..20).map(|step| moved(json!({ "rank": rank, "rank_dropout": 0.5 }), step)).collect();
            for row in &part {
                let zeros = row.iter().filter(|v| v.abs() < 1e-6).count();
                let scale = 6.0 / (6 - zeros) as f32;
                assert!(row.iter().zip(&whole).all(|(p, w)| p.abs() < 1e-6 || (p - w * scale).abs() < 1e-5));
            }
            assert!(part.iter().any(|row| row.iter().any(|v| v.abs() < 1e-6)));
            let quiet = (1..40).filter(|&step| {
                moved(json!({ "rank": rank, "module_dropout": 0.5 }), step).iter().all(|v| v.abs() < 1e-6)
            });
            let quiet = quiet.count();
            assert!(quiet > 5 && quiet < 34, "{quiet}");
            assert!(chosen("loha", json!({ "module_dropout": 0.5 })).0.rests());
        }
    }

    #[test]
    fn configurations() {
        survives_saving(
            &[chosen("loha", json!({ "rank_dropout": 0.1, "rank_pattern": { "v": 3 } }))],
            &["head"],
        );
        let written = config(&[chosen("loha", json!({ "rank": 4, "alpha": 2 }))], &[]);
        assert_eq!((&written["r"], &written["alpha"]), (&json!(4), &json!(2)));
        for bad in
            [json!({ "r": 0 }), json!({ "rank_dropout": 1.5 }), json!({ "rank_pattern": { "q": 0.5 } })]
        {
            assert!(from_file(&with(written.clone(), bad)).is_err());
        }
        let (sites, info) = toy();
        let table = [(chosen("loha", json!({})).0, Some(engraft_nn::Targets::names(["tok"])))];
        assert!(crate::attach(&table, &[], &sites, &info, 0).is_err(), "a table has no such form");
    }
}
