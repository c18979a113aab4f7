//! Poly (Polytropon): an inventory of LoRAs, the skills, of which each task has its own mixture at each matrix; with
//! several splits (MHR) each part of the input and output is mixed by itself.
//!
//! y = x·Wᵀ + x·A·B/r, A = Σ_s w_s·A_s, B = Σ_s w_s·B_s, w = z/Σz over the skills. Outside training z = σ(Z[task]); in
//! training each sequence draws z = σ(Z[task] + ln u − ln(1 − u)), a relaxed Bernoulli of temperature 1. A_s
//! Kaiming-uniform, B_s zero, Z uniform in ±10⁻³, so the base is unchanged at the start.
//!
//! Ponti et al. 2023, arXiv:2202.13914; splits: Caccia et al. 2023, arXiv:2211.03831.
//!
//! poly_lora_A [splits, skills, in/splits, rank], poly_lora_B [splits, skills, rank, out/splits],
//! poly_router.module_logits [tasks, splits·skills]. Sequences are of the task that the data say, else of the adapter's own,
//! `engraft_task` in the configuration where it is not the first; merged is what that one has.
//!
//! u = (w + ½)/2³², w word number `sequence·splits·skills + i` of the stream "PATH.STEP.MICRO" of the seed.

use engraft_nn::{Base, Builder, Error, Init, Mode, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::{Unary, cat};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{int, rank};
use crate::shared::low_rank::{RANK_MAX, linear};
use crate::shared::sizes;
use crate::shared::tasks::{Tasks, task_field, tasks_field};
use crate::{Ahead, Described, Entry, Info, Loaded, Method, peft};

const MAX: usize = 1 << 16;
/// Beside the sum of the shares, as in `peft`.
const EPS: f32 = 1e-12;

#[derive(Clone, Debug)]
struct Poly {
    rank: usize,
    tasks: Tasks,
    skills: usize,
    splits: usize,
    /// B starts as noise.
    random: bool,
}

static INFO: Info = Info {
    name: "poly",
    title: "Poly",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2202.13914",
    summary: "y = x·Wᵀ + x·(Σ w_s·A_s)·(Σ w_s·B_s)/r: a mixture of skills for each task",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "POLY",
    fields: &[
        rank("8"),
        int("skills", (1, MAX as i64), Some("4"), "LoRAs in each inventory."),
        int("splits", (1, MAX as i64), Some("1"), "Parts of the input and output that are mixed apart."),
        tasks_field("1"),
        task_field(),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>, [rank, tasks, skills, splits, task]: [&'static str; 5]) -> Poly {
    Poly {
        rank: r.count(rank, 8, RANK_MAX),
        tasks: Tasks::read(r, [tasks, task], 1),
        skills: r.count(skills, 4, MAX),
        splits: r.count(splits, 1, MAX),
        random: false,
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, ["rank", "tasks", "skills", "splits", "task"]))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.one_of("poly_type", &[("poly", ())]);
    let method = Poly {
        random: !r.flag("init_weights", true),
        ..read(&mut r, ["r", "n_tasks", "n_skills", "n_splits", "engraft_task"])
    };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(method), targets, train_also }))
}

fn example() -> Box<dyn Method> {
    let tasks = Tasks { count: 2, usual: 1 };
    Box::new(Poly { rank: 2, tasks, skills: 3, splits: 2, random: false })
}

impl Method for Poly {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn tasks(&self) -> Option<usize> {
        Some(self.tasks.count)
    }

    fn suits(&self, run: &Ahead) -> Result<()> {
        self.tasks.suit(run)
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn chosen_in_use(&self) -> &'static [(&'static str, &'static str)] {
        &[("task", "engraft_task")]
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let Poly { rank, tasks, skills, splits, .. } = *self;
        for site in b.targets() {
            let (out, inn) = linear(site, INFO.title)?;
            let path = &site.path;
            if !out.is_multiple_of(splits) || !inn.is_multiple_of(splits) {
                let message =
                    format!("a matrix [{out}, {inn}] has no {splits} equal splits; choose another `splits`");
                return Err(Error::Site { path: path.clone(), message });
            }
            let start_b = if self.random { Init::kaiming(rank) } else { Init::Zeros };
            let (shape_a, shape_b) =
                ([splits, skills, inn / splits, rank], [splits, skills, rank, out / splits]);
            let inventory = Inventory {
                a: b.param(&format!("{path}.poly_lora_A"), &shape_a, Init::kaiming(inn / splits))?,
                b: b.param(&format!("{path}.poly_lora_B"), &shape_b, start_b)?,
                logits: b.param(
                    &format!("{path}.poly_router.module_logits"),
                    &[tasks.count, splits * skills],
                    Init::Uniform(1e-3),
                )?,
                method: self.clone(),
            };
            b.patch(site.id, Patch::Weight(Box::new(inventory)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let mut own = json!({
            "init_weights": !self.random, "n_skills": self.skills, "n_splits": self.splits, "n_tasks": self.tasks.count,
            "poly_type": "poly", "r": self.rank,
        });
        if self.tasks.usual > 0 {
            own["engraft_task"] = json!(self.tasks.usual);
        }
        own.as_object().cloned().unwrap_or_default()
    }
}

struct Inventory {
    a: Param,
    b: Param,
    logits: Param,
    method: Poly,
}

impl Inventory {
    /// Mixed factors [in, rank] and [rank, out] of each of `tasks`, with or without `noise` [tasks, splits·skills].
    fn mixtures(&self, tasks: &[usize], noise: Option<&Tensor>) -> Result<Vec<(Tensor, Tensor)>> {
        let Poly { rank, skills, splits, .. } = self.method;
        let count = tasks.len();
        let rows = Tensor::from_i64(tasks.iter().map(|&task| task as i64).collect(), [count])?;
        let mut z = self.logits.get().gather(&rows)?;
        if let Some(noise) = noise {
            z = z.add(noise)?;
        }
        let z = z.unary(Unary::Sigmoid)?.reshape([count, splits, skills])?;
        let shares = z.div(&z.sum_dim(2)?.unary(Unary::Shift(EPS))?)?.permute(&[1, 0, 2])?;
        // [splits, count, numbers of a part] → [count, splits, numbers].
        let mixed = |t: &Tensor| -> Result<Tensor> {
            let numbers = t.len() / (splits * skills);
            let all = shares.matmul(&t.reshape([splits, skills, numbers])?)?;
            Ok(all.permute(&[1, 0, 2])?)
        };
        let (a, b) = (mixed(&self.a.get())?, mixed(&self.b.get())?);
        let (inn, out) = (a.len() / (count * rank), b.len() / (count * rank));
        let one = |i: usize| -> Result<(Tensor, Tensor)> {
            let a = a.rows_between(i, i + 1)?.reshape([inn, rank])?;
            let b = b.rows_between(i, i + 1)?.reshape([splits, rank, out / splits])?;
            Ok((a, b.permute(&[1, 0, 2])?.reshape([rank, out])?))
        };
        (0..count).map(one).collect()
    }

    /// ln u − ln(1 − u) for every sequence.
    fn noise(&self, sequences: usize, site: &Site, (seed, step, micro): (u64, u64, u64)) -> Result<Tensor> {
        let each = self.method.splits * self.method.skills;
        let key = Init::key(seed, &format!("{}.{step}.{micro}", site.path));
        let draw = |i: usize| {
            let u = (f64::from(key.bits(i as u64)) + 0.5) / 4_294_967_296.0;
            (u.ln() - (-u).ln_1p()) as f32
        };
        Ok(Tensor::from_vec((0..sequences * each).map(draw).collect(), [sequences, each])?)
    }
}

impl WeightPatch for Inventory {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let mut w = base.dense()?;
        for (a, b) in self.mixtures(&[self.method.tasks.usual], None)? {
            w = w.add(&a.matmul(&b)?.t()?.scale(1.0 / self.method.rank as f32)?)?;
        }
        Ok(w)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let branch = |x: &Tensor, (a, b): &(Tensor, Tensor)| -> Result<Tensor> {
            Ok(x.matmul(a)?.scale(1.0 / self.method.rank as f32)?.matmul(b)?)
        };
        let sequences = cx.layout().sequences();
        let change = match cx.mode() {
            Mode::Train { seed, step, micro } if !x.is_empty() => {
                let noise = self.noise(sequences.len(), site, (seed, step, micro))?;
                let mixtures = self.mixtures(&self.method.tasks.of(cx)?, Some(&noise))?;
                let parts = sequences
                    .iter()
                    .zip(&mixtures)
                    .map(|(rows, mixture)| branch(&x.rows_between(rows.start, rows.end)?, mixture))
                    .collect::<Result<Vec<_>>>()?;
                cat(&parts.iter().collect::<Vec<_>>(), 0)?
            }
            _ => self.method.tasks.each(x, cx, |task, x| branch(x, &self.mixtures(&[task], None)?[0]))?,
        };
        Ok(base.forward(x)?.plus(&change)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Layout, Patched, Value as Frozen};
    use engraft_tensor::testing::{close, sample};

    const Q: &str = "layers.0.attn.q";

    fn output(a: &crate::Attached, x: &Tensor, lengths: &[usize], mode: Mode) -> Tensor {
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, Q));
        let Frozen::Weight(weight) = &site.value else { panic!() };
        let cx = Pass::new(Layout::counted(lengths).unwrap(), None).training(mode);
        Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx).forward(x).unwrap()
    }

    #[test]
    fn skills_are_mixed_for_the_task() {
        let settings = json!({ "rank": 2, "tasks": 3, "skills": 4, "splits": 2, "task": 1 });
        let a = attached(&[chosen("poly", settings)], &[]);
        // skills·rank·(m + n) + tasks·splits·skills.
        assert_eq!(a.adapter.trained_count(), 2 * (4 * 2 * (6 + 6 + 4 + 6) + 2 * 3 * 2 * 4));
        let x = sample(&[5, 6], 3);
        close(&both_ways(&a, Q, &x).0, &x.matmul_t(&frozen(Q)).unwrap(), 1e-6);
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, Q, &x);
        close(&fast, &defined, 1e-5);
        let other =
            attached(&[chosen("poly", json!({ "rank": 2, "tasks": 3, "skills": 4, "splits": 2 }))], &[]);
        stir(&other, 0.5);
        let there = both_ways(&other, Q, &x).0.to_vec().unwrap();
        assert_ne!(fast.to_vec().unwrap(), there, "tasks have mixtures of their own");
    }

    #[test]
    fn rows_have_the_mixture_of_their_own_task() {
        let made = |task: usize| {
            let settings = json!({ "rank": 2, "tasks": 3, "skills": 4, "task": task });
            let a = attached(&[chosen("poly", settings)], &[]);
            stir(&a, 0.5);
            a
        };
        let (a, x) = (made(0), sample(&[5, 6], 3));
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, Q));
        let Frozen::Weight(weight) = &site.value else { panic!() };
        let run = |mode: Mode, tasks: &[usize]| {
            let layout = Layout::counted(&[2, 3]).unwrap().with_tasks(tasks.to_vec());
            let cx = Pass::new(layout, None).training(mode);
            Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx).forward(&x).unwrap()
        };
        let found = run(Mode::Eval, &[2, 1]);
        let alone = |task: usize| both_ways(&made(task), Q, &x).0;
        let part = |t: &Tensor, from, to| t.rows_between(from, to).unwrap();
        close(&part(&found, 0, 2), &part(&alone(2), 0, 2), 1e-6);
        close(&part(&found, 2, 5), &part(&alone(1), 2, 5), 1e-6);
        let train = Mode::Train { seed: 1, step: 1, micro: 0 };
        let [first, second] = [[2, 1], [2, 0]].map(|tasks| run(train, &tasks));
        close(&part(&first, 0, 2), &part(&second, 0, 2), 0.0);
        assert_ne!(part(&first, 2, 5).to_vec().unwrap(), part(&second, 2, 5).to_vec().unwrap());
    }

    #[test]
    fn in_training_each_sequence_draws_its_mixture() {
        let a = attached(&[chosen("poly", json!({ "rank": 2, "skills": 3 }))], &[]);
        stir(&a, 0.5);
        let one = sample(&[2, 6], 3);
        let x = cat(&[&one, &one], 0).unwrap();
        let mode = |step| Mode::Train { seed: 1, step, micro: 0 };
        let y = output(&a, &x, &[2, 2], mode(1));
        let half = |y: &Tensor, i: usize| y.rows_between(2 * i, 2 * i + 2).unwrap().to_vec().unwrap();
        assert_ne!(half(&y, 0), half(&y, 1));
        assert_eq!(half(&y, 0), half(&output(&a, &x, &[2, 2], mode(1)), 0));
        assert_ne!(half(&y, 0), half(&output(&a, &x, &[2, 2], mode(2)), 0));
        let evaluated = output(&a, &x, &[2, 2], Mode::Eval);
        assert_eq!(half(&evaluated, 0), half(&evaluated, 1));
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("poly", json!({ "tasks": 2, "task": 1, "splits": 2 }))], &["head"]);
        let good = config(&[chosen("poly", json!({}))], &[]);
        assert_eq!(good.get("engraft_task"), None);
        for bad in [
            json!({ "n_skills": 0 }),
            json!({ "engraft_task": 1 }),
            json!({ "engraft_task": "first" }),
            json!({ "poly_type": "mhr" }),
        ] {
            let key = bad.as_object().unwrap().keys().next().unwrap().clone();
            let Err(error) = from_file(&with(good.clone(), bad)) else { panic!("{key} passed") };
            assert!(error.to_string().contains(&key), "{error}");
        }
        let (sites, info) = toy();
        let uneven = [chosen("poly", json!({ "splits": 4 }))];
        let Err(error) = crate::attach(&uneven, &[], &sites, &info, 0) else {
            panic!("uneven splits passed")
        };
        assert!(error.to_string().contains("splits"), "{error}");
    }
}
