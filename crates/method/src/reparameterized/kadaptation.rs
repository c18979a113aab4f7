//! KAdaptation: a sum of Kronecker products whose small left factors all layers share.
//!
//! W′ = W + s·Σᵢ Aᵢ⊗(uᵢ·vᵢ), i = 1…N, with Aᵢ = lᵢ·rᵢ [N, N] of low rank and shared, uᵢ [out/N, r], vᵢ [r, in/N] of each target. The
//! released code starts both u and v as zero, from where nothing moves; here u is zero, so that W′ = W, and v Glorot-uniform;
//! l and r are uniform in ±0.01. The forward reads x as matrices and never forms the sum.
//!
//! He et al. 2023, arXiv:2203.16329, equations 3 and 4 and the released code (scale 160).
//!
//! kadaptation_left (l) [N, N, r], kadaptation_right (r) [N, r, N]; kadaptation_u [N, out/N, r], kadaptation_v [N, r, in/N] a target.

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::fields::{float, int};
use crate::shared::sizes;
use crate::shared::{divisors, kronecker, places};
use crate::{Described, Entry, Info, Loaded, Method, peft};

const COUNT_MAX: usize = 1 << 12;

struct Kadaptation {
    count: usize,
    rank: usize,
    scale: f64,
    dropout: f32,
}

static INFO: Info = Info {
    name: "kadaptation",
    title: "KAdaptation",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2203.16329",
    summary: "W′ = W + s·Σ Aᵢ⊗(uᵢ·vᵢ), with small Aᵢ of low rank that all layers share",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_KADAPTATION",
    fields: &[
        int(
            "n",
            (1, COUNT_MAX as i64),
            Some("32"),
            "Number N of products and size of their left factors, a divisor of the targets' inputs and outputs.",
        ),
        int("rank", (1, COUNT_MAX as i64), Some("1"), "Rank r of both factors."),
        float("scale", (0.0, 1e9), "160", "Factor s on the sum."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of the sum while training."),
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

fn read(r: &mut Reader<'_>) -> Kadaptation {
    Kadaptation {
        count: r.count("n", 32, COUNT_MAX),
        rank: r.count("rank", 1, COUNT_MAX),
        scale: r.float("scale", 160.0),
        dropout: r.dropout("dropout"),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(Kadaptation { count: 2, rank: 1, scale: 8.0, dropout: 0.0 })
}

impl Method for Kadaptation {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let most = |(out, inn): (usize, usize)| (out / self.count).min(inn / self.count);
        sizes::beyond(targets, "rank", |_| self.rank, most, sizes::IDLE)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let (n, r) = (self.count, self.rank);
        let left = b.param("kadaptation_left", &[n, n, r], Init::Uniform(0.01))?;
        let right = b.param("kadaptation_right", &[n, r, n], Init::Uniform(0.01))?;
        for site in b.targets() {
            let rules = Rules::Thin(left.clone(), right.clone());
            let names = ["kadaptation_u", "kadaptation_v"];
            let sum = Sum::attach(b, site, INFO.title, names, rules, [n, r], self.scale, self.dropout)?;
            b.patch(site.id, Patch::Weight(Box::new(sum)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "dropout": as_written(self.dropout), "layers_pattern": null, "layers_to_transform": null, "n": self.count,
            "rank": self.rank, "scale": number(self.scale),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// The left factors of a sum of Kronecker products, as all targets have them.
pub(crate) enum Rules {
    /// A [N, N, N].
    Whole(Param),
    /// l [N, N, r] and r [N, r, N].
    Thin(Param, Param),
}

impl Rules {
    fn get(&self) -> Result<Tensor> {
        match self {
            Rules::Whole(whole) => Ok(whole.get()),
            Rules::Thin(left, right) => Ok(left.get().matmul(&right.get())?),
        }
    }
}

/// s·Σᵢ Aᵢ⊗(uᵢ·vᵢ).
pub(crate) struct Sum {
    rules: Rules,
    up: Param,
    down: Param,
    scale: f32,
    dropout: f32,
}

impl Sum {
    /// (out, in) of a layer that `n` divides.
    pub fn sizes(site: &Site, title: &str, n: usize) -> Result<(usize, usize)> {
        let (out, inn) = places::linear(site, title)?;
        if out.is_multiple_of(n) && inn.is_multiple_of(n) {
            return Ok((out, inn));
        }
        let message = format!(
            "[{out}, {inn}] cannot be cut into {n}×{n} blocks; choose an `n` that divides both, such as {}",
            divisors::near(n, &[out, inn])
        );
        places::unfit(site, message)
    }

    /// The factors u and v of one target under `names`.
    #[allow(clippy::too_many_arguments, reason = "two methods describe the same sum")]
    pub fn attach(
        b: &mut Builder<'_>,
        site: &Site,
        title: &str,
        names: [&str; 2],
        rules: Rules,
        [n, rank]: [usize; 2],
        scale: f64,
        dropout: f32,
    ) -> Result<Sum> {
        let (out, inn) = Sum::sizes(site, title, n)?;
        let [up, down] = names.map(|name| format!("{}.{name}", site.path));
        let glorot = Init::Uniform((6.0 / (rank + inn / n) as f32).sqrt());
        let up = b.param(&up, &[n, out / n, rank], Init::Zeros)?;
        let down = b.param(&down, &[n, rank, inn / n], glorot)?;
        Ok(Sum { rules, up, down, scale: scale as f32, dropout })
    }
}

impl WeightPatch for Sum {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let sum = kronecker::sum(&self.rules.get()?, &self.up.get(), &self.down.get())?;
        Ok(base.dense()?.add(&sum.scale(self.scale)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        let rules = self.rules.get()?.scale(self.scale)?;
        let moved = kronecker::multiply_sum(&dropped, &rules, &self.up.get(), &self.down.get())?;
        Ok(base.forward(x)?.plus(&moved)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn sums_products_and_moves_from_its_start() {
        let a = attached(&[chosen("kadaptation", json!({ "n": 2, "rank": 1, "scale": 3.0 }))], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * 2 * 2 + 2 * (2 * (3 + 3) + 2 * (2 + 3)));
        let q = "layers.0.attn.q";
        let x = sample(&[5, 6], 3);
        let y = both_ways(&a, q, &x).0;
        close(&y, &x.matmul_t(&frozen(q)).unwrap(), 1e-6);
        let up = a.adapter.params().iter().find(|p| p.name == format!("{q}.kadaptation_u")).unwrap();
        let g = y.backward_from(sample(&[5, 6], 4)).unwrap();
        assert!(
            g.get(&up.param).unwrap().to_vec().unwrap().iter().any(|g| g.abs() > 1e-6),
            "nothing would move"
        );
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, q, &x);
        close(&fast, &defined, 1e-5);
        let rules = value_of(&a, "kadaptation_left").matmul(&value_of(&a, "kadaptation_right")).unwrap();
        let products = up.param.value().matmul(&value_of(&a, &format!("{q}.kadaptation_v"))).unwrap();
        let part = |t: &Tensor, i: usize| {
            let shape = t.shape()[1..].to_vec();
            t.rows_between(i, i + 1).unwrap().reshape(shape).unwrap()
        };
        let mut expected = frozen(q);
        for i in 0..2 {
            let one = kronecker::kron(&part(&rules, i), &part(&products, i)).unwrap();
            expected = expected.add(&one.scale(3.0).unwrap()).unwrap();
        }
        close(&merged(&a, q), &expected, 1e-5);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("kadaptation", json!({ "n": 2, "dropout": 0.1 }))], &["head"]);
        let written = config(&[chosen("kadaptation", json!({ "n": 2 }))], &[]);
        assert_eq!(written["scale"], json!(160));
        assert!(from_file(&with(written, json!({ "n": 0 }))).is_err());
        let (sites, info) = toy();
        assert!(crate::attach(&[chosen("kadaptation", json!({ "n": 4 }))], &[], &sites, &info, 0).is_err());
    }
}
