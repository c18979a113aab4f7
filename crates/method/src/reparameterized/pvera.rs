//! PVeRA: VeRA whose inner numbers are normal variables in training.
//!
//! The shared A has 2r rows: d⊙(A·x) gives means μ and logarithms of variances λ, and W′·x = W·x + b⊙(B·(μ + ε⊙e^(λ/2))), ε
//! standard normal, drawn anew in every pass of training. Afterwards the mean is taken, so that
//! W′ = W + diag(b)·B·diag(d₁)·A₁ with the first halves of d and A. d starts as a small constant, b as zero, so W′ = W.
//!
//! Cherdo et al. 2025, arXiv:2512.07703; VeRA: Kopiczko et al. 2024, arXiv:2310.11454. As `peft` has it: A and B are
//! Kaiming-uniform draws of PyTorch's generator, and with `save_projection = false` the file holds only their seed.
//!
//! pvera_lambda_b (b) `[out]`, pvera_lambda_d (d) `[2r]` a target; pvera_A [2r, largest in], pvera_B [largest out, r].

use engraft_nn::{Base, Builder, Init, Mode, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::places;
use crate::shared::projection::{corner, kaiming_pair};
use crate::shared::torch_random::Seed;
use crate::{Described, Entry, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1 << 16;
const OF_TARGETS: &str = "pvera_only";
const SHARED: [&str; 2] = ["pvera_A", "pvera_B"];

struct Pvera {
    rank: usize,
    seed: Seed,
    d_initial: f64,
    dropout: f32,
    save_projection: bool,
    bias: Biases,
    /// Whether b and d start as ones and noise.
    random: bool,
    /// Seed of the noise in `peft`, kept for the file alone.
    generator_seed: Option<Seed>,
}

static INFO: Info = Info {
    name: "pvera",
    title: "PVeRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2512.07703",
    summary: "VeRA whose inner numbers are normal variables in training and means afterwards",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "PVERA",
    fields: &[
        int(
            "rank",
            (1, 1 << 14),
            Some("256"),
            "Number r of inner variables; a module trains 2r + out numbers.",
        ),
        float("d_initial", (-1e3, 1e3), "0.1", "What d starts as."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of A while training."),
        int(
            "projection_prng_key",
            (0, u32::MAX as i64),
            Some("0"),
            "Seed of A and B, as PyTorch draws from it.",
        ),
        flag(
            "save_projection",
            "true",
            "Put A and B into the adapter's file; without them it holds their seed alone.",
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
    peft::own_settings(&INFO, settings, |r| read(r, ("rank", "dropout")))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.ignore(&["fan_in_fan_out"]);
    // Results that differ from pass to pass could not be compared with anything.
    r.must_be_off(&["sample_at_inference"]);
    let random = !r.flag("init_weights", true);
    let given = r.value("generator_seed").is_some();
    let generator_seed = Some(r.torch_seed("generator_seed", 0)).filter(|_| given);
    let method = Pvera { random, generator_seed, ..read(&mut r, ("r", "pvera_dropout")) };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(method), targets, train_also }))
}

fn read(r: &mut Reader<'_>, (rank, dropout): (&'static str, &'static str)) -> Pvera {
    Pvera {
        rank: r.count(rank, 256, RANK_MAX),
        seed: r.torch_seed("projection_prng_key", 0),
        d_initial: r.float("d_initial", 0.1),
        dropout: r.dropout(dropout),
        save_projection: r.flag("save_projection", true),
        bias: Biases::read(r, OF_TARGETS),
        random: false,
        generator_seed: None,
    }
}

fn example() -> Box<dyn Method> {
    Box::new(Pvera {
        rank: 4,
        seed: Seed::of(1),
        d_initial: 0.4,
        dropout: 0.0,
        save_projection: false,
        bias: Biases::None,
        random: false,
        generator_seed: None,
    })
}

impl Method for Pvera {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        let sizes = [2 * self.rank, self.rank];
        let shared = kaiming_pair(b, INFO.title, SHARED, sizes, self.seed, self.save_projection)?;
        for site in b.targets() {
            let (out, inn) = places::linear(site, INFO.title)?;
            let constant = Tensor::full(self.d_initial as f32, [2 * self.rank]);
            let (init_b, init_d) = match self.random {
                false => (Init::Zeros, Init::Values(constant)),
                true => (Init::Ones, Init::Normal(1.0)),
            };
            let outputs = b.param(&format!("{}.pvera_lambda_b", site.path), &[out], init_b)?;
            let inner = b.param(&format!("{}.pvera_lambda_d", site.path), &[2 * self.rank], init_d)?;
            let [down, up] = shared.clone();
            let patch = Variables { down, up, inner, outputs, inn, dropout: self.dropout };
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "bias": self.bias.name(OF_TARGETS), "d_initial": number(self.d_initial), "fan_in_fan_out": false,
            "generator_seed": self.generator_seed.map(Seed::written), "init_weights": !self.random, "layers_pattern": null,
            "layers_to_transform": null, "projection_prng_key": self.seed.written(), "pvera_dropout": as_written(self.dropout),
            "r": self.rank, "sample_at_inference": false, "save_projection": self.save_projection,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_name(&self, name: &str) -> String {
        let whole = SHARED.contains(&name);
        if whole { format!("base_model.{name}") } else { format!("base_model.model.{name}") }
    }
}

/// b⊙(B·(μ + ε⊙e^(λ/2))) with (μ, λ) = d⊙(A·x).
struct Variables {
    down: Param,
    up: Param,
    inner: Param,
    outputs: Param,
    inn: usize,
    dropout: f32,
}

impl Variables {
    /// d⊙(A·x), of the first half of the rows or of all.
    fn inner(&self, x: &Tensor, rows: usize) -> Result<Tensor> {
        let down = corner(&self.down, rows, self.inn)?;
        Ok(x.matmul_t(&down)?.mul(&self.inner.get().rows_between(0, rows)?)?)
    }

    fn outputs(&self, inner: &Tensor) -> Result<Tensor> {
        let outputs = self.outputs.get();
        Ok(inner.matmul_t(&corner(&self.up, outputs.len(), inner.width())?)?.mul(&outputs)?)
    }

    /// With given noise [rows, r].
    fn noisy(&self, x: &Tensor, noise: &Tensor) -> Result<Tensor> {
        let rank = self.inner.value().len() / 2;
        let both = self.inner(x, 2 * rank)?;
        let deviation = both.narrow(1, rank, rank)?.scale(0.5)?.unary(Unary::Exp)?;
        self.outputs(&both.narrow(1, 0, rank)?.add(&deviation.mul(noise)?)?)
    }
}

impl WeightPatch for Variables {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let rank = self.inner.value().len() / 2;
        let (inner, outputs) = (self.inner.get().rows_between(0, rank)?, self.outputs.get());
        let down = corner(&self.down, rank, self.inn)?.mul(&inner.reshape([rank, 1])?)?;
        let up = corner(&self.up, outputs.len(), rank)?.mul(&outputs.reshape([outputs.len(), 1])?)?;
        Ok(base.dense()?.add(&up.matmul(&down)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let y = base.forward(x)?;
        let rank = self.inner.value().len() / 2;
        let moved = match cx.mode() {
            Mode::Eval => self.outputs(&self.inner(x, rank)?)?,
            Mode::Train { seed, step, micro } => {
                let mut noise = vec![0.0; x.rows() * rank];
                Init::key(seed, &format!("pvera.{}.{step}.{micro}", site.path)).fill_normal(&mut noise);
                let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
                self.noisy(&dropped, &Tensor::from_vec(noise, [x.rows(), rank])?)?
            }
        };
        Ok(y.plus(&moved)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Layout, Patched, Value as Frozen};
    use engraft_tensor::testing::{check_gradients, close, sample};

    #[test]
    fn the_mean_is_merged_and_noise_is_of_training_alone() {
        let a = attached(&[chosen("pvera", json!({ "rank": 3 }))], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * ((6 + 6) + (6 + 4)));
        let q = "layers.0.attn.q";
        let x = sample(&[5, 6], 3);
        close(&both_ways(&a, q, &x).0, &x.matmul_t(&frozen(q)).unwrap(), 1e-6);
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, q, &x);
        close(&fast, &defined, 1e-5);
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, q));
        let Frozen::Weight(weight) = &site.value else { panic!("a weight") };
        let train = |step: u64| {
            let mode = Mode::Train { seed: 1, step, micro: 0 };
            let cx = Pass::new(Layout::counted(&[5]).unwrap(), None).training(mode);
            Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx).forward(&x).unwrap()
        };
        assert_eq!(train(1).to_vec().unwrap(), train(1).to_vec().unwrap());
        assert_ne!(train(1).to_vec().unwrap(), train(2).to_vec().unwrap());
        let steps = 4000;
        let mut mean = Tensor::zeros([5, 6]);
        for step in 0..steps {
            mean = mean.add(&train(step).scale(1.0 / steps as f32).unwrap()).unwrap();
        }
        close(&mean, &fast, 0.1);
    }

    #[test]
    fn gradients_go_through_mean_and_deviation() {
        let (down, up) = (Param::frozen(sample(&[6, 5], 1)), Param::frozen(sample(&[4, 3], 2)));
        let noise = sample(&[7, 3], 3);
        let inputs = [sample(&[7, 5], 4), sample(&[6], 5), sample(&[4], 6)];
        let patch = |inner: &Tensor, outputs: &Tensor| Variables {
            down: down.clone(),
            up: up.clone(),
            inner: Param::new(inner.detach()),
            outputs: Param::new(outputs.detach()),
            inn: 5,
            dropout: 0.0,
        };
        check_gradients(&inputs[..1], |v| Ok(patch(&inputs[1], &inputs[2]).noisy(&v[0], &noise).unwrap()))
            .unwrap();
        let own = patch(&inputs[1], &inputs[2]);
        let dy = sample(&[7, 4], 7);
        let g = own.noisy(&inputs[0], &noise).unwrap().backward_from(dy.clone()).unwrap();
        for (param, input) in [(&own.inner, &inputs[1]), (&own.outputs, &inputs[2])] {
            let gradient = g.get(param).unwrap().to_vec().unwrap();
            for (at, found) in gradient.iter().enumerate() {
                let along = |step: f32| -> f64 {
                    let mut moved = input.to_vec().unwrap();
                    moved[at] += step;
                    param.set(Tensor::from_vec(moved, [input.len()]).unwrap()).unwrap();
                    let y = own.noisy(&inputs[0], &noise).unwrap().mul(&dy).unwrap().to_vec().unwrap();
                    y.iter().map(|&v| f64::from(v)).sum()
                };
                let expected = (along(1e-2) - along(-1e-2)) / 2e-2;
                param.set(input.clone()).unwrap();
                assert!((f64::from(*found) - expected).abs() < 1e-2 * expected.abs().max(1.0));
            }
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("pvera", json!({ "rank": 3, "dropout": 0.1, "bias": "all" }))], &["head"]);
        survives_saving(&[chosen("pvera", json!({ "rank": 3, "save_projection": false }))], &[]);
        let written = config(&[chosen("pvera", json!({}))], &[]);
        assert!(from_file(&with(written.clone(), json!({ "generator_seed": 7 }))).is_ok());
        for bad in [json!({ "sample_at_inference": true }), json!({ "r": 0 }), json!({ "bias": "some" })] {
            assert!(from_file(&with(written.clone(), bad)).is_err());
        }
    }
}
