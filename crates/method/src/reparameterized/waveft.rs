//! WaveFT: a change of the weight made of a few wavelets.
//!
//! W′ = W + λ·IDWT(C), one level of the inverse two-dimensional wavelet transform of a matrix C that is zero but at N places,
//! drawn once from a seed. C is as large as the weight and the filters' reach, its four quarters are the bands; the result
//! is cut to the weight's size. A wavelet touches as many rows and columns as its filter is long, so ΔW is sparse and the
//! forward multiplies by its places alone. Without the transform (`use_idwt = false`) ΔW is λ·C itself. The coefficients
//! start as zero, so W′ = W.
//!
//! Bilican et al. 2025, arXiv:2505.12532. As `peft` has it: the places are the first N of PyTorch's `randperm(out · in)`.
//!
//! waveft_spectrum `[N]`.

use std::sync::Arc;

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Pattern, Reader, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::torch_random::{Generator, Seed};
use crate::shared::{places, wavelets};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

const COUNT_MAX: usize = 1 << 24;
const OF_TARGETS: &str = "waveft_only";

struct WaveFt {
    count: usize,
    scaling: f64,
    wavelet: String,
    use_idwt: bool,
    seed: Seed,
    zero: bool,
    /// Whether targets share all coefficients by their sizes.
    proportional: bool,
    bias: Biases,
    count_pattern: Vec<Pattern>,
}

static INFO: Info = Info {
    name: "waveft",
    title: "WaveFT",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2505.12532",
    summary: "W′ = W + λ·IDWT(C), C zero but at N random places",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "WAVEFT",
    fields: &[
        int(
            "n_frequency",
            (1, COUNT_MAX as i64),
            Some("2592"),
            "Number N of wavelets, whose coefficients are what a module trains.",
        ),
        float("scaling", (0.0, 1e9), "25", "Factor λ on the change."),
        Field {
            name: "wavelet_family",
            kind: FieldKind::Text,
            default: Some("\"db1\""),
            doc: "Which wavelets: db1 (Haar) to db10, sym2 to sym10, coif1 to coif3.",
        },
        flag(
            "use_idwt",
            "true",
            "Make the change of wavelets; otherwise each coefficient changes one number.",
        ),
        int(
            "random_loc_seed",
            (0, u32::MAX as i64),
            Some("777"),
            "Seed of the places of the wavelets, as PyTorch draws from it.",
        ),
        flag("proportional_parameters", "false", "Share the coefficients of all modules out by their sizes."),
        choice(
            "init",
            &["zeros", "normal"],
            "\"zeros\"",
            "How the coefficients start; small normal noise changes the model from the start.",
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
            doc: "Other numbers of wavelets for modules that a pattern matches.",
        },
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let zero = r.one_of("init", &[("zeros", true), ("normal", false)]);
    let method = WaveFt { zero, ..read(&mut r) };
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
    let method = WaveFt { zero: r.flag("init_weights", true), ..read(&mut r) };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(method), targets, train_also }))
}

fn read(r: &mut Reader<'_>) -> WaveFt {
    let method = WaveFt {
        count: r.count("n_frequency", 2592, COUNT_MAX),
        scaling: r.float("scaling", 25.0),
        wavelet: r.text("wavelet_family").unwrap_or_else(|| "db1".into()),
        use_idwt: r.flag("use_idwt", true),
        seed: r.torch_seed("random_loc_seed", 777),
        zero: true,
        proportional: r.flag("proportional_parameters", false),
        bias: Biases::read(r, OF_TARGETS),
        count_pattern: r.patterns("n_frequency_pattern"),
    };
    // Without the transform the family is only a word of the file.
    let unused = !method.use_idwt && ["coif4", "coif5"].contains(&&*method.wavelet);
    if wavelets::filters(&method.wavelet).is_none() && !unused {
        let known = wavelets::names().join(", ");
        let why = match &*method.wavelet {
            "coif4" | "coif5" => {
                ": peft's numbers for this family are those of no wavelet, and for coif5 it cannot compute with them at all"
            }
            _ => "",
        };
        r.problem(format!("`wavelet_family`: expected one of {known}, found {}{why}", method.wavelet));
    }
    for p in method.count_pattern.iter().filter_map(|p| p.not_a_count(COUNT_MAX)) {
        r.problem(format!("`n_frequency_pattern`: expected a whole number from 1 to {COUNT_MAX}, found {p}"));
    }
    method
}

fn example() -> Box<dyn Method> {
    Box::new(WaveFt {
        count: 60,
        scaling: 4.0,
        wavelet: "db2".into(),
        use_idwt: true,
        seed: Seed::of(3),
        zero: true,
        proportional: false,
        bias: Biases::None,
        count_pattern: vec![],
    })
}

impl Method for WaveFt {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        let sizes: Vec<(usize, usize)> =
            b.targets().iter().map(|site| places::linear(site, INFO.title)).collect::<Result<_>>()?;
        let total: usize = sizes.iter().map(|(out, inn)| out * inn).sum();
        for (site, &(out, inn)) in b.targets().into_iter().zip(&sizes) {
            let share = (out * inn) as f64 / total as f64 * (self.count * sizes.len()) as f64;
            let count = match Pattern::find(&self.count_pattern, &site.path) {
                // As Python rounds: of two as near the even one.
                _ if self.proportional => (share.round_ties_even() as usize).max(1),
                found => found.map_or(self.count, |n| n as usize),
            };
            if count > out * inn {
                let message = format!("has {} places; lower `n_frequency` from {count}", out * inn);
                return places::unfit(site, message);
            }
            let init = if self.zero { Init::Zeros } else { Init::Normal(0.01) };
            let spectrum = b.param(&format!("{}.waveft_spectrum", site.path), &[count], init)?;
            let drawn = Generator::new(self.seed).permutation(out * inn, count);
            let drawn = drawn.into_iter().map(|at| (at / inn, at % inn));
            let made = self.wavelets([out, inn], drawn)?;
            b.patch(site.id, Patch::Weight(Box::new(Spectrum { spectrum, ..made })))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "bias": self.bias.name(OF_TARGETS), "fan_in_fan_out": false, "init_weights": self.zero,
            "layers_pattern": null, "layers_to_transform": null, "n_frequency": self.count,
            "n_frequency_pattern": Pattern::table(&self.count_pattern),
            "proportional_parameters": self.proportional, "random_loc_seed": self.seed.written(),
            "scaling": number(self.scaling), "use_idwt": self.use_idwt, "wavelet_family": self.wavelet,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl WaveFt {
    /// What the coefficients at `drawn` places change in a weight [out, in].
    fn wavelets(&self, size: [usize; 2], drawn: impl Iterator<Item = (usize, usize)>) -> Result<Spectrum> {
        // (place in the weight as one row, coefficient, factor)
        let mut entries: Vec<(u64, i64, f32)> = Vec::new();
        let flat = |row: usize, column: usize| (row * size[1] + column) as u64;
        let bands = self.use_idwt.then(|| size.map(|n| Axis::new(n, &self.wavelet)));
        for (k, (row, column)) in drawn.enumerate() {
            let Some([down, across]) = &bands else {
                entries.push((flat(row, column), k as i64, self.scaling as f32));
                continue;
            };
            let (row, column) = (row + down.offset, column + across.offset);
            // The rows' filter follows the half that the column lies in, and the columns' that of the row.
            let rows: Vec<_> = down.touched(row, column >= across.half).collect();
            for (column, c) in across.touched(column, row >= down.half) {
                for &(row, r) in &rows {
                    entries.push((flat(row, column), k as i64, (self.scaling * r * c) as f32));
                }
            }
        }
        entries.sort_by_key(|entry| entry.0);
        let count = entries.len();
        let places = ops::Pattern::with_repeats(entries.iter().map(|e| e.0), (size[0], size[1]), 0)?;
        Ok(Spectrum {
            spectrum: Param::frozen(Tensor::zeros([0])),
            places: Arc::new(places),
            from: Tensor::from_i64(entries.iter().map(|e| e.1).collect(), [count])?,
            factors: Tensor::from_vec(entries.iter().map(|e| e.2).collect(), [count])?,
        })
    }
}

/// One dimension of the transform.
struct Axis {
    /// Size of the weight.
    size: usize,
    filters: [Vec<f64>; 2],
    /// Places of a band.
    half: usize,
    /// Where the weight's first place lies among those of the coefficients.
    offset: usize,
    /// What is cut off in front of what the filters make.
    cut: usize,
}

impl Axis {
    fn new(size: usize, wavelet: &str) -> Axis {
        let filters = wavelets::filters(wavelet).unwrap_or_default();
        let reach = filters[0].len().saturating_sub(2);
        let padded = (size + reach).next_multiple_of(2);
        // The bands make 2·half + reach numbers, of which the reach falls away on both sides, and the rest evenly.
        let made = padded - reach;
        Axis { size, half: padded / 2, offset: (padded - size) / 2, cut: reach + (made - size) / 2, filters }
    }

    /// The places of the weight that coefficient `at` touches, by the highpass filter where `high`, and their factors.
    fn touched(&self, at: usize, high: bool) -> impl Iterator<Item = (usize, f64)> {
        let first = 2 * (at % self.half);
        let filter = self.filters[usize::from(high)].iter().enumerate();
        filter.filter_map(move |(t, &f)| {
            let place = (first + t).checked_sub(self.cut)?;
            (place < self.size).then_some((place, f))
        })
    }
}

/// Coefficients and the places that they change.
struct Spectrum {
    spectrum: Param,
    /// May name a place several times.
    places: Arc<ops::Pattern>,
    /// The coefficient of each place.
    from: Tensor,
    /// Its factor there.
    factors: Tensor,
}

impl Spectrum {
    /// What is added at each place.
    fn values(&self) -> Result<Tensor> {
        let spectrum = self.spectrum.get();
        let read = spectrum.reshape([spectrum.len(), 1])?.gather(&self.from)?;
        Ok(read.reshape([self.factors.len()])?.mul(&self.factors)?)
    }
}

impl WeightPatch for Spectrum {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.scatter_sparse(&self.values()?, &self.places)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        Ok(base.forward(x)?.add_sparse(x, &self.values()?, &self.places)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn all_coefficients_make_every_change_of_haar_s_wavelets() {
        // With all 36 places of q, Haar's transform keeps lengths.
        let settings = json!({ "n_frequency": 24, "scaling": 2.0, "n_frequency_pattern": { "q": 36 } });
        let a = attached(&[chosen("waveft", settings)], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * (36 + 24));
        let q = "layers.0.attn.q";
        let x = sample(&[5, 6], 3);
        close(&both_ways(&a, q, &x).0, &x.matmul_t(&frozen(q)).unwrap(), 1e-6);
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, q, &x);
        close(&fast, &defined, 1e-5);
        let squares = |t: &Tensor| t.to_vec().unwrap().iter().map(|v| v * v).sum::<f32>();
        let change = merged(&a, q).sub(&frozen(q)).unwrap();
        let spectrum = value_of(&a, &format!("{q}.waveft_spectrum"));
        assert!((squares(&change) / (4.0 * squares(&spectrum)) - 1.0).abs() < 1e-3);
    }

    #[test]
    fn without_the_transform_each_coefficient_changes_one_number() {
        let settings = json!({ "n_frequency": 7, "scaling": 3.0, "use_idwt": false, "random_loc_seed": 5 });
        let a = attached(&[chosen("waveft", settings)], &[]);
        stir(&a, 0.5);
        let q = "layers.0.attn.q";
        let mut expected = frozen(q).to_vec().unwrap();
        let spectrum = value_of(&a, &format!("{q}.waveft_spectrum")).to_vec().unwrap();
        let drawn = Generator::new(Seed::of(5)).permutation(36, 7);
        drawn.iter().zip(&spectrum).for_each(|(&at, c)| expected[at] += 3.0 * c);
        close(&merged(&a, q), &Tensor::from_vec(expected, [6, 6]).unwrap(), 1e-6);
    }

    #[test]
    fn coefficients_are_shared_out_by_size() {
        let a =
            attached(&[chosen("waveft", json!({ "n_frequency": 10, "proportional_parameters": true }))], &[]);
        let count = |path: &str| value_of(&a, &format!("{path}.waveft_spectrum")).len();
        assert_eq!([count("layers.0.attn.q"), count("layers.0.attn.v")], [12, 8]);
    }

    #[test]
    fn configurations() {
        let settings =
            json!({ "n_frequency": 9, "wavelet_family": "sym4", "bias": "waveft_only", "init": "normal" });
        survives_saving(&[chosen("waveft", settings)], &["head"]);
        let written = config(&[chosen("waveft", json!({ "n_frequency": 9 }))], &[]);
        assert_eq!(written["scaling"], json!(25));
        for bad in
            [json!({ "wavelet_family": "coif5" }), json!({ "n_frequency": 0 }), json!({ "bias": "some" })]
        {
            assert!(from_file(&with(written.clone(), bad)).is_err());
        }
        let (sites, info) = toy();
        assert!(crate::attach(&[chosen("waveft", json!({}))], &[], &sites, &info, 0).is_err(), "too many");
    }
}
