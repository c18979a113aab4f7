//! Intrinsic SAID: all changes of all targets from one short vector, by a random projection that is never stored.
//!
//! W′ = W + λ·P(z) with one z `[d]` for all targets and one λ for each. P pads z with zeros to L = 2^⌈log₂ D⌉ numbers, D = out·in,
//! and takes the first D of H·G·Π·H·S·z/√(D·Σg²): S random signs, H the Walsh–Hadamard matrix, Π a random order, G a diagonal of
//! normal numbers g (Fastfood). z starts as zero and λ as one, so W′ = W. Every step forms ΔW, which the transform makes in
//! O(L log L); backward makes it again instead of keeping what lies between.
//!
//! Aghajanyan et al. 2021, arXiv:2012.13255, section 3.2; Le et al. 2013 (Fastfood), arXiv:1408.3060.
//!
//! said_z (z) `[d]`, said_lambda (λ) [1] a target. Random numbers are Philox 4×32-10 words by (seed, name), PATH being the
//! target's: the sign i is the lowest bit of word i of `said.S.PATH`, Π exchanges i and i + (word i of `said.P.PATH`) mod (L − i) for
//! rising i, g are the normals of `said.G.PATH`.

use std::sync::Arc;

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::cat;
use engraft_tensor::{Param, Tensor, checkpoint};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::int;
use crate::shared::places;
use crate::{Described, Entry, Info, Loaded, Method, peft};

const DIMENSION_MAX: usize = 1 << 24;
const Z: &str = "said_z";

struct Said {
    dimension: usize,
    seed: u64,
}

static INFO: Info = Info {
    name: "said",
    title: "Intrinsic SAID",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2012.13255",
    summary: "W′ = W + λ·P(z), one short z for all targets and a random projection P",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_SAID",
    fields: &[
        int(
            "dimension",
            (1, DIMENSION_MAX as i64),
            Some("20000"),
            "Length d of the vector that everything is made from.",
        ),
        int("projection_seed", (0, u32::MAX as i64), Some("0"), "Seed of the random projections."),
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

fn read(r: &mut Reader<'_>) -> Said {
    Said { dimension: r.count("dimension", 20_000, DIMENSION_MAX), seed: r.seed("projection_seed", 0) }
}

fn example() -> Box<dyn Method> {
    Box::new(Said { dimension: 50, seed: 1 })
}

impl Method for Said {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let z = b.param(Z, &[self.dimension], Init::Zeros)?;
        for site in b.targets() {
            let (out, inn) = places::linear(site, INFO.title)?;
            if self.dimension > (out * inn).next_power_of_two() {
                let message =
                    format!("[{out}, {inn}] holds fewer than {} numbers; lower `dimension`", self.dimension);
                return places::unfit(site, message);
            }
            let lambda = b.param(&format!("{}.said_lambda", site.path), &[1], Init::Ones)?;
            let projection = Arc::new(Fastfood::new(self.seed, &site.path, [out, inn])?);
            b.patch(site.id, Patch::Weight(Box::new(Projected { z: z.clone(), lambda, projection })))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "dimension": self.dimension, "layers_pattern": null, "layers_to_transform": null,
            "projection_seed": self.seed,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// One random projection to a matrix.
struct Fastfood {
    shape: [usize; 2],
    signs: Tensor,
    order: Tensor,
    /// g/√(D·Σg²).
    normals: Tensor,
}

impl Fastfood {
    fn new(seed: u64, path: &str, shape: [usize; 2]) -> Result<Fastfood> {
        let count = shape[0] * shape[1];
        let length = count.next_power_of_two();
        let key = |part: &str| Init::key(seed, &format!("said.{part}.{path}"));
        let signs = key("S");
        let signs = (0..length as u64).map(|i| if signs.bits(i) & 1 == 1 { 1.0 } else { -1.0 }).collect();
        let steps = key("P");
        let mut order: Vec<i64> = (0..length as i64).collect();
        for i in 0..length {
            order.swap(i, i + steps.bits(i as u64) as usize % (length - i));
        }
        let mut normals = vec![0.0; length];
        key("G").fill_normal(&mut normals);
        let squares: f64 = normals.iter().map(|&g| f64::from(g).powi(2)).sum();
        let by = (count as f64 * squares).sqrt();
        normals.iter_mut().for_each(|g| *g = (f64::from(*g) / by) as f32);
        Ok(Fastfood {
            shape,
            signs: Tensor::from_vec(signs, [length])?,
            order: Tensor::from_i64(order, [length])?,
            normals: Tensor::from_vec(normals, [length])?,
        })
    }

    /// P(z).
    fn project(&self, z: &Tensor) -> engraft_tensor::Result<Tensor> {
        let length = self.signs.len();
        let padded = match length - z.len() {
            0 => z.clone(),
            missing => cat(&[z, &Tensor::zeros([missing])], 0)?,
        };
        let mixed = padded.mul(&self.signs)?.hadamard()?.gather(&self.order)?;
        let mixed = mixed.mul(&self.normals)?.hadamard()?;
        mixed.rows_between(0, self.shape[0] * self.shape[1])?.reshape(self.shape)
    }
}

/// λ·P(z).
struct Projected {
    z: Param,
    lambda: Param,
    projection: Arc<Fastfood>,
}

impl Projected {
    fn change(&self) -> Result<Tensor> {
        let projection = self.projection.clone();
        let made = checkpoint(&[&self.z.get()], move |v| projection.project(&v[0]))?;
        Ok(made.mul(&self.lambda.get())?)
    }
}

impl WeightPatch for Projected {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.change()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        Ok(base.forward(x)?.plus(&x.matmul_t(&self.change()?)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{check_gradients, close, sample};

    #[test]
    fn the_projection_keeps_lengths_on_average_and_its_gradient_is_the_adjoint() {
        let z = sample(&[40], 1);
        let squares = |t: &Tensor| -> f32 { t.to_vec().unwrap().iter().map(|v| v * v).sum() };
        let ratios = (0..200).map(|seed| {
            let p = Fastfood::new(seed, "a", [10, 9]).unwrap();
            squares(&p.project(&z).unwrap()) / squares(&z)
        });
        let mean = ratios.sum::<f32>() / 200.0;
        assert!((mean - 1.0).abs() < 0.1, "{mean}");
        let p = Fastfood::new(3, "a", [5, 6]).unwrap();
        check_gradients(&[sample(&[32], 2)], |v| p.project(&v[0])).unwrap();
    }

    #[test]
    fn one_vector_moves_all_targets() {
        let a = attached(&[chosen("said", json!({ "dimension": 20 }))], &[]);
        assert_eq!(a.adapter.trained_count(), 20 + 4);
        let x = sample(&[5, 6], 3);
        for path in ["layers.0.attn.q", "layers.1.attn.v"] {
            close(&both_ways(&a, path, &x).0, &x.matmul_t(&frozen(path)).unwrap(), 1e-6);
        }
        stir(&a, 0.5);
        let changes = ["layers.0.attn.q", "layers.1.attn.q"].map(|path| {
            let (fast, defined) = both_ways(&a, path, &x);
            close(&fast, &defined, 1e-5);
            merged(&a, path).sub(&frozen(path)).unwrap().to_vec().unwrap()
        });
        assert_ne!(changes[0], changes[1], "each target has a projection of its own");
        let p = Fastfood::new(0, "layers.0.attn.q", [6, 6]).unwrap();
        let expected =
            p.project(&value_of(&a, Z)).unwrap().mul(&value_of(&a, "layers.0.attn.q.said_lambda")).unwrap();
        close(&merged(&a, "layers.0.attn.q"), &frozen("layers.0.attn.q").add(&expected).unwrap(), 1e-5);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("said", json!({ "dimension": 20, "projection_seed": 3 }))], &["head"]);
        let written = config(&[chosen("said", json!({ "dimension": 20 }))], &[]);
        assert!(from_file(&with(written, json!({ "dimension": 0 }))).is_err());
        let (sites, info) = toy();
        assert!(crate::attach(&[chosen("said", json!({ "dimension": 33 }))], &[], &sites, &info, 0).is_err());
    }
}
