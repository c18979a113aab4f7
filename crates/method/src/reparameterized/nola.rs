//! NOLA: LoRA's factors as sums of fixed random matrices with trained coefficients.
//!
//! W′ = W + (α/r)·B·A with A = A₀ + Σᵢ αᵢ·Aᵢ and B = Σⱼ βⱼ·Bⱼ, i, j = 1…k. All Aᵢ, Bⱼ are uniform in ±1/√k, A₀ Kaiming-uniform;
//! they are functions of a seed and never saved. α and β start as zero, so W′ = W, and the first step moves β. The number of
//! trained numbers, 2k a target, does not depend on the rank. Targets of the same sizes share their random matrices.
//!
//! Koohpayegani et al. 2024, arXiv:2310.02556, equations 2 and 3.
//!
//! nola_alpha (α) `[k]`, nola_beta (β) `[k]`. Random numbers are Philox 4×32-10 words by (seed, name): `nola.A.RxN` holds [k, r, in],
//! `nola.B.MxR` [k, out, r], and `nola.A0.RxN` [r, in].

use std::collections::HashMap;

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::fields::{float, int};
use crate::shared::kept::Kept;
use crate::shared::places;
use crate::shared::sizes;
use crate::{Described, Entry, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1024;
const BASES_MAX: usize = 1 << 16;

struct Nola {
    rank: usize,
    alpha: f64,
    bases: usize,
    seed: u64,
    dropout: f32,
}

static INFO: Info = Info {
    name: "nola",
    title: "NOLA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2310.02556",
    summary: "W′ = W + (α/r)·(Σ βⱼ·Bⱼ)·(A₀ + Σ αᵢ·Aᵢ), random matrices and trained coefficients",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_NOLA",
    fields: &[
        int("rank", (1, RANK_MAX as i64), Some("8"), "Inner size r of the product; trains nothing more."),
        float("alpha", (0.0, 1e9), "16", "The product is scaled by alpha/rank."),
        int(
            "num_basis",
            (1, BASES_MAX as i64),
            Some("1024"),
            "Number k of random matrices for each factor; a target trains 2k numbers.",
        ),
        int("basis_seed", (0, u32::MAX as i64), Some("0"), "Seed of the random matrices."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of A while training."),
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

fn read(r: &mut Reader<'_>) -> Nola {
    Nola {
        rank: r.count("rank", 8, RANK_MAX),
        alpha: r.float("alpha", 16.0),
        bases: r.count("num_basis", 1024, BASES_MAX),
        seed: r.seed("basis_seed", 0),
        dropout: r.dropout("dropout"),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(Nola { rank: 2, alpha: 8.0, bases: 12, seed: 1, dropout: 0.0 })
}

impl Method for Nola {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let (k, r) = (self.bases, self.rank);
        let uniform = Init::Uniform(1.0 / (k as f32).sqrt());
        let mut drawn: HashMap<String, Tensor> = HashMap::new();
        let mut draw = |name: String, shape: [usize; 2], init: &Init| -> Result<Tensor> {
            if !drawn.contains_key(&name) {
                drawn.insert(name.clone(), init.tensor(&shape, self.seed, &name)?);
            }
            Ok(drawn[&name].clone())
        };
        for site in b.targets() {
            let (out, inn) = places::linear(site, INFO.title)?;
            let patch = Combined {
                start: draw(format!("nola.A0.{r}x{inn}"), [r, inn], &Init::kaiming(inn))?,
                down: draw(format!("nola.A.{r}x{inn}"), [k, r * inn], &uniform)?,
                up: draw(format!("nola.B.{out}x{r}"), [k, out * r], &uniform)?,
                alpha: b.param(&format!("{}.nola_alpha", site.path), &[k], Init::Zeros)?,
                beta: b.param(&format!("{}.nola_beta", site.path), &[k], Init::Zeros)?,
                scale: (self.alpha / r as f64) as f32,
                dropout: self.dropout,
                kept: Kept::new(),
            };
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "alpha": number(self.alpha), "basis_seed": self.seed, "dropout": as_written(self.dropout),
            "layers_pattern": null, "layers_to_transform": null, "num_basis": self.bases, "rank": self.rank,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// B·A of combined random matrices, a row each.
struct Combined {
    start: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: Param,
    beta: Param,
    scale: f32,
    dropout: f32,
    kept: Kept<[Tensor; 2]>,
}

impl Combined {
    /// A [r, in] and B [out, r].
    fn factors(&self) -> Result<[Tensor; 2]> {
        self.kept.of(&[&self.alpha, &self.beta], || self.made())
    }

    fn made(&self) -> Result<[Tensor; 2]> {
        let (rank, inn) = (self.start.dim(0), self.start.dim(1));
        let sum = |coefficients: &Param, bases: &Tensor| -> Result<Tensor> {
            Ok(coefficients.get().reshape([1, bases.dim(0)])?.matmul(bases)?)
        };
        let down = sum(&self.alpha, &self.down)?.reshape([rank, inn])?.add(&self.start)?;
        let up = sum(&self.beta, &self.up)?.reshape([self.up.dim(1) / rank, rank])?;
        Ok([down, up])
    }
}

impl WeightPatch for Combined {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let [down, up] = self.factors()?;
        Ok(base.dense()?.add(&up.matmul(&down)?.scale(self.scale)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let [down, up] = self.factors()?;
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        Ok(base.forward(x)?.add_low_rank(&dropped, &down, &up, self.scale)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn trains_coefficients_of_matrices_that_the_seed_gives() {
        for rank in [2, 5] {
            let a = attached(&[chosen("nola", json!({ "rank": rank, "num_basis": 7 }))], &[]);
            assert_eq!(a.adapter.trained_count(), 4 * 2 * 7, "whatever the rank");
        }
        let moved = |seed: u64| {
            let settings = json!({ "rank": 2, "alpha": 6, "num_basis": 7, "basis_seed": seed });
            let a = attached(&[chosen("nola", settings)], &[]);
            let x = sample(&[5, 6], 3);
            let q = "layers.0.attn.q";
            close(&both_ways(&a, q, &x).0, &x.matmul_t(&frozen(q)).unwrap(), 1e-6);
            stir(&a, 0.5);
            let (fast, defined) = both_ways(&a, q, &x);
            close(&fast, &defined, 1e-5);
            let uniform = Init::Uniform(1.0 / 7f32.sqrt());
            let sum = |of: &str, name: &str, shape: [usize; 2]| {
                let bases = uniform.tensor(&[7, shape[0] * shape[1]], seed, name).unwrap();
                let c = value_of(&a, &format!("{q}.nola_{of}")).reshape([1, 7]).unwrap();
                c.matmul(&bases).unwrap().reshape(shape).unwrap()
            };
            let start = Init::kaiming(6).tensor(&[2, 6], seed, "nola.A0.2x6").unwrap();
            let down = sum("alpha", "nola.A.2x6", [2, 6]).add(&start).unwrap();
            let change = sum("beta", "nola.B.6x2", [6, 2]).matmul(&down).unwrap().scale(3.0).unwrap();
            close(&merged(&a, q), &frozen(q).add(&change).unwrap(), 1e-5);
            fast.to_vec().unwrap()
        };
        assert_ne!(moved(0), moved(1));
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("nola", json!({ "num_basis": 5, "dropout": 0.1 }))], &["head"]);
        let written = config(&[chosen("nola", json!({ "num_basis": 5 }))], &[]);
        assert!(from_file(&with(written, json!({ "num_basis": 0 }))).is_err());
    }
}
