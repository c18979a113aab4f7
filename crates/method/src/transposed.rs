//! Matrices that files store transposed (GPT-2's `Conv1D`): trained whole they lie so in adapters' files too. And where `peft` cannot
//! hold what changes them, or what changes a classifier, the type of the file: one of our own, so that no program loads it as
//! something that it is not.

use engraft_nn::{Adapter, Kind, ModelInfo, Result, Site, SiteId, Sites, Targets};
use engraft_tensor::Tensor;
use serde_json::Value;

use crate::Chosen;
use crate::assemble::chosen_by;
use crate::classifier::{self, ADAPTED};
use crate::layers::{self, SOME_LAYERS};
use crate::peft::NOTHING_BESIDE;

/// Types that `peft` has for `nn.Linear`: a matrix that files store transposed (GPT-2's `Conv1D`) it refuses, or leaves as it
/// is (OSF).
const NOT_TRANSPOSED: &[&str] = &[
    "BEFT",
    "BOFT",
    "C3A",
    "DELORA",
    "GLORA",
    "HRA",
    "LILY",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "OSF",
    "PEANUT",
    "POLY",
    "PSOFT",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "TRAINABLE_TOKENS",
];

/// What `peft`'s LN tuning puts between a module and the tensors of its trained copy.
pub(crate) const TRAINED_COPY: &str = ".ln_tuning_layers";

/// What precedes such a type where an adapter changes such a matrix all the same.
const TRANSPOSED: &str = "ENGRAFT_CONV1D_";

/// What precedes a type of `peft` that has no place for modules trained as a whole, where an adapter has such.
const BESIDE: &str = "ENGRAFT_BESIDE_";

/// A tensor of a file as it is here, or one of here as the file has it: `tensor` the other way round where `key` names a matrix of
/// the model that its files store transposed.
pub(crate) fn turned(key: &str, tensor: Tensor, sites: &Sites) -> Result<Tensor> {
    // Prompts do not wrap the model.
    let path = key.strip_prefix("base_model.").and_then(|path| path.strip_suffix(".weight"));
    let Some(path) = path.map(|path| path.strip_prefix("model.").unwrap_or(path)) else { return Ok(tensor) };
    let path = path.strip_suffix(TRAINED_COPY).unwrap_or(path);
    let stored_so =
        |site: &Site| matches!(site.kind, Kind::Linear { transposed: true, .. }) && site.path == path;
    if sites.iter().any(stored_so) && tensor.shape().len() == 2 { Ok(tensor.t()?) } else { Ok(tensor) }
}

/// The type of a file: that of `peft`, unless it cannot hold what is adapted at `chosen`, the modules `train_also`, or that the
/// classifier is adapted.
pub(crate) fn type_of_file(
    peft_type: &str,
    sites: &Sites,
    (targets, chosen): &(Option<Targets>, Vec<SiteId>),
    train_also: &[String],
    classifier_adapted: bool,
) -> String {
    let ours = peft_type.starts_with("ENGRAFT_");
    if layers::own(targets.as_ref()).is_some() && !ours {
        return format!("{SOME_LAYERS}{peft_type}");
    }
    let turned = |id: &SiteId| matches!(sites.get(*id).kind, Kind::Linear { transposed: true, .. });
    match NOT_TRANSPOSED.contains(&peft_type) && chosen.iter().any(turned) {
        true => format!("{TRANSPOSED}{peft_type}"),
        false if NOTHING_BESIDE.contains(&peft_type) && !train_also.is_empty() => {
            format!("{BESIDE}{peft_type}")
        }
        false if classifier_adapted && !ours => format!("{ADAPTED}{peft_type}"),
        false => peft_type.to_owned(),
    }
}

/// Whether `file_type` stands for a type of `peft` where that cannot hold the adapter.
pub(crate) fn stands_for(file_type: &str) -> Option<&str> {
    let of = |prefix, types: &[&str]| file_type.strip_prefix(prefix).filter(|own| types.contains(own));
    let of_some = of(TRANSPOSED, NOT_TRANSPOSED).or_else(|| of(BESIDE, NOTHING_BESIDE));
    of_some.or_else(|| file_type.strip_prefix(ADAPTED)).or_else(|| file_type.strip_prefix(SOME_LAYERS))
}

/// The configuration with the type of `peft` that its own stands for, if it does.
pub(crate) fn as_in_peft(config: &Value) -> Option<Value> {
    let peft_type = stands_for(config.get("peft_type")?.as_str()?)?.to_owned();
    let mut config = config.clone();
    config["peft_type"] = peft_type.into();
    Some(config)
}

/// What to say where the adapter is of a method of `peft` and yet `peft` cannot hold what it changes.
///
/// # Errors
/// Targets that match nothing.
pub fn not_in_peft(
    adapter: &Adapter,
    methods: &[Chosen],
    train_also: &[String],
    sites: &Sites,
    info: &ModelInfo,
) -> Result<Option<String>> {
    let [(method, targets)] = methods else { return Ok(None) };
    let sites = sites.named(adapter.names());
    let by = chosen_by((method.as_ref(), targets.as_ref()), train_also, sites)?;
    let is_adapted = classifier::is_adapted(info, sites, adapter);
    let file_type = type_of_file(method.file_type(adapter), sites, &by, train_also, is_adapted);
    let what = match file_type.strip_prefix(ADAPTED) {
        _ if file_type.starts_with(SOME_LAYERS) => "has this method in all layers alone",
        Some(_) => "trains a classifier as a whole and cannot hold what is adapted in it",
        None if file_type.starts_with(BESIDE) => "cannot hold modules that are trained beside this method",
        None => "cannot hold this method at matrices that are stored transposed (`Conv1D`)",
    };
    let own = stands_for(&file_type).is_some();
    Ok(own.then(|| format!("`peft` {what}: the adapter is saved as {file_type}, which Engraft alone reads")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use engraft_nn::{Role, Targets, Value as Frozen};
    use engraft_tensor::testing::{close, sample};
    use serde_json::json;

    use super::*;
    use crate::testing::{chosen, rows_of, stir, toy};
    use crate::{attach, load_adapter, save_adapter};

    #[test]
    fn modules_beside_a_method_that_peft_has_no_place_for_make_a_type_of_its_own() {
        let (sites, info) = toy();
        let methods = [(chosen("trainable_tokens", json!({ "token_indices": [1, 4] })).0, None)];
        let also = ["layers.0.norm".to_owned()];
        let a = attach(&methods, &also, &sites, &info, 1).unwrap();
        stir(&a, 0.3);
        let (config, tensors) = save_adapter(&a.adapter, &methods, &also, "b", &sites, &info).unwrap();
        assert_eq!(config["peft_type"], "ENGRAFT_BESIDE_TRAINABLE_TOKENS");
        let told = not_in_peft(&a.adapter, &methods, &also, &sites, &info).unwrap().unwrap();
        assert!(told.contains("trained beside this method"), "{told}");
        let loaded = load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
        assert_eq!(loaded.train_also, also);
        let again = save_adapter(&loaded.adapter, &loaded.methods, &also, "b", &sites, &info).unwrap();
        assert_eq!(again.0, config);
        for ((key, was), (other, is)) in tensors.iter().zip(&again.1) {
            assert_eq!(key, other);
            close(is, was, 0.0);
        }
        let a = attach(&methods, &[], &sites, &info, 1).unwrap();
        let (config, _) = save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(config["peft_type"], "TRAINABLE_TOKENS");
    }

    #[test]
    fn what_peft_cannot_hold_at_a_transposed_matrix_has_a_type_of_its_own() {
        let (sites, info) = toy();
        let mut sites = Arc::try_unwrap(sites).ok().unwrap();
        let weight = sample(&[5, 6], 8);
        let source = Arc::new(engraft_nn::Weight::table(rows_of(&weight), None));
        let kind = engraft_nn::Kind::Linear { out: 5, inn: 6, transposed: true };
        sites.add_value("h.0.c_fc", Role::Up, Some(0), kind, Frozen::Weight(source), "h.0.c_fc.weight");
        let sites = Arc::new(sites);
        for (name, expected) in [
            ("osf", "ENGRAFT_CONV1D_OSF"),
            ("loha", "ENGRAFT_CONV1D_LOHA"),
            ("trainable_tokens", "ENGRAFT_CONV1D_TRAINABLE_TOKENS"),
            ("lora", "LORA"),
            ("bitfit", "ENGRAFT_BITFIT"),
        ] {
            let names = if name == "bitfit" { vec!["attn.q"] } else { vec!["c_fc"] };
            let settings = match name {
                "trainable_tokens" => json!({ "token_indices": [1, 4] }),
                _ => json!({}),
            };
            let methods = [(chosen(name, settings).0, Some(Targets::names(names)))];
            let a = attach(&methods, &[], &sites, &info, 1).unwrap();
            stir(&a, 0.3);
            let (config, tensors) = save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
            assert_eq!(config["peft_type"], expected, "{name}");
            let own = not_in_peft(&a.adapter, &methods, &[], &sites, &info).unwrap();
            assert_eq!(own.is_some(), expected.contains("CONV1D"), "{name}");
            let loaded = load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
            let again = save_adapter(&loaded.adapter, &loaded.methods, &[], "b", &sites, &info).unwrap();
            assert_eq!(again.0, config, "{name}");
            for ((key, was), (other, is)) in tensors.iter().zip(&again.1) {
                assert_eq!(key, other);
                close(is, was, 0.0);
            }
        }
        // A file of `peft` holds nothing of such a matrix and says that it does.
        let methods = [(chosen("osf", json!({})).0, Some(Targets::names(["c_fc"])))];
        let a = attach(&methods, &[], &sites, &info, 1).unwrap();
        let (mut config, _) = save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        config["peft_type"] = "OSF".into();
        let error = load_adapter(&config, vec![], &sites, &info).err().unwrap().to_string();
        assert!(error.contains("passes over"), "{error}");
        // Elsewhere it is that of `peft`.
        let methods = [(chosen("osf", json!({})).0, Some(Targets::names(["attn.q"])))];
        let a = attach(&methods, &[], &sites, &info, 1).unwrap();
        let (config, _) = save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(config["peft_type"], "OSF");
    }
}
