//! UniLoRA: every number of LoRA's factors, of all targets, is one of d trained numbers.
//!
//! W′ = W + B·A, with A and B of all targets, one after the other, equal to P·θ: each of their D numbers reads one place of
//! θ `[d]`, scaled by one over the root of how often that place is read, so that P keeps lengths. Each place is read ⌊D/d⌋ or ⌈D/d⌉
//! times; which by whom is drawn from a seed. θ starts uniform and small, so that a new adapter changes the model, slightly.
//!
//! Li et al. 2025, arXiv:2506.00799. As `peft` has it: the places are NumPy's draws, in the order of the targets, A before B;
//! with `save_indices` the file holds them and their scales.
//!
//! unilora_theta_d (θ) `[d]`; with `save_indices` unilora_indices_A and unilora_scales_A [r, in], unilora_indices_B and
//! unilora_scales_B [out, r] of each target.

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::kept::Kept;
use crate::shared::numpy_random::Generator;
use crate::shared::places;
use crate::shared::sizes;
use crate::{Described, Entry, Info, Loaded, Method, Stored, peft};

const RANK_MAX: usize = 1 << 16;
const LENGTH_MAX: usize = 1 << 24;
const OF_TARGETS: &str = "unilora_only";
const THETA: &str = "unilora_theta_d";

struct UniLora {
    rank: usize,
    length: usize,
    seed: u64,
    dropout: f32,
    bound: f64,
    /// Whether θ starts as standard normal noise.
    random: bool,
    save_indices: bool,
    bias: Biases,
}

static INFO: Info = Info {
    name: "unilora",
    title: "UniLoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2506.00799",
    summary: "W′ = W + B·A, every number of A and B one of d trained numbers",
    mergeable: true,
    identity_at_init: false,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "UNILORA",
    fields: &[
        int("rank", (1, RANK_MAX as i64), Some("4"), "Inner size r of the products."),
        int(
            "theta_d_length",
            (1, LENGTH_MAX as i64),
            Some("256"),
            "Number d of trained numbers, of all targets together.",
        ),
        int(
            "proj_seed",
            (0, u32::MAX as i64),
            Some("42"),
            "Seed of who reads which number, as NumPy draws from it.",
        ),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of A while training."),
        float("init_theta_d_bound", (0.0, 1e3), "0.02", "The numbers start uniform up to this."),
        flag(
            "save_indices",
            "false",
            "Put into the adapter's file who reads which number; without that it holds the seed alone.",
        ),
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
    peft::own_settings(&INFO, settings, |r| read(r, "rank", "dropout"))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.ignore(&["fan_in_fan_out"]);
    let random = !r.flag("init_weights", true);
    let method = UniLora { random, ..read(&mut r, "r", "unilora_dropout") };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(method), targets, train_also }))
}

fn read(r: &mut Reader<'_>, rank: &'static str, dropout: &'static str) -> UniLora {
    UniLora {
        rank: r.count(rank, 4, RANK_MAX),
        length: r.count("theta_d_length", 256, LENGTH_MAX),
        seed: r.seed("proj_seed", 42),
        dropout: r.dropout(dropout),
        bound: r.float("init_theta_d_bound", 0.02),
        random: false,
        save_indices: r.flag("save_indices", false),
        bias: Biases::read(r, OF_TARGETS),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(UniLora {
        rank: 2,
        length: 40,
        seed: 1,
        dropout: 0.0,
        bound: 2.0,
        random: false,
        save_indices: false,
        bias: Biases::None,
    })
}

impl Method for UniLora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        let sizes: Vec<(usize, usize)> =
            b.targets().iter().map(|site| places::linear(site, INFO.title)).collect::<Result<_>>()?;
        let total = sizes.iter().map(|(out, inn)| self.rank * (out + inn)).sum();
        let (drawn, scales) = self.places(total);
        let start = if self.random { Init::Normal(1.0) } else { Init::Uniform(self.bound as f32) };
        let theta = b.param(THETA, &[self.length], start)?;
        let mut at = 0;
        for (site, (out, inn)) in b.targets().into_iter().zip(sizes) {
            let mut factor = |b: &mut Builder<'_>, name: &str, shape: [usize; 2]| -> Result<Factor> {
                let own = &drawn[at..at + shape[0] * shape[1]];
                at += own.len();
                let indices = own.iter().map(|&i| i as f32).collect();
                let scales = own.iter().map(|&i| scales[i]).collect();
                let mut keep = |kind: &str, values: Vec<f32>| {
                    let values = Tensor::from_vec(values, shape)?;
                    let name = format!("{}.unilora_{kind}_{name}", site.path);
                    if self.save_indices {
                        b.fixed(&name, &shape, Init::Values(values))
                    } else {
                        Ok(Param::frozen(values))
                    }
                };
                Ok(Factor { indices: keep("indices", indices)?, scales: keep("scales", scales)? })
            };
            let down = factor(b, "A", [self.rank, inn])?;
            let up = factor(b, "B", [out, self.rank])?;
            let patch = Read { theta: theta.clone(), down, up, dropout: self.dropout, kept: Kept::new() };
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "bias": self.bias.name(OF_TARGETS), "fan_in_fan_out": false, "init_theta_d_bound": number(self.bound),
            "init_weights": !self.random, "layers_pattern": null, "layers_to_transform": null, "proj_seed": self.seed,
            "r": self.rank, "save_indices": self.save_indices, "theta_d_length": self.length,
            "unilora_dropout": as_written(self.dropout),
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_name(&self, name: &str) -> String {
        if name == THETA { format!("base_model.{name}") } else { format!("base_model.model.{name}") }
    }

    fn stored_as(&self, key: &str) -> Stored {
        if key.contains(".unilora_indices_") { Stored::I64 } else { Stored::F32 }
    }
}

impl UniLora {
    /// Which place each of `total` numbers reads, and the scale of each place.
    fn places(&self, total: usize) -> (Vec<usize>, Vec<f32>) {
        let (each, rest) = (total / self.length, total % self.length);
        let mut generator = Generator::new(self.seed);
        let mut drawn: Vec<usize> = (0..self.length).flat_map(|i| std::iter::repeat_n(i, each)).collect();
        if rest > 0 {
            drawn.extend(generator.choice(self.length, rest));
        }
        generator.shuffle(&mut drawn);
        let mut counts = vec![0u32; self.length];
        drawn.iter().for_each(|&i| counts[i] += 1);
        (drawn, counts.into_iter().map(|n| if n == 0 { 0.0 } else { 1.0 / (n as f32).sqrt() }).collect())
    }
}

/// Where the numbers of a factor are read, and how they are scaled.
struct Factor {
    indices: Param,
    scales: Param,
}

impl Factor {
    fn read(&self, theta: &Tensor) -> Result<Tensor> {
        let indices = self.indices.value();
        let read = theta.reshape([theta.len(), 1])?.gather(&indices.as_i64().reshape([indices.len()])?)?;
        Ok(read.reshape(indices.shape())?.mul(&self.scales.get())?)
    }
}

/// B·A of numbers that are read from θ.
struct Read {
    theta: Param,
    down: Factor,
    up: Factor,
    dropout: f32,
    kept: Kept<[Tensor; 2]>,
}

impl Read {
    fn factors(&self) -> Result<[Tensor; 2]> {
        let Factor { indices, scales } = &self.down;
        self.kept.of(&[&self.theta, indices, scales, &self.up.indices, &self.up.scales], || self.made())
    }

    fn made(&self) -> Result<[Tensor; 2]> {
        let theta = self.theta.get();
        Ok([self.down.read(&theta)?, self.up.read(&theta)?])
    }
}

impl WeightPatch for Read {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let [down, up] = self.factors()?;
        Ok(base.dense()?.add(&up.matmul(&down)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let [down, up] = self.factors()?;
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        Ok(base.forward(x)?.add_low_rank(&dropped, &down, &up, 1.0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn a_few_numbers_are_read_evenly_and_keep_their_length() {
        let settings =
            json!({ "rank": 3, "theta_d_length": 11, "save_indices": true, "init_theta_d_bound": 1.0 });
        let a = attached(&[chosen("unilora", settings)], &[]);
        assert_eq!(a.adapter.trained_count(), 11);
        let all = |kind: &str| -> Vec<f32> {
            let own = a.adapter.params().iter().filter(|p| p.name.contains(kind));
            own.flat_map(|p| p.param.value().to_vec().unwrap()).collect()
        };
        let (indices, scales) = (all("indices"), all("scales"));
        let total = 2 * 3 * ((6 + 6) + (6 + 4));
        assert_eq!(indices.len(), total);
        for place in 0..11 {
            let count = indices.iter().filter(|&&i| i == place as f32).count();
            assert!(count == total / 11 || count == total.div_ceil(11));
        }
        let theta = value_of(&a, THETA).to_vec().unwrap();
        let squares = |v: &mut dyn Iterator<Item = f32>| v.map(|x| x * x).sum::<f32>();
        let made = squares(&mut indices.iter().zip(&scales).map(|(&i, s)| theta[i as usize] * s));
        assert!((made / squares(&mut theta.iter().copied()) - 1.0).abs() < 1e-4);
        stir(&a, 0.5);
        let x = sample(&[5, 6], 3);
        let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
        close(&fast, &defined, 1e-5);
    }

    #[test]
    fn configurations() {
        survives_saving(
            &[chosen("unilora", json!({ "theta_d_length": 30, "dropout": 0.1, "bias": "all" }))],
            &["head"],
        );
        survives_saving(&[chosen("unilora", json!({ "theta_d_length": 30, "save_indices": true }))], &[]);
        let written = config(&[chosen("unilora", json!({}))], &[]);
        assert_eq!(written["init_theta_d_bound"], json!(0.02));
        for bad in [json!({ "theta_d_length": 0 }), json!({ "bias": "some" }), json!({ "proj_seed": -1 })] {
            assert!(from_file(&with(written.clone(), bad)).is_err());
        }
    }
}
