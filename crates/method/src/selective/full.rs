//! Full fine-tuning of chosen weights, and of the head alone (a linear probe).
//!
//! W′ = P with P starting as W. Full: every tensor of the model, or the targets and their biases. Head: what turns
//! features into logits; `train_also` may name another choice.
//!
//! P has the shape of W and is saved under its name. A tied table stays tied: one P serves both sites.

use std::collections::HashMap;

use engraft_nn::{Builder, Error, Patch, Replacement, Result, Site, Value as Frozen};
use engraft_tensor::Param;
use serde_json::{Map, Value};

use crate::read::Reader;
use crate::{Described, Entry, Info, Loaded, Method, peft};

#[derive(Clone, Copy)]
enum Whole {
    Model,
    Head,
}

static FULL_INFO: Info = Info {
    name: "full",
    title: "Full fine-tuning",
    class: "selective",
    sites: "weight, vector",
    paper: "",
    summary: "trains whole tensors: all, or those of the targets",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_FULL",
    fields: &[],
};

static HEAD_INFO: Info = Info {
    name: "head",
    title: "Linear probe",
    class: "selective",
    sites: "weight, vector",
    paper: "",
    summary: "trains the head alone",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_HEAD",
    fields: &[],
};

/// In the registry.
pub static FULL: Entry = Entry {
    info: &FULL_INFO,
    from_settings: |s| Whole::Model.of_settings(s),
    from_file: |c| Whole::Model.of_file(c),
    example: || Box::new(Whole::Model),
};

/// In the registry.
pub static HEAD: Entry = Entry {
    info: &HEAD_INFO,
    from_settings: |s| Whole::Head.of_settings(s),
    from_file: |c| Whole::Head.of_file(c),
    example: || Box::new(Whole::Head),
};

impl Whole {
    fn of_settings(self, settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
        Reader::settings(settings, self.info().fields).finish()?;
        Ok(Box::new(self))
    }

    fn of_file(self, config: &Value) -> Result<Option<Loaded>> {
        let map = config.as_object().filter(|_| peft::is_type(config, self.info().peft_type));
        let Some(map) = map else { return Ok(None) };
        let mut r = Reader::file(map);
        let train_also = peft::read_header(&mut r);
        let targets = peft::read_targets(&mut r);
        r.finish()?;
        Ok(Some(Loaded { method: Box::new(self), targets, train_also }))
    }

    /// The sites trained where the recipe names none.
    fn own_sites<'a>(self, b: &Builder<'a>) -> Result<Vec<&'a Site>> {
        let holds = |s: &&Site| !matches!(s.value, Frozen::None);
        let Whole::Head = self else { return Ok(b.sites().iter().filter(holds).collect()) };
        let head: Vec<&Site> = b.sites().head().filter(holds).collect();
        if head.is_empty() {
            let message = "the head alone is to be trained, and this model has none; choose another method";
            return Err(Error::Unsupported(message.into()));
        }
        // `train_also` has chosen already.
        Ok(if b.sites().iter().any(|s| b.replaced(s.id)) { Vec::new() } else { head })
    }
}

impl Method for Whole {
    fn info(&self) -> &'static Info {
        match self {
            Whole::Model => &FULL_INFO,
            Whole::Head => &HEAD_INFO,
        }
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let mut chosen = b.targets();
        let biases: Vec<&Site> = chosen.iter().filter_map(|s| b.sites().bias_of(&s.path)).collect();
        chosen.extend(biases);
        if chosen.is_empty() {
            chosen = self.own_sites(b)?;
        }
        let mut trained: HashMap<&str, Param> = HashMap::new();
        for site in chosen.into_iter().filter(|s| !matches!(s.value, Frozen::None)) {
            let tensor = site.tensor.as_deref().unwrap_or(&site.path);
            if b.replaced(site.id) {
                continue;
            }
            if let Some(tied) = trained.get(tensor) {
                b.patch(site.id, Patch::Weight(Box::new(Replacement(tied.clone()))))?;
                continue;
            }
            trained.insert(tensor, b.replace_as(site.id, &site.tensor_name())?);
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        Map::new()
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::*;
    use engraft_nn::Targets;
    use engraft_tensor::testing::{close, sample};
    use serde_json::json;

    #[test]
    fn trained_numbers() {
        // Table, linear layers with their biases and norms of two layers, and the head.
        let layer = (36 + 6) + (24 + 4) + 24 + (48 + 6) + (6 + 6);
        assert_eq!(trained("full", json!({})), 11 * 6 + 2 * layer + (3 * 6 + 3));
        assert_eq!(trained("head", json!({})), 3 * 6 + 3);
    }

    #[test]
    fn trains_all_the_targets_or_the_head() {
        let a = attached(&[chosen("full", json!({}))], &[]);
        assert_eq!(names(&a).len(), 1 + 2 * (4 + 3 + 2) + 2, "every tensor once");
        let x = sample(&[4, 6], 2);
        close(
            &both_ways(&a, "layers.0.attn.q", &x).0,
            &x.matmul_t(&frozen("layers.0.attn.q")).unwrap(),
            1e-6,
        );
        let some = (chosen("full", json!({})).0, Some(Targets::names(["attn.q"])));
        assert_eq!(names(&attached(&[some], &[])).len(), 4, "weights and their biases");
        assert_eq!(names(&attached(&[chosen("head", json!({}))], &[])), ["head.weight", "head.bias"]);
        assert_eq!(names(&attached(&[chosen("head", json!({}))], &["head"])), ["head.weight", "head.bias"]);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("full", json!({}))], &[]);
        survives_saving(&[chosen("head", json!({}))], &[]);
        survives_saving(&[chosen("head", json!({}))], &["head"]);
    }
}
