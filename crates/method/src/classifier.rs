//! The classifier of a text model, which `peft` trains and saves as a whole with every adapter of such a model: by the task alone,
//! whatever the configuration says. Targets inside it are no targets there.

use engraft_nn::{Adapter, ModelInfo, Site, Sites, Value as Frozen};
use serde_json::Value;

use crate::peft::{NOTHING_BESIDE, task_type};

/// What `peft` trains and saves with an adapter of a classifier, whatever the configuration says.
const CLASSIFIERS: &[&str] = &["classifier", "score"];

/// Those of `dead` among `train_also` that a user may have named, each once: `peft` names all classifiers that it knows by itself,
/// and one of them is the model's.
pub(crate) fn unmatched(mut dead: Vec<String>, train_also: &[String], config: &Value) -> Vec<String> {
    let classifies = matches!(config.get("task_type").and_then(Value::as_str), Some("SEQ_CLS" | "TOKEN_CLS"));
    let is_usual = |name: &String| CLASSIFIERS.contains(&name.as_str());
    let has_one = train_also.iter().any(|name| is_usual(name) && !dead.contains(name));
    dead.retain(|name| !(classifies && has_one && is_usual(name)));
    dead.sort();
    dead.dedup();
    dead
}

/// What precedes a type of `peft` where an adapter changes a classifier by something that is no whole tensor.
pub(crate) const ADAPTED: &str = "ENGRAFT_HEAD_";

/// The classifier's name and sites; `None` where the adapter's file will not be one of a classifier.
fn of_model<'s>(
    info: &ModelInfo,
    sites: &'s Sites,
    adapter: &Adapter,
) -> Option<(&'static str, Vec<&'s Site>)> {
    // A file may name another task, or none.
    if !matches!(task_type(adapter, info), Some("SEQ_CLS" | "TOKEN_CLS")) {
        return None;
    }
    CLASSIFIERS.iter().find_map(|name| {
        let inside = |s: &&Site| {
            s.path.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let found: Vec<&Site> =
            sites.iter().filter(|s| !matches!(s.value, Frozen::None)).filter(inside).collect();
        (!found.is_empty()).then_some((*name, found))
    })
}

/// Whether the adapter holds the tensor of a site itself.
fn holds(adapter: &Adapter, site: &Site) -> bool {
    let name = site.tensor_name();
    adapter.params().iter().any(|param| param.saved && param.name == name)
}

/// Whether the adapter changes the classifier by something that is no whole tensor.
pub(crate) fn is_adapted(info: &ModelInfo, sites: &Sites, adapter: &Adapter) -> bool {
    let changed = |site: &&Site| match adapter.at(site.id) {
        [] => false,
        patches => patches.len() > 1 || !holds(adapter, site),
    };
    of_model(info, sites, adapter).is_some_and(|(_, of_model)| of_model.iter().any(changed))
}

/// What a file of `peft_type` holds beside the adapter, so that the classifier is there as a whole: `modules_to_save`, and the
/// tensors that the adapter leaves as they are. `peft` takes one module for it: what of it is in `train_also` goes with it.
pub(crate) fn kept<'s>(
    peft_type: &str,
    info: &ModelInfo,
    sites: &'s Sites,
    adapter: &Adapter,
    train_also: &[String],
) -> (Vec<String>, Vec<&'s Site>) {
    let none = || (train_also.to_vec(), Vec::new());
    if peft_type.starts_with("ENGRAFT_") || NOTHING_BESIDE.contains(&peft_type) {
        return none();
    }
    let Some((classifier, of_model)) = of_model(info, sites, adapter) else { return none() };
    let missing: Vec<&Site> = of_model.into_iter().filter(|site| !holds(adapter, site)).collect();
    if missing.is_empty() && train_also.iter().any(|name| name == classifier) {
        return none();
    }
    let mut names: Vec<String> =
        train_also.iter().flat_map(|name| outside(name, classifier, sites)).collect();
    names.push(classifier.to_owned());
    (names, missing)
}

/// `name` in `modules_to_save` where it means nothing in the classifier, else the modules outside that it means.
fn outside(name: &str, classifier: &str, sites: &Sites) -> Vec<String> {
    let modules: Vec<String> = sites
        .iter()
        .filter(|site| !matches!(site.value, Frozen::None))
        .filter_map(|site| {
            let path = site.tensor_name();
            let ends = |at: &usize| path.as_bytes().get(*at) == Some(&b'.');
            let end = path.match_indices(name).map(|(at, _)| at + name.len()).find(ends)?;
            Some(path[..end].to_owned())
        })
        .collect();
    let within = |module: &String| {
        module.strip_prefix(classifier).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    if !modules.iter().any(within) {
        return vec![name.to_owned()];
    }
    let mut others: Vec<String> = modules.into_iter().filter(|module| !within(module)).collect();
    others.dedup();
    others
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use engraft_nn::{Linear, Role, Targets, Task, Weight};
    use engraft_tensor::testing::{close, sample};
    use serde_json::json;

    use super::*;
    use crate::testing::{chosen, rows_of, stir, toy};
    use crate::{Named, attach, load_adapter, not_in_peft, save_adapter};

    #[test]
    fn names_that_peft_adds_are_not_missed() {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let of = |dead: &[&str], all: &[&str], task: &str| {
            unmatched(list(dead), &list(all), &json!({ "task_type": task }))
        };
        let both = ["classifier", "score", "classifier", "score"];
        assert!(of(&["score", "score"], &both, "SEQ_CLS").is_empty());
        assert_eq!(of(&["score", "score"], &both, "CAUSAL_LM"), ["score"]);
        assert_eq!(of(&both, &both, "SEQ_CLS"), ["classifier", "score"]);
        assert_eq!(of(&["x", "score"], &["x", "score", "classifier"], "TOKEN_CLS"), ["x"]);
        assert_eq!(of(&["score"], &["score", "x"], "SEQ_CLS"), ["score"]);
    }

    /// The toy model with a classifier of two layers.
    fn classifying() -> (Arc<Sites>, ModelInfo) {
        let (sites, mut info) = toy();
        let mut sites = Arc::try_unwrap(sites).ok().unwrap();
        for (path, out, seed) in [("classifier.dense", 6, 71), ("classifier.out_proj", 3, 72)] {
            let weight = Weight::table(rows_of(&sample(&[out, 6], seed)), None);
            let bias = Some(sample(&[out], seed + 10));
            Linear::declare(&mut sites, (path, path), Role::Head, None, Arc::new(weight), bias);
        }
        info.task = Task::SequenceClassification;
        (Arc::new(sites), info)
    }

    fn of<'a>(tensors: &'a Named, name: &str) -> &'a engraft_tensor::Tensor {
        &tensors.iter().find(|(key, _)| key == &format!("base_model.model.{name}")).expect(name).1
    }

    #[test]
    fn a_classifier_of_which_a_part_is_trained_is_in_the_file_as_a_whole() {
        let (sites, info) = classifying();
        let queries = || Some(Targets::names(["attn.q"]));
        for (settings, also) in [
            (json!({ "bias": "all" }), vec![]),
            (json!({}), vec!["out_proj"]),
            (json!({}), vec!["dense", "out_proj"]),
            (json!({ "bias": "all" }), vec!["norm", "out_proj"]),
        ] {
            let methods = [(chosen("lora", settings).0, queries())];
            let also: Vec<String> = also.into_iter().map(str::to_owned).collect();
            let a = attach(&methods, &also, &sites, &info, 1).unwrap();
            stir(&a, 0.3);
            let (config, tensors) = save_adapter(&a.adapter, &methods, &also, "b", &sites, &info).unwrap();
            let modules = if also.iter().any(|n| n == "norm") {
                json!(["norm", "classifier"])
            } else {
                json!(["classifier"])
            };
            assert_eq!((&config["peft_type"], &config["modules_to_save"]), (&json!("LORA"), &modules));
            for (name, seed) in [("dense", 71), ("out_proj", 72)] {
                for (end, base) in [
                    ("weight", sample(&[if name == "dense" { 6 } else { 3 }, 6], seed)),
                    ("bias", sample(&[if name == "dense" { 6 } else { 3 }], seed + 10)),
                ] {
                    let name = format!("classifier.{name}.{end}");
                    let own = a.adapter.params().iter().find(|p| p.name == name);
                    close(of(&tensors, &name), &own.map_or(base, |p| p.param.value()), 1e-6);
                }
            }
            let loaded = load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
            let again =
                save_adapter(&loaded.adapter, &loaded.methods, &loaded.train_also, "b", &sites, &info)
                    .unwrap();
            assert_eq!(again.0, config);
            assert!(again.1.iter().zip(&tensors).all(|(a, b)| a.0 == b.0));
        }
    }

    #[test]
    fn a_classifier_that_is_adapted_has_a_type_of_its_own() {
        let (sites, info) = classifying();
        for (name, targets) in
            [("lora", vec!["attn.q", "out_proj"]), ("ia3", vec!["dense"]), ("beft", vec!["out_proj"])]
        {
            let methods = [(chosen(name, json!({})).0, Some(Targets::names(targets)))];
            let a = attach(&methods, &[], &sites, &info, 1).unwrap();
            stir(&a, 0.3);
            let (config, tensors) = save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
            assert_eq!(config["peft_type"], format!("ENGRAFT_HEAD_{}", name.to_uppercase()));
            let told = not_in_peft(&a.adapter, &methods, &[], &sites, &info).unwrap().unwrap();
            assert!(told.contains("ENGRAFT_HEAD_") && told.contains("classifier"), "{told}");
            let loaded = load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
            let again = save_adapter(&loaded.adapter, &loaded.methods, &[], "b", &sites, &info).unwrap();
            assert_eq!(again.0, config);
            for ((key, was), (other, is)) in tensors.iter().zip(&again.1) {
                assert_eq!(key, other);
                close(is, was, 0.0);
            }
            // Trained as a whole it is none of the targets.
            let also = ["classifier".to_owned()];
            let whole = [(chosen(name, json!({})).0, Some(Targets::names(["attn.q", "out_proj"])))];
            let a = attach(&whole, &also, &sites, &info, 1).unwrap();
            assert!(not_in_peft(&a.adapter, &whole, &also, &sites, &info).unwrap().is_none());
        }
    }
}
