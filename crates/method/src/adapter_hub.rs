//! An adapter as AdapterHub's library has it on disk: one directory or, for a fusion, a setup of several.

use std::sync::Arc;

use engraft_nn::{Error, ModelInfo, Result, Site, Sites};
use serde_json::{Map, Value, json};

use crate::Named;
use crate::hybrid::from_peft;

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

/// The files of the adapter of a model that is saved as `config` and `tensors`; `about` is what every configuration says of the model.
///
/// # Errors
/// An adapter that AdapterHub's library has no form for.
pub fn adapter_hub(
    config: &Value,
    tensors: Named,
    about: &Map<String, Value>,
    (sites, info): (&Arc<Sites>, &ModelInfo),
) -> Result<HubFiles> {
    let (config, tensors) = match from_peft(config, &tensors, sites, info)? {
        Some(converted) => converted,
        None => (config.clone(), tensors),
    };
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
        return Err(Error::Unsupported(no_form(&config)));
    }
    if map["config"].get("subtract_projection") == Some(&false.into()) {
        let message = "this ReFT does not take P·h off (`form = \"direft\"`), which AdapterHub's library does not read from a file: it \
                       would compute another; train it with `form = \"noreft\"`";
        return Err(Error::Unsupported(message.into()));
    }
    let directory = HubDirectory {
        name: String::new(),
        config: ("adapter_config.json", Value::Object(plain)),
        weights: Some(("adapter.safetensors", own)),
    };
    Ok(HubFiles { directories: vec![directory], rest })
}

/// What is told of an adapter that the library has no form for.
fn no_form(config: &Value) -> String {
    const FORMS: &str = "it has one for bottleneck adapters, Compacter, ReFT, UniPELT, MAM adapters, fusions of serial bottleneck adapters, \
                         prefixes, prompts, LoRA and (IA)³";
    let kind = config.get("peft_type").and_then(Value::as_str).unwrap_or("none");
    match crate::assemble::is_union(config) {
        true => format!(
            "this adapter is a union of several methods, and AdapterHub's library has none that a recipe lists; {FORMS}, each by itself"
        ),
        false => format!("AdapterHub has no form for this adapter (its peft_type is {kind}); {FORMS}"),
    }
}

/// The adapters of a fusion.
fn fused(map: &Map<String, Value>) -> &[Value] {
    map.get("adapters").and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// What one of them is called.
fn name(adapter: &Value) -> &str {
    adapter.get("name").and_then(Value::as_str).unwrap_or_default()
}

/// The adapters of a fusion as the library can have them: all serial and at the same places, one that no layer goes without last,
/// since it asks the last what all of them read.
fn in_order(map: &Map<String, Value>) -> Result<Vec<&Value>> {
    let adapters = fused(map);
    let refused = |text: String| Err(Error::Unsupported(text));
    let says = |adapter: &Value, key: &str| adapter.get("config").and_then(|c| c.get(key)).cloned();
    let Some((first, rest)) = adapters.split_first() else { return Ok(vec![]) };
    for adapter in adapters {
        if says(adapter, "peft_type").is_some() || says(adapter, "is_parallel") == Some(true.into()) {
            return refused(format!(
                "`{}` is no serial bottleneck adapter, and AdapterHub fuses no others as the paper does",
                name(adapter)
            ));
        }
    }
    let unlike = |key: &str| rest.iter().find(|other| says(other, key) != says(first, key));
    for key in ["mh_adapter", "cross_adapter", "output_adapter"] {
        if let Some(other) = unlike(key) {
            return refused(format!(
                "`{}` and `{}` sit at different sublayers (`{key}`), and AdapterHub's library refuses to fuse such adapters",
                name(first),
                name(other)
            ));
        }
    }
    let of_last = map.get("reads_of_last") == Some(&true.into());
    if let Some(other) = unlike("original_ln_before").filter(|_| !of_last) {
        return refused(format!(
            "`{}` and `{}` read different rows (`original_ln_before`), and AdapterHub's library gives all of a fusion what the last reads",
            name(first),
            name(other)
        ));
    }
    let left_out =
        |adapter: &Value| says(adapter, "leave_out").and_then(|v| v.as_array().cloned()).unwrap_or_default();
    let is_everywhere = |adapter: &&Value| {
        left_out(adapter).iter().all(|layer| adapters.iter().all(|other| left_out(other).contains(layer)))
    };
    let Some(last) = adapters.iter().rev().find(is_everywhere) else {
        return refused(
            "each of these adapters leaves out a layer (`leave_out`) that another one has, and AdapterHub's library asks the last of a \
             fusion in every layer"
                .into(),
        );
    };
    let others = adapters.iter().filter(|adapter| !std::ptr::eq(*adapter, last));
    Ok(others.chain([last]).collect())
}

/// A fusion: its plan, its adapters, itself.
fn setup(map: &Map<String, Value>, tensors: Named, about: &Map<String, Value>) -> Result<Vec<HubDirectory>> {
    let adapters = in_order(map)?;
    let names: Vec<&str> = adapters.iter().map(|adapter| name(adapter)).collect();
    // Tensors are called after the adapters in their first order.
    let joined = fused(map).iter().map(name).collect::<Vec<_>>().join(",");
    let fusion = map.get("name").and_then(Value::as_str).unwrap_or(&joined);
    let around = |more: Value| {
        let mut all = about.clone();
        all.extend(more.as_object().cloned().unwrap_or_default());
        Value::Object(all)
    };
    let single = |name: &&str| json!({ "children": [name], "type": "single" });
    let children: Vec<Value> = names.iter().map(single).collect();
    let plan = json!({
        "adapter_setup": { "children": children, "kwargs": { "name": fusion }, "type": "Fuse" }, "head_setup": null,
        "version": about.get("version"),
    });
    let mut directories =
        vec![HubDirectory { name: String::new(), config: ("adapter_setup.json", plan), weights: None }];
    let of = |parts: &[String]| -> Named {
        tensors.iter().filter(|(key, _)| parts.iter().any(|part| key.contains(part))).cloned().collect()
    };
    for adapter in &adapters {
        let own = name(adapter);
        directories.push(HubDirectory {
            name: own.into(),
            config: ("adapter_config.json", around((*adapter).clone())),
            weights: Some((
                "adapter.safetensors",
                of(&[format!(".adapters.{own}."), format!("shared_parameters.{own}.")]),
            )),
        });
    }
    let own = json!({ "adapter_names": names, "config": map.get("fusion_config"), "name": fusion });
    directories.push(HubDirectory {
        name: fusion.into(),
        config: ("adapter_fusion_config.json", around(own)),
        weights: Some((
            "model_adapter_fusion.safetensors",
            of(&[format!(".adapter_fusion_layer.{fusion}.")]),
        )),
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
        let (sites, info) = crate::testing::toy();
        let found = adapter_hub(&config, tensors, &about(), (&sites, &info)).unwrap();
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
        let (sites, info) = crate::testing::toy();
        let error = |config: Value| {
            adapter_hub(&config, vec![], &about(), (&sites, &info)).map(|_| ()).unwrap_err().to_string()
        };
        assert!(error(json!({ "peft_type": "LOHA", "r": 2 })).contains("LOHA"));
        let union = error(json!({ "peft_type": "ENGRAFT_UNION", "methods": [] }));
        assert!(union.contains("union of several methods"), "{union}");
        let own = json!({ "peft_type": "ENGRAFT_BOTTLENECK", "config": {}, "name": "a", "version": "adapters.1.3.0" });
        let tensors = named(&["x.adapters.a.adapter_up.bias"]);
        let found = adapter_hub(&own, tensors, &about(), (&sites, &info)).unwrap();
        assert_eq!(found.directories[0].config.1.get("peft_type"), None);
        assert!(found.rest.is_empty());
    }
}
