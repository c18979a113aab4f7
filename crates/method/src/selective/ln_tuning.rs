//! LN tuning: the gains and biases of the norms are trained, and nothing else.
//!
//! v′ = P for every norm's gain and bias v, P starting as v. A block of the usual kind has 4·width such numbers, with RMS
//! norms 2·width.
//!
//! Zhao et al. 2023, arXiv:2312.11420.
//!
//! P `[width]`, named `ln_tuning_layers.weight` and `ln_tuning_layers.bias` in the norm's module. As in `peft`, targets may name
//! other modules, whose tensors are then trained whole.

use std::collections::HashMap;

use engraft_nn::{Builder, Kind, Resolution, Result, Role, Site, SiteId, Sites, Targets, Value as Frozen};
use serde_json::{Map, Value};

use crate::copies::decoder_of;
use crate::read::Reader;
use crate::transposed::TRAINED_COPY;
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
            if let (Some((module, end)), false) = (module_of(site, b.sites()), b.replaced(site.id)) {
                b.replace_as(site.id, &format!("{module}{TRAINED_COPY}.{end}"))?;
            }
        }
        Ok(())
    }

    /// A target names the module of a norm; in `peft` it may be any other that holds tensors.
    fn resolve(&self, targets: &Targets, sites: &Sites) -> Result<Resolution> {
        let among_norms = Modules::of(sites, |site| site.role == Role::Norm).resolve(targets);
        match &among_norms {
            Ok(found) if found.dead.is_empty() => among_norms,
            _ => Modules::of(sites, |_| true).resolve(targets).or(among_norms),
        }
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        Map::new()
    }
}

/// The module that a tensor belongs to, and its name in it. A masked-word head's bias lies beside its decoder, which `peft` copies
/// with a bias of its own.
fn module_of(site: &Site, sites: &Sites) -> Option<(String, String)> {
    if let Some(decoder) = decoder_of(site, sites) {
        return Some((decoder.path.clone(), "bias".to_owned()));
    }
    let name = site.tensor_name();
    name.rsplit_once('.').map(|(module, end)| (module.to_owned(), end.to_owned()))
}

/// Modules that hold tensors, and which: a site for each here, the model's own for each tensor.
#[derive(Default)]
struct Modules {
    all: Sites,
    tensors: Vec<Vec<SiteId>>,
}

impl Modules {
    /// Those of the tensors that `wanted` chooses.
    fn of(sites: &Sites, wanted: impl Fn(&Site) -> bool) -> Modules {
        let mut found = Modules::default();
        let mut numbers: HashMap<String, usize> = HashMap::new();
        for site in sites.iter().filter(|site| !matches!(site.value, Frozen::None) && wanted(site)) {
            let Some((module, _)) = module_of(site, sites) else { continue };
            let number = *numbers.entry(module.clone()).or_insert_with(|| {
                // Norms hold no matrix, and are to be named all the same.
                let kind =
                    if site.is_weight() { site.kind.clone() } else { Kind::Embedding { rows: 1, width: 1 } };
                found.all.add(module, site.role, site.layer, kind);
                found.tensors.push(Vec::new());
                found.tensors.len() - 1
            });
            found.tensors[number].push(site.id);
        }
        found
    }

    fn resolve(&self, targets: &Targets) -> Result<Resolution> {
        let found = targets.resolve(&self.all)?;
        let ids = found.sites.into_iter().flat_map(|id| self.tensors[id.0].clone()).collect();
        Ok(Resolution { sites: ids, dead: found.dead })
    }
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
    fn other_modules_may_be_named_as_peft_has_it() {
        let targets = Targets::names(["layers.0.norm", "layers.0.attn.q"]);
        let a = attached(&[(Box::new(LnTuning), Some(targets))], &[]);
        let both = names(&a);
        let expected = [
            "attn.q.ln_tuning_layers.weight",
            "attn.q.ln_tuning_layers.bias",
            "norm.ln_tuning_layers.weight",
        ];
        for name in expected.map(|name| format!("layers.0.{name}")) {
            assert!(both.contains(&name.as_str()) && both.len() == 4, "{name} in {both:?}");
        }
        let (sites, info) = toy();
        let methods = [(Box::new(LnTuning) as Box<dyn Method>, Some(Targets::names(["nrm"])))];
        let error = crate::attach(&methods, &[], &sites, &info, 0).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("nothing among 2 norms"), "{error}");
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("ln_tuning", json!({}))], &["head"]);
        survives_saving(&[(Box::new(LnTuning), Some(Targets::names(["layers.0.norm"])))], &[]);
        let written = config(&[chosen("ln_tuning", json!({}))], &[]);
        assert_eq!(written["target_modules"], json!(["norm"]));
    }
}
