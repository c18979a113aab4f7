//! AdaLoRA: an update in the form of a singular value decomposition, whose ranks are dealt out by importance.
//!
//! W′ = W + α/(r₀ + 10⁻⁵)·B·(E ⊙ A), E one number a row of A; A and B normal with deviation 0.02, E zero, so W′ = W.
//! The loss gains γ times the mean over all A and B of ‖AAᵀ − I‖ and ‖BᵀB − I‖.
//! After update t the sensitivity I = |w·g| of every number is smoothed, Ī ← β₁Ī + (1 − β₁)I, and so is its doubt,
//! U ← β₂U + (1 − β₂)|I − Ī|. A triplet (a number of E, its row of A, its column of B) scores Ī·U of the first plus the
//! means of Ī·U over the others. The budget b(t), a sum of ranks, falls from all to the target with the cube of what is
//! left of the steps between `tinit` and the last `tfinal`; every `delta_t` steps E is zeroed where a score is not among
//! the b(t) largest. A triplet may come back until the last `tfinal` steps begin; then ranks are settled.
//!
//! Zhang et al. 2023, arXiv:2303.10512 (algorithm 1); sensitivity is read after the update, as its code and `peft` do.
//!
//! A [rank, in], B [out, rank], E [rank, 1], `rank_pattern` in the configuration says which of r₀ triplets these are; at
//! a convolution `in` is the window.

mod allocation;
mod settings;

use engraft_nn::{Adapter, Base, Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, dropout, float, int};
use crate::shared::low_rank::{
    RANK_MAX, UNUSED, added, changed, kept_columns, kept_rows, off_identity, plain_lora,
};
use crate::shared::sizes;
use crate::shared::token_indices::Tokens;
use crate::{Ahead, Described, Entry, Forget, Info, Loaded, Method, Step, peft};
use allocation::{Cut, Schedule, TOTAL, choose, named_total, pattern_of, triplets};
use settings::{IN_FILE, IN_RECIPE, READ, UNREAD, read, read_pattern};

#[derive(Clone, Debug)]
struct AdaLora {
    init_rank: usize,
    target_rank: usize,
    alpha: f64,
    dropout: f32,
    schedule: Schedule,
    beta1: f64,
    beta2: f64,
    orthogonality: f64,
    bias: Biases,
    /// A and B start as noise of deviation 1, and so does E.
    random: bool,
    /// `r` of the file, which says nothing.
    unused_rank: usize,
    /// Rows of tables that are trained beside the triplets.
    tokens: Tokens,
    /// Keys of a file that `peft` does not read for AdaLoRA.
    kept: Map<String, Value>,
    /// Which of the first triplets a file still has, by path: training goes on with these ranks.
    pattern: Option<Map<String, Value>>,
}

static INFO: Info = Info {
    name: "adalora",
    title: "AdaLoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2303.10512",
    summary: "W′ = W + (α/r)·B·(E ⊙ A); ranks are cut where triplets matter least",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ADALORA",
    fields: &[
        int("init_rank", (1, 1024), Some("12"), "Rank of every matrix at the start."),
        int("target_rank", (1, 1024), Some("8"), "Mean rank of the matrices at the end."),
        float("alpha", (0.0, 1e9), "8", "The product is scaled by alpha/init_rank."),
        dropout("0"),
        int("tinit", (0, 1 << 40), Some("0"), "Steps before ranks are cut."),
        int("tfinal", (0, 1 << 40), Some("0"), "Steps at the end with settled ranks."),
        int("delta_t", (1, 1 << 40), Some("1"), "Steps from one cut to the next."),
        int("total_step", (1, 1 << 40), None, "Steps of the schedule; by default those of the run."),
        float("beta1", (0.0, 1.0), "0.85", "Share that an importance keeps from step to step."),
        float(
            "beta2",
            (0.0, 1.0),
            "0.85",
            "Share that the doubt about an importance keeps from step to step.",
        ),
        float(
            "orth_reg_weight",
            (0.0, 1e6),
            "0.5",
            "Weight of the penalty on A and B that are not orthogonal.",
        ),
        choice(
            "bias",
            &["none", "all", "lora_only"],
            "\"none\"",
            "Which biases of the model are trained too.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, &IN_RECIPE))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    let off: Vec<&'static str> = UNUSED.iter().copied().filter(|k| !READ.contains(k)).collect();
    r.must_be_off(&off);
    r.must_be_off(&["loftq_config", "use_dora"]);
    r.ignore(UNREAD);
    let method = AdaLora {
        random: !r.flag("init_lora_weights", true),
        unused_rank: r.count("r", 8, RANK_MAX),
        pattern: read_pattern(&mut r),
        tokens: Tokens::read(&mut r),
        kept: UNREAD.iter().filter_map(|key| Some((key.to_string(), map.get(*key)?.clone()))).collect(),
        ..read(&mut r, &IN_FILE)
    };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(method), targets, train_also }))
}

fn example() -> Box<dyn Method> {
    let schedule = Schedule { tinit: 1, tfinal: 1, delta_t: 1, total: None };
    Box::new(AdaLora {
        init_rank: 3,
        target_rank: 2,
        alpha: 6.0,
        dropout: 0.0,
        schedule,
        beta1: 0.85,
        beta2: 0.85,
        orthogonality: 0.5,
        bias: Biases::All,
        random: false,
        unused_rank: 8,
        tokens: Tokens::default(),
        kept: Map::new(),
        pattern: None,
    })
}

impl Method for AdaLora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let least = |(out, inn): (usize, usize)| out.min(inn);
        sizes::beyond(targets, "init_rank", |_| self.init_rank, least, sizes::IDLE)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        self.tokens.attach(b)?;
        // What the configuration says of the schedule's length is known when training begins.
        b.state(TOTAL, &[1], Init::Zeros)?;
        for site in b.targets() {
            let (out, inn) = match site.kind {
                Kind::Linear { out, inn, .. } | Kind::Convolution { out, inn, .. } => (out, inn),
                _ => {
                    let message =
                        "AdaLoRA changes matrices; leave the embedding out of the targets, or use `lora`";
                    return Err(Error::Site { path: site.path.clone(), message: message.into() });
                }
            };
            self.attach_triplets(b, site, out, inn)?;
        }
        Ok(())
    }

    fn suits(&self, run: &Ahead) -> Result<()> {
        if let Some(problem) = self.grows("target_r").filter(|_| self.pattern.is_none()) {
            return Err(Error::Mismatch(vec![problem]));
        }
        self.schedule.check(self.schedule.total.unwrap_or(run.steps))
    }

    fn penalty(&self, adapter: &Adapter, step: Step) -> Result<Option<Tensor>> {
        self.schedule.check(self.schedule.total(step))?;
        if self.orthogonality == 0.0 {
            return Ok(None);
        }
        let (mut sum, mut count) = (Tensor::scalar(0.0), 0);
        for t in triplets(adapter)? {
            count += 2;
            for gram in [t.a.get().matmul_t(&t.a.get())?, t.b.get().t_matmul(&t.b.get())?] {
                sum = sum.add(&off_identity(&gram)?)?;
            }
        }
        Ok(Some(sum.scale((self.orthogonality / f64::from(count.max(1))) as f32)?))
    }

    fn after_step(&self, adapter: &Adapter, moments: &mut dyn Forget, step: Step) -> Result<()> {
        if self.pattern.is_some() {
            return Ok(());
        }
        let triplets = triplets(adapter)?;
        let total = self.schedule.total(step);
        named_total(adapter)?.set(Tensor::full(total as f32, [1]))?;
        let (first, target) = (self.init_rank * triplets.len(), self.target_rank * triplets.len());
        let cut = self.schedule.at(step.number, total, first, target);
        if matches!(cut, Cut::Not | Cut::To(_)) {
            let update = moments.last().ok_or_else(|| {
                Error::Unsupported("AdaLoRA needs an optimizer that shows its updates".into())
            })?;
            for t in &triplets {
                for (param, sensitivity, doubt) in &t.smoothed {
                    let gradient = match update.gradients.get(param) {
                        Some(gradient) => gradient.mul(&update.scale.reshape([])?)?,
                        None => Tensor::zeros(param.value().shape().to_vec()),
                    };
                    self.smooth(&param.value().mul(&gradient)?, sensitivity, doubt)?;
                }
            }
        }
        if let Cut::To(budget) | Cut::Last(budget) = cut {
            choose(&triplets, first - budget.min(first))?;
        }
        if let Cut::Last(_) = cut {
            for (_, sensitivity, doubt) in triplets.iter().flat_map(|t| &t.smoothed) {
                for average in [sensitivity, doubt] {
                    average.set(Tensor::zeros(average.value().shape().to_vec()))?;
                }
            }
        }
        if cut != Cut::Not {
            for t in &triplets {
                t.e.set(t.e.value().mul(&t.mask.value())?)?;
            }
        }
        Ok(())
    }

    /// Rows of A and E and columns of B that are off are dropped.
    fn finish(&self, adapter: &Adapter) -> Result<()> {
        if self.pattern.is_some() {
            return Ok(());
        }
        for t in triplets(adapter)? {
            // A number that has come back since the last cut does what the evaluation saw.
            let (mask, e) = (t.mask.value().to_vec()?, t.e.value().to_vec()?);
            let keep: Vec<bool> = mask.iter().zip(&e).map(|(m, e)| *m != 0.0 || *e != 0.0).collect();
            let marks = keep.iter().map(|k| f32::from(u8::from(*k))).collect();
            t.mask.set(Tensor::from_vec(marks, [keep.len(), 1])?)?;
            if keep.iter().all(|k| *k) {
                continue;
            }
            t.a.replace(kept_rows(&t.a.value(), &keep)?);
            t.e.replace(kept_rows(&t.e.value(), &keep)?);
            t.b.replace(kept_columns(&t.b.value(), &keep)?);
        }
        Ok(())
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let mut map = plain_lora(self.unused_rank, self.alpha, self.dropout, &[]);
        let known = named_total(model.adapter).ok().and_then(|total| total.value().to_vec().ok());
        let known = known.map(|v| v[0] as u64).filter(|total| *total > 0);
        // `peft` wants a number; what was never trained has the smallest that it takes.
        let total = self.schedule.total.or(known).unwrap_or(self.schedule.tinit + self.schedule.tfinal + 1);
        let pattern = self.pattern.clone().or_else(|| pattern_of(model.adapter));
        let own = json!({
            "beta1": self.beta1, "beta2": self.beta2, "bias": self.bias.name("lora_only"), "deltaT": self.schedule.delta_t,
            "init_lora_weights": !self.random, "init_r": self.init_rank, "lora_alpha": number(self.alpha),
            "lora_dropout": as_written(self.dropout), "orth_reg_weight": number(self.orthogonality),
            "rank_pattern": pattern, "target_r": self.target_rank, "tfinal": self.schedule.tfinal,
            "tinit": self.schedule.tinit, "total_step": total, "trainable_token_indices": self.tokens.written(),
        });
        map.extend(own.as_object().cloned().unwrap_or_default());
        map.extend(self.kept.clone());
        map
    }
}

impl AdaLora {
    fn attach_triplets(&self, b: &mut Builder<'_>, site: &Site, out: usize, inn: usize) -> Result<()> {
        let path = &site.path;
        let kept = |marks: &Value| marks.as_array().map_or(0, |m| m.iter().filter(|v| **v == true).count());
        let of_file = self.pattern.as_ref().and_then(|p| p.get(&format!("{path}.lora_E")));
        let rank = of_file.map_or(self.init_rank, kept);
        let (noise, values) = match self.random {
            true => (Init::Normal(1.0), Init::Normal(1.0)),
            false => (Init::Normal(0.02), Init::Zeros),
        };
        let mut tensors = Vec::new();
        for (letter, shape, init) in
            [("A", [rank, inn], &noise), ("B", [out, rank], &noise), ("E", [rank, 1], &values)]
        {
            let name = format!("{path}.lora_{letter}");
            tensors.push(b.param(&name, &shape, init.clone())?);
            if self.pattern.is_none() {
                b.state(&format!("{name}.sensitivity"), &shape, Init::Zeros)?;
                b.state(&format!("{name}.doubt"), &shape, Init::Zeros)?;
            }
        }
        if self.pattern.is_none() {
            b.state(&format!("{path}.lora_E.mask"), &[rank, 1], Init::Ones)?;
        }
        let alpha = if self.alpha > 0.0 { self.alpha } else { rank as f64 };
        let scale = (alpha / (self.init_rank as f64 + 1e-5)) as f32;
        let [a, bb, e] = [0, 1, 2].map(|i| tensors[i].clone());
        b.patch(site.id, Patch::Weight(Box::new(Decomposed { a, b: bb, e, scale, dropout: self.dropout })))
    }

    /// One step of the averages, of the sensitivity `wg` (up to its sign).
    fn smooth(&self, wg: &Tensor, sensitivity: &Param, doubt: &Param) -> Result<()> {
        let now = wg.unary(Unary::Abs)?;
        let mix = |old: &Param, new: &Tensor, beta: f64| {
            old.value().scale(beta as f32)?.add(&new.scale((1.0 - beta) as f32)?)
        };
        sensitivity.set(mix(sensitivity, &now, self.beta1)?)?;
        let off = now.sub(&sensitivity.value())?.unary(Unary::Abs)?;
        Ok(doubt.set(mix(doubt, &off, self.beta2)?)?)
    }
}

/// B·(E ⊙ A) at one matrix.
struct Decomposed {
    a: Param,
    b: Param,
    e: Param,
    scale: f32,
    dropout: f32,
}

impl WeightPatch for Decomposed {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        changed(base, &self.a.get().mul(&self.e.get())?, &self.b.get(), self.scale)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        let a = self.a.get().mul(&self.e.get())?;
        added(base.forward(x)?, &dropped, &a, &self.b.get(), self.scale)
    }
}

#[cfg(test)]
mod tests;
