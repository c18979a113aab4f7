//! TinyLoRA: a change within the strongest directions of a weight, mixed by a vector of a few numbers that several weights
//! may share.
//!
//! W′ = W + B·R·A with A = √Σ·Vᵀ and B = U·√Σ of the r largest singular values of W, and R = Σᵢ vᵢ·Pᵢ. A, B and the
//! matrices Pᵢ, drawn from N(0, 1/r), stay; v is trained and starts as zero, so W′ = W. The targets, in order, are dealt to
//! groups that have one v each: as many as there are targets without `weight_tying`, one with all of it. The forward sees
//! two thin factors, y = x·Wᵀ + (drop(x)·Aᵀ)·(B·R)ᵀ. The rows of a table are the outputs of its matrix.
//!
//! "Learning to Reason in 13 Parameters", arXiv:2602.04118, after LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604).
//!
//! `tinylora_v.G` [u], for the model as a whole; in each module `tinylora_A` [r, in], `tinylora_B` [out, r] and
//! `tinylora_P` [u, r, r].

use engraft_nn::{Base, Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Param, Tensor, linalg};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::matrices;
use crate::shared::sizes;
use crate::shared::torch_random::{Generator, Seed};
use crate::{Described, Entry, Info, Loaded, Method, peft, tied};

const SIZE_MAX: usize = 1 << 16;
/// What stands for the biases of the targets.
const OF_TARGETS: &str = "tinylora_only";

struct TinyLora {
    rank: usize,
    /// Length of v.
    len: usize,
    tying: f64,
    seed: Seed,
    save_projection: bool,
    /// v starts uniform in ± this where `start` says so.
    bound: f64,
    start: Start,
    dropout: f32,
    bias: Biases,
}

/// How v starts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Start {
    Zeros,
    Uniform,
    /// `peft` leaves it as memory has it; here it is drawn.
    Nothing,
}

static INFO: Info = Info {
    name: "tinylora",
    title: "TinyLoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2602.04118",
    summary: "W′ = W + B·(Σᵢ vᵢ·Pᵢ)·A, A and B from the largest singular values of W, only v trained and shared",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "TINYLORA",
    fields: &[
        int("rank", (1, SIZE_MAX as i64), Some("2"), "Singular values that are kept."),
        int("u", (1, SIZE_MAX as i64), Some("64"), "Numbers that a group of targets trains."),
        float(
            "weight_tying",
            (0.0, 1.0),
            "0",
            "How far targets share these numbers: 0 not at all, 1 all of them.",
        ),
        int(
            "projection_seed",
            (0, u32::MAX as i64),
            Some("42"),
            "Seed of the matrices P, as PyTorch draws from it.",
        ),
        flag(
            "save_projection",
            "true",
            "Put P into the adapter's file; without them it holds their seed alone.",
        ),
        choice("init", &["zeros", "uniform"], "\"zeros\"", "How v starts."),
        float("init_v_bound", (0.0, 1e3), "0.02", "Bound of a uniform start."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of A while training."),
        choice(
            "bias",
            &["none", "all", OF_TARGETS],
            "\"none\"",
            "Which biases of the model are trained too.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| {
        let start = r.one_of("init", &[("zeros", Start::Zeros), ("uniform", Start::Uniform)]);
        read(r, ("rank", "dropout"), start)
    })
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| {
        r.ignore(&["fan_in_fan_out"]);
        let start = match r.value("init_weights").cloned() {
            None | Some(Value::Bool(true)) => Start::Zeros,
            Some(Value::Bool(false)) => Start::Nothing,
            Some(Value::String(word)) if word == "uniform" => Start::Uniform,
            Some(other) => {
                r.problem(format!("`init_weights`: expected true, false or \"uniform\", found {other}"));
                Start::Zeros
            }
        };
        read(r, ("r", "tinylora_dropout"), start)
    })
}

fn read(r: &mut Reader<'_>, (rank, dropout): (&'static str, &'static str), start: Start) -> TinyLora {
    let tying = r.float("weight_tying", 0.0);
    if !(0.0..=1.0).contains(&tying) {
        r.problem(format!("`weight_tying`: expected a number from 0 to 1, found {tying}"));
    }
    TinyLora {
        rank: r.count(rank, 2, SIZE_MAX),
        len: r.count("u", 64, SIZE_MAX),
        tying,
        seed: r.torch_seed("projection_seed", 42),
        save_projection: r.flag("save_projection", true),
        bound: r.float("init_v_bound", 0.02),
        start,
        dropout: r.dropout(dropout),
        bias: Biases::read(r, OF_TARGETS),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(TinyLora {
        rank: 2,
        len: 5,
        tying: 0.5,
        seed: Seed::of(3),
        save_projection: false,
        bound: 0.02,
        start: Start::Zeros,
        dropout: 0.0,
        bias: Biases::None,
    })
}

impl Method for TinyLora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond(targets, "rank", |_| self.rank, |(out, inn)| out.min(inn), "it is cut to that there")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        let targets = b.targets();
        // A table that nothing reads (T5's `shared`) comes first and is counted.
        let unread = b.sites().iter().any(|site| tied::chosen_by_own_name(b, site).is_some());
        let count = targets.len() + usize::from(unread);
        let init = match self.start {
            Start::Zeros => Init::Zeros,
            Start::Uniform | Start::Nothing => Init::Uniform(self.bound as f32),
        };
        let mut vectors: Vec<Param> = Vec::new();
        for number in 0..count {
            let group = self.group(number, count);
            if group == vectors.len() {
                vectors.push(b.param(&format!("tinylora_v.{group}"), &[self.len], init.clone())?);
            }
        }
        for (number, site) in (usize::from(unread)..).zip(targets) {
            if matches!(site.kind, Kind::Convolution { .. }) {
                let message =
                    "TinyLoRA adapts linear layers and tables; leave the convolution out of the targets";
                return Err(Error::Site { path: site.path.clone(), message: message.into() });
            }
            let v = vectors[self.group(number, count)].clone();
            let patch = self.directions(b, site, number as u64, v)?;
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let start = match self.start {
            Start::Zeros => json!(true),
            Start::Uniform => json!("uniform"),
            Start::Nothing => json!(false),
        };
        let own = json!({
            "bias": self.bias.name(OF_TARGETS), "fan_in_fan_out": false, "init_v_bound": number(self.bound), "init_weights": start,
            "layers_pattern": null, "layers_to_transform": null, "projection_seed": self.seed.written(), "r": self.rank,
            "save_projection": self.save_projection, "tinylora_dropout": as_written(self.dropout), "u": self.len,
            "weight_tying": number(self.tying),
        });
        own.as_object().cloned().unwrap_or_default()
    }

    /// v belongs to the model as a whole.
    fn file_name(&self, name: &str) -> String {
        let whole = name.starts_with("tinylora_v.");
        if whole { format!("base_model.{name}") } else { format!("base_model.model.{name}") }
    }
}

impl TinyLora {
    /// The group of target `number` of `targets`.
    fn group(&self, number: usize, targets: usize) -> usize {
        let groups = ((targets as f64 * (1.0 - self.tying)).round_ties_even() as usize).max(1);
        (number / (targets / groups).max(1)).min(groups - 1)
    }

    /// A, B and P of one target.
    fn directions(&self, b: &mut Builder<'_>, site: &Site, number: u64, v: Param) -> Result<Directions> {
        let svd = linalg::svd(&matrices::frozen(site)?)?;
        let rank = self.rank.min(svd.s.len());
        let roots: Vec<f32> = svd.s[..rank].iter().map(|s| s.sqrt()).collect();
        let roots = Tensor::from_vec(roots, [rank])?;
        let up = svd.u.narrow(1, 0, rank)?.mul(&roots)?;
        let down = svd.vt.rows_between(0, rank)?.mul(&roots.reshape([rank, 1])?)?;
        let count = self.len * rank * rank;
        let drawn = Generator::new(self.seed.plus(number)).normal(1.0 / (rank as f64).sqrt(), count);
        let (out, inn, shape) = (up.dim(0), down.width(), [self.len, rank, rank]);
        let mixing = Init::Values(Tensor::from_vec(drawn, shape)?);
        let name = |end: &str| format!("{}.tinylora_{end}", site.path);
        Ok(Directions {
            a: b.fixed(&name("A"), &[rank, inn], Init::Values(down))?,
            b: b.fixed(&name("B"), &[out, rank], Init::Values(up))?,
            p: match self.save_projection {
                true => b.fixed(&name("P"), &shape, mixing)?,
                false => b.state(&name("P"), &shape, mixing)?,
            },
            v,
            dropout: self.dropout,
        })
    }
}

struct Directions {
    a: Param,
    b: Param,
    p: Param,
    v: Param,
    dropout: f32,
}

impl Directions {
    /// R [r, r].
    fn mixer(&self) -> Result<Tensor> {
        let p = self.p.get();
        let [len, rank] = [p.dim(0), p.dim(1)];
        let sum = self.v.get().reshape([1, len])?.matmul(&p.reshape([len, rank * rank])?)?;
        Ok(sum.reshape([rank, rank])?)
    }
}

impl WeightPatch for Directions {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.b.get().matmul(&self.mixer()?)?.matmul(&self.a.get())?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        // R is smaller than what it is multiplied with, whichever side that is.
        let down = self.mixer()?.matmul(&self.a.get())?;
        Ok(base.forward(x)?.add_low_rank(&dropped, &down, &self.b.get(), 1.0)?)
    }

    fn lookup(&self, ids: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let rows = cx.dropout(&self.b.get().gather(ids)?, self.dropout, site.id, 0)?;
        Ok(base.lookup(ids)?.add(&rows.matmul(&self.mixer()?)?.matmul(&self.a.get())?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Targets;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn thirteen_numbers_for_all_targets_together() {
        for (tying, groups) in [(0.0, 4), (0.5, 2), (0.3, 3), (1.0, 1)] {
            let a = attached(&[chosen("tinylora", json!({ "u": 13, "weight_tying": tying }))], &[]);
            assert_eq!(a.adapter.trained_count(), 13 * groups, "{tying}");
        }
        let own = TinyLora {
            tying: 0.3,
            ..read(&mut Reader::settings(&Map::new(), INFO.fields), ("rank", "dropout"), Start::Zeros)
        };
        // round(7·0.7) = 5 groups of one target, the last of three.
        assert_eq!((0..7).map(|i| own.group(i, 7)).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 4, 4]);
    }

    #[test]
    fn the_change_lies_within_the_strongest_directions() {
        let methods =
            [(chosen("tinylora", json!({ "rank": 2 })).0, Some(Targets::names(["tok", "attn.q", "attn.v"])))];
        let a = attached(&methods, &[]);
        let x = sample(&[5, 6], 3);
        let plain = x.matmul_t(&frozen("layers.0.attn.v")).unwrap();
        close(&both_ways(&a, "layers.0.attn.v", &x).0, &plain, 1e-6);
        stir(&a, 0.5);
        let ids = Tensor::from_i64(vec![2, 0, 7], [3]).unwrap();
        for (path, x) in [("layers.0.attn.q", &x), ("layers.1.attn.v", &x), ("tok", &ids)] {
            let (fast, defined) = both_ways(&a, path, x);
            close(&fast, &defined, 1e-5);
        }
        let change = merged(&a, "layers.0.attn.v").sub(&frozen("layers.0.attn.v")).unwrap();
        let svd = linalg::svd(&frozen("layers.0.attn.v")).unwrap();
        let weak = svd.u.narrow(1, 2, 2).unwrap().t_matmul(&change).unwrap();
        assert!(weak.to_vec().unwrap().iter().all(|v| v.abs() < 1e-5));
        assert!(change.to_vec().unwrap().iter().any(|v| v.abs() > 0.05));
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({ "u": 3 }),
            json!({ "u": 3, "rank": 9, "weight_tying": 1.0, "save_projection": false }),
            json!({ "init": "uniform", "init_v_bound": 0.3, "bias": "tinylora_only", "dropout": 0.1 }),
        ] {
            survives_saving(&[chosen("tinylora", settings)], &["head"]);
        }
        let good = config(&[chosen("tinylora", json!({ "u": 3 }))], &[]);
        for bad in [json!({ "weight_tying": 1.5 }), json!({ "u": 0 }), json!({ "init_weights": "normal" })] {
            assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
