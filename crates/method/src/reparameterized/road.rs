//! RoAd: the outputs of frozen layers, in pairs, turned by learned angles and stretched.
//!
//! W′ = R·W and b′ = R·b; R is block diagonal with one 2×2 matrix a pair. For a pair (y₁, y₂) of outputs,
//! y₁′ = α₁₁·cos θ₁₁·y₁ − α₁₂·sin θ₁₂·y₂ and y₂′ = α₂₁·sin θ₂₁·y₁ + α₂₂·cos θ₂₂·y₂. RoAd₁ has one angle and one stretch a
//! pair, RoAd₂ one of each an output, RoAd₄ one of each an entry of R. Angles start as 0, stretches as 1, so W′ = W.
//! Pairs lie half a group apart: output i of a group goes with output i + group/2.
//!
//! Liao and Monz 2024, arXiv:2409.00119.
//!
//! `road_theta` and `road_alpha` `[out/2]`, `[out]` or `[2·out]`; in RoAd₄ each group has first the numbers that multiply its own
//! outputs (cosines), then those that multiply its partners (sines).

use engraft_nn::{Base, Builder, Error, Init, Pass, Patch, Result, Role, Site, VectorPatch, WeightPatch};
use engraft_tensor::ops::{Unary, cat};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{choice, flag, int};
use crate::shared::matrices;
use crate::{Described, Entry, Info, Loaded, Method, peft};

#[derive(Clone, Copy)]
struct Road {
    variant: Variant,
    group: usize,
    init_weights: bool,
}

/// How many numbers a pair of outputs has.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Variant {
    One,
    Two,
    Four,
}

const VARIANTS: &[(&str, Variant)] =
    &[("road_1", Variant::One), ("road_2", Variant::Two), ("road_4", Variant::Four)];

static INFO: Info = Info {
    name: "road",
    title: "RoAd",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2409.00119",
    summary: "W′ = R·W, pairs of outputs turned and stretched",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ROAD",
    fields: &[
        choice(
            "variant",
            &["road_1", "road_2", "road_4"],
            "\"road_1\"",
            "One angle and stretch a pair of outputs (road_1), an output (road_2) or an entry of the 2×2 matrix (road_4).",
        ),
        int(
            "group_size",
            (2, 1 << 20),
            Some("64"),
            "Outputs in a group, an even number that divides all of them; partners lie half a group apart.",
        ),
        flag("init_weights", "true", "Start as the base; otherwise angles and stretches are drawn."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

/// The keys, which are the same in recipes and files.
fn read(r: &mut Reader<'_>) -> Road {
    let road = Road {
        variant: r.one_of("variant", VARIANTS),
        group: r.count("group_size", 64, 1 << 20),
        init_weights: r.flag("init_weights", true),
    };
    if !road.group.is_multiple_of(2) {
        r.problem(format!("`group_size`: expected an even number, found {}", road.group));
    }
    road
}

fn example() -> Box<dyn Method> {
    Box::new(Road { variant: Variant::Four, group: 2, init_weights: true })
}

impl Method for Road {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let (out, _) = matrices::linear(site, INFO.title)?;
            if !out.is_multiple_of(self.group) {
                let message = format!(
                    "`group_size` is {}, which does not divide its {out} outputs; choose a smaller even number that does",
                    self.group
                );
                return Err(Error::Site { path: site.path.clone(), message });
            }
            let turn = self.turn(b, site, out)?;
            if let Some(bias) = b.sites().bias_of(&site.path) {
                b.patch(bias.id, Patch::Vector(Box::new(turn.clone())))?;
            }
            b.patch(site.id, Patch::Weight(Box::new(turn)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let variant = VARIANTS.iter().find(|v| v.1 == self.variant).map_or("", |v| v.0);
        let own = json!({ "group_size": self.group, "init_weights": self.init_weights, "variant": variant });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Road {
    fn turn(&self, b: &mut Builder<'_>, site: &Site, out: usize) -> Result<Turn> {
        let count = match self.variant {
            Variant::One => out / 2,
            Variant::Two => out,
            Variant::Four => 2 * out,
        };
        let mut make = |name: &str, start: Init, centre: f32| -> Result<Param> {
            let name = format!("{}.{name}", site.path);
            let init = match self.init_weights {
                true => start,
                false => {
                    let drawn = Init::Normal(0.5).tensor(&[count], b.seed(), &name)?;
                    Init::Values(drawn.unary(Unary::Shift(centre))?)
                }
            };
            b.param(&name, &[count], init)
        };
        let (theta, alpha) = (make("road_theta", Init::Zeros, 0.0)?, make("road_alpha", Init::Ones, 1.0)?);
        Ok(Turn { theta, alpha, variant: self.variant, group: self.group })
    }
}

#[derive(Clone)]
struct Turn {
    theta: Param,
    alpha: Param,
    variant: Variant,
    group: usize,
}

impl Turn {
    /// What multiplies an output itself, and what multiplies its partner (with the partner's sign), each `[out]`.
    fn columns(&self) -> Result<(Tensor, Tensor)> {
        let (theta, alpha, half) = (self.theta.get(), self.alpha.get(), self.group / 2);
        let (own, other) = match self.variant {
            Variant::One => {
                let twice = |t: &Tensor| -> Result<Tensor> {
                    let pairs = t.reshape([t.len() / half, 1, half])?;
                    Ok(cat(&[&pairs, &pairs], 1)?.reshape([2 * t.len()])?)
                };
                let (theta, alpha) = (twice(&theta)?, twice(&alpha)?);
                ((theta.clone(), alpha.clone()), (theta, alpha))
            }
            Variant::Two => ((theta.clone(), alpha.clone()), (theta, alpha)),
            Variant::Four => {
                let part = |t: &Tensor, which: usize| -> Result<Tensor> {
                    let groups = t.reshape([t.len() / (2 * self.group), 2, self.group])?;
                    Ok(groups.narrow(1, which, 1)?.reshape([t.len() / 2])?)
                };
                ((part(&theta, 0)?, part(&alpha, 0)?), (part(&theta, 1)?, part(&alpha, 1)?))
            }
        };
        Ok((own.1.mul(&own.0.unary(Unary::Cos)?)?, other.1.mul(&other.0.unary(Unary::Sin)?)?))
    }

    /// R·y for rows y [rows, out].
    fn rows(&self, y: &Tensor) -> Result<Tensor> {
        let (own, other) = self.columns()?;
        let halves = y.reshape([y.len() / self.group, 2, self.group / 2])?;
        let (first, second) = (halves.narrow(1, 0, 1)?, halves.narrow(1, 1, 1)?);
        let partners = cat(&[&second.scale(-1.0)?, &first], 1)?.reshape(y.shape())?;
        Ok(y.mul(&own)?.plus(&partners.mul(&other)?)?)
    }
}

impl WeightPatch for Turn {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let (w, (own, other)) = (base.dense()?, self.columns()?);
        let (out, half) = (w.dim(0), self.group / 2);
        // The row of W that each row is mixed with, and its sign.
        let first = |i: usize| i % self.group < half;
        let partners = (0..out).map(|i| if first(i) { i + half } else { i - half } as i64).collect();
        let signs = (0..out).map(|i| if first(i) { -1.0 } else { 1.0 }).collect();
        let partners = w.gather(&Tensor::from_i64(partners, [out])?)?;
        let other = other.mul(&Tensor::from_vec(signs, [out])?)?;
        Ok(w.mul(&own.reshape([out, 1])?)?.add(&partners.mul(&other.reshape([out, 1])?)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        self.rows(&base.forward(x)?)
    }
}

impl VectorPatch for Turn {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        Ok(self.rows(&v.reshape([1, v.len()])?)?.reshape([v.len()])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn pairs_turn_with_their_biases() {
        let x = sample(&[5, 6], 3);
        for (variant, count) in [("road_1", 1), ("road_2", 2), ("road_4", 4)] {
            let settings = json!({ "variant": variant, "group_size": 2 });
            let a = attached(&[chosen("road", settings)], &[]);
            assert_eq!(names(&a)[..2], ["layers.0.attn.q.road_theta", "layers.0.attn.q.road_alpha"]);
            assert_eq!(a.adapter.trained_count(), 2 * count * (6 + 4));
            close(
                &both_ways(&a, "layers.0.attn.q", &x).0,
                &x.matmul_t(&frozen("layers.0.attn.q")).unwrap(),
                1e-6,
            );
            stir(&a, 0.5);
            let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
            close(&fast, &defined, 1e-5);
        }
        // With angles alone, lengths of pairs stay.
        let queries = Some(engraft_nn::Targets::names(["attn.q"]));
        let a = attached(&[(chosen("road", json!({ "group_size": 6 })).0, queries)], &[]);
        let theta = a.adapter.params().iter().find(|p| p.name == "layers.0.attn.q.road_theta").unwrap();
        theta.param.set(sample(&[3], 7).scale(3.0).unwrap()).unwrap();
        let bias = frozen("layers.0.attn.q.bias").to_vec().unwrap();
        let turned = vector(&a, "layers.0.attn.q.bias").to_vec().unwrap();
        for i in 0..3 {
            let length = |v: &[f32]| v[i].hypot(v[i + 3]);
            assert!((length(&turned) - length(&bias)).abs() < 1e-6 && (turned[i] - bias[i]).abs() > 1e-4);
        }
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({ "group_size": 2 }),
            json!({ "variant": "road_4", "group_size": 2, "init_weights": false }),
        ] {
            survives_saving(&[chosen("road", settings)], &["head"]);
        }
        let (sites, info) = toy();
        let error =
            crate::attach(&[chosen("road", json!({}))], &[], &sites, &info, 0).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("`group_size` is 64"), "{error}");
        let odd = json!({ "group_size": 3 });
        assert!(from_settings(odd.as_object().unwrap()).is_err());
        let good = config(&[chosen("road", json!({ "group_size": 2 }))], &[]);
        assert!(good.get("exclude_modules").is_none(), "peft's RoAd has no such key");
        assert!(from_file(&with(good, json!({ "variant": "road_3" }))).is_err());
    }
}
