//! SSF: scale and shift after every operation of the model.
//!
//! y′ = γ ⊙ y + β behind each linear layer, norm and patch embedding, so that W′ = diag(γ)·W, b′ = γ ⊙ b + β, and a norm's gain
//! and bias likewise. γ starts as N(1, 0.02), β as N(0, 0.02); with `init = "identity"` as ones and zeros. A norm without bias
//! (RMS norm) is scaled alone; β behind a layer without bias is added to its output, and cannot be folded into it.
//!
//! Lian et al. 2022, arXiv:2210.08823, equations 3 to 6.
//!
//! Of each module: ssf_scale and ssf_shift `[out]`.

use engraft_nn::{
    Base, Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, VectorPatch, WeightPatch,
};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{choice, flag};
use crate::{Described, Entry, Info, Loaded, Method, peft};

struct Ssf {
    /// Whether norms are scaled and shifted too.
    norms: bool,
    drawn: bool,
}

static INFO: Info = Info {
    name: "ssf",
    title: "SSF",
    class: "additive",
    sites: "weight, norm",
    paper: "arXiv:2210.08823",
    summary: "y′ = γ ⊙ y + β behind every linear layer, norm and patch embedding",
    mergeable: true,
    identity_at_init: false,
    default_roles: Some(&[
        Role::PatchEmbed,
        Role::Q,
        Role::K,
        Role::V,
        Role::O,
        Role::CrossQ,
        Role::CrossK,
        Role::CrossV,
        Role::CrossO,
        Role::Gate,
        Role::Up,
        Role::Down,
    ]),
    peft_type: "ENGRAFT_SSF",
    fields: &[
        flag("norms", "true", "Scale and shift behind all norms too."),
        choice(
            "init",
            &["normal", "identity"],
            "\"normal\"",
            "Start with a deviation of 0.02 around no change, or at no change.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn read(r: &mut Reader<'_>) -> Ssf {
    Ssf { norms: r.flag("norms", true), drawn: r.one_of("init", &[("normal", true), ("identity", false)]) }
}

fn example() -> Box<dyn Method> {
    Box::new(Ssf { norms: true, drawn: true })
}

impl Ssf {
    fn both(&self, b: &mut Builder<'_>, module: &str, out: usize, has_shift: bool) -> Result<Both> {
        let (scale, shift) = (format!("{module}.ssf_scale"), format!("{module}.ssf_shift"));
        let starts = match self.drawn {
            false => [Init::Ones, Init::Zeros],
            true => {
                let around = Init::Normal(0.02).tensor(&[out], b.seed(), &scale)?;
                [Init::Values(around.unary(Unary::Shift(1.0))?), Init::Normal(0.02)]
            }
        };
        let [one, zero] = starts;
        let scale = b.param(&scale, &[out], one)?;
        let shift = if has_shift { Some(b.param(&shift, &[out], zero)?) } else { None };
        Ok(Both { scale, shift })
    }

    fn at_weight(&self, b: &mut Builder<'_>, site: &Site) -> Result<()> {
        let out = match site.kind {
            Kind::Linear { out, .. } | Kind::Convolution { out, .. } => out,
            _ => {
                let message = "SSF scales what layers compute; leave the embedding out of the targets".into();
                return Err(Error::Site { path: site.path.clone(), message });
            }
        };
        let both = self.both(b, &site.path, out, true)?;
        match b.sites().bias_of(&site.path) {
            Some(bias) => {
                b.patch(bias.id, Patch::Vector(Box::new(both.clone())))?;
                b.patch(site.id, Patch::Weight(Box::new(Scaled { scale: both.scale, shift: None })))
            }
            None => {
                b.patch(site.id, Patch::Weight(Box::new(Scaled { scale: both.scale, shift: both.shift })))
            }
        }
    }

    fn at_norm(&self, b: &mut Builder<'_>, gain: &Site) -> Result<()> {
        let (Some(module), Kind::Vector { len }) = (gain.path.strip_suffix(".weight"), &gain.kind) else {
            return Ok(());
        };
        let bias = b.sites().bias_of(module);
        let both = self.both(b, module, *len, bias.is_some())?;
        b.patch(gain.id, Patch::Vector(Box::new(Both { shift: None, ..both.clone() })))?;
        match bias {
            Some(bias) => b.patch(bias.id, Patch::Vector(Box::new(both))),
            None => Ok(()),
        }
    }
}

impl Method for Ssf {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("2·o + n")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            self.at_weight(b, site)?;
        }
        if self.norms {
            let norms: Vec<&Site> = b.sites().iter().filter(|s| s.role == Role::Norm).collect();
            for gain in norms.into_iter().filter(|s| !b.replaced(s.id)).collect::<Vec<_>>() {
                self.at_norm(b, gain)?;
            }
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "init": if self.drawn { "normal" } else { "identity" }, "layers_pattern": null, "layers_to_transform": null,
            "norms": self.norms,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// γ ⊙ v + β; β is left out where it belongs to another vector.
#[derive(Clone)]
struct Both {
    scale: Param,
    shift: Option<Param>,
}

impl VectorPatch for Both {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        let scaled = v.mul(&self.scale.get())?;
        match &self.shift {
            Some(shift) => Ok(scaled.plus(&shift.get())?),
            None => Ok(scaled),
        }
    }
}

/// diag(γ)·W, and β where the layer has no bias that takes it.
struct Scaled {
    scale: Param,
    shift: Option<Param>,
}

impl WeightPatch for Scaled {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let scale = self.scale.get();
        Ok(base.dense()?.mul(&scale.reshape([scale.len(), 1])?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let y = base.forward(x)?.mul(&self.scale.get())?;
        match &self.shift {
            Some(shift) => Ok(y.plus(&shift.get())?),
            None => Ok(y),
        }
    }

    fn mergeable(&self) -> bool {
        self.shift.is_none()
    }

    fn lacks_bias(&self) -> bool {
        self.shift.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn scales_and_shifts_what_comes_out() {
        let a = attached(&[chosen("ssf", json!({ "init": "identity" }))], &[]);
        let q = "layers.0.attn.q";
        let x = sample(&[5, 6], 3);
        close(&both_ways(&a, q, &x).0, &x.matmul_t(&frozen(q)).unwrap(), 1e-6);
        // Twice the outputs of q, k, v, down and of the norm, in two layers.
        assert_eq!(a.adapter.trained_count(), 2 * 2 * (6 + 4 + 4 + 6 + 6));
        stir(&a, 0.5);
        let get = |module: &str, end: &str| value_of(&a, &format!("{module}.ssf_{end}"));
        let (fast, defined) = both_ways(&a, q, &x);
        close(&fast, &defined, 1e-5);
        let bias = vector(&a, "layers.0.attn.q.bias");
        let plain = x.matmul_t(&frozen(q)).unwrap().add(&frozen("layers.0.attn.q.bias")).unwrap();
        let wanted = plain.mul(&get(q, "scale")).unwrap().add(&get(q, "shift")).unwrap();
        close(&fast.add(&bias).unwrap(), &wanted, 1e-5);
        // v has no bias: what is added to its output is no part of a weight.
        let v = "layers.1.attn.v";
        let plain = x.matmul_t(&frozen(v)).unwrap();
        let wanted = plain.mul(&get(v, "scale")).unwrap().add(&get(v, "shift")).unwrap();
        close(&both_ways(&a, v, &x).0, &wanted, 1e-5);
        let norm = "layers.1.norm";
        let gain = frozen("layers.1.norm.weight").mul(&get(norm, "scale")).unwrap();
        close(&vector(&a, "layers.1.norm.weight"), &gain, 1e-6);
        let shifted = frozen("layers.1.norm.bias").mul(&get(norm, "scale")).unwrap();
        close(&vector(&a, "layers.1.norm.bias"), &shifted.add(&get(norm, "shift")).unwrap(), 1e-6);
    }

    #[test]
    fn starts_around_no_change() {
        let a = attached(&[chosen("ssf", json!({}))], &[]);
        for p in a.adapter.params() {
            let middle = if p.name.ends_with("scale") { 1.0 } else { 0.0 };
            let values = p.param.value().to_vec().unwrap();
            assert!(values.iter().all(|v| (v - middle).abs() < 0.2 && *v != middle), "{}", p.name);
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("ssf", json!({}))], &["head"]);
        survives_saving(&[chosen("ssf", json!({ "norms": false, "init": "identity" }))], &[]);
        let (sites, info) = toy();
        let table = [(chosen("ssf", json!({})).0, Some(engraft_nn::Targets::names(["tok"])))];
        assert!(crate::attach(&table, &[], &sites, &info, 0).is_err());
        let written = config(&[chosen("ssf", json!({}))], &[]);
        assert!(from_file(&with(written, json!({ "init": "large" }))).is_err());
    }
}
