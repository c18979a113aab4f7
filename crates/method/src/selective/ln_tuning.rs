//! LN tuning: the gains and biases of the norms are trained, and nothing else.
//!
//! v′ = P for every norm's gain and bias v, P starting as v. A block of the usual kind has 4·width such numbers, with RMS
//! norms 2·width.
//!
//! Zhao et al. 2023, arXiv:2312.11420.
//!
//! P `[width]`, named `ln_tuning_layers.weight` and `ln_tuning_layers.bias` in the norm's module.

use engraft_nn::{Builder, Kind, Resolution, Result, Role, Site, SiteId, Sites, Targets};
use serde_json::{Map, Value};

use crate::read::Reader;
use crate::{Described, Entry, Info, Loaded, Method, peft};

struct LnTuning;

static INFO: Info = Info {
    name: "ln_tuning",
    title: "LN tuning",
    class: "selective",
    sites: "vector",
    paper: "arXiv:2312.11420",
    summary: "trains the gains and biases of the norms alone",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Norm]),
    peft_type: "LN_TUNING",
    fields: &[],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    Reader::settings(settings, INFO.fields).finish()?;
    Ok(Box::new(LnTuning))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(LnTuning), targets, train_also }))
}

fn example() -> Box<dyn Method> {
    Box::new(LnTuning)
}

impl Method for LnTuning {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            if let (Some((module, end)), false) = (site.path.rsplit_once('.'), b.replaced(site.id)) {
                b.replace_as(site.id, &format!("{module}.ln_tuning_layers.{end}"))?;
            }
        }
        Ok(())
    }

    /// A target names the module of a norm.
    fn resolve(&self, targets: &Targets, sites: &Sites) -> Result<Resolution> {
        let (mut modules, mut vectors) = (Sites::default(), Vec::<Vec<SiteId>>::new());
        let mut last = "";
        for site in norms(sites) {
            let Some((module, _)) = site.path.rsplit_once('.') else { continue };
            if module != last {
                // No linear layer, so that "all-linear" chooses none.
                modules.add(module, Role::Norm, site.layer, Kind::Embedding { rows: 1, width: 1 });
                vectors.push(Vec::new());
                last = module;
            }
            vectors.last_mut().into_iter().for_each(|v| v.push(site.id));
        }
        let found = targets.resolve(&modules)?;
        let ids = found.sites.into_iter().flat_map(|id| vectors[id.0].clone()).collect();
        Ok(Resolution { sites: ids, dead: found.dead })
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        Map::new()
    }
}

/// Gains and biases of norms.
fn norms(sites: &Sites) -> impl Iterator<Item = &Site> {
    sites.of_kind(|k| matches!(k, Kind::Vector { .. })).filter(|s| s.role == Role::Norm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Matcher;
    use engraft_tensor::testing::close;
    use serde_json::json;

    #[test]
    fn trains_every_norm_or_those_of_the_targets() {
        let a = attached(&[chosen("ln_tuning", json!({}))], &[]);
        assert_eq!(
            names(&a)[..2],
            ["layers.0.norm.ln_tuning_layers.weight", "layers.0.norm.ln_tuning_layers.bias"]
        );
        assert_eq!(a.adapter.trained_count(), 2 * 2 * 6);
        close(&vector(&a, "layers.0.norm.weight"), &frozen("layers.0.norm.weight"), 0.0);
        stir(&a, 0.5);
        let trained =
            a.adapter.params().iter().find(|p| p.name == "layers.1.norm.ln_tuning_layers.bias").unwrap();
        close(&vector(&a, "layers.1.norm.bias"), &trained.param.value(), 0.0);
        assert!(a.adapter.at(site_id(&toy().0, "layers.0.attn.q.bias")).is_empty());

        let some = |targets: Targets| names(&attached(&[(Box::new(LnTuning), Some(targets))], &[])).len();
        assert_eq!(some(Targets::names(["layers.1.norm"])), 2);
        assert_eq!(some(Matcher::Regex(r".*\.norm".into()).into()), 4);
    }

    #[test]
    fn other_modules_are_refused() {
        let (sites, info) = toy();
        for targets in [Targets::names(["attn.q"]), Matcher::AllLinear.into()] {
            let methods = [(Box::new(LnTuning) as Box<dyn Method>, Some(targets))];
            let error = crate::attach(&methods, &[], &sites, &info, 0).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("nothing among 2 norms"), "{error}");
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("ln_tuning", json!({}))], &["head"]);
        survives_saving(&[(Box::new(LnTuning), Some(Targets::names(["layers.0.norm"])))], &[]);
        let written = config(&[chosen("ln_tuning", json!({}))], &[]);
        assert_eq!(written["target_modules"], json!(["norm"]));
    }
}
