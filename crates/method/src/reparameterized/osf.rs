//! OSF: the weight's weakest singular directions are trained, and kept out of the way of its strongest.
//!
//! W = U·diag(S)·V; W′ = W + U_low·diag(S_low)·V_low − (the same as it was at the start). The first `effective_rank` directions
//! stay as they are; gradients of U_low and V_low lose what lies along them, so that what earlier tasks put there is kept.
//! U_low, S_low and V_low start as the rest of the decomposition, so W′ = W. Which of its two signs a pair of vectors has does
//! not matter: what is taken off is a product.
//!
//! Nayak et al. 2025, arXiv:2504.07097.
//!
//! `osf_svd_params.U_low` [out, k], `osf_svd_params.S_low` `[k]`, `osf_svd_params.V_low` [k, in], k = min(out, in) −
//! `effective_rank`. The strongest directions are beside them in checkpoints only.

use std::collections::HashSet;

use engraft_nn::{
    Adapter, Base, Builder, Error, Init, Kind, NamedParam, Pass, Patch, Pattern, Result, Role, Site,
    WeightPatch,
};
use engraft_tensor::ops::cat;
use engraft_tensor::{Gradients, Param, Tensor, linalg, no_grad};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::flag;
use crate::shared::matrices;
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, Named, Step, peft};

struct Osf {
    kept: Kept,
    /// Other numbers of directions for modules in whose path a pattern is found, as in the file.
    patterns: Vec<(String, Pattern, Kept)>,
    init_weights: bool,
    /// `target_svd_config` of a file, which `peft` keeps and does not look at.
    unused: Value,
    /// Whether it was read from a file, where nothing need be left to train.
    from_file: bool,
    /// Modules that the file holds something of, once its tensors were seen.
    held: Option<HashSet<String>>,
}

/// How many directions stay as they are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kept {
    /// Half of those there are.
    Half,
    Count(usize),
    Share(f64),
}

static INFO: Info = Info {
    name: "osf",
    title: "OSF",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2504.07097",
    summary: "the weakest singular directions of W trained, away from the strongest",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::K, Role::V, Role::O, Role::Gate, Role::Up, Role::Down]),
    peft_type: "OSF",
    fields: &[
        Field {
            name: "effective_rank",
            kind: FieldKind::Float { min: 0.0, max: 1e9 },
            default: None,
            doc: "Directions that stay as they are: a whole number, or a share below 1; half of them if left out.",
        },
        Field {
            name: "rank_pattern",
            kind: FieldKind::FloatMap,
            default: Some("{}"),
            doc: "Other numbers or shares for modules in whose path a pattern is found.",
        },
        flag("init_weights", "true", "Start as the decomposition; otherwise what is trained is drawn."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    let unused = r.value("target_svd_config").cloned().unwrap_or_default();
    let osf = Osf { unused, from_file: true, ..read(&mut r) };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(osf), targets, train_also }))
}

/// The keys, which are the same in recipes and files.
fn read(r: &mut Reader<'_>) -> Osf {
    let kept = match r.value("effective_rank").cloned() {
        None => Kept::Half,
        Some(value) => Kept::read(r, "effective_rank", &value),
    };
    let mut patterns = Vec::new();
    let table = r.value("rank_pattern").and_then(Value::as_object).cloned().unwrap_or_default();
    for (text, value) in table {
        match Pattern::anywhere(&text) {
            Ok(regex) => patterns.push((text, regex, Kept::read(r, "rank_pattern", &value))),
            Err(e) => r.problem(format!("`rank_pattern`: `{text}` is not a valid pattern: {e}")),
        }
    }
    let init_weights = r.flag("init_weights", true);
    Osf { kept, patterns, init_weights, unused: Value::Null, from_file: false, held: None }
}

fn example() -> Box<dyn Method> {
    let kept = Kept::Share(0.75);
    Box::new(Osf {
        kept,
        patterns: vec![],
        init_weights: true,
        unused: Value::Null,
        from_file: false,
        held: None,
    })
}

impl Kept {
    /// A whole number of at least 1, or a number with a point up to 1.
    fn read(r: &mut Reader<'_>, key: &str, value: &Value) -> Kept {
        match (value.as_u64(), value.as_f64()) {
            (Some(count), _) if count > 0 => Kept::Count(count as usize),
            (None, Some(share)) if share > 0.0 && share <= 1.0 => Kept::Share(share),
            (None, Some(count)) if count > 1.0 => Kept::Count(count as usize),
            _ => {
                r.problem(format!("`{key}`: expected a number above 0, found {value}"));
                Kept::Half
            }
        }
    }

    fn of(self, all: usize) -> usize {
        match self {
            Kept::Half => all / 2,
            Kept::Count(count) => count.min(all),
            Kept::Share(share) => (all as f64 * share) as usize,
        }
    }

    fn value(self) -> Value {
        match self {
            Kept::Half => Value::Null,
            Kept::Count(count) => json!(count),
            Kept::Share(share) => json!(share),
        }
    }
}

impl Method for Osf {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn pattern(&self, text: &str) -> std::result::Result<Pattern, String> {
        Pattern::anywhere(text)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let (out, inn) = matrices::linear(site, INFO.title)?;
            let is_held = self.held.as_ref().is_none_or(|held| held.contains(&site.path));
            if matches!(site.kind, Kind::Linear { transposed: true, .. }) && !is_held {
                let message = "peft's OSF passes over matrices that files store transposed (`Conv1D`): this file holds nothing \
                               of it, and the model in peft was trained without it; leave it out of `target_modules` to read what \
                               else there is, or train `osf` here, where such matrices can be adapted";
                return Err(Error::Site { path: site.path.clone(), message: message.into() });
            }
            let all = out.min(inn);
            let own = self.patterns.iter().find(|(_, regex, _)| regex.is_match(&site.path));
            let kept = own.map_or(self.kept, |(.., kept)| *kept).of(all);
            if kept == all && self.from_file {
                for (end, shape) in [("U_low", vec![out, 0]), ("S_low", vec![0]), ("V_low", vec![0, inn])] {
                    let name = format!("{}.osf_svd_params.{end}", site.path);
                    b.fixed(&name, &shape, Init::Values(Tensor::zeros(shape.clone())))?;
                }
                continue;
            }
            if kept == 0 || kept == all {
                let message = format!(
                    "`effective_rank` keeps {kept} of its {all} directions; choose a number that leaves some to keep and some to train"
                );
                return Err(Error::Site { path: site.path.clone(), message });
            }
            let patch = self.directions(b, site, kept)?;
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn read_shapes(&mut self, tensors: &Named) {
        let path = |(name, _): &(String, Tensor)| {
            let module = name.strip_prefix("base_model.model.")?.split(".osf_svd_params.").next()?;
            Some(module.to_owned())
        };
        self.held = Some(tensors.iter().filter_map(path).collect());
    }

    /// Takes out of the gradients of U_low and V_low what lies along the directions that are kept.
    fn after_backward(&self, adapter: &Adapter, gradients: &mut Gradients, _step: Step) -> Result<()> {
        let named =
            |name: String| -> Option<&NamedParam> { adapter.params().iter().find(|p| p.name == name) };
        for p in adapter.trainable() {
            for (low, high, across) in [("U_low", "U_high", false), ("V_low", "V_high", true)] {
                let Some(module) = p.name.strip_suffix(&format!("osf_svd_params.{low}")) else { continue };
                let (Some(high), Some(gradient)) =
                    (named(format!("{module}osf_{high}")), gradients.get(&p.param).cloned())
                else {
                    continue;
                };
                let high = high.param.value();
                let along = no_grad(|| -> Result<Tensor> {
                    Ok(match across {
                        false => high.matmul(&high.t_matmul(&gradient)?)?,
                        true => gradient.matmul_t(&high)?.matmul(&high)?,
                    })
                })?;
                gradients.set(&p.param, gradient.sub(&along)?);
            }
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let patterns: Map<String, Value> =
            self.patterns.iter().map(|(text, _, kept)| (text.clone(), kept.value())).collect();
        let patterns = if patterns.is_empty() { Value::Null } else { Value::Object(patterns) };
        let own = json!({
            "effective_rank": self.kept.value(), "init_weights": self.init_weights, "rank_pattern": patterns,
            "target_svd_config": self.unused,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Osf {
    fn directions(&self, b: &mut Builder<'_>, site: &Site, kept: usize) -> Result<Directions> {
        let svd = linalg::svd(&matrices::frozen(site)?)?;
        let all = svd.s.len();
        let (rest, out, inn) = (all - kept, svd.u.dim(0), svd.vt.dim(1));
        let u = svd.u.narrow(1, kept, rest)?;
        let s = Tensor::from_vec(svd.s[kept..].to_vec(), [rest])?;
        let v = svd.vt.rows_between(kept, all)?;
        let mut low = |name: &str, shape: &[usize], value: &Tensor| {
            let init = if self.init_weights { Init::Values(value.clone()) } else { Init::Normal(1.0) };
            b.param(&format!("{}.osf_svd_params.{name}", site.path), shape, init)
        };
        let patch = Directions {
            u: low("U_low", &[out, rest], &u)?,
            s: low("S_low", &[rest], &s)?,
            v: low("V_low", &[rest, inn], &v)?,
            taken: (u.mul(&s)?.scale(-1.0)?, v.rows_between(0, rest)?),
        };
        b.state(&format!("{}.osf_U_high", site.path), &[out, kept], Init::Values(svd.u.narrow(1, 0, kept)?))?;
        b.state(
            &format!("{}.osf_V_high", site.path),
            &[kept, inn],
            Init::Values(svd.vt.rows_between(0, kept)?),
        )?;
        Ok(patch)
    }
}

struct Directions {
    u: Param,
    s: Param,
    v: Param,
    /// −U_low·diag(S_low) and V_low as they were at the start.
    taken: (Tensor, Tensor),
}

impl WeightPatch for Directions {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let now = self.u.get().mul(&self.s.get())?.matmul(&self.v.get())?;
        Ok(base.dense()?.add(&now)?.add(&self.taken.0.matmul(&self.taken.1)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        // One pair of thin factors, twice as wide.
        let up = cat(&[&self.u.get().mul(&self.s.get())?, &self.taken.0], 1)?;
        let down = cat(&[&self.v.get(), &self.taken.1], 0)?;
        Ok(base.forward(x)?.add_low_rank(x, &down, &up, 1.0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    fn queries(settings: Value) -> Vec<crate::Chosen> {
        vec![(chosen("osf", settings).0, Some(engraft_nn::Targets::names(["attn.q", "mlp.down"])))]
    }

    #[test]
    fn the_weakest_directions_are_trained() {
        let x = sample(&[5, 6], 3);
        for (settings, kept) in
            [(json!({}), 3), (json!({ "effective_rank": 4 }), 4), (json!({ "effective_rank": 0.2 }), 1)]
        {
            let a = attached(&queries(settings), &[]);
            let rest = 6 - kept;
            assert_eq!(a.adapter.trained_count(), 2 * (rest * (6 + 1 + 6) + rest * (6 + 1 + 8)));
            assert_eq!(names(&a)[0], "layers.0.attn.q.osf_svd_params.U_low");
            close(
                &both_ways(&a, "layers.0.attn.q", &x).0,
                &x.matmul_t(&frozen("layers.0.attn.q")).unwrap(),
                1e-5,
            );
            stir(&a, 0.5);
            let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
            close(&fast, &defined, 1e-5);
        }
    }

    #[test]
    fn gradients_lose_what_lies_along_the_directions_that_are_kept() {
        let methods = queries(json!({}));
        let a = attached(&methods, &[]);
        let mut gradients = Gradients::default();
        for (number, p) in a.adapter.trainable().enumerate() {
            gradients.set(&p.param, sample(p.param.value().shape(), number as u64));
        }
        methods[0]
            .0
            .after_backward(&a.adapter, &mut gradients, Step { number: 1, total: 1, seed: 0 })
            .unwrap();
        let param = |end: &str| {
            let name = format!("layers.0.mlp.down.{end}");
            a.adapter.params().iter().find(|p| p.name == name).unwrap().param.clone()
        };
        let u = gradients.get(&param("osf_svd_params.U_low")).unwrap();
        let v = gradients.get(&param("osf_svd_params.V_low")).unwrap();
        let ones = |t: &Tensor| t.add(&Tensor::full(1.0, t.shape())).unwrap();
        let along = param("osf_U_high").value().t_matmul(u).unwrap();
        close(&ones(&along), &Tensor::full(1.0, along.shape()), 1e-5);
        let along = v.matmul_t(&param("osf_V_high").value()).unwrap();
        close(&ones(&along), &Tensor::full(1.0, along.shape()), 1e-5);
        assert!(u.to_vec().unwrap().iter().any(|g| g.abs() > 0.1));
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({}),
            json!({ "effective_rank": 2, "rank_pattern": { "mlp": 0.5 } }),
            json!({ "effective_rank": 0.4, "init_weights": false }),
        ] {
            survives_saving(&queries(settings), &["head"]);
        }
        let (sites, info) = toy();
        let error =
            crate::attach(&queries(json!({ "effective_rank": 6 })), &[], &sites, &info, 0).map(|_| ());
        assert!(error.unwrap_err().to_string().contains("keeps 6 of its 6"));
        let bad = json!({ "effective_rank": -1 });
        assert!(from_settings(bad.as_object().unwrap()).is_err());
        let good = config(&queries(json!({})), &[]);
        assert!(good["effective_rank"].is_null() && good["rank_pattern"].is_null());
        let unused = with(good, json!({ "target_svd_config": { "q.weight": 3 } }));
        assert!(from_file(&unused).unwrap().is_some(), "peft does not look at it either");
    }
}
