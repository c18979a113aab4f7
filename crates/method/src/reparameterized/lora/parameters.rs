//! `target_parameters` of `peft`: matrices by their own names in place of their modules'.
//!
//! The tensor is taken as the file stores it, [n, m]: A [rank, m] and B [n, rank], of a table with `rows` rows A [rank, width] and
//! B [rows, rank], of a matrix that files store transposed (GPT-2's `Conv1D`) A [rank, out] and B [in, rank] with
//! W′ = W + s·(B·A)ᵀ. Patterns of ranks and scales are held against the name of the matrix, and what narrows the modules (layers,
//! exclusions) says nothing of it. Stacks of matrices, as layers of experts have them, no model here has.

use engraft_nn::{
    Builder, Error, Kind, Matcher, Resolution, Result, Site, SiteId, Sites, TargetError, Targets,
};

use super::Lora;
use super::form::Form;
use super::start::Start;
use crate::read::Reader;
use crate::shared::parameters::{WEIGHT, means};
use crate::tied;

/// The names that the file gives.
pub(super) fn read(r: &mut Reader<'_>) -> Vec<String> {
    let named = r.texts("target_parameters").unwrap_or_default();
    for name in named.iter().filter(|name| !name.ends_with(WEIGHT)) {
        r.problem(format!(
            "`target_parameters`: `{name}` is no matrix of a module here, whose name ends in `{WEIGHT}`; name the modules in \
             `target_modules`"
        ));
    }
    named
}

const CHANGED_BASE: &str = "its tensor is another module's too, and peft takes this `init_lora_weights` off both: such an adapter fits \
                            only a base that was changed; save it in peft with `path_initial_model_for_weight_conversion` first";

fn at(site: &Site, message: &str) -> Error {
    Error::Site { path: site.path.clone(), message: message.into() }
}

impl Lora {
    /// Whether the matrix of `site` is named by itself.
    pub(super) fn is_parameter(&self, site: &Site) -> bool {
        self.parameters.iter().any(|name| means(name, &site.path))
    }

    /// Whether it is, and stands transposed in the file.
    pub(super) fn is_turned(&self, site: &Site) -> bool {
        matches!(site.kind, Kind::Linear { transposed: true, .. }) && self.is_parameter(site)
    }

    /// What `peft` does not do with a parameter.
    pub(super) fn check_parameters(&self, r: &mut Reader<'_>) {
        let plain = self.start != Start::Mica
            && self.dropout.elements == 0.0
            && !(self.dora || self.product_bias)
            && self.kasa.is_none()
            && self.blocks.is_none()
            && matches!(self.form, Form::Plain);
        if !self.parameters.is_empty() && !plain {
            r.problem(
                "`target_parameters` go with a plain LoRA without dropout and without a bias of the product; name the modules in \
                 `target_modules`",
            );
        }
    }

    /// The sites of the modules that the targets choose, and those of matrices that are named by themselves.
    pub(super) fn chosen(&self, targets: &Targets, sites: &Sites) -> Result<Resolution> {
        if self.parameters.is_empty() {
            return Ok(targets.resolve(sites)?);
        }
        let none = matches!(&targets.matcher, Matcher::Names(names) if names.is_empty());
        let mut found = match targets.resolve(sites) {
            _ if none => Resolution { sites: vec![], dead: vec![] },
            Err(TargetError::Dead { names, .. }) => Resolution { sites: vec![], dead: names },
            Err(TargetError::LeftOut { .. }) => Resolution { sites: vec![], dead: vec![] },
            found => found?,
        };
        let is_named = |name: &String| sites.iter().any(|s| s.is_weight() && means(name, &s.path));
        let own: Vec<&Site> = sites.iter().filter(|s| s.is_weight() && self.is_parameter(s)).collect();
        if own.is_empty() && found.sites.is_empty() {
            return Ok(Targets::names(self.parameters.clone()).resolve(sites)?);
        }
        let names_vector = |s: &&Site| {
            self.parameters.iter().any(|name| s.path.strip_suffix(name.as_str()).is_some_and(ends))
        };
        if let Some(vector) =
            sites.iter().filter(|s| matches!(s.kind, Kind::Vector { .. })).find(names_vector)
        {
            return Err(at(
                vector,
                "it is in `target_parameters`, which are matrices; train it with `modules_to_save`",
            ));
        }
        if let Some(twice) = own.iter().find(|s| found.sites.contains(&s.id)) {
            return Err(at(
                twice,
                "it is in `target_modules` and in `target_parameters`; leave it out of one of the two",
            ));
        }
        found.dead.extend(self.parameters.iter().filter(|name| !is_named(name)).cloned());
        found.sites.extend(own.iter().map(|site| site.id));
        found.sites.sort();
        Ok(found)
    }

    /// An error where `peft` refuses what is named, or would not make what the file holds.
    pub(super) fn check_places(&self, b: &Builder<'_>, tied: &[SiteId]) -> Result<()> {
        let targets = b.targets();
        let by_itself = |site: &&&Site| self.is_parameter(site);
        for site in targets.iter().filter(by_itself) {
            if let Kind::Convolution { .. } = site.kind {
                return Err(at(
                    site,
                    "`target_parameters` are matrices, and it is a convolution; name it in `target_modules`",
                ));
            }
            if b.replaced(site.id) || tied.contains(&site.id) {
                let message = "it is in `target_parameters`, and another key has it trained as a whole or with a table; leave it \
                               out of one of the two";
                return Err(at(site, message));
            }
        }
        // What `peft` left in `fan_in_fan_out` is what holds for the last of the modules, and must be false for a parameter.
        let modules = targets.iter().filter(|site| !self.is_parameter(site));
        let stored = modules.rev().find_map(|site| match site.kind {
            Kind::Linear { transposed, .. } => Some(transposed),
            _ => None,
        });
        let given = self.kept.get("fan_in_fan_out").and_then(serde_json::Value::as_bool);
        if !self.parameters.is_empty() && stored.or(given) == Some(true) {
            return Err(Error::Unsupported(
                "`target_parameters` beside modules that are stored transposed (`fan_in_fan_out`) peft refuses; name all of them \
                 in one of `target_modules` and `target_parameters`"
                    .into(),
            ));
        }
        // `peft` takes such a start off the tensor, and so off all that share it.
        let shared = |site: &&&Site| tied::sharing(b.sites(), site).nth(1).is_some();
        let started = |site: &&&Site| !matches!(site.kind, Kind::Embedding { .. }) || self.is_parameter(site);
        let taken_off = self.from_file && self.start.is_taken_off();
        // The table's own module may be none that the model reads, as T5's `shared`.
        let own = |site: &Site| tied::own_name(b.sites(), site).map(|name| (site.path.clone(), name));
        let named = |(_, name): &(String, String)| self.parameters.iter().any(|own| means(own, name));
        if let Some((path, _)) = b.sites().iter().filter(|_| taken_off).filter_map(own).find(named) {
            return Err(Error::Site { path, message: CHANGED_BASE.into() });
        }
        if let Some(site) = targets.iter().filter(|_| taken_off).filter(started).find(shared) {
            return Err(at(site, CHANGED_BASE));
        }
        Ok(())
    }
}

/// Whether what stands before a name ends where a name may begin.
fn ends(before: &str) -> bool {
    before.is_empty() || before.ends_with('.')
}

#[cfg(test)]
mod tests {
    use crate::testing::*;
    use engraft_nn::{Kind, Role, Sites, Targets, Value as Frozen, merged_tensors};
    use engraft_tensor::testing::{close, sample};
    use serde_json::{Value, json};
    use std::sync::Arc;

    /// A file with these keys changed.
    fn file(changes: Value) -> Value {
        let methods = [(chosen("lora", json!({ "rank": 2 })).0, Some(Targets::names(["attn.q", "attn.v"])))];
        with(config(&methods, &[]), changes)
    }

    /// The model with a matrix [5, 6] that files store transposed.
    fn with_transposed() -> Arc<Sites> {
        let mut sites = Arc::try_unwrap(toy().0).ok().unwrap();
        let source = Arc::new(engraft_nn::Weight::table(rows_of(&sample(&[5, 6], 8)), None));
        let kind = Kind::Linear { out: 5, inn: 6, transposed: true };
        sites.add_value("h.0.c_fc", Role::Up, Some(0), kind, Frozen::Weight(source), "h.0.c_fc.weight");
        Arc::new(sites)
    }

    #[test]
    fn weights_of_linear_layers_are_read_and_written_by_their_names() {
        let (sites, info) = toy();
        let methods = [(chosen("lora", json!({ "rank": 2 })).0, Some(Targets::names(["attn.q", "attn.v"])))];
        let a = attached(&methods, &[]);
        let (_, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        for (modules, parameters, layers) in [
            (json!([]), json!(["attn.v.weight", "attn.q.weight"]), Value::Null),
            (json!(["attn.q"]), json!(["attn.v.weight"]), Value::Null),
            (json!([]), json!(["attn.q.weight", "attn.v.weight"]), json!([5])),
            (json!(["attn.q"]), json!(["attn.v.weight"]), json!([0, 1])),
        ] {
            let list = if layers.is_null() { Value::Null } else { json!("layers") };
            let config = file(json!({
                "target_modules": modules, "target_parameters": parameters, "layers_to_transform": layers,
                "layers_pattern": list
            }));
            let loaded = crate::load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
            let (written, again) =
                crate::save_adapter(&loaded.adapter, &loaded.methods, &[], "b", &sites, &info).unwrap();
            for (key, expected) in [
                ("target_modules", &modules),
                ("target_parameters", &parameters),
                ("layers_to_transform", &layers),
            ] {
                assert_eq!(&written[key], expected, "{key}");
            }
            assert_eq!(again.len(), tensors.len());
        }
    }

    #[test]
    fn the_tensor_is_taken_as_it_is_stored() {
        let (sites, info) = (with_transposed(), toy().1);
        let config =
            file(json!({ "target_modules": [], "target_parameters": ["c_fc.weight", "tok.weight"] }));
        let tensors = vec![
            ("base_model.model.h.0.c_fc.lora_A.weight".to_owned(), sample(&[2, 5], 1)),
            ("base_model.model.h.0.c_fc.lora_B.weight".to_owned(), sample(&[6, 2], 2)),
            ("base_model.model.tok.lora_A.weight".to_owned(), sample(&[2, 6], 3)),
            ("base_model.model.tok.lora_B.weight".to_owned(), sample(&[frozen("tok").dim(0), 2], 4)),
        ];
        let loaded = crate::load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
        let merged = merged_tensors(&sites, &loaded.adapter).unwrap();
        let scale = config["lora_alpha"].as_f64().unwrap() as f32 / 2.0;
        let product = |b: usize, a: usize| tensors[b].1.matmul(&tensors[a].1).unwrap().scale(scale).unwrap();
        let of = |name: &str| merged.iter().find(|m| m.site.path.contains(name)).unwrap().value.clone();
        close(&of("tok"), &frozen("tok").add(&product(3, 2)).unwrap(), 1e-5);
        let stored = sample(&[5, 6], 8).t().unwrap();
        close(&of("c_fc"), &stored.add(&product(1, 0)).unwrap(), 1e-5);
    }

    #[test]
    fn patterns_are_held_against_the_name_of_the_matrix() {
        let (sites, info) = toy();
        let config = file(json!({
            "target_modules": ["attn.q"], "target_parameters": ["attn.v.weight"], "rank_pattern": { "v": 5, "v.weight": 3, "q": 4 }
        }));
        let loaded = crate::from_file(&config).unwrap();
        let a = crate::attach(&[(loaded.method, loaded.targets)], &[], &sites, &info, 0).unwrap();
        let rank = |end: &str| {
            a.adapter.params().iter().find(|p| p.name.ends_with(end)).unwrap().param.value().dim(0)
        };
        assert_eq!((rank("q.lora_A.weight"), rank("v.lora_A.weight")), (4, 3));
    }

    #[test]
    fn what_peft_does_not_do_is_refused() {
        let (sites, info) = (with_transposed(), toy().1);
        let plain = json!({ "target_modules": [], "target_parameters": ["attn.q.weight"] });
        for changes in [
            json!({ "target_parameters": ["experts.gate_up_proj"] }),
            json!({ "lora_dropout": 0.1 }),
            json!({ "lora_bias": true }),
            json!({ "use_dora": true }),
            json!({ "alora_invocation_tokens": [3] }),
            json!({ "init_lora_weights": "mica" }),
        ] {
            assert!(crate::from_file(&with(file(plain.clone()), changes.clone())).is_err(), "{changes}");
        }
        for (changes, train_also) in [
            (json!({ "target_modules": ["attn.q"] }), None),
            (json!({ "target_modules": "all-linear" }), None),
            (json!({ "target_modules": ["c_fc"] }), None),
            (json!({ "fan_in_fan_out": true }), None),
            (json!({ "target_parameters": ["nothing.weight"] }), None),
            (json!({}), Some("attn.q")),
        ] {
            let loaded = crate::from_file(&with(file(plain.clone()), changes.clone())).unwrap();
            let also: Vec<String> = train_also.iter().map(|name| (*name).to_owned()).collect();
            let methods = [(loaded.method, loaded.targets)];
            assert!(crate::attach(&methods, &also, &sites, &info, 0).is_err(), "{changes}");
        }
    }
}
