//! RoSA: a low-rank product and a sparse change side by side.
//!
//! W′ = W + (α/r)·B·A + S; A starts as Kaiming-uniform noise, B and the k = ⌊density·|W|⌋ values of S as zeros. S lies where
//! the squares of the gradient, summed over some batches, are largest in each matrix. The gradients are taken at the start of
//! the run; the 64 steps with the product alone that the authors make before are not made.
//!
//! Nikdan et al. 2024, arXiv:2401.04679, algorithm 1.
//!
//! A [rank, in], B [out, rank], `sparse_values` `[k]`, `sparse_indices` `I64` `[k]` of each target.

use std::sync::Arc;

use engraft_nn::{Adapter, Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, number};
use crate::shared::scores::{Data, Score, choose};
use crate::shared::sparse::{Budget, Mask, shape};
use crate::{Calibration, Described, Entry, Field, FieldKind, Info, Method, peft};

const RANK_MAX: usize = 1024;
const BATCHES_MAX: usize = 1 << 20;

struct Rosa {
    rank: usize,
    alpha: f64,
    density: f64,
    batches: usize,
}

static INFO: Info = Info {
    name: "rosa",
    title: "RoSA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2401.04679",
    summary: "W′ = W + (α/r)·B·A + S with a sparse S where gradients are largest",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_ROSA",
    fields: &[
        Field {
            name: "rank",
            kind: FieldKind::Int { min: 1, max: RANK_MAX as i64 },
            default: Some("16"),
            doc: "Inner size r of the product.",
        },
        Field {
            name: "alpha",
            kind: FieldKind::Float { min: 0.0, max: 1e9 },
            default: Some("16"),
            doc: "The product is scaled by alpha/rank.",
        },
        Field {
            name: "density",
            kind: FieldKind::Float { min: 0.0, max: 1.0 },
            default: Some("0.006"),
            doc: "Share of each matrix that S has values for.",
        },
        Field {
            name: "batches",
            kind: FieldKind::Int { min: 1, max: BATCHES_MAX as i64 },
            default: Some("1"),
            doc: "Micro-batches whose squared gradients choose the places.",
        },
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| peft::own_settings(&INFO, settings, Rosa::read),
    from_file: |config| peft::own_file(&INFO, config, Rosa::read),
    example: || Box::new(Rosa { rank: 2, alpha: 3.0, density: 0.05, batches: 1 }),
};

impl Rosa {
    fn read(r: &mut Reader<'_>) -> Self {
        Rosa {
            rank: r.count("rank", 16, RANK_MAX),
            alpha: r.float("alpha", 16.0),
            density: r.share("density", 0.006),
            batches: r.count("batches", 1, BATCHES_MAX),
        }
    }

    fn mask(&self) -> Mask {
        Mask::own(Budget::Each(self.density))
    }
}

impl Method for Rosa {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let (out, inn) = shape(site)?;
            let name = |part: &str| format!("{}.{part}.weight", site.path);
            let product = Product {
                a: b.param(&name("lora_A"), &[self.rank, inn], Init::kaiming(inn))?,
                b: b.param(&name("lora_B"), &[out, self.rank], Init::Zeros)?,
                scale: (self.alpha / self.rank as f64) as f32,
            };
            b.patch(site.id, Patch::Weight(Box::new(product)))?;
        }
        self.mask().attach(b)
    }

    fn prepare(&self, adapter: &Arc<Adapter>, base: &dyn Calibration) -> Result<()> {
        choose(&self.mask(), adapter, base, Score::Squares, Data::Batches(self.batches as u64))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "rank": self.rank, "alpha": number(self.alpha), "density": self.density, "batches": self.batches });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// The product; S is a patch of its own above it.
struct Product {
    a: Param,
    b: Param,
    scale: f32,
}

impl WeightPatch for Product {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.b.get().matmul(&self.a.get())?.scale(self.scale)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        Ok(base.forward(x)?.add_low_rank(x, &self.a.get(), &self.b.get(), self.scale)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn is_the_sum_of_both_changes() {
        let settings = json!({ "rank": 2, "alpha": 3, "density": 0.2 });
        let a = attached(&[chosen("rosa", settings)], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * (2 * (6 + 6) + 7 + 2 * (6 + 4) + 4));
        let path = "layers.0.attn.q";
        let x = sample(&[5, 6], 3);
        close(&both_ways(&a, path, &x).0, &x.matmul_t(&frozen(path)).unwrap(), 1e-6);
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, path, &x);
        close(&fast, &defined, 1e-5);
        // Without S it is LoRA.
        let values = param(&a.adapter, &format!("{path}.sparse_values"));
        values.set(Tensor::zeros([7])).unwrap();
        let factor = |name: &str| param(&a.adapter, &format!("{path}.{name}.weight")).value();
        let product = factor("lora_B").matmul(&factor("lora_A")).unwrap().scale(1.5).unwrap();
        let lora = frozen(path).add(&product).unwrap();
        close(&both_ways(&a, path, &x).1, &x.matmul_t(&lora).unwrap(), 1e-5);
    }

    #[test]
    fn the_mask_lies_where_squared_gradients_are_largest() {
        let path = "layers.0.attn.v";
        let method = chosen("rosa", json!({ "rank": 1, "density": 0.2, "batches": 2 })).0;
        let (base, adapter) = prepared(method.as_ref(), &[path]);
        let mut squares = [0.0f32; 24];
        for number in 0..2 {
            let (x, dy) = base.seen(base.sites().get(base.targets()[0]), number);
            let g = dy.t_matmul(&x).unwrap().to_vec().unwrap();
            squares.iter_mut().zip(g).for_each(|(s, g)| *s += g * g);
        }
        let mut order: Vec<usize> = (0..24).collect();
        order.sort_by(|&a, &b| squares[b].total_cmp(&squares[a]));
        let mut expected: Vec<i64> = order[..4].iter().map(|&i| i as i64).collect();
        expected.sort_unstable();
        assert_eq!(param(&adapter, &format!("{path}.sparse_indices")).value().to_i64().unwrap(), expected);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("rosa", json!({ "rank": 2, "density": 0.1 }))], &["head"]);
        let written = config(&[chosen("rosa", json!({}))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "density": 2.0 }))).is_err());
    }
}
