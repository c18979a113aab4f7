//! PSOFT: a small rotation between the strongest singular vectors of a weight.
//!
//! W′ = W + s·B·(R − I)·A, A and B the first r singular directions of W with B·A their part of W over s, s = α/r: in that
//! subspace W is turned by R, outside it stays. R = diag(b)·(I + Q)(I − Q)⁻¹·diag(a) with skew-symmetric Q, or the first terms of
//! that series, or any matrix (`psoft_orth` off). Q starts as zero, a and b as ones, so W′ = W.
//! `psoft_init` puts all of the singular values into B, so that the rows of A are orthonormal; `pissa_init` their roots into
//! each. The forward has two thin products, B·(R − I) made once a pass.
//!
//! Wu et al., ICLR 2026.
//!
//! `psoft_R.weight` `[r(r − 1)/2]` (or [r, r]), `psoft_R.vector_a` and `psoft_R.vector_b` `[r]`, and fixed `psoft_A` [r, in],
//! `psoft_B` [out, r]. `peft` leaves A and B out of its files and makes them again; but a singular vector and its negative are
//! equally good, which of them one gets depends on the library, and R means something else with the other. So this form has
//! them in the file, and is not `peft`'s.

use engraft_nn::{Base, Builder, Error, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor, linalg};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::{matrices, orthogonal};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

#[derive(Clone, Copy)]
struct Psoft {
    rank: usize,
    alpha: f64,
    dropout: f32,
    split: Split,
    turn: Turn,
    /// Whether R is scaled at its input (a) and its output (b).
    scales: [bool; 2],
    init_weights: bool,
}

/// Where the singular values go.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Split {
    IntoB,
    Roots,
}

const SPLITS: &[(&str, Split)] = &[("psoft_init", Split::IntoB), ("pissa_init", Split::Roots)];

/// How R is made.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Turn {
    orthogonal: bool,
    series: bool,
    terms: usize,
    /// The longest Q of a series, by its Frobenius norm.
    longest: Option<f64>,
}

static INFO: Info = Info {
    name: "psoft",
    title: "PSOFT",
    class: "reparameterized",
    sites: "weight",
    paper: "ICLR 2026, OpenReview FSHrinMArK",
    summary: "W′ = W + s·B·(R − I)·A, a rotation R between the strongest singular vectors",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_PSOFT",
    fields: &[
        int("rank", (2, 1024), Some("32"), "Number r of singular directions, and size of R."),
        float(
            "alpha",
            (0.0, 1e9),
            "32",
            "A and B are held apart by the factor alpha/rank; the change itself does not depend on it at the start.",
        ),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of A while training."),
        choice(
            "ab_svd_init",
            &["psoft_init", "pissa_init"],
            "\"psoft_init\"",
            "Singular values all in B, or their roots in A and B.",
        ),
        flag("psoft_orth", "true", "Keep R orthogonal but for its scales."),
        flag("psoft_mag_a", "true", "Scale R at its input."),
        flag("psoft_mag_b", "true", "Scale R at its output."),
        flag(
            "use_cayley_neumann",
            "false",
            "The first terms of a series instead of the exact Cayley transform.",
        ),
        int("num_cayley_neumann_terms", (1, 64), Some("5"), "Terms of the series."),
        Field {
            name: "cayley_neumann_eps",
            kind: FieldKind::Float { min: 0.0, max: 1.0 },
            default: None,
            doc: "The longest Q of a series; longer ones are shortened.",
        },
        flag("init_weights", "true", "Start as the base; otherwise Q is drawn."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, ["rank", "alpha", "dropout"]))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    if peft::is_type(config, "PSOFT") {
        let message = "an adapter of peft_type PSOFT has its rotation but not the singular vectors it turns, whose signs \
                       depend on the library that made them; merge it in peft, or train it here with method `psoft`";
        return Err(Error::Unsupported(message.into()));
    }
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    let psoft = read(&mut r, ["r", "psoft_alpha", "psoft_dropout"]);
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(psoft), targets, train_also }))
}

/// Recipes and files differ in three names.
fn read(r: &mut Reader<'_>, [rank, alpha, dropout]: [&'static str; 3]) -> Psoft {
    let longest = r.value("cayley_neumann_eps").is_some().then(|| r.float("cayley_neumann_eps", 0.0));
    if longest.is_some_and(|eps| eps <= 0.0 || eps >= 1.0) {
        r.problem("`cayley_neumann_eps`: expected a number between 0 and 1");
    }
    let psoft = Psoft {
        rank: r.count(rank, 32, 1 << 16),
        alpha: r.float(alpha, 32.0),
        dropout: r.dropout(dropout),
        split: r.one_of("ab_svd_init", SPLITS),
        turn: Turn {
            orthogonal: r.flag("psoft_orth", true),
            series: r.flag("use_cayley_neumann", false),
            terms: r.count("num_cayley_neumann_terms", 5, 1 << 10),
            longest,
        },
        scales: [r.flag("psoft_mag_a", true), r.flag("psoft_mag_b", true)],
        init_weights: r.flag("init_weights", true),
    };
    if psoft.rank < 2 || psoft.alpha <= 0.0 {
        r.problem(format!(
            "`{rank}` must be at least 2 and `{alpha}` above 0, found {} and {}",
            psoft.rank, psoft.alpha
        ));
    }
    psoft
}

fn example() -> Box<dyn Method> {
    let turn = Turn { orthogonal: true, series: false, terms: 5, longest: None };
    let (split, scales) = (Split::IntoB, [true, true]);
    Box::new(Psoft { rank: 4, alpha: 8.0, dropout: 0.0, split, turn, scales, init_weights: true })
}

impl Method for Psoft {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let (out, inn) = matrices::linear(site, INFO.title)?;
            if self.rank > out.min(inn) {
                let message =
                    format!("`rank` is {}, and it has {} singular directions", self.rank, out.min(inn));
                return Err(Error::Site { path: site.path.clone(), message });
            }
            let patch = self.patch(b, site, out, inn)?;
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let split = SPLITS.iter().find(|s| s.1 == self.split).map_or("", |s| s.0);
        let own = json!({
            "ab_svd_init": split, "cayley_neumann_eps": self.turn.longest.map(number), "init_weights": self.init_weights,
            "num_cayley_neumann_terms": self.turn.terms, "psoft_alpha": number(self.alpha),
            "psoft_dropout": as_written(self.dropout), "psoft_mag_a": self.scales[0], "psoft_mag_b": self.scales[1],
            "psoft_orth": self.turn.orthogonal, "r": self.rank, "use_cayley_neumann": self.turn.series,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Psoft {
    fn patch(&self, b: &mut Builder<'_>, site: &Site, out: usize, inn: usize) -> Result<Subspace> {
        let (r, scale) = (self.rank, (self.alpha / self.rank as f64) as f32);
        let svd = linalg::svd(&matrices::frozen(site)?)?;
        let values = Tensor::from_vec(svd.s[..r].iter().map(|s| s / scale).collect(), [r])?;
        let (u, v) = (svd.u.narrow(1, 0, r)?, svd.vt.rows_between(0, r)?);
        let (first, second) = match self.split {
            Split::IntoB => (v.rows_between(0, r)?, u.mul(&values)?),
            Split::Roots => {
                let roots = values.unary(Unary::Sqrt)?;
                (v.mul(&roots.reshape([r, 1])?)?, u.mul(&roots)?)
            }
        };
        let name = |end: &str| format!("{}.psoft_{end}", site.path);
        let (shape, still) = match self.turn.orthogonal {
            true => (vec![r * (r - 1) / 2], Tensor::zeros([r * (r - 1) / 2])),
            false => (vec![r, r], orthogonal::identity(r)?),
        };
        let start = match self.init_weights {
            true => still,
            false => Init::Normal(0.1)
                .tensor(&shape, b.seed(), &name("R.weight"))?
                .add(&still.reshape(&shape[..])?)?,
        };
        Ok(Subspace {
            q: b.param(&name("R.weight"), &shape, Init::Values(start))?,
            input: if self.scales[0] { Some(b.param(&name("R.vector_a"), &[r], Init::Ones)?) } else { None },
            output: if self.scales[1] { Some(b.param(&name("R.vector_b"), &[r], Init::Ones)?) } else { None },
            a: b.fixed(&name("A"), &[r, inn], Init::Values(first))?,
            b: b.fixed(&name("B"), &[out, r], Init::Values(second))?,
            turn: self.turn,
            rank: r,
            scale,
            dropout: self.dropout,
        })
    }
}

struct Subspace {
    q: Param,
    input: Option<Param>,
    output: Option<Param>,
    a: Param,
    b: Param,
    turn: Turn,
    rank: usize,
    scale: f32,
    dropout: f32,
}

impl Subspace {
    /// R [r, r].
    fn turn(&self) -> Result<Tensor> {
        let (q, r) = (self.q.get(), self.rank);
        let mut turned = match self.turn {
            Turn { orthogonal: false, .. } => q,
            Turn { series: false, .. } => {
                // The transform of −Q, with the signs of that file.
                orthogonal::cayley(&orthogonal::skew(&q.scale(-1.0)?.reshape([1, q.len()])?, r)?)?
                    .reshape([r, r])?
            }
            Turn { terms, longest, .. } => {
                let mut q = orthogonal::skew(&q.reshape([1, q.len()])?, r)?;
                if let Some(longest) = longest {
                    q = shortened(&q, longest as f32)?;
                }
                orthogonal::cayley_neumann(&q, terms)?.reshape([r, r])?
            }
        };
        if let Some(output) = &self.output {
            turned = turned.mul(&output.get().reshape([r, 1])?)?;
        }
        if let Some(input) = &self.input {
            turned = turned.mul(&input.get())?;
        }
        Ok(turned)
    }

    /// B·(R − I) [out, r].
    fn second(&self) -> Result<Tensor> {
        let change = self.turn()?.sub(&orthogonal::identity(self.rank)?.reshape([self.rank, self.rank])?)?;
        Ok(self.b.get().matmul(&change)?)
    }
}

/// Q·min(1, longest/‖Q‖); the norm is kept from zero, where it has no slope.
fn shortened(q: &Tensor, longest: f32) -> Result<Tensor> {
    let squares = q.unary(Unary::Square)?.sum()?;
    let least = longest * longest;
    let length = squares
        .unary(Unary::Shift(-least))?
        .unary(Unary::Relu)?
        .unary(Unary::Shift(least))?
        .unary(Unary::Sqrt)?;
    Ok(q.mul(&length.unary(Unary::Recip)?.scale(longest)?)?)
}

impl WeightPatch for Subspace {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.second()?.matmul(&self.a.get())?.scale(self.scale)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        Ok(base.forward(x)?.add_low_rank(&dropped, &self.a.get(), &self.second()?, self.scale)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn the_subspace_is_turned_and_the_rest_stays() {
        let x = sample(&[5, 6], 3);
        let w = frozen("layers.0.attn.q");
        for (settings, count) in [
            (json!({ "rank": 3 }), 3 + 6),
            (json!({ "rank": 3, "psoft_orth": false, "psoft_mag_a": false }), 9 + 3),
            (
                json!({ "rank": 3, "use_cayley_neumann": true, "cayley_neumann_eps": 0.5, "ab_svd_init": "pissa_init" }),
                3 + 6,
            ),
        ] {
            let a = attached(&[chosen("psoft", settings)], &[]);
            assert_eq!(a.adapter.trained_count(), 4 * count);
            close(&both_ways(&a, "layers.0.attn.q", &x).0, &x.matmul_t(&w).unwrap(), 1e-5);
            stir(&a, 0.5);
            let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
            close(&fast, &defined, 1e-5);
        }
        // A rotation alone keeps the lengths of rows of W: their angles too.
        let a = attached(
            &[chosen("psoft", json!({ "rank": 3, "psoft_mag_a": false, "psoft_mag_b": false }))],
            &[],
        );
        stir(&a, 0.5);
        let (sites, _) = toy();
        let merged = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
        let q = &merged.iter().find(|m| m.site.path == "layers.0.attn.q").unwrap().value;
        let singular = |m: &Tensor| Tensor::from_vec(linalg::svd(m).unwrap().s, [6]).unwrap();
        let norm = |m: &Tensor| m.unary(Unary::Square).unwrap().sum().unwrap();
        close(&norm(&singular(q)), &norm(&singular(&w)), 1e-4);
    }

    #[test]
    fn long_generators_are_shortened() {
        let q = orthogonal::skew(&sample(&[1, 3], 1), 3).unwrap();
        let length = |q: &Tensor| q.unary(Unary::Square).unwrap().sum().unwrap().item().unwrap().sqrt();
        assert!((length(&shortened(&q, 0.5).unwrap()) - 0.5).abs() < 1e-6);
        let short = q.scale(0.1).unwrap();
        close(&shortened(&short, 0.5).unwrap(), &short, 1e-6);
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({ "rank": 3 }),
            json!({ "rank": 4, "alpha": 6, "dropout": 0.1, "psoft_orth": false, "init_weights": false }),
            json!({ "rank": 2, "use_cayley_neumann": true, "num_cayley_neumann_terms": 3, "cayley_neumann_eps": 0.9 }),
        ] {
            survives_saving(&[chosen("psoft", settings)], &["head"]);
        }
        let (sites, info) = toy();
        assert!(
            crate::attach(&[chosen("psoft", json!({}))], &[], &sites, &info, 0).is_err(),
            "32 of 6 directions"
        );
        let theirs = from_file(&json!({ "peft_type": "PSOFT" })).map(|_| ()).unwrap_err().to_string();
        assert!(theirs.contains("merge it in peft"), "{theirs}");
    }
}
