//! `target_parameters` of `peft`: matrices by their own names in place of their modules'. That of a linear layer, its `weight`,
//! is adapted as the layer is; stacks of matrices, as layers of experts have them, no model here has.

use engraft_nn::{Error, Kind, Matcher, Result, Site, Targets};

use super::Lora;
use super::start::Start;
use crate::read::Reader;
use crate::shared::biases::Biases;

/// What names the matrix of a module.
const WEIGHT: &str = ".weight";

/// The targets with the modules of the parameters that the file names, and these names.
pub(super) fn read(r: &mut Reader<'_>, targets: Option<Targets>) -> (Option<Targets>, Vec<String>) {
    let named = r.texts("target_parameters").unwrap_or_default();
    if named.is_empty() {
        return (targets, named);
    }
    let mut modules = Vec::new();
    for name in &named {
        match name.strip_suffix(WEIGHT) {
            Some(module) => modules.push(module.to_owned()),
            None => r.problem(format!(
                "`target_parameters`: `{name}` is no matrix of a module here, whose name ends in `{WEIGHT}`; name the modules \
                 in `target_modules`"
            )),
        }
    }
    let more = match targets {
        None => Vec::new(),
        Some(Targets { matcher: Matcher::Names(names), exclude: None, layers: None, .. }) => names,
        Some(_) => {
            r.problem(
                "`target_parameters` beside a pattern, exclusions or a choice of layers, which hold for modules alone; name the \
                 modules in `target_modules`",
            );
            Vec::new()
        }
    };
    if let Some(twice) = modules.iter().find(|module| more.contains(module)) {
        r.problem(format!("`{twice}` is in `target_modules` and in `target_parameters`"));
    }
    (Some(Targets::names(more.into_iter().chain(modules))), named)
}

impl Lora {
    /// What `peft` does not do with a parameter.
    pub(super) fn check_parameters(&self, r: &mut Reader<'_>) {
        let plain = matches!(self.start, Start::Kaiming | Start::Gaussian | Start::Random)
            && self.dropout.elements == 0.0
            && !(self.dora || self.product_bias || self.tied)
            && self.kasa.is_none()
            && self.blocks.is_none()
            && self.bias != Biases::OfTargets
            // These would be looked up by the name of the parameter.
            && self.rank_pattern.is_empty()
            && self.alpha_pattern.is_empty();
        if !self.parameters.is_empty() && !plain {
            r.problem(
                "`target_parameters` go with a plain LoRA of one rank without dropout; name the modules in `target_modules`",
            );
        }
    }

    /// An error at a site that is named as a parameter and is not stored as [out, in].
    pub(super) fn check_parameter(&self, site: &Site) -> Result<()> {
        let names = |name: &String| {
            let module = name.strip_suffix(WEIGHT).unwrap_or(name);
            site.path.strip_suffix(module).is_some_and(|before| before.is_empty() || before.ends_with('.'))
        };
        if matches!(site.kind, Kind::Linear { transposed: false, .. }) || !self.parameters.iter().any(names) {
            return Ok(());
        }
        let message = "it is in `target_parameters`, which here are those of linear layers; name it in `target_modules`";
        Err(Error::Site { path: site.path.clone(), message: message.into() })
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::*;
    use engraft_nn::Targets;
    use serde_json::{Value, json};

    /// A file with these keys changed.
    fn file(changes: Value) -> Value {
        let methods = [(chosen("lora", json!({ "rank": 2 })).0, Some(Targets::names(["attn.q", "attn.v"])))];
        with(config(&methods, &[]), changes)
    }

    #[test]
    fn weights_of_linear_layers_are_read_and_written_by_their_names() {
        let (sites, info) = toy();
        let methods = [(chosen("lora", json!({ "rank": 2 })).0, Some(Targets::names(["attn.q", "attn.v"])))];
        let a = attached(&methods, &[]);
        let (_, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        for (modules, parameters) in [
            (json!([]), json!(["attn.v.weight", "attn.q.weight"])),
            (json!(["attn.q"]), json!(["attn.v.weight"])),
        ] {
            let config = file(json!({ "target_modules": modules, "target_parameters": parameters }));
            let loaded = crate::load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
            let (written, again) =
                crate::save_adapter(&loaded.adapter, &loaded.methods, &[], "b", &sites, &info).unwrap();
            assert_eq!((&written["target_modules"], &written["target_parameters"]), (&modules, &parameters));
            assert_eq!(again.len(), tensors.len());
        }
    }

    #[test]
    fn what_peft_does_not_do_is_refused() {
        let (sites, info) = toy();
        for changes in [
            json!({ "target_modules": [], "target_parameters": ["experts.gate_up_proj"] }),
            json!({ "target_modules": ["attn.q"], "target_parameters": ["attn.q.weight"] }),
            json!({ "target_modules": "all-linear", "target_parameters": ["attn.q.weight"] }),
            json!({ "target_modules": [], "target_parameters": ["attn.q.weight"], "lora_dropout": 0.1 }),
            json!({ "target_modules": [], "target_parameters": ["attn.q.weight"], "rank_pattern": { "q": 3 } }),
        ] {
            assert!(crate::from_file(&file(changes.clone())).is_err(), "{changes}");
        }
        let table = file(json!({ "target_modules": [], "target_parameters": ["tok.weight"] }));
        let loaded = crate::from_file(&table).unwrap();
        assert!(crate::attach(&[(loaded.method, loaded.targets)], &[], &sites, &info, 0).is_err());
    }
}
