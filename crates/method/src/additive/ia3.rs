//! (IA)³: frozen projections whose outputs (keys, values) or inputs (the MLP's last matrix) are rescaled.
//!
//! y = l ⊙ (x·Wᵀ + b) at most sites, y = (l ⊙ x)·Wᵀ + b at feed-forward ones; l starts as ones.
//! Merged: rows or columns of W, and b, times l.
//!
//! Liu et al. 2022, arXiv:2205.05638.
//!
//! l [out, 1], or [1, in] at feed-forward sites.

use engraft_nn::{
    Base, Builder, Error, Init, Kind, Pass, Patch, Pattern, Result, Role, Site, SiteId, VectorPatch,
    WeightPatch,
};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::hybrid::{Alone, alone};
use crate::read::{Reader, texts};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

struct Ia3 {
    feedforward: Feedforward,
    /// What a file says of how the vectors started: `peft` writes it down again.
    starts_as_ones: bool,
    /// From an `adapter_config.json`, which may name what it does not need.
    from_file: bool,
}

/// Which of the targets are scaled at their input.
#[derive(Clone)]
enum Feedforward {
    /// Those that end an MLP.
    Down,
    /// Those whose path ends so.
    Suffixes(Vec<String>),
    /// Those whose whole path matches.
    Pattern(String, Pattern),
}

static INFO: Info = Info {
    name: "ia3",
    title: "(IA)³",
    class: "additive",
    sites: "weight",
    paper: "arXiv:2205.05638",
    summary: "keys, values and MLP activations times learned vectors",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::K, Role::V, Role::Down]),
    peft_type: "IA3",
    fields: &[Field {
        name: "feedforward",
        kind: FieldKind::TextList,
        default: None,
        doc: "Ends of the paths of targets that are scaled at their input; by default those that end an MLP.",
    }],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let feedforward = r.texts("feedforward").map_or(Feedforward::Down, Feedforward::Suffixes);
    r.finish()?;
    Ok(Box::new(Ia3 { feedforward, starts_as_ones: true, from_file: false }))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return alone(config, &INFO, Alone::Ia3);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.ignore(&["fan_in_fan_out"]);
    let feedforward = read_feedforward(&mut r);
    let starts_as_ones = r.flag("init_ia3_weights", true);
    r.finish()?;
    Ok(Some(Loaded {
        method: Box::new(Ia3 { feedforward, starts_as_ones, from_file: true }),
        targets,
        train_also,
    }))
}

fn read_feedforward(r: &mut Reader<'_>) -> Feedforward {
    let Some(value) = r.value("feedforward_modules").cloned() else { return Feedforward::Down };
    if let Some(names) = texts(&value) {
        return Feedforward::Suffixes(names);
    }
    let Some(text) = value.as_str() else {
        r.problem(format!("`feedforward_modules`: expected a pattern or a list of names, found {value}"));
        return Feedforward::Down;
    };
    match Pattern::whole(text) {
        Ok(pattern) => Feedforward::Pattern(text.into(), pattern),
        Err(e) => {
            r.problem(format!("`feedforward_modules`: `{text}` is not a valid pattern: {e}"));
            Feedforward::Down
        }
    }
}

fn example() -> Box<dyn Method> {
    Box::new(Ia3 { feedforward: Feedforward::Down, starts_as_ones: true, from_file: false })
}

impl Method for Ia3 {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("L·(2·kv + f)")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let targets = b.targets();
        if let (Feedforward::Suffixes(ends), false) = (&self.feedforward, self.from_file) {
            let none = |end: &&String| !targets.iter().any(|site| site.path.ends_with(end.as_str()));
            let none: Vec<&str> = ends.iter().filter(none).map(String::as_str).collect();
            if !none.is_empty() {
                let names = none.join(", ");
                return Err(Error::Unsupported(format!("`feedforward`: no target's name ends in {names}")));
            }
        }
        for site in targets {
            // The shapes of the two vectors, and the inputs that share a number: a channel's, in a convolution.
            let (input, output, shared) = match site.kind {
                Kind::Linear { out, inn, .. } => (vec![1, inn], vec![out, 1], 1),
                Kind::Convolution { shape: [out, channels, height, width], .. } => {
                    (vec![1, channels, 1, 1], vec![1, out, 1, 1], height * width)
                }
                _ => {
                    let message =
                        "(IA)³ rescales linear layers; leave the embedding out of the targets".into();
                    return Err(Error::Site { path: site.path.clone(), message });
                }
            };
            let name = format!("{}.ia3_l", site.path);
            if self.is_feedforward(site) {
                let scale = b.param(&name, &input, Init::Ones)?;
                b.patch(site.id, Patch::Weight(Box::new(ScaledInput { scale, shared })))?;
                continue;
            }
            let scale = b.param(&name, &output, Init::Ones)?;
            if let Some(bias) = b.sites().bias_of(&site.path) {
                b.patch(bias.id, Patch::Vector(Box::new(ScaledOutput(scale.clone()))))?;
            }
            b.patch(site.id, Patch::Weight(Box::new(ScaledOutput(scale))))?;
        }
        Ok(())
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let feedforward = match &self.feedforward {
            Feedforward::Suffixes(names) => json!(names),
            Feedforward::Pattern(text, _) => json!(text),
            Feedforward::Down => json!(self.down_names(model)),
        };
        // peft's (IA)³ has no choice of layers.
        let own = json!({ "fan_in_fan_out": false, "feedforward_modules": feedforward, "init_ia3_weights": self.starts_as_ones });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Ia3 {
    fn is_feedforward(&self, site: &Site) -> bool {
        match &self.feedforward {
            Feedforward::Down => site.role == Role::Down,
            Feedforward::Suffixes(ends) => ends.iter().any(|end| site.path.ends_with(end.as_str())),
            Feedforward::Pattern(_, regex) => regex.is_match(&site.path),
        }
    }

    /// Names that tell the MLP's last matrices from the other targets.
    fn down_names(&self, model: &Described<'_>) -> Vec<String> {
        let site = |id: &SiteId| model.sites.get(*id);
        let down: Vec<&Site> = model.chosen.iter().map(site).filter(|s| s.role == Role::Down).collect();
        let mut names: Vec<String> = down.iter().map(|s| s.module().to_string()).collect();
        names.sort();
        names.dedup();
        let caught = |s: &Site| names.iter().any(|n| s.path.ends_with(n.as_str()));
        let exact = model.chosen.iter().map(site).all(|s| caught(s) == (s.role == Role::Down));
        if exact { names } else { down.iter().map(|s| s.path.clone()).collect() }
    }
}

/// l ⊙ (x·Wᵀ), l ⊙ b.
struct ScaledOutput(Param);

impl WeightPatch for ScaledOutput {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let scale = self.0.get();
        Ok(base.dense()?.mul(&scale.reshape([scale.len(), 1])?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let scale = self.0.get();
        Ok(base.forward(x)?.mul(&scale.reshape([scale.len()])?)?)
    }
}

impl VectorPatch for ScaledOutput {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        let scale = self.0.get();
        Ok(v.mul(&scale.reshape([scale.len()])?)?)
    }
}

/// (l ⊙ x)·Wᵀ.
struct ScaledInput {
    scale: Param,
    /// Inputs, one after another, that share a number.
    shared: usize,
}

impl ScaledInput {
    /// l for every input `[in]`.
    fn of_inputs(&self) -> Result<Tensor> {
        let scale = self.scale.get();
        if self.shared == 1 {
            return Ok(scale.reshape([scale.len()])?);
        }
        let each = scale.reshape([scale.len(), 1])?.mul(&Tensor::full(1.0, [1, self.shared]))?;
        Ok(each.reshape([scale.len() * self.shared])?)
    }
}

impl WeightPatch for ScaledInput {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.mul(&self.of_inputs()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        base.forward(&x.mul(&self.of_inputs()?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn trained_numbers() {
        // Outputs of k and v, inputs of the MLP's second matrix.
        assert_eq!(trained("ia3", json!({})), 2 * (4 + 4 + 8));
    }

    #[test]
    fn scales_outputs_with_their_bias_and_feedforward_inputs() {
        let a = attached(&[chosen("ia3", json!({}))], &[]);
        let x = sample(&[5, 6], 3);
        close(
            &both_ways(&a, "layers.0.attn.k", &x).0,
            &x.matmul_t(&frozen("layers.0.attn.k")).unwrap(),
            1e-6,
        );
        stir(&a, 0.5);
        let scale = |name: &str| a.adapter.params().iter().find(|p| p.name == name).unwrap().param.value();
        let k = scale("layers.0.attn.k.ia3_l");
        assert_eq!(k.shape(), [4, 1]);
        let (fast, defined) = both_ways(&a, "layers.0.attn.k", &x);
        close(&fast, &defined, 1e-5);
        let by_hand = x.matmul_t(&frozen("layers.0.attn.k")).unwrap().mul(&k.reshape([4]).unwrap()).unwrap();
        close(&fast, &by_hand, 1e-5);
        let bias = frozen("layers.0.attn.k.bias").mul(&k.reshape([4]).unwrap()).unwrap();
        close(&vector(&a, "layers.0.attn.k.bias"), &bias, 1e-6);

        let down = scale("layers.1.mlp.down.ia3_l");
        assert_eq!(down.shape(), [1, 8]);
        let x = sample(&[5, 8], 4);
        let (fast, defined) = both_ways(&a, "layers.1.mlp.down", &x);
        close(&fast, &defined, 1e-5);
        close(&fast, &x.mul(&down).unwrap().matmul_t(&frozen("layers.1.mlp.down")).unwrap(), 1e-5);
        assert!(a.adapter.at(site_id(&toy().0, "layers.1.mlp.down.bias")).is_empty());
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("ia3", json!({}))], &["head"]);
        let written = config(&[chosen("ia3", json!({}))], &[]);
        assert_eq!(written["target_modules"], json!(["down", "k", "v"]));
        assert_eq!(written["feedforward_modules"], json!(["down"]));
        let targets = Some(engraft_nn::Targets::names(["attn.k", "mlp.down"]));
        let mixed = config(&[(chosen("ia3", json!({})).0, targets)], &[]);
        let paths = ["layers.0.attn.k", "layers.0.mlp.down", "layers.1.attn.k", "layers.1.mlp.down"];
        assert_eq!(mixed["target_modules"], json!(paths));
        assert_eq!(
            mixed["feedforward_modules"],
            json!([paths[1], paths[3]]),
            "the same texts as the targets"
        );
        let named = from_file(&with(written.clone(), json!({ "feedforward_modules": ".*down" }))).unwrap();
        assert!(named.is_some());
        assert!(from_file(&with(written.clone(), json!({ "feedforward_modules": 3 }))).is_err());
        assert!(from_file(&with(written, json!({ "target_modules": ["tok"] }))).is_ok());
        let (sites, info) = toy();
        let table = [(chosen("ia3", json!({})).0, Some(engraft_nn::Targets::names(["tok"])))];
        assert!(crate::attach(&table, &[], &sites, &info, 0).is_err(), "a table is not rescaled");
    }

    #[test]
    fn feedforward_names_that_match_nothing_are_a_mistake() {
        let (sites, info) = toy();
        let methods = [chosen("ia3", json!({ "feedforward": ["down", "nosuch"] }))];
        let error = crate::attach(&methods, &[], &sites, &info, 7).err().unwrap().to_string();
        assert!(error.contains("no target's name ends in nosuch"), "{error}");
    }
}
