//! FourierFT: a change of the weight made of a few frequencies.
//!
//! W′ = W + α·Re(F⁻¹(C)), with F⁻¹ the inverse two-dimensional Fourier transform, divided by out·in, of a matrix C [out, in]
//! that is zero but at N places, drawn once from a seed. The coefficients start as standard normal noise, which changes the
//! model, or as zero. The forward never forms ΔW: a row is transformed, its frequencies are multiplied and moved, and
//! transformed back.
//!
//! Gao et al. 2024, arXiv:2405.03003. As `peft` has it: the places are the first N of PyTorch's `randperm(out · in)`.
//!
//! fourierft_spectrum `[N]`.

use std::sync::Arc;

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Frequencies;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Pattern, Reader, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, float, int};
use crate::shared::places;
use crate::shared::torch_random::{Generator, Seed};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

const COUNT_MAX: usize = 1 << 24;
const OF_TARGETS: &str = "fourier_only";

struct FourierFt {
    count: usize,
    scaling: f64,
    seed: Seed,
    zero: bool,
    bias: Biases,
    count_pattern: Vec<Pattern>,
}

static INFO: Info = Info {
    name: "fourierft",
    title: "FourierFT",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2405.03003",
    summary: "W′ = W + α·Re(F⁻¹(C)), C zero but at N random places",
    mergeable: true,
    identity_at_init: false,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "FOURIERFT",
    fields: &[
        int(
            "n_frequency",
            (1, COUNT_MAX as i64),
            Some("1000"),
            "Number N of frequencies, which are what a module trains.",
        ),
        float("scaling", (0.0, 1e9), "150", "Factor α on the change."),
        int(
            "random_loc_seed",
            (0, u32::MAX as i64),
            Some("777"),
            "Seed of the places of the frequencies, as PyTorch draws from it.",
        ),
        choice(
            "init",
            &["normal", "zeros"],
            "\"normal\"",
            "How the coefficients start; normal noise changes the model from the start.",
        ),
        choice(
            "bias",
            &["none", "all", OF_TARGETS],
            "\"none\"",
            "Which biases of the model are trained too.",
        ),
        Field {
            name: "n_frequency_pattern",
            kind: FieldKind::IntMap,
            default: Some("{}"),
            doc: "Other numbers of frequencies for modules that a pattern matches.",
        },
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let zero = r.one_of("init", &[("normal", false), ("zeros", true)]);
    let method = FourierFt { zero, ..read(&mut r) };
    r.finish()?;
    Ok(Box::new(method))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.ignore(&["fan_in_fan_out"]);
    let method = FourierFt { zero: r.flag("init_weights", false), ..read(&mut r) };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(method), targets, train_also }))
}

fn read(r: &mut Reader<'_>) -> FourierFt {
    let method = FourierFt {
        count: r.count("n_frequency", 1000, COUNT_MAX),
        scaling: r.float("scaling", 150.0),
        seed: r.torch_seed("random_loc_seed", 777),
        zero: false,
        bias: Biases::read(r, OF_TARGETS),
        count_pattern: r.patterns("n_frequency_pattern"),
    };
    for p in method.count_pattern.iter().filter_map(|p| p.not_a_count(COUNT_MAX)) {
        r.problem(format!("`n_frequency_pattern`: expected a whole number from 1 to {COUNT_MAX}, found {p}"));
    }
    method
}

fn example() -> Box<dyn Method> {
    let (bias, count_pattern) = (Biases::None, vec![]);
    Box::new(FourierFt { count: 40, scaling: 60.0, seed: Seed::of(3), zero: false, bias, count_pattern })
}

impl Method for FourierFt {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        for site in b.targets() {
            let (out, inn) = places::linear(site, INFO.title)?;
            let count = Pattern::find(&self.count_pattern, &site.path).map_or(self.count, |n| n as usize);
            if count > out * inn {
                let message = format!("has {} frequencies; lower `n_frequency` from {count}", out * inn);
                return places::unfit(site, message);
            }
            let drawn = Generator::new(self.seed).permutation(out * inn, count);
            let drawn: Vec<(usize, usize)> = drawn.into_iter().map(|at| (at / inn, at % inn)).collect();
            let init = if self.zero { Init::Zeros } else { Init::Normal(1.0) };
            let spectrum = b.param(&format!("{}.fourierft_spectrum", site.path), &[count], init)?;
            let scale = (self.scaling / (out * inn) as f64) as f32;
            let frequencies = Frequencies::new(out, inn, &drawn)?;
            b.patch(site.id, Patch::Weight(Box::new(Spectrum { spectrum, frequencies, inn, scale })))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "bias": self.bias.name(OF_TARGETS), "fan_in_fan_out": false, "init_weights": self.zero,
            "layers_pattern": null, "layers_to_transform": null, "n_frequency": self.count,
            "n_frequency_pattern": Pattern::table(&self.count_pattern), "random_loc_seed": self.seed.written(),
            "scaling": number(self.scaling),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// α·Re(F⁻¹(C)).
struct Spectrum {
    spectrum: Param,
    frequencies: Arc<Frequencies>,
    inn: usize,
    scale: f32,
}

impl Spectrum {
    /// x·ΔWᵀ.
    fn moved(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.few_frequencies(&self.spectrum.get().scale(self.scale)?, &self.frequencies)?)
    }
}

impl WeightPatch for Spectrum {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let mut unit = vec![0.0; self.inn * self.inn];
        unit.iter_mut().step_by(self.inn + 1).for_each(|v| *v = 1.0);
        let unit = Tensor::from_vec(unit, [self.inn, self.inn])?;
        Ok(base.dense()?.add(&self.moved(&unit)?.t()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        Ok(base.forward(x)?.plus(&self.moved(x)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};
    use std::f64::consts::TAU;

    #[test]
    fn is_the_inverse_transform_of_its_spectrum() {
        let settings = json!({ "n_frequency": 7, "scaling": 50, "n_frequency_pattern": { "v": 4 } });
        let a = attached(&[chosen("fourierft", settings)], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * (7 + 4));
        for (path, out, count) in [("layers.0.attn.q", 6, 7), ("layers.1.attn.v", 4, 4)] {
            let name = format!("{path}.fourierft_spectrum");
            let c =
                a.adapter.params().iter().find(|p| p.name == name).unwrap().param.value().to_vec().unwrap();
            let places = Generator::new(Seed::of(777)).permutation(out * 6, count);
            let mut change = vec![0.0f32; out * 6];
            for (at, value) in change.iter_mut().enumerate() {
                let sum = places.iter().zip(&c).map(|(place, c)| {
                    let (u, v) = (place / 6, place % 6);
                    let turn = (u * (at / 6)) as f64 / out as f64 + (v * (at % 6)) as f64 / 6.0;
                    f64::from(*c) * (TAU * turn).cos()
                });
                *value = (50.0 * sum.sum::<f64>() / (out * 6) as f64) as f32;
            }
            let changed = frozen(path).add(&Tensor::from_vec(change, [out, 6]).unwrap()).unwrap();
            let x = sample(&[5, 6], 3);
            let (fast, defined) = both_ways(&a, path, &x);
            close(&defined, &x.matmul_t(&changed).unwrap(), 1e-5);
            close(&fast, &defined, 1e-5);
        }
        let still = attached(&[chosen("fourierft", json!({ "n_frequency": 7, "init": "zeros" }))], &[]);
        let x = sample(&[5, 6], 3);
        let q = "layers.0.attn.q";
        close(&both_ways(&still, q, &x).0, &x.matmul_t(&frozen(q)).unwrap(), 1e-6);
    }

    #[test]
    fn configurations() {
        let settings = json!({ "n_frequency": 5, "bias": "fourier_only", "n_frequency_pattern": { "q": 3 } });
        survives_saving(&[chosen("fourierft", settings)], &["head"]);
        let written = config(&[chosen("fourierft", json!({ "n_frequency": 5 }))], &[]);
        assert_eq!((&written["scaling"], &written["random_loc_seed"]), (&json!(150), &json!(777)));
        for bad in [json!({ "n_frequency": 0 }), json!({ "bias": "some" }), json!({ "random_loc_seed": 0.5 })]
        {
            assert!(from_file(&with(written.clone(), bad)).is_err());
        }
        let (sites, info) = toy();
        let many = [chosen("fourierft", json!({ "n_frequency": 25 }))];
        assert!(crate::attach(&many, &[], &sites, &info, 0).is_err(), "v has 24 places");
    }
}
