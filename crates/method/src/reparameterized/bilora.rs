//! BiLoRA: the directions of an update and their sizes learned on different rows, so that neither fits the other's noise.
//!
//! W′ = W + α/r·B·(e ⊙ A); A and B normal with deviation 0.02, e zero, so W′ = W. Odd steps move A and B on the rows that
//! are not held out, with γ times the mean over all A and B of ‖AAᵀ − I‖ and ‖BᵀB − I‖ in the loss; even steps move e on
//! the rows that are held out. Each takes its own gradient at the other's present value (first order).
//!
//! Qiang et al. 2024, arXiv:2403.13037, with real pseudo-singular values.
//!
//! A [rank, in], B [out, rank], e `[rank]` while in training; at the end e becomes part of A, and what is saved is a LoRA.

use engraft_nn::{Adapter, Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Gradients, Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::bilevel::{keep_level, turn};
use crate::shared::fields::{alpha, dropout, float, rank};
use crate::shared::low_rank::{
    Pair, RANK_MAX, added, changed, ending, linear, named, off_identity, plain_lora, rows_times,
};
use crate::shared::sizes;
use crate::{Described, Entry, Info, Loaded, Method, Part, Step, peft};

struct BiLoRa {
    rank: usize,
    alpha: f64,
    dropout: f32,
    held_out: f64,
    rate: f64,
    orthogonality: f64,
}

const SIZES: &str = "sizes";
const END: &str = ".lora_sizes";

static INFO: Info = Info {
    name: "bilora",
    title: "BiLoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2403.13037",
    summary: "W′ = W + (α/r)·B·(e ⊙ A): A and B learned on some rows, e on the others",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_BILORA",
    fields: &[
        rank("8"),
        alpha("16"),
        dropout("0"),
        float("held_out", (0.001, 0.999), "0.3", "Share of the training rows that sizes are learned on."),
        float("size_rate", (0.0, 1e6), "1", "Factor on the learning rate of the sizes."),
        float(
            "orth_reg_weight",
            (0.0, 1e6),
            "0.1",
            "Weight of the penalty on A and B that are not orthogonal.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>, [rank, alpha, dropout]: [&'static str; 3]) -> BiLoRa {
    let method = BiLoRa {
        rank: r.count(rank, 8, RANK_MAX),
        alpha: r.float(alpha, 16.0),
        dropout: r.dropout(dropout),
        held_out: r.float("held_out", 0.3),
        rate: r.float("size_rate", 1.0),
        orthogonality: r.float("orth_reg_weight", 0.1),
    };
    if !(method.held_out > 0.0 && method.held_out < 1.0) {
        r.problem(format!("`held_out`: expected a number between 0 and 1, found {}", method.held_out));
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
    Box::new(BiLoRa { rank: 3, alpha: 6.0, dropout: 0.0, held_out: 0.3, rate: 1.0, orthogonality: 0.1 })
}

impl Method for BiLoRa {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let ((out, inn), path, noise) = (linear(site, INFO.title)?, &site.path, Init::Normal(0.02));
            let pair = Pair {
                a: b.param(&format!("{path}.lora_A.weight"), &[self.rank, inn], noise.clone())?,
                b: b.param(&format!("{path}.lora_B.weight"), &[out, self.rank], noise)?,
            };
            let sizes = b.param_in_group(&format!("{path}{END}"), &[self.rank], Init::Zeros, SIZES)?;
            let scale = (self.alpha / self.rank as f64) as f32;
            b.patch(
                site.id,
                Patch::Weight(Box::new(Measured { pair, sizes, scale, dropout: self.dropout })),
            )?;
        }
        Ok(())
    }

    fn learning_rate_factor(&self, group: &str) -> f32 {
        if group == SIZES { self.rate as f32 } else { 1.0 }
    }

    fn held_out(&self) -> f64 {
        self.held_out
    }

    fn part(&self, step: Step) -> Part {
        turn(step.number)
    }

    fn penalty(&self, adapter: &Adapter, step: Step) -> Result<Option<Tensor>> {
        if self.orthogonality == 0.0 || self.part(step) == Part::Upper {
            return Ok(None);
        }
        let (mut sum, mut count) = (Tensor::scalar(0.0), 0);
        for (stem, _) in ending(adapter, END)? {
            let a = named(adapter, &format!("{stem}.lora_A.weight"))?;
            let b = named(adapter, &format!("{stem}.lora_B.weight"))?;
            count += 2;
            for gram in [a.get().matmul_t(&a.get())?, b.get().t_matmul(&b.get())?] {
                sum = sum.add(&off_identity(&gram)?)?;
            }
        }
        Ok(Some(sum.scale((self.orthogonality / f64::from(count.max(1))) as f32)?))
    }

    fn after_backward(&self, adapter: &Adapter, gradients: &mut Gradients, step: Step) -> Result<()> {
        keep_level(adapter, gradients, END, self.part(step));
        Ok(())
    }

    /// Sizes become part of A.
    fn finish(&self, adapter: &Adapter) -> Result<()> {
        for (stem, sizes) in ending(adapter, END)? {
            let a = named(adapter, &format!("{stem}.lora_A.weight"))?;
            a.set(rows_times(&a.value(), &sizes.value())?)?;
            sizes.replace(Tensor::zeros([0]));
        }
        Ok(())
    }

    fn file_type(&self, adapter: &Adapter) -> &'static str {
        if finished(adapter) { "LORA" } else { INFO.peft_type }
    }

    fn keeps(&self, adapter: &Adapter, name: &str) -> bool {
        !(name.ends_with(END) && finished(adapter))
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        if finished(model.adapter) {
            return plain_lora(self.rank, self.alpha, self.dropout, &[]);
        }
        let own = json!({
            "held_out": number(self.held_out), "lora_alpha": number(self.alpha), "lora_dropout": as_written(self.dropout),
            "orth_reg_weight": number(self.orthogonality), "r": self.rank, "size_rate": number(self.rate),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// Whether sizes have become part of A.
fn finished(adapter: &Adapter) -> bool {
    ending(adapter, END).is_ok_and(|all| all.iter().all(|(_, sizes)| sizes.value().is_empty()))
}

struct Measured {
    pair: Pair,
    sizes: Param,
    scale: f32,
    dropout: f32,
}

impl Measured {
    fn a(&self) -> Result<Tensor> {
        let sizes = self.sizes.get();
        if sizes.is_empty() { Ok(self.pair.a.get()) } else { rows_times(&self.pair.a.get(), &sizes) }
    }
}

impl WeightPatch for Measured {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        changed(base, &self.a()?, &self.pair.b.get(), self.scale)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        added(base.forward(x)?, &dropped, &self.a()?, &self.pair.b.get(), self.scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn sizes_become_part_of_a_lora() {
        let (sites, info) = toy();
        let methods = [chosen("bilora", json!({ "rank": 3, "alpha": 6 }))];
        let (a, path) = (attached(&methods, &[]), "layers.0.attn.q");
        // r(m + n + 1).
        assert_eq!(a.adapter.trained_count(), 2 * 3 * (6 + 6 + 1 + 4 + 6 + 1));
        let x = sample(&[5, 6], 3);
        close(&both_ways(&a, path, &x).0, &x.matmul_t(&frozen(path)).unwrap(), 1e-6);
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, path, &x);
        close(&fast, &defined, 1e-5);
        methods[0].0.finish(&a.adapter).unwrap();
        close(&both_ways(&a, path, &x).0, &fast, 1e-6);
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(config["peft_type"], "LORA");
        let loaded = crate::load_adapter(&config, tensors, &sites, &info).unwrap();
        let loaded = crate::Attached {
            adapter: loaded.adapter,
            dead_targets: vec![],
            dead_modules: vec![],
            without_targets: vec![],
        };
        close(&both_ways(&loaded, path, &x).0, &fast, 1e-6);
    }

    #[test]
    fn held_out_rows_leave_directions_untouched() {
        let methods = [chosen("bilora", json!({ "rank": 2 }))];
        let (a, method) = (attached(&methods, &["head"]), &methods[0].0);
        for (number, upper) in [(1, false), (2, true)] {
            let step = Step { number, total: 10, seed: 0 };
            let mut gradients = Gradients::default();
            a.adapter.trainable().for_each(|p| gradients.set(&p.param, p.param.value()));
            method.after_backward(&a.adapter, &mut gradients, step).unwrap();
            for p in a.adapter.trainable() {
                assert_eq!(gradients.get(&p.param).is_some(), p.name.ends_with(END) == upper, "{}", p.name);
            }
            assert_eq!(method.penalty(&a.adapter, step).unwrap().is_some(), !upper);
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("bilora", json!({ "held_out": 0.4 }))], &["head"]);
        let good = config(&[chosen("bilora", json!({}))], &[]);
        for bad in [json!({ "held_out": 1 }), json!({ "r": 0 }), json!({ "size_rate": "fast" })] {
            let key = bad.as_object().unwrap().keys().next().unwrap().clone();
            let Err(error) = from_file(&with(good.clone(), bad)) else { panic!("{key} passed") };
            assert!(error.to_string().contains(&key), "{error}");
        }
    }
}
