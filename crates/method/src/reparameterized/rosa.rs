//! RoSA: a low-rank product and a sparse change side by side.
//!
//! W′ = W + (α/r)·B·A + S; A starts as Kaiming-uniform noise, B and the k = ⌊density·|W|⌋ values of S as zeros. S lies where
//! the squares of the gradient of W′, summed over some batches, are largest in each matrix. In the first `warmup` steps the
//! product is trained alone, and the micro-batches of the last of them choose the places; then both are trained, the product
//! from where it is. Without a warm-up the first `batches` micro-batches choose at the start. All is one run with one
//! learning-rate schedule.
//!
//! Nikdan et al. 2024, arXiv:2401.04679, algorithm 1; the warm-up as in section 5 and the authors' code (schedule `wl64`, one
//! gradient).
//!
//! A [rank, in], B [out, rank], `sparse_values` `[k]`, `sparse_indices` `I64` `[k]` of each target.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use engraft_nn::{Adapter, Base, Builder, Error, Init, Mode, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, number};
use crate::shared::fields::{float, int};
use crate::shared::scores::{Best, Data, Score, choose};
use crate::shared::sizes;
use crate::shared::sparse::{Budget, Delta, Mask, expect_whole_gradient, shape};
use crate::{Ahead, Calibration, Described, Entry, Forget, Info, Method, Step, peft};

const RANK_MAX: usize = 1024;
const BATCHES_MAX: usize = 1 << 20;

struct Rosa {
    rank: usize,
    alpha: f64,
    density: f64,
    batches: usize,
    /// Steps of the product alone.
    warmup: u64,
    squares: Squares,
}

/// Sums of squared gradients by the path of the matrix, while the last step of the warm-up goes on.
type Squares = Arc<Mutex<HashMap<String, Tensor>>>;

fn held(squares: &Squares) -> MutexGuard<'_, HashMap<String, Tensor>> {
    squares.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
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
        int("rank", (1, RANK_MAX as i64), Some("16"), "Inner size r of the product."),
        float("alpha", (0.0, 1e9), "16", "The product is scaled by alpha/rank."),
        float("density", (0.0, 1.0), "0.006", "Share of each matrix that S has values for."),
        int(
            "batches",
            (1, BATCHES_MAX as i64),
            Some("1"),
            "Micro-batches whose squared gradients choose the places, where there is no warm-up.",
        ),
        int(
            "warmup",
            (0, 1 << 40),
            Some("64"),
            "First steps, in which the product is trained alone; the last of them chooses the places. The paper: 64.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| {
        peft::own_settings(&INFO, settings, |r| Rosa { warmup: r.at_least("warmup", 0, 0), ..Rosa::read(r) })
    },
    from_file: |config| peft::own_file(&INFO, config, Rosa::read),
    example: || {
        let squares = Squares::default();
        Box::new(Rosa { rank: 2, alpha: 3.0, density: 0.05, batches: 1, warmup: 0, squares })
    },
};

impl Rosa {
    fn read(r: &mut Reader<'_>) -> Self {
        Rosa {
            rank: r.count("rank", 16, RANK_MAX),
            alpha: r.float("alpha", 16.0),
            density: r.share("density", 0.006),
            batches: r.count("batches", 1, BATCHES_MAX),
            // What goes on from a file has its places.
            warmup: 0,
            squares: Squares::default(),
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

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
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
        if self.warmup == 0 {
            return self.mask().attach(b);
        }
        let mask = self.mask();
        for group in mask.groups(&b.targets())? {
            let (values, places) = mask.tensors(b, &group)?;
            for (site, first) in group.sites {
                expect_whole_gradient(site)?;
                let delta = Delta::new(values.clone(), places.clone(), shape(site)?, first);
                let sparse = Sparse { delta, warmup: self.warmup, squares: self.squares.clone() };
                b.patch(site.id, Patch::Weight(Box::new(sparse)))?;
            }
        }
        Ok(())
    }

    fn suits(&self, run: &Ahead) -> Result<()> {
        if self.warmup > 0 && run.steps <= self.warmup {
            let message = format!(
                "`warmup`: {} steps, after which the sparse part begins, and the run has {}; choose fewer, or 0",
                self.warmup, run.steps
            );
            return Err(Error::Mismatch(vec![message]));
        }
        Ok(())
    }

    fn after_step(&self, adapter: &Adapter, _moments: &mut dyn Forget, step: Step) -> Result<()> {
        if step.number == self.warmup { self.settle(adapter) } else { Ok(()) }
    }

    fn rests(&self) -> bool {
        self.warmup > 0
    }

    fn prepare(&self, adapter: &Arc<Adapter>, base: &dyn Calibration) -> Result<()> {
        if self.warmup > 0 {
            return Ok(());
        }
        choose(&self.mask(), adapter, base, Score::Squares, Data::Batches(self.batches as u64))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "rank": self.rank, "alpha": number(self.alpha), "density": self.density, "batches": self.batches });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Rosa {
    /// Gives every S the places where the squares are largest.
    fn settle(&self, adapter: &Adapter) -> Result<()> {
        let squares = std::mem::take(&mut *held(&self.squares));
        for p in adapter.params() {
            let Some(path) = p.name.strip_suffix(".sparse_indices") else { continue };
            let Some((_, sum)) = squares.iter().find(|(of, _)| path.ends_with(of.as_str())) else { continue };
            let count = p.param.value().len();
            let mut best = Best::new(count);
            best.offer(path, 0, &sum.to_vec()?)?;
            let places = best.places().into_iter().map(|place| place as i64).collect();
            p.param.set(Tensor::from_i64(places, [count])?)?;
        }
        Ok(())
    }
}

/// S, which rests in the warm-up and looks on in its last step.
struct Sparse {
    delta: Delta,
    warmup: u64,
    squares: Squares,
}

impl WeightPatch for Sparse {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        self.delta.weight(base)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        match cx.mode() {
            Mode::Train { step, .. } if step < self.warmup => base.forward(x),
            Mode::Train { step, .. } if step == self.warmup => {
                let (to, path, x) = (self.squares.clone(), site.path.clone(), x.clone());
                let y = base.forward(&x)?;
                let x = x.detach().reshape([x.rows(), x.width()])?;
                Ok(y.observe(move |dy| {
                    let g = dy.reshape([dy.rows(), dy.width()])?.t_matmul(&x)?.unary(Unary::Square)?;
                    let mut sums = held(&to);
                    let sum = match sums.remove(&path) {
                        Some(sum) => sum.plus(&g)?,
                        None => g,
                    };
                    sums.insert(path.clone(), sum);
                    Ok(())
                }))
            }
            _ => self.delta.forward(x, base, site, cx),
        }
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

    struct Nothing;

    impl Forget for Nothing {
        fn forget(&mut self, _: &Param) {}
    }

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
        let method = chosen("rosa", json!({ "rank": 1, "density": 0.2, "batches": 2, "warmup": 0 })).0;
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
    fn the_last_step_of_the_warm_up_chooses() {
        let path = "layers.0.attn.v";
        let method = chosen("rosa", json!({ "rank": 1, "density": 0.2, "warmup": 2 })).0;
        let (base, adapter) = prepared(method.as_ref(), &[path]);
        let places = || param(&adapter, &format!("{path}.sparse_indices")).value().to_i64().unwrap();
        let spread = places();
        let site = base.sites().get(base.targets()[0]);
        let engraft_nn::Value::Weight(weight) = &site.value else { panic!() };
        let x = sample(&[5, 6], 3);
        let run = |number: u64| {
            let cx = Pass::new(engraft_nn::Layout::counted(&[5]).unwrap(), None);
            let cx = cx.training(Mode::Train { seed: 1, step: number, micro: 0 });
            let patched = engraft_nn::Patched::new(weight.as_ref(), adapter.at(site.id), site, &cx);
            let dy = sample(&[5, 4], 10 + number);
            let gradients = patched.forward(&x).unwrap().mul(&dy).unwrap().sum().unwrap().backward().unwrap();
            let values = gradients.get(&param(&adapter, &format!("{path}.sparse_values"))).cloned();
            method.after_step(&adapter, &mut Nothing, Step { number, total: 4, seed: 1 }).unwrap();
            (values, dy)
        };
        assert!(run(1).0.is_none() && places() == spread, "S rests");
        let (values, dy) = run(2);
        assert!(values.is_none());
        let g = dy.t_matmul(&x).unwrap().to_vec().unwrap();
        let mut order: Vec<i64> = (0..24).collect();
        order.sort_by(|&a, &b| g[b as usize].abs().total_cmp(&g[a as usize].abs()));
        order.truncate(4);
        order.sort_unstable();
        assert_eq!(places(), order);
        // From then on S has the gradient of its places.
        let (values, dy) = run(3);
        let g = dy.t_matmul(&x).unwrap().to_vec().unwrap();
        let expected = order.iter().map(|&p| g[p as usize]).collect();
        close(&values.unwrap(), &Tensor::from_vec(expected, [4]).unwrap(), 1e-5);
        let run = |steps| method.suits(&Ahead { steps, task: toy().1.task, tasks: None });
        assert!(run(3).is_ok() && run(2).unwrap_err().to_string().contains("`warmup`"));
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("rosa", json!({ "rank": 2, "density": 0.1 }))], &["head"]);
        let written = config(&[chosen("rosa", json!({}))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "density": 2.0 }))).is_err());
    }
}
