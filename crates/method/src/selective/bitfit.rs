//! BitFit: the biases of the model are trained, nothing else.
//!
//! b′ = P with P starting as b: of every linear layer and norm that has one, or of the modules that are targets.
//!
//! Ben Zaken et al. 2022, arXiv:2106.10199.
//!
//! P [len of the bias], saved as the bias itself.

use engraft_nn::{Builder, Error, Kind, Resolution, Result, Role, Site, SiteId, Sites, Targets};
use serde_json::{Map, Value};

use crate::read::Reader;
use crate::{Described, Entry, Info, Loaded, Method, peft};

struct BitFit;

static INFO: Info = Info {
    name: "bitfit",
    title: "BitFit",
    class: "selective",
    sites: "vector",
    paper: "arXiv:2106.10199",
    summary: "trains the biases alone",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_BITFIT",
    fields: &[],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    Reader::settings(settings, INFO.fields).finish()?;
    Ok(Box::new(BitFit))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(BitFit), targets, train_also }))
}

fn example() -> Box<dyn Method> {
    Box::new(BitFit)
}

impl Method for BitFit {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let chosen: Vec<SiteId> = match b.targets() {
            none if none.is_empty() => biases(b.sites()).map(|s| s.id).collect(),
            some => some.into_iter().map(|s| s.id).collect(),
        };
        if chosen.is_empty() {
            let message =
                "BitFit trains biases, and this model has none; choose another method, such as lora or ia3";
            return Err(Error::Unsupported(message.into()));
        }
        for id in chosen {
            if !b.replaced(id) {
                b.replace(id)?;
            }
        }
        Ok(())
    }

    /// A target names the module whose bias is meant.
    fn resolve(&self, targets: &Targets, sites: &Sites) -> Result<Resolution> {
        let (mut modules, mut ids) = (Sites::default(), Vec::new());
        for bias in biases(sites) {
            let module = bias.path.trim_end_matches(".bias");
            let weight = sites.iter().find(|s| s.is_weight() && s.path == module);
            // What is not linear takes another kind, so that "all-linear" leaves it out.
            let other = Kind::Embedding { rows: 1, width: 1 };
            let (role, kind) = weight.map_or((bias.role, other), |w| (w.role, w.kind.clone()));
            modules.add(module, role, bias.layer, kind);
            ids.push(bias.id);
        }
        let found = targets.resolve(&modules)?;
        Ok(Resolution { sites: found.sites.into_iter().map(|id| ids[id.0]).collect(), dead: found.dead })
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        Map::new()
    }
}

fn biases(sites: &Sites) -> impl Iterator<Item = &Site> {
    let is_bias = |s: &&Site| s.role == Role::Bias || s.path.ends_with(".bias");
    sites.of_kind(|k| matches!(k, Kind::Vector { .. })).filter(is_bias)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Matcher;
    use engraft_tensor::testing::close;
    use serde_json::json;

    #[test]
    fn trained_numbers() {
        // q, k, down and the norm of two layers, and the head.
        assert_eq!(trained("bitfit", json!({})), 2 * (6 + 4 + 6 + 6) + 3);
    }

    #[test]
    fn trains_every_bias_or_those_of_the_targets() {
        let a = attached(&[chosen("bitfit", json!({}))], &[]);
        assert_eq!(names(&a).len(), 2 * 4 + 1);
        assert!(names(&a).iter().all(|n| n.ends_with(".bias")));
        close(&vector(&a, "layers.0.attn.q.bias"), &frozen("layers.0.attn.q.bias"), 0.0);
        stir(&a, 0.5);
        let trained = a.adapter.params().iter().find(|p| p.name == "layers.0.attn.q.bias").unwrap();
        close(&vector(&a, "layers.0.attn.q.bias"), &trained.param.value(), 0.0);

        let some = |targets: Targets| names(&attached(&[(Box::new(BitFit), Some(targets))], &[])).len();
        assert_eq!(some(Targets::names(["attn.q", "norm"])), 4);
        assert_eq!(some(Targets::roles(&[Role::Down])), 2);
        assert_eq!(some(Matcher::AllLinear.into()), 6, "all-linear leaves norms and the head out");
        assert_eq!(some(Matcher::Regex(r".*\.1\..*".into()).into()), 4);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("bitfit", json!({}))], &["head"]);
        survives_saving(&[(Box::new(BitFit), Some(Targets::roles(&[Role::Q])))], &[]);
        let (sites, info) = toy();
        let dead = [(Box::new(BitFit) as Box<dyn Method>, Some(Targets::names(["attn.v"])))];
        assert!(crate::attach(&dead, &[], &sites, &info, 0).is_err(), "v has no bias");
    }
}
