//! VeLoRA: backward sees of each input of A one number a piece of it.
//!
//! The forward is LoRA's. For the gradient of A, each row x is cut into `num_groups` pieces (the last filled up with zeros) and
//! only their lengths along one direction e are kept, c = ⟨piece, e⟩; the gradient is that of x̂ = scale·(c₁·e, c₂·e, …) in the
//! place of x. What goes on to the layer below is exact. e is the mean of all pieces of the batch's rows, of length one: of every
//! micro-batch (`batch_average`) or of the first of a run (`batch_average_once`); or it is drawn (`random`).
//!
//! Miles et al. 2024, arXiv:2405.17991, as `peft` has it. Saved beside A and B: e, `lora_velora_embed` `[⌈in/num_groups⌉]`, zero
//! until a first step. `peft` takes the mean over padding too, where there is any; here there is none.

use engraft_nn::{Builder, Init, Mode, Pass, Result};
use engraft_tensor::ops::{Unary, cat};
use engraft_tensor::{Param, Tensor, no_grad};
use serde_json::{Value, json};

use super::form::table;
use crate::Field;
use crate::read::Reader;
use crate::shared::fields::{choice, flag, float, int};

const GROUPS_MAX: usize = 1 << 20;

/// Where e comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    EveryBatch,
    FirstBatch,
    Random,
}

const SOURCES: &[(&str, Source)] = &[
    ("batch_average", Source::EveryBatch),
    ("batch_average_once", Source::FirstBatch),
    ("random", Source::Random),
];

pub(super) const FIELDS: [Field; 4] = [
    flag("velora", "false", "VeLoRA: keep of each input of A one number a piece of it for backward."),
    int(
        "velora_num_groups",
        (1, GROUPS_MAX as i64),
        Some("64"),
        "VeLoRA: pieces of an input; more of them cost more memory and make a better gradient.",
    ),
    float("velora_scale", (1e-9, 1e9), "1", "VeLoRA: factor on the gradient of A."),
    choice(
        "velora_init_type",
        &["batch_average", "batch_average_once", "random"],
        "\"batch_average\"",
        "VeLoRA: the direction that pieces are measured along: their mean in every batch, in the first, or drawn.",
    ),
];

#[derive(Clone, Debug)]
pub(super) struct Velora {
    groups: usize,
    scale: f64,
    source: Source,
    /// As in the file that it was read from.
    found: Option<Value>,
}

impl Velora {
    /// `velora_config` of a file, or the settings of a recipe.
    pub fn read(r: &mut Reader<'_>) -> Option<Velora> {
        let of = |r: &mut Reader<'_>, [groups, scale, source]: [&'static str; 3]| {
            let read = Velora {
                groups: r.count(groups, 64, GROUPS_MAX),
                scale: r.float(scale, 1.0),
                source: r.one_of(source, SOURCES),
                found: None,
            };
            if read.scale <= 0.0 {
                r.problem(format!("`{scale}`: expected a number above 0, found {}", read.scale));
            }
            read
        };
        if r.is_file() {
            let found = table(r, "velora_config", |r| of(r, ["num_groups", "scale", "init_type"]));
            return found.map(|(read, found)| Velora { found: Some(found), ..read });
        }
        let read = of(r, ["velora_num_groups", "velora_scale", "velora_init_type"]);
        r.flag("velora", false).then_some(read)
    }

    pub fn written(&self) -> Value {
        let source = SOURCES.iter().find(|(_, source)| *source == self.source).map_or("", |(name, _)| name);
        let own = || json!({ "init_type": source, "num_groups": self.groups, "scale": self.scale });
        self.found.clone().unwrap_or_else(own)
    }

    pub fn attach(&self, b: &mut Builder<'_>, path: &str, inn: usize) -> Result<Direction> {
        let name = format!("{path}.lora_velora_embed");
        let length = inn.div_ceil(self.groups);
        let start = match self.source {
            Source::Random => Init::Values(unit(&Init::Normal(1.0).tensor(&[length], b.seed(), &name)?)?),
            _ => Init::Zeros,
        };
        Ok(Direction { e: b.fixed(&name, &[length], start)?, form: self.clone() })
    }
}

/// e of one matrix.
#[derive(Clone)]
pub(super) struct Direction {
    e: Param,
    form: Velora,
}

impl Direction {
    /// y + s·(x·Aᵀ)·Bᵀ in training.
    pub fn added_to(&self, y: Tensor, x: &Tensor, [a, b]: [&Tensor; 2], s: f32, cx: &Pass) -> Result<Tensor> {
        let first = matches!(cx.mode(), Mode::Train { step: 1, micro: 0, .. });
        let anew = self.form.source == Source::EveryBatch || self.form.source == Source::FirstBatch && first;
        if anew && !x.is_empty() {
            no_grad(|| Ok::<_, engraft_nn::Error>(self.e.set(self.mean(&x.detach())?)?))?;
        }
        let inner = x.matmul_t_compressed(a, &self.e.value(), self.form.groups, self.form.scale as f32)?;
        Ok(y.plus(&inner.scale(s)?.matmul_t(b)?)?)
    }

    /// The mean of all pieces of x, of length one.
    fn mean(&self, x: &Tensor) -> Result<Tensor> {
        let (groups, length) = (self.form.groups, self.e.value().len());
        let sums = x.sum_to(&[x.width()])?;
        let filled = cat(&[&sums, &Tensor::zeros([groups * length - sums.len()])], 0)?;
        let mean = filled.reshape([groups, length])?.sum_to(&[length])?;
        unit(&mean.scale(1.0 / (x.rows() * groups) as f32)?)
    }
}

/// v/‖v‖; all equal where v is zero.
fn unit(v: &Tensor) -> Result<Tensor> {
    let squares = |v: &Tensor| v.unary(Unary::Square)?.sum();
    // One where the squares are zero, else nothing: no number of a tensor is looked at within a step.
    let zero = squares(v)?.scale(-f32::MAX)?.unary(Unary::Shift(1.0))?.unary(Unary::Relu)?;
    let v = v.add(&zero)?;
    Ok(v.div(&squares(&v)?.unary(Unary::Sqrt)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Base, Layout, Patched};
    use engraft_tensor::testing::{close, sample};
    use serde_json::json;

    const Q: &str = "layers.0.attn.q";

    fn settings(source: &str) -> Value {
        json!({ "rank": 2, "alpha": 4, "velora": true, "velora_num_groups": 4, "velora_scale": 0.5, "velora_init_type": source })
    }

    /// y of a training step at Q, and the gradients of A and B for Σ y·g.
    fn step(a: &crate::Attached, x: &Tensor, number: u64) -> (Tensor, Tensor, Tensor) {
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, Q));
        let engraft_nn::Value::Weight(weight) = &site.value else { panic!("no weight") };
        let mode = Mode::Train { seed: 1, step: number, micro: 0 };
        let cx = Pass::new(Layout::counted(&[x.dim(0)]).unwrap(), None).training(mode);
        let y = Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx).forward(x).unwrap();
        let all = y.mul(&sample(y.shape(), 9)).unwrap().sum().unwrap().backward().unwrap();
        let of = |end: &str| {
            let name = format!("{Q}.{end}");
            all.get(&a.adapter.params().iter().find(|p| p.name == name).unwrap().param).unwrap().clone()
        };
        (y.detach(), of("lora_A.weight"), of("lora_B.weight"))
    }

    #[test]
    fn the_gradient_of_a_sees_pieces_on_the_mean_and_all_else_is_lora_s() {
        let (x, plain) =
            (sample(&[5, 6], 3), attached(&[chosen("lora", json!({ "rank": 2, "alpha": 4 }))], &[]));
        let a = attached(&[chosen("lora", settings("batch_average"))], &[]);
        assert_eq!(a.adapter.trained_count(), plain.adapter.trained_count());
        stir(&plain, 0.5);
        stir(&a, 0.5);
        let ((y, _, db), (y0, _, db0)) = (step(&a, &x, 1), step(&plain, &x, 1));
        close(&y, &y0, 1e-6);
        close(&db, &db0, 1e-5);
        // Four pieces of two of six numbers: the last one is all filled up.
        let e = value_of(&a, &format!("{Q}.lora_velora_embed"));
        let rows = x.to_vec().unwrap();
        let mut mean = [0.0f32; 2];
        rows.iter().enumerate().for_each(|(i, v)| mean[i % 2] += v);
        let norm = mean.iter().map(|v| v * v).sum::<f32>().sqrt();
        close(&e, &Tensor::from_vec(mean.map(|v| v / norm).to_vec(), [2]).unwrap(), 1e-5);
        let e = e.to_vec().unwrap();
        let seen = (0..rows.len()).map(|i| {
            let first = i / 2 * 2;
            0.5 * (rows[first] * e[0] + rows[first + 1] * e[1]) * e[i % 2]
        });
        let seen = Tensor::from_vec(seen.collect(), [5, 6]).unwrap();
        let dh = sample(&[5, 6], 9)
            .matmul(&value_of(&a, &format!("{Q}.lora_B.weight")))
            .unwrap()
            .scale(2.0)
            .unwrap();
        close(&step(&a, &x, 1).1, &dh.t_matmul(&seen).unwrap(), 1e-5);
    }

    #[test]
    fn the_direction_follows_every_batch_or_the_first_or_none() {
        let (one, two) = (sample(&[5, 6], 3), sample(&[4, 6], 4));
        for (source, follows) in [
            ("batch_average", [true, true]),
            ("batch_average_once", [true, false]),
            ("random", [false, false]),
        ] {
            let a = attached(&[chosen("lora", settings(source))], &[]);
            let e = || value_of(&a, &format!("{Q}.lora_velora_embed")).to_vec().unwrap();
            let before = e();
            step(&a, &one, 1);
            let first = e();
            step(&a, &two, 2);
            assert_eq!([before != first, first != e()], follows, "{source}");
            assert!((first.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5);
        }
        let a = attached(&[chosen("lora", settings("batch_average"))], &[]);
        step(&a, &Tensor::zeros([3, 6]), 1);
        let e = value_of(&a, &format!("{Q}.lora_velora_embed"));
        close(&e, &Tensor::full(0.5f32.sqrt(), [2]), 1e-6);
    }

    #[test]
    fn it_is_saved_with_its_direction() {
        let methods = [chosen("lora", settings("random"))];
        survives_saving(&methods, &[]);
        let a = attached(&methods, &[]);
        assert!(names(&a).contains(&"layers.0.attn.q.lora_velora_embed"));
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, Q, &sample(&[5, 6], 3));
        close(&fast, &defined, 1e-5);
        let good = config(&methods, &[]);
        assert_eq!(good["velora_config"], json!({ "init_type": "random", "num_groups": 4, "scale": 0.5 }));
        for bad in [
            json!({ "num_groups": 0 }),
            json!({ "scale": 0.0 }),
            json!({ "init_type": "first" }),
            json!({ "depth": 2 }),
        ] {
            let bad = with(good.clone(), json!({ "velora_config": bad }));
            let Err(error) = crate::from_file(&bad) else { panic!("{} passed", bad["velora_config"]) };
            assert!(error.to_string().contains("velora_config"), "{error}");
        }
        let conv = [(chosen("lora", settings("random")).0, Some(engraft_nn::Targets::names(["tok"])))];
        let (sites, info) = toy();
        assert!(crate::attach(&conv, &[], &sites, &info, 0).is_err(), "a table has no VeLoRA");
    }
}
