//! MonteCLoRA: in training A is a mean of noisy samples, whose spread and shares are learnt.
//!
//! A′ = A + scaler·Σₙ wₙ·diag(√v)·Zₙ, Zₙ [rank, in] standard normal, N samples; y = x·Wᵀ + s·(x·A′ᵀ)·Bᵀ. Outside training A′ = A.
//! v = max(e^{2σ}·χ²ᵣ, 10⁻³) is the diagonal of a Wishart matrix with r degrees of freedom and scale diag(e^{2σ}); w = softmax(√d·z + μ)
//! stands for a Dirichlet draw with concentrations α = e^{ρ}: μ = ln α less its mean, d = (1 − 2/N)/α + Σ(1/α)/N², z normal.
//! Added to the loss is, averaged over the matrices, λ·(K₁ + K₂ + K₃) and with `use_entropy` Σ w²:
//! K₁ = ln Γ(Σα) − ln Γ(N·p) + Σ(ln Γ(α) − ln Γ(p)) + Σ(α − p)·(ψ(α) − ψ(Σα)), p the prior's concentration,
//! K₂ = ½·r·(Σe^{2σ} − Σ2σ − r), K₃ = ½·N·(Σv − Σ ln v − r).
//!
//! Sengupta et al. 2024, arXiv:2411.04358, with the signs and constants of `peft`. σ `[rank]` and ρ `[N]` start uniform in [0, 1).
//! Saved beside A and B, under `lora_monteclora_sampler`: σ `std_prior`, ρ `expert_weights_prior`, and what was drawn last,
//! diag(v) `gaussian_var_prior` [rank, rank] and w `expert_weights` `[N]`, which nothing reads.
//!
//! Zₙ, the χ²ᵣ as sums of r squares (one row of normal numbers for each degree of freedom) and z are the normal numbers of the
//! streams "PATH.STEP.MICRO.samples", ".wishart" and ".shares" of the seed. `peft` draws `buffer_size` of each ahead; none is here.

use engraft_nn::{Builder, Init, Result, Site};
use engraft_tensor::cpu::gamma::ln_gamma;
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Value, json};

use super::form::table;
use crate::Field;
use crate::read::Reader;
use crate::shared::fields::{flag, float, int};

const SAMPLES_MAX: usize = 1 << 12;
/// The least v, α and d, as in `peft`.
const LEAST_VARIANCE: f32 = 1e-3;
const LEAST: f32 = 1e-6;

pub(super) const FIELDS: [Field; 6] = [
    flag("monteclora", "false", "MonteCLoRA: train A as a mean of noisy samples, whose spread is learnt."),
    int(
        "monteclora_num_samples",
        (1, SAMPLES_MAX as i64),
        Some("8"),
        "MonteCLoRA: samples of A in a forward.",
    ),
    flag(
        "monteclora_use_entropy",
        "false",
        "MonteCLoRA: add the squares of the samples' shares to the loss, so that no sample takes over.",
    ),
    float(
        "monteclora_dirichlet_prior",
        (1e-9, 1e9),
        "0.1",
        "MonteCLoRA: concentration of the shares' prior; larger ones make them more equal.",
    ),
    float("monteclora_sample_scaler", (0.0, 1e9), "1e-4", "MonteCLoRA: factor on the noise."),
    float(
        "monteclora_kl_loss_weight",
        (0.0, 1e9),
        "1e-5",
        "MonteCLoRA: weight in the loss of how far spread and shares are from their priors.",
    ),
];

#[derive(Clone, Debug)]
pub(super) struct MonteClora {
    samples: usize,
    entropy: bool,
    prior: f64,
    scaler: f64,
    weight: f64,
    /// As in the file that it was read from.
    found: Option<Value>,
}

impl MonteClora {
    /// `monteclora_config` of a file, or the settings of a recipe.
    pub fn read(r: &mut Reader<'_>) -> Option<MonteClora> {
        let of = |r: &mut Reader<'_>, [samples, entropy, prior, scaler, weight]: [&'static str; 5]| {
            let read = MonteClora {
                samples: r.count(samples, 8, SAMPLES_MAX),
                entropy: r.flag(entropy, false),
                prior: r.float(prior, 0.1),
                scaler: r.float(scaler, 1e-4),
                weight: r.float(weight, 1e-5),
                found: None,
            };
            if read.prior <= 0.0 {
                r.problem(format!("`{prior}`: expected a number above 0, found {}", read.prior));
            }
            read
        };
        if r.is_file() {
            let keys = ["num_samples", "use_entropy", "dirichlet_prior", "sample_scaler", "kl_loss_weight"];
            let found = table(r, "monteclora_config", |r| {
                r.count("buffer_size", 150, usize::MAX);
                of(r, keys)
            });
            return found.map(|(read, found)| MonteClora { found: Some(found), ..read });
        }
        let keys = [
            "monteclora_num_samples",
            "monteclora_use_entropy",
            "monteclora_dirichlet_prior",
            "monteclora_sample_scaler",
            "monteclora_kl_loss_weight",
        ];
        let read = of(r, keys);
        r.flag("monteclora", false).then_some(read)
    }

    pub fn written(&self) -> Value {
        let own = || {
            json!({ "buffer_size": 150, "dirichlet_prior": self.prior, "kl_loss_weight": self.weight,
                "num_samples": self.samples, "sample_scaler": self.scaler, "use_entropy": self.entropy })
        };
        self.found.clone().unwrap_or_else(own)
    }

    pub fn attach(&self, b: &mut Builder<'_>, path: &str, rank: usize) -> Result<Sampler> {
        let name = |end: &str| format!("{path}.lora_monteclora_sampler.{end}");
        let trained = |b: &mut Builder<'_>, end: &str, count: usize| -> Result<Param> {
            let centred = Init::Uniform(0.5).tensor(&[count], b.seed(), &name(end))?;
            b.param(&name(end), &[count], Init::Values(centred.unary(Unary::Shift(0.5))?))
        };
        let shares = Init::Values(Tensor::full(1.0 / self.samples as f32, [self.samples]));
        Ok(Sampler {
            spread: trained(b, "std_prior", rank)?,
            concentrations: trained(b, "expert_weights_prior", self.samples)?,
            variances: b.fixed(&name("gaussian_var_prior"), &[rank, rank], Init::Values(identity(rank)?))?,
            shares: b.fixed(&name("expert_weights"), &[self.samples], shares)?,
            matrices: b.targets().len(),
            form: self.clone(),
        })
    }
}

/// σ and ρ of one matrix.
#[derive(Clone)]
pub(super) struct Sampler {
    spread: Param,
    concentrations: Param,
    /// What was drawn last.
    variances: Param,
    shares: Param,
    /// Number of matrices that the term of the loss is averaged over.
    matrices: usize,
    form: MonteClora,
}

impl Sampler {
    /// A′ for A [rank, in], and this matrix's term of the loss.
    pub fn draw(&self, a: &Tensor, site: &Site, (seed, step, micro): (u64, u64, u64)) -> Result<[Tensor; 2]> {
        let (rank, inn, n) = (a.dim(0), a.dim(1), self.form.samples);
        let normal = |what: &str, shape: &[usize]| {
            Init::Normal(1.0).tensor(shape, seed, &format!("{}.{step}.{micro}.{what}", site.path))
        };
        let squares = normal("wishart", &[rank, rank])?.unary(Unary::Square)?.sum_to(&[rank])?;
        let scales = self.spread.get().scale(2.0)?.unary(Unary::Exp)?;
        let v = at_least(&scales.mul(&squares)?, LEAST_VARIANCE)?;
        let w = self.drawn_shares(&normal("shares", &[n])?)?;
        let mixed = w.reshape([1, n])?.matmul(&normal("samples", &[n, rank * inn])?)?;
        let noise = mixed.reshape([rank, inn])?.mul(&v.unary(Unary::Sqrt)?.reshape([rank, 1])?)?;
        self.variances.set(identity(rank)?.mul(&v.detach())?)?;
        self.shares.set(w.detach())?;
        Ok([a.add(&noise.scale(self.form.scaler as f32)?)?, self.loss(&scales, &v, &w)?])
    }

    /// w for z `[N]`.
    fn drawn_shares(&self, z: &Tensor) -> Result<Tensor> {
        let n = self.form.samples as f32;
        let alpha = at_least(&self.concentrations.get().unary(Unary::Exp)?, LEAST)?;
        let log = alpha.unary(Unary::Log)?;
        let mean = log.sub(&log.mean()?)?;
        let inverse = alpha.unary(Unary::Recip)?;
        let d = inverse.scale(1.0 - 2.0 / n)?.add(&inverse.sum()?.scale(1.0 / (n * n))?)?;
        let root = at_least(&d, LEAST)?.unary(Unary::Shift(LEAST))?.unary(Unary::Sqrt)?;
        Ok(root.mul(z)?.add(&mean)?.softmax()?)
    }

    /// The share of this matrix in the term of the loss.
    fn loss(&self, scales: &Tensor, v: &Tensor, w: &Tensor) -> Result<Tensor> {
        let (n, rank, p) = (self.form.samples as f64, v.len() as f32, self.form.prior);
        let alpha = self.concentrations.get().unary(Unary::Exp)?;
        let total = alpha.sum()?;
        let gammas = total.unary(Unary::LnGamma)?.add(&alpha.unary(Unary::LnGamma)?.sum()?)?;
        let apart = alpha.unary(Unary::Digamma)?.sub(&total.unary(Unary::Digamma)?)?;
        let of_shares = alpha.unary(Unary::Shift(-p as f32))?.mul(&apart)?.sum()?.add(&gammas)?;
        let of_shares = of_shares.unary(Unary::Shift(-(ln_gamma(n * p) + n * ln_gamma(p)) as f32))?;
        let from_one = |v: &Tensor, log: Tensor| v.sum()?.sub(&log.sum()?)?.unary(Unary::Shift(-rank));
        let of_scales = from_one(scales, self.spread.get().scale(2.0)?)?.scale(0.5 * rank)?;
        let of_variances = from_one(v, v.unary(Unary::Log)?)?.scale(0.5 * n as f32)?;
        let mut loss = of_shares.add(&of_scales)?.add(&of_variances)?.scale(self.form.weight as f32)?;
        if self.form.entropy {
            loss = loss.add(&w.unary(Unary::Square)?.sum()?)?;
        }
        Ok(loss.scale(1.0 / self.matrices as f32)?)
    }
}

/// max(x, least).
fn at_least(x: &Tensor, least: f32) -> Result<Tensor> {
    Ok(x.unary(Unary::Shift(-least))?.unary(Unary::Relu)?.unary(Unary::Shift(least))?)
}

fn identity(n: usize) -> Result<Tensor> {
    let one = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
    Ok(Tensor::from_vec(one, [n, n])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Base, Layout, Mode, Pass, Patched};
    use engraft_tensor::testing::{close, sample};
    use serde_json::json;

    const Q: &str = "layers.0.attn.q";

    fn settings() -> Value {
        json!({ "rank": 2, "alpha": 4, "monteclora": true, "monteclora_num_samples": 3, "monteclora_sample_scaler": 0.5,
            "monteclora_kl_loss_weight": 0.1, "monteclora_use_entropy": true })
    }

    fn sampler(spread: Vec<f32>, concentrations: Vec<f32>) -> Sampler {
        let form = MonteClora {
            samples: concentrations.len(),
            entropy: true,
            prior: 0.3,
            scaler: 1.0,
            weight: 0.7,
            found: None,
        };
        let param = |v: Vec<f32>| {
            let n = v.len();
            Param::new(Tensor::from_vec(v, [n]).unwrap())
        };
        Sampler {
            variances: Param::frozen(identity(spread.len()).unwrap()),
            shares: Param::frozen(Tensor::zeros([concentrations.len()])),
            spread: param(spread),
            concentrations: param(concentrations),
            matrices: 2,
            form,
        }
    }

    fn site() -> Site {
        let (sites, _) = toy();
        sites.get(site_id(&sites, Q)).clone()
    }

    /// E[A′] = A; v is e^{2σ}·χ²ᵣ, of mean e^{2σ}·r and variance e^{4σ}·2r; given w and v a number of the noise has variance v·Σw².
    #[test]
    fn the_law_of_the_samples() {
        let (rank, inn, steps) = (3, 50, 3000);
        let spread = vec![0.0, 0.3, -0.2];
        let sampler = sampler(spread.clone(), vec![0.5, 1.0]);
        let a = sample(&[rank, inn], 1);
        let (mut mean, mut first, mut second, mut ratio) =
            (vec![0.0f64; rank * inn], [0.0f64; 3], [0.0f64; 3], [0.0f64; 3]);
        for step in 0..steps {
            let [drawn, _] = sampler.draw(&a, &site(), (7, step, 0)).unwrap();
            let noise = drawn.sub(&a).unwrap().to_vec().unwrap();
            let w = sampler.shares.value().to_vec().unwrap();
            assert!((w.iter().sum::<f32>() - 1.0).abs() < 1e-5 && w.iter().all(|w| *w >= 0.0));
            let of_shares: f64 = w.iter().map(|w| f64::from(w * w)).sum();
            let v = sampler.variances.value().to_vec().unwrap();
            for r in 0..rank {
                let own = f64::from(v[r * rank + r]);
                first[r] += own / steps as f64;
                second[r] += own * own / steps as f64;
                let squares = noise[r * inn..(r + 1) * inn].iter().map(|n| f64::from(n * n)).sum::<f64>();
                ratio[r] += squares / (inn as f64 * own * of_shares) / steps as f64;
            }
            mean.iter_mut().zip(&noise).for_each(|(m, n)| *m += f64::from(*n) / steps as f64);
        }
        let worst = mean.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        assert!(worst < 0.2, "{worst}");
        for r in 0..rank {
            let scale = f64::from(2.0 * spread[r]).exp();
            let variance = second[r] - first[r] * first[r];
            assert!((first[r] / (scale * 3.0) - 1.0).abs() < 0.06, "{first:?}");
            assert!((variance / (scale * scale * 6.0) - 1.0).abs() < 0.2, "{variance} {scale}");
            assert!((ratio[r] - 1.0).abs() < 0.03, "{ratio:?}");
        }
    }

    /// With equal concentrations the shares are equal in the mean, and a larger one draws more.
    #[test]
    fn the_law_of_the_shares() {
        let mean = |concentrations: Vec<f32>| {
            let sampler = sampler(vec![0.0], concentrations.clone());
            let mut mean = vec![0.0f32; concentrations.len()];
            for step in 0..2000 {
                sampler.draw(&Tensor::zeros([1, 1]), &site(), (3, step, 1)).unwrap();
                let w = sampler.shares.value().to_vec().unwrap();
                mean.iter_mut().zip(w).for_each(|(m, w)| *m += w / 2000.0);
            }
            mean
        };
        assert!(mean(vec![0.4; 4]).iter().all(|m| (m - 0.25).abs() < 0.02));
        let apart = mean(vec![1.5, 0.0, 0.0]);
        assert!(apart[0] > 0.6 && (apart[1] - apart[2]).abs() < 0.02, "{apart:?}");
    }

    #[test]
    fn the_gradients_of_samples_and_loss() {
        let (own, g) = (sampler(vec![0.2, -0.3], vec![0.4, 0.1, -0.2]), sample(&[2, 4], 5));
        let a = Param::new(sample(&[2, 4], 1));
        let of = || {
            let [drawn, loss] = own.draw(&a.get(), &site(), (1, 1, 0)).unwrap();
            drawn.mul(&g).unwrap().sum().unwrap().add(&loss).unwrap()
        };
        let gradients = of().backward().unwrap();
        close(gradients.get(&a).unwrap(), &g, 1e-6);
        for param in [&own.spread, &own.concentrations] {
            let (found, start) = (gradients.get(param).unwrap().to_vec().unwrap(), param.value());
            for (i, found) in found.into_iter().enumerate() {
                let at = |h: f32| {
                    let mut moved = start.to_vec().unwrap();
                    moved[i] += h;
                    param.set(Tensor::from_vec(moved, [start.len()]).unwrap()).unwrap();
                    of().item().unwrap()
                };
                let expected = (at(1e-2) - at(-1e-2)) / 2e-2;
                param.set(start.clone()).unwrap();
                assert!((found - expected).abs() < 1e-2 * expected.abs().max(0.5), "{found} {expected}");
            }
        }
    }

    #[test]
    fn outside_training_it_is_lora_and_in_training_the_loss_is_carried() {
        let methods = [chosen("lora", settings())];
        let a = attached(&methods, &[]);
        // r(m + n) + r + N at q [6, 6] and v [4, 6] of two layers.
        assert_eq!(a.adapter.trained_count(), 2 * (2 * (6 + 6) + 2 * (6 + 4) + 2 * (2 + 3)));
        stir(&a, 0.5);
        let x = sample(&[5, 6], 3);
        let (fast, defined) = both_ways(&a, Q, &x);
        close(&fast, &defined, 1e-5);
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, Q));
        let engraft_nn::Value::Weight(weight) = &site.value else { panic!("no weight") };
        let run = |step, share| {
            let mode = Mode::Train { seed: 1, step, micro: 0 };
            let cx = Pass::new(Layout::counted(&[5]).unwrap(), None).training(mode).sharing(share);
            Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx).forward(&x).unwrap()
        };
        let (one, two) = (run(1, 1.0), run(2, 1.0));
        assert_ne!(one.to_vec().unwrap(), two.to_vec().unwrap());
        assert_eq!(one.to_vec().unwrap(), run(1, 0.5).to_vec().unwrap());
        // B at zero: the loss of the outputs says nothing of σ, the carried term does, by its share.
        let b = a.adapter.params().iter().find(|p| p.name == format!("{Q}.lora_B.weight")).unwrap();
        b.param.set(Tensor::zeros([6, 2])).unwrap();
        let spread =
            a.adapter.params().iter().find(|p| p.name.starts_with(Q) && p.name.ends_with("std_prior"));
        let of = |share| {
            let all = run(1, share).sum().unwrap().backward().unwrap();
            all.get(&spread.unwrap().param).unwrap().clone()
        };
        close(&of(0.25), &of(1.0).scale(0.25).unwrap(), 1e-5);
        assert!(of(1.0).to_vec().unwrap().iter().all(|g| *g != 0.0));
    }

    #[test]
    fn configurations() {
        let methods = [chosen("lora", settings())];
        survives_saving(&methods, &["head"]);
        let good = config(&methods, &[]);
        let expected = json!({ "buffer_size": 150, "dirichlet_prior": 0.1, "kl_loss_weight": 0.1, "num_samples": 3,
            "sample_scaler": 0.5, "use_entropy": true });
        assert_eq!(good["monteclora_config"], expected);
        for bad in [
            json!({ "num_samples": 0 }),
            json!({ "dirichlet_prior": 0.0 }),
            json!({ "buffer_size": 0 }),
            json!({ "noise": 2 }),
        ] {
            let bad = with(good.clone(), json!({ "monteclora_config": bad }));
            let Err(error) = crate::from_file(&bad) else { panic!("{} passed", bad["monteclora_config"]) };
            assert!(error.to_string().contains("monteclora_config"), "{error}");
        }
        let both = with(good, json!({ "velora_config": {} }));
        assert!(crate::from_file(&both).err().unwrap().to_string().contains("cannot be combined"));
    }
}
