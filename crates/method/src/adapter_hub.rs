//! An adapter as AdapterHub's library has it on disk: one directory or, for a fusion, a setup of several.

use engraft_nn::{Error, Result, Site, Sites};
use serde_json::{Map, Value, json};

use crate::Named;

/// The files of an adapter in AdapterHub's form.
pub struct HubFiles {
    /// Directories below the adapter's own; "" is that itself.
    pub directories: Vec<HubDirectory>,
    /// Tensors of the model that the adapter has trained whole, which are no part of an adapter there.
    pub rest: Named,
}

/// One directory: a configuration and the tensors beside it.
pub struct HubDirectory {
    /// Its name.
    pub name: String,
    /// Name and content of its configuration.
    pub config: (&'static str, Value),
    /// Name and content of its weights; none beside the plan of a setup.
    pub weights: Option<(&'static str, Named)>,
}

/// The name that AdapterHub has for a module: its older one, where it was renamed.
pub(crate) fn hub_name(sites: &Sites, site: &Site) -> String {
    sites.older().map_or(&site.path, |older| &older.get(site.id).path).clone()
}

/// Keys around a configuration that the library does not have.
const OURS: [&str; 8] = [
    "peft_type",
    "base_model_name_or_path",
    "task_type",
    "inference_mode",
    "modules_to_save",
    "peft_version",
    "auto_mapping",
    "revision",
];

/// The files of the adapter that is saved as `config` and `tensors`; `about` is what every configuration says of the model.
///
/// # Errors
/// An adapter whose form is not AdapterHub's.
pub fn adapter_hub(config: &Value, tensors: Named, about: &Map<String, Value>) -> Result<HubFiles> {
    let (own, rest): (Named, Named) =
        tensors.into_iter().partition(|(name, _)| !name.starts_with(crate::foreign::PREFIX));
    let Some(map) = config.as_object() else {
        return Err(Error::Unsupported("adapter_config.json holds no object".into()));
    };
    let mut plain: Map<String, Value> = map.clone();
    plain.retain(|key, _| !OURS.contains(&key.as_str()));
    plain.extend(about.clone());
    if map.contains_key("fusion_config") {
        return Ok(HubFiles { directories: setup(map, own, about)?, rest });
    }
    if !(map.get("config").is_some_and(Value::is_object) && map.contains_key("name")) {
        let kind = map.get("peft_type").and_then(Value::as_str).unwrap_or("none");
        return Err(Error::Unsupported(format!(
            "AdapterHub has no form for this adapter (its peft_type is {kind}); it has one for bottleneck adapters, Compacter, \
             ReFT, UniPELT, MAM adapters, fusions, and for prefixes, prompts, LoRA and (IA)³ that were read from its files"
        )));
    }
    let directory = HubDirectory {
        name: String::new(),
        config: ("adapter_config.json", Value::Object(plain)),
        weights: Some(("adapter.safetensors", own)),
    };
    Ok(HubFiles { directories: vec![directory], rest })
}

/// A fusion: its plan, its adapters, itself.
fn setup(map: &Map<String, Value>, tensors: Named, about: &Map<String, Value>) -> Result<Vec<HubDirectory>> {
    let adapters = map.get("adapters").and_then(Value::as_array).cloned().unwrap_or_default();
    for adapter in &adapters {
        let inner = adapter.get("config");
        let is_other = inner.is_some_and(|config| config.get("peft_type").is_some());
        if is_other || inner.and_then(|config| config.get("is_parallel")) == Some(&Value::Bool(true)) {
            return Err(Error::Unsupported(format!(
                "`{}` is no serial bottleneck adapter, and AdapterHub fuses no others as the paper does",
                adapter.get("name").and_then(Value::as_str).unwrap_or_default()
            )));
        }
    }
    let names: Vec<&str> = adapters.iter().filter_map(|a| a.get("name").and_then(Value::as_str)).collect();
    let joined = names.join(",");
    let name = map.get("name").and_then(Value::as_str).unwrap_or(&joined);
    let around = |more: Value| {
        let mut all = about.clone();
        all.extend(more.as_object().cloned().unwrap_or_default());
        Value::Object(all)
    };
    let single = |name: &&str| json!({ "children": [name], "type": "single" });
    let children: Vec<Value> = names.iter().map(single).collect();
    let plan = json!({
        "adapter_setup": { "children": children, "kwargs": { "name": name }, "type": "Fuse" }, "head_setup": null,
        "version": about.get("version"),
    });
    let mut directories =
        vec![HubDirectory { name: String::new(), config: ("adapter_setup.json", plan), weights: None }];
    let of = |parts: &[String]| -> Named {
        tensors.iter().filter(|(key, _)| parts.iter().any(|part| key.contains(part))).cloned().collect()
    };
    for adapter in &adapters {
        let own = adapter.get("name").and_then(Value::as_str).unwrap_or_default();
        directories.push(HubDirectory {
            name: own.into(),
            config: ("adapter_config.json", around(adapter.clone())),
            weights: Some((
                "adapter.safetensors",
                of(&[format!(".adapters.{own}."), format!("shared_parameters.{own}.")]),
            )),
        });
    }
    let fusion = json!({ "adapter_names": names, "config": map.get("fusion_config"), "name": name });
    directories.push(HubDirectory {
        name: name.into(),
        config: ("adapter_fusion_config.json", around(fusion)),
        weights: Some(("model_adapter_fusion.safetensors", of(&[format!(".adapter_fusion_layer.{name}.")]))),
    });
    Ok(directories)
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_tensor::Tensor;

    fn about() -> Map<String, Value> {
        json!({ "model_type": "bert" }).as_object().cloned().unwrap_or_default()
    }

    fn named(names: &[&str]) -> Named {
        names.iter().map(|name| ((*name).to_owned(), Tensor::full(1.0, [1]))).collect()
    }

    #[test]
    fn a_fusion_is_a_setup() {
        let config = json!({
            "peft_type": "ENGRAFT_ADAPTER_FUSION", "fusion_config": { "key": true },
            "adapters": [{ "config": { "reduction_factor": 2 }, "name": "a" }, { "config": {}, "name": "b" }],
        });
        let tensors = named(&[
            "x.adapters.a.adapter_up.bias",
            "x.adapters.b.adapter_up.bias",
            "x.adapter_fusion_layer.a,b.key.bias",
            "base_model.model.head.weight",
        ]);
        let found = adapter_hub(&config, tensors, &about()).unwrap();
        assert_eq!((found.rest.len(), found.rest[0].0.as_str()), (1, "base_model.model.head.weight"));
        let names: Vec<(&str, &str)> =
            found.directories.iter().map(|d| (d.name.as_str(), d.config.0)).collect();
        assert_eq!(
            names,
            [
                ("", "adapter_setup.json"),
                ("a", "adapter_config.json"),
                ("b", "adapter_config.json"),
                ("a,b", "adapter_fusion_config.json")
            ]
        );
        assert_eq!(found.directories[1].config.1["model_type"], "bert");
        assert_eq!(found.directories[3].config.1["config"]["key"], true);
        let held = |i: usize| found.directories[i].weights.as_ref().map_or(0, |(_, tensors)| tensors.len());
        assert_eq!([0, 1, 2, 3].map(held), [0, 1, 1, 1]);
    }

    #[test]
    fn what_has_no_such_form_is_refused() {
        let error = adapter_hub(&json!({ "peft_type": "LORA", "r": 2 }), vec![], &about());
        let error = error.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("LORA"), "{error}");
        let own = json!({ "peft_type": "ENGRAFT_BOTTLENECK", "config": {}, "name": "a", "version": "adapters.1.3.0" });
        let found = adapter_hub(&own, named(&["x.adapters.a.adapter_up.bias"]), &about()).unwrap();
        assert_eq!(found.directories[0].config.1.get("peft_type"), None);
        assert!(found.rest.is_empty());
    }
}
