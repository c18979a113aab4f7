//! CapaBoost: one pair of factors used several times under fixed masks, for a rank that it does not store.
//!
//! W′ = W + α/r·Σ_i (B ⊙ M_i)·(A ⊙ N_i), i from 1 to d; A Kaiming-uniform, B zero, so W′ = W. The masks keep the same
//! share of numbers each and are not trained; the rank is up to d·r. The d products are one of rank d·r.
//!
//! Song et al. 2024, arXiv:2407.01320.
//!
//! A [rank, in], B [out, rank]. Masks are not stored: N_i keeps the round(density·rank·in) numbers of A whose words are
//! least among words 0, 1, … of a stream of `mask_seed`, the earlier of equals; the stream is the FNV-1a hash of
//! "PATH.lora_A.mask.i", and the same holds for M_i and B.

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::Tensor;
use engraft_tensor::ops::cat;
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::fields::{alpha, dropout, float, int, rank};
use crate::shared::low_rank::{Pair, RANK_MAX, added, changed, linear};
use crate::shared::sizes;
use crate::{Described, Entry, Info, Loaded, Method, peft};

struct CapaBoost {
    rank: usize,
    alpha: f64,
    dropout: f32,
    copies: usize,
    density: f64,
    mask_seed: u64,
}

static INFO: Info = Info {
    name: "capaboost",
    title: "CapaBoost",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2407.01320",
    summary: "W′ = W + (α/r)·Σ (B ⊙ M_i)·(A ⊙ N_i): one LoRA used d times under fixed random masks",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_CAPABOOST",
    fields: &[
        rank("8"),
        alpha("16"),
        dropout("0"),
        int("copies", (1, 64), Some("2"), "How often the pair is used: d."),
        float("density", (0.0, 1.0), "0.5", "Share of the numbers that each mask keeps."),
        int("mask_seed", (0, i64::MAX), Some("0"), "What the masks are drawn from."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>, [rank, alpha, dropout]: [&'static str; 3]) -> CapaBoost {
    let method = CapaBoost {
        rank: r.count(rank, 8, RANK_MAX),
        alpha: r.float(alpha, 16.0),
        dropout: r.dropout(dropout),
        copies: r.count("copies", 2, 64),
        density: r.float("density", 0.5),
        mask_seed: r.at_least("mask_seed", 0, 0),
    };
    if !(method.density > 0.0 && method.density <= 1.0) {
        r.problem(format!("`density`: expected a number above 0 and up to 1, found {}", method.density));
    }
    method
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, ["rank", "alpha", "dropout"]))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| read(r, ["r", "lora_alpha", "lora_dropout"]))
}

fn example() -> Box<dyn Method> {
    Box::new(CapaBoost { rank: 3, alpha: 6.0, dropout: 0.0, copies: 2, density: 0.5, mask_seed: 1 })
}

impl Method for CapaBoost {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let (out, inn) = linear(site, "CapaBoost")?;
            let pair = Pair::new(b, &site.path, (out, inn), self.rank)?;
            let masks = |letter: &str, shape: [usize; 2]| -> Result<Vec<Tensor>> {
                let name = |i: usize| format!("{}.lora_{letter}.mask.{i}", site.path);
                (0..self.copies).map(|i| mask(&shape, self.density, self.mask_seed, &name(i))).collect()
            };
            let (of_a, of_b) = (masks("A", [self.rank, inn])?, masks("B", [out, self.rank])?);
            let scale = (self.alpha / self.rank as f64) as f32;
            let patch = Masked { pair, of_a, of_b, scale, dropout: self.dropout };
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "copies": self.copies, "density": number(self.density), "lora_alpha": number(self.alpha),
            "lora_dropout": as_written(self.dropout), "mask_seed": self.mask_seed, "r": self.rank,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// Ones at the `density` of places whose random words are least, zeros elsewhere.
fn mask(shape: &[usize], density: f64, seed: u64, name: &str) -> Result<Tensor> {
    let count: usize = shape.iter().product();
    let mut words = vec![0u32; count];
    Init::key(seed, name).fill_bits(0, &mut words);
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_key(|&i| (words[i], i));
    let mut marks = vec![0.0; count];
    for &i in order.iter().take((density * count as f64).round() as usize) {
        marks[i] = 1.0;
    }
    Ok(Tensor::from_vec(marks, shape)?)
}

struct Masked {
    pair: Pair,
    of_a: Vec<Tensor>,
    of_b: Vec<Tensor>,
    scale: f32,
    dropout: f32,
}

impl Masked {
    /// The masked copies beside each other: A [d·rank, in], B [out, d·rank].
    fn factors(&self) -> Result<(Tensor, Tensor)> {
        let all = |factor: &Tensor, masks: &[Tensor], dim| -> Result<Tensor> {
            let copies: Vec<Tensor> =
                masks.iter().map(|mask| factor.mul(mask)).collect::<std::result::Result<_, _>>()?;
            Ok(cat(&copies.iter().collect::<Vec<_>>(), dim)?)
        };
        Ok((all(&self.pair.a.get(), &self.of_a, 0)?, all(&self.pair.b.get(), &self.of_b, 1)?))
    }
}

impl WeightPatch for Masked {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let (a, b) = self.factors()?;
        changed(base, &a, &b, self.scale)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        let (a, b) = self.factors()?;
        added(base.forward(x)?, &dropped, &a, &b, self.scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    const Q: &str = "layers.0.attn.q";

    /// ΔW at a matrix.
    fn change(a: &crate::Attached) -> Tensor {
        let (_, wide) = both_ways(a, Q, &Tensor::from_vec(unit(6), [6, 6]).unwrap());
        wide.t().unwrap().sub(&frozen(Q)).unwrap()
    }

    fn unit(n: usize) -> Vec<f32> {
        (0..n * n).map(|i| f32::from(u8::from(i % (n + 1) == 0))).collect()
    }

    /// The rank of a square matrix, by elimination with the largest pivots.
    fn rank_of(t: &Tensor) -> usize {
        let n = t.dim(0);
        let mut m: Vec<f64> = t.to_vec().unwrap().iter().map(|v| f64::from(*v)).collect();
        for rank in 0..n {
            let pivot = (0..n * n).max_by(|&a, &b| m[a].abs().total_cmp(&m[b].abs())).unwrap();
            if m[pivot].abs() < 1e-4 {
                return rank;
            }
            let (row, column, old) = (pivot / n, pivot % n, m.clone());
            for (i, v) in m.iter_mut().enumerate() {
                *v -= old[i / n * n + column] * old[row * n + i % n] / old[pivot];
            }
        }
        n
    }

    #[test]
    fn copies_raise_the_rank_and_not_the_count() {
        let of = |copies: usize, density: f64| {
            let settings = json!({ "rank": 2, "alpha": 4, "copies": copies, "density": density });
            let a = attached(&[chosen("capaboost", settings)], &[]);
            assert_eq!(a.adapter.trained_count(), 2 * 2 * (6 + 6 + 4 + 6));
            stir(&a, 0.5);
            let (fast, defined) = both_ways(&a, Q, &sample(&[5, 6], 3));
            close(&fast, &defined, 1e-5);
            change(&a)
        };
        // Full masks: d times a LoRA.
        let lora = attached(&[chosen("lora", json!({ "rank": 2, "alpha": 4 }))], &[]);
        stir(&lora, 0.5);
        close(&of(1, 1.0), &change(&lora), 1e-5);
        assert_eq!((rank_of(&of(1, 1.0)), rank_of(&of(2, 0.5))), (2, 4));
    }

    #[test]
    fn masks_keep_their_share_and_repeat() {
        let m = mask(&[7, 11], 0.3, 5, "a").unwrap().to_vec().unwrap();
        assert_eq!(m.iter().sum::<f32>(), 23.0);
        assert_eq!(m, mask(&[7, 11], 0.3, 5, "a").unwrap().to_vec().unwrap());
        assert_ne!(m, mask(&[7, 11], 0.3, 5, "b").unwrap().to_vec().unwrap());
        assert_ne!(m, mask(&[7, 11], 0.3, 6, "a").unwrap().to_vec().unwrap());
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("capaboost", json!({ "copies": 3, "mask_seed": 9 }))], &["head"]);
        let good = config(&[chosen("capaboost", json!({}))], &[]);
        for bad in [
            json!({ "copies": 0 }),
            json!({ "density": 0 }),
            json!({ "density": 1.5 }),
            json!({ "r": 0 }),
            json!({ "mask_seed": -1 }),
        ] {
            let key = bad.as_object().unwrap().keys().next().unwrap().clone();
            let Err(error) = from_file(&with(good.clone(), bad)) else { panic!("{key} passed") };
            assert!(error.to_string().contains(&key), "{error}");
        }
    }
}
