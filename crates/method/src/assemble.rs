//! Methods and sites → adapter, and adapter ↔ file: configuration and tensors, no bytes.
//!
//! One method is written in `peft`'s form, with `peft`'s type where there is one. Several methods in one adapter are a
//! union of Engraft's own type: their configurations in a list, their tensors under `0.`, `1.`, …

use std::collections::HashMap;
use std::sync::Arc;

use engraft_nn::{
    Adapter, Base, Builder, Error, Matcher, ModelInfo, Patch, Replacement, Result, Site, SiteId, Sites,
    Targets, TaskName, Value as Frozen, pattern,
};
use engraft_tensor::Tensor;
use serde_json::{Map, Value, json};

use crate::bases::{OtherBase, other_bases};
use crate::copies::{biases_of_decoders, biases_of_saved, copies_are_equal, one_bias_a_head, stale};
use crate::names::{file_names, prefix, stored_as};
use crate::transposed::{turned, type_of_file};
use crate::written::{as_held, as_stored, as_trained, written};
use crate::{Described, Method, classifier, from_file, layers, peft, tied};

const UNION: &str = "ENGRAFT_UNION";

/// A method and the sites it was told to use; `None` for its default.
pub type Chosen = (Box<dyn Method>, Option<Targets>);

/// Tensors by their names in a file.
pub type Named = Vec<(String, Tensor)>;

/// A new adapter, and what was named but matches nothing in the model.
pub struct Attached {
    /// The adapter.
    pub adapter: Adapter,
    /// Targets without a site, among others that have some.
    pub dead_targets: Vec<String>,
    /// Modules to train as a whole that do not exist.
    pub dead_modules: Vec<String>,
    /// Numbers of the methods that have sites of their own and look at no targets.
    pub without_targets: Vec<usize>,
}

/// An adapter read from a file, with what made it.
pub struct LoadedAdapter {
    /// The adapter.
    pub adapter: Adapter,
    /// Its methods.
    pub methods: Vec<Chosen>,
    /// Modules trained as a whole.
    pub train_also: Vec<String>,
    /// Targets and modules that the file names and the model does not have.
    pub dead: Vec<String>,
}

/// A new adapter: the modules `train_also` trained as a whole, then every method at its sites, in order.
///
/// New tensors are drawn from `seed`. An error where a method's targets match nothing at all. Where the model's modules
/// have been renamed, targets may go by the older names, and the tensors then do too.
pub fn attach(
    methods: &[Chosen],
    train_also: &[String],
    sites: &Arc<Sites>,
    info: &ModelInfo,
    seed: u64,
) -> Result<Attached> {
    under_names(
        sites,
        |a: &Attached| a.dead_targets.len() + a.dead_modules.len(),
        |sites| build(methods, train_also, sites, info, seed, Vec::new(), &Vec::new()),
    )
}

/// `make` under the model's current names or, where these leave something unmatched and the older ones less, those.
fn under_names<T>(
    sites: &Arc<Sites>,
    dead: impl Fn(&T) -> usize,
    make: impl Fn(&Arc<Sites>) -> Result<T>,
) -> Result<T> {
    let current = make(sites);
    let unmatched = current.as_ref().map_or(usize::MAX, &dead);
    let Some(older) = sites.older().filter(|_| unmatched > 0) else { return current };
    match make(older) {
        Ok(found) if dead(&found) < unmatched => Ok(found),
        _ => current,
    }
}

fn build(
    methods: &[Chosen],
    train_also: &[String],
    sites: &Arc<Sites>,
    info: &ModelInfo,
    seed: u64,
    replaced: Vec<OtherBase>,
    unread: &Named,
) -> Result<Attached> {
    let views: Vec<_> = methods.iter().map(|(_, targets)| layers::view(targets.as_ref(), sites)).collect();
    let mut b = Builder::new(sites, info, seed);
    for (name, value) in unread {
        b.fixed(name, value.shape(), engraft_nn::Init::Values(value.clone()))?;
    }
    for other in replaced {
        let shape = other.value.shape().to_vec();
        let param = b.fixed(&other.name, &shape, engraft_nn::Init::Values(other.value))?;
        for id in other.sites {
            b.patch(id, Patch::Weight(Box::new(Replacement(param.clone()))))?;
        }
    }
    let dead_modules = b.train_modules(train_also)?;
    let (mut dead_targets, mut without_targets) = (Vec::new(), Vec::new());
    for (number, (method, targets)) in methods.iter().enumerate() {
        b.set_prefix(prefix(methods, number));
        if let Some(targets) = targets.clone().or_else(|| method.default_targets(sites)) {
            let targets = Targets { train_also: train_also.to_vec(), ..targets };
            let found = tied::resolve(method.as_ref(), &targets, sites)?;
            dead_targets.extend(found.dead);
            b.set_targets(found.sites);
            b.set_choice(Some(targets));
        } else {
            b.set_targets(Vec::new());
            b.set_choice(None);
        }
        layers::attach(method.as_ref(), &mut b, sites, views[number].as_ref())?;
        if !b.heeds_targets() {
            without_targets.push(number);
        }
    }
    // A pattern of ranks that could not be decided must not pass for one that does not match.
    pattern::gave_up()?;
    Ok(Attached { adapter: b.finish(), dead_targets, dead_modules, without_targets })
}

/// An adapter from `adapter_config.json` and the tensors beside it.
///
/// Every missing, extra and mis-shaped tensor is reported. A copy of a frozen embedding or head is taken as the base
/// below the adapter where it differs from the model's own. Modules may go by their older names.
pub fn load_adapter(
    config: &Value,
    tensors: Named,
    sites: &Arc<Sites>,
    info: &ModelInfo,
) -> Result<LoadedAdapter> {
    under_names(
        sites,
        |loaded: &LoadedAdapter| loaded.dead.len(),
        |sites| load_named(config, tensors.clone(), sites, info),
    )
}

fn load_named(config: &Value, tensors: Named, sites: &Arc<Sites>, info: &ModelInfo) -> Result<LoadedAdapter> {
    let (mut methods, train_also) = read_methods(config)?;
    methods.iter_mut().for_each(|(method, _)| method.read_shapes(&tensors));
    let tensors = one_bias_a_head(tied::without_copies(tensors, config, sites)?, config, sites);
    let tensors = as_trained(tensors, &methods)?;
    let mut attached = build(&methods, &train_also, sites, info, 0, Vec::new(), &Vec::new())?;
    let (mut names, mut copies) = (HashMap::new(), HashMap::new());
    for p in attached.adapter.params().iter().filter(|p| p.saved) {
        let (key, more) = file_names(&methods, &attached.adapter, &p.name);
        names.insert(key, p.name.clone());
        copies.extend(more.into_iter().map(|copy| (copy, p.name.clone())));
    }
    let (mut given, mut rest, mut copied) = (Vec::new(), Vec::new(), Vec::new());
    for (key, tensor) in tensors {
        let tensor = turned(&key, as_held(tensor, stored_as(&methods, &key, sites))?, sites)?;
        match (names.get(&key), copies.get(&key)) {
            (Some(name), _) => given.push((name.clone(), tensor)),
            (None, Some(name)) => copied.push((key, name, tensor)),
            (None, None) if stale(&key) => {}
            (None, None) => rest.push((key, tensor)),
        }
    }
    copies_are_equal(&copied, &given)?;
    let (unknown, others) = other_bases(rest, sites)?;
    let (unknown, unread) = tied::of_unread_modules(unknown, sites);
    given.extend(unknown);
    if !others.is_empty() || !unread.is_empty() {
        given.extend(others.iter().map(|o| (o.name.clone(), o.value.clone())));
        given.extend(unread.clone());
        attached = build(&methods, &train_also, sites, info, 0, others, &unread)?;
    }
    attached.adapter.load(given)?;
    let says = |key: &str| config.get(key).and_then(Value::as_str);
    attached.adapter.set_task(match (says("task_type"), says("peft_type")) {
        (Some(name), _) => TaskName::Is(name.to_owned()),
        (None, Some(_)) => TaskName::None,
        (None, None) => TaskName::OfModel,
    });
    attached.adapter.set_idle_keys(peft::idle_keys(config, &methods));
    // AdapterHub's files have neither key; what its library saved is trained as there.
    attached.adapter.set_reads_answers(says("peft_type").is_none());
    let dead_modules = classifier::unmatched(attached.dead_modules, &train_also, config);
    let dead = attached.dead_targets.into_iter().chain(dead_modules).collect();
    Ok(LoadedAdapter { adapter: attached.adapter, methods, train_also, dead })
}

/// Whether a configuration is that of several methods.
pub(crate) fn is_union(config: &Value) -> bool {
    peft::is_type(config, UNION)
}

/// The methods of a configuration.
pub(crate) fn methods_of(config: &Value) -> Result<Vec<Chosen>> {
    Ok(read_methods(config)?.0)
}

fn read_methods(config: &Value) -> Result<(Vec<Chosen>, Vec<String>)> {
    let configs = match config.get("methods").and_then(Value::as_array) {
        Some(list) if is_union(config) => list.as_slice(),
        _ => std::slice::from_ref(config),
    };
    let (mut methods, mut train_also) = (Vec::new(), Vec::new());
    for config in configs {
        let loaded = from_file(config)?;
        methods.push((loaded.method, loaded.targets));
        train_also.extend(loaded.train_also);
    }
    if is_union(config) {
        train_also = config.get("modules_to_save").and_then(crate::read::texts).unwrap_or_default();
    }
    Ok((methods, train_also))
}

/// `adapter_config.json` and the tensors of its file. `base_model` is the base as the user named it.
///
/// `peft` wants the tensors of a classifier in every file; one that is not trained is written as it is in the model.
/// Modules are called as the adapter's targets call them.
pub fn save_adapter(
    adapter: &Adapter,
    methods: &[Chosen],
    train_also: &[String],
    base_model: &str,
    sites: &Sites,
    info: &ModelInfo,
) -> Result<(Value, Named)> {
    let sites = sites.named(adapter.names());
    let mut tensors = Vec::new();
    for (name, value) in written(adapter, methods)? {
        let (key, copies) = file_names(methods, adapter, &name);
        tensors.extend(copies.into_iter().chain([key]).map(|key| (key, value.clone())));
    }
    let config = match methods {
        [(method, targets)] => {
            let by = chosen_by((method.as_ref(), targets.as_ref()), train_also, sites)?;
            let is_adapted = classifier::is_adapted(info, sites, adapter);
            let file_type = type_of_file(method.file_type(adapter), sites, &by, train_also, is_adapted);
            let (train_also, kept) = classifier::kept(&file_type, info, sites, adapter, train_also);
            for site in kept {
                tensors.push((method.file_name(&site.tensor_name()), own_value(site)?));
            }
            let of = Saved { adapter, base_model, sites, info };
            let (map, chosen) = config((method.as_ref(), targets.as_ref()), "", &train_also, &of)?;
            biases_of_decoders(&mut tensors, &map, (&train_also, &chosen), sites);
            tensors.extend(biases_of_saved(&map, &train_also, &tensors, sites));
            tensors.extend(tied::copies(&map, &tensors, sites)?);
            for site in peft::copied_tables(&map, sites, info, &chosen) {
                let key = format!("base_model.model.{}.base_layer.weight", site.path);
                if tensors.iter().all(|(name, _)| *name != key) {
                    tensors.push((key, own_value(site)?));
                }
            }
            map
        }
        several => {
            let saved = Saved { adapter, base_model, sites, info };
            let of = |(number, (m, t)): (usize, &Chosen)| {
                let before = prefix(several, number);
                Ok(Value::Object(config((m.as_ref(), t.as_ref()), &before, &[], &saved)?.0))
            };
            let mut union = peft::write_header(UNION, base_model, peft::task_type(adapter, info), train_also);
            let configs = several.iter().enumerate().map(of).collect::<Result<Vec<_>>>()?;
            union.insert("methods".into(), json!(configs));
            peft::keep_idle(&mut union, adapter, "");
            union
        }
    };
    for (key, tensor) in &mut tensors {
        *tensor = turned(key, as_stored(tensor, stored_as(methods, key, sites))?, sites)?;
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok((Value::Object(config), tensors))
}

/// The model's value at a site.
fn own_value(site: &Site) -> Result<Tensor> {
    match &site.value {
        Frozen::Weight(weight) => weight.dense(),
        Frozen::Vector(vector) => Ok(vector.clone()),
        Frozen::None => {
            Err(Error::Site { path: site.path.clone(), message: "expected a tensor, found none".into() })
        }
    }
}

/// What is saved, and for which model.
struct Saved<'a> {
    adapter: &'a Adapter,
    base_model: &'a str,
    sites: &'a Sites,
    info: &'a ModelInfo,
}

/// A method's targets beside the modules trained as a whole, and the sites that they choose.
pub(crate) fn chosen_by(
    (method, targets): (&dyn Method, Option<&Targets>),
    train_also: &[String],
    sites: &Sites,
) -> Result<(Option<Targets>, Vec<SiteId>)> {
    let targets = targets.cloned().or_else(|| method.default_targets(sites));
    let targets = targets.map(|targets| Targets { train_also: train_also.to_vec(), ..targets });
    let chosen = match &targets {
        Some(targets) => tied::resolve(method, targets, sites)?.sites,
        None => Vec::new(),
    };
    Ok((targets, chosen))
}

/// The method's configuration, and the sites that its targets choose.
fn config(
    (method, targets): (&dyn Method, Option<&Targets>),
    prefix: &str,
    train_also: &[String],
    saved: &Saved<'_>,
) -> Result<(Map<String, Value>, Vec<SiteId>)> {
    let Saved { adapter, base_model, sites, info } = *saved;
    let task = peft::task_type(adapter, info);
    let by = chosen_by((method, targets), train_also, sites)?;
    // Of several methods the file has a type of its own already.
    let is_adapted = prefix.is_empty() && classifier::is_adapted(info, sites, adapter);
    let file_type = type_of_file(method.file_type(adapter), sites, &by, train_also, is_adapted);
    let (targets, chosen) = by;
    let mut map = peft::write_header(&file_type, base_model, task, train_also);
    map.insert(peft::AUTO_MAPPING.into(), peft::auto_mapping(adapter, info));
    map.extend(method.config(&Described { info, sites, chosen: &chosen, adapter, prefix, base_model }));
    peft::agree_on_storage(&mut map, sites, &chosen);
    if let Some(targets) = targets {
        let by_layer = map.contains_key("layers_to_transform");
        map.extend(peft::write_targets(&targets, method, sites, by_layer)?);
        if matches!(targets.matcher, Matcher::Roles(_)) {
            peft::agree_on_parameters(&mut map);
        }
        peft::agree_on_feedforward(&mut map, sites, &chosen);
    }
    peft::keep_idle(&mut map, adapter, prefix);
    Ok((map, chosen))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{attached, chosen, config, frozen, names, rows_of, stir, survives_saving, toy};
    use engraft_nn::Role;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn several_methods_keep_their_names_apart() {
        let union = [
            chosen("lora", json!({ "rank": 2 })),
            chosen("lora", json!({ "rank": 3 })),
            chosen("prompt", json!({})),
        ];
        let a = attached(&union, &["head"]);
        assert!(
            names(&a).contains(&"0.layers.0.attn.q.lora_A.weight")
                && names(&a).contains(&"2.prompt_embeddings")
        );
        survives_saving(&union, &["head"]);
        let written = config(&union, &["head"]);
        assert_eq!(written["peft_type"], "ENGRAFT_UNION");
        assert_eq!(written["methods"].as_array().unwrap().len(), 3);
    }

    #[test]
    fn an_embedding_under_lora_is_in_the_file_as_peft_has_it() {
        let (sites, info) = toy();
        let mut sites = Arc::try_unwrap(sites).ok().unwrap();
        let table = sample(&[11, 6], 8);
        let weight = Arc::new(engraft_nn::Weight::table(rows_of(&table), None));
        engraft_nn::Embedding::declare(
            &mut sites,
            ("model.embed_tokens", "model.embed_tokens"),
            Role::Embed,
            weight,
        );
        let sites = Arc::new(sites);
        let methods = [(chosen("lora", json!({})).0, Some(Targets::names(["embed_tokens"])))];
        let a = attach(&methods, &[], &sites, &info, 1).unwrap();
        let (config, tensors) = save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        let key = "base_model.model.model.embed_tokens.base_layer.weight";
        close(&tensors.iter().find(|t| t.0 == key).unwrap().1, &table, 0.0);
        let loaded = load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
        assert_eq!(loaded.adapter.params().len(), 2, "an equal copy is no base of its own");
    }

    #[test]
    fn a_classifier_that_is_not_trained_is_in_the_file() {
        let (sites, mut info) = toy();
        let mut sites = Arc::try_unwrap(sites).ok().unwrap();
        let weight = frozen("head");
        let source = Arc::new(engraft_nn::Weight::table(rows_of(&weight), None));
        let bias = Some(sample(&[3], 4));
        engraft_nn::Linear::declare(
            &mut sites,
            ("classifier", "classifier"),
            Role::Head,
            None,
            source,
            bias.clone(),
        );
        let sites = Arc::new(sites);
        info.task = engraft_nn::Task::SequenceClassification;
        for (name, level) in [("lora", ".model"), ("ia3", ".model"), ("prompt", ""), ("prefix", "")] {
            let methods = [chosen(name, json!({}))];
            let a = attach(&methods, &[], &sites, &info, 1).unwrap();
            let (config, tensors) = save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
            assert_eq!(config["modules_to_save"], json!(["classifier"]), "{name}");
            let held = |end: &str| {
                let key = methods[0].0.file_name(&format!("classifier.{end}"));
                assert!(key.starts_with("base_model.") && (level.is_empty() || key.contains(level)), "{key}");
                tensors.iter().find(|t| t.0 == key).unwrap().1.clone()
            };
            close(&held("weight"), &weight, 0.0);
            close(&held("bias"), bias.as_ref().unwrap(), 0.0);
            let loaded = load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
            let again =
                save_adapter(&loaded.adapter, &loaded.methods, &loaded.train_also, "b", &sites, &info);
            assert_eq!(again.unwrap().0, config);
            let whole = attach(&methods, &["classifier".into()], &sites, &info, 1).unwrap();
            let also = ["classifier".to_string()];
            let trained = save_adapter(&whole.adapter, &methods, &also, "b", &sites, &info).unwrap();
            assert_eq!(trained.1.len(), tensors.len());
        }
    }

    #[test]
    fn what_is_dead_is_told() {
        let (sites, info) = toy();
        let targets = Some(Targets::names(["attn.q", "query"]));
        let a = attach(
            &[(chosen("lora", json!({})).0, targets)],
            &["score".into(), "head".into()],
            &sites,
            &info,
            0,
        )
        .unwrap();
        assert_eq!((a.dead_targets, a.dead_modules), (vec!["query".to_string()], vec!["score".to_string()]));
        let nothing = Some(Targets::names(["query"]));
        assert!(attach(&[(chosen("lora", json!({})).0, nothing)], &[], &sites, &info, 0).is_err());
    }

    #[test]
    fn every_mismatch_of_a_file_is_reported() {
        let (sites, info) = toy();
        let methods = [chosen("lora", json!({ "rank": 2 }))];
        let a = attached(&methods, &[]);
        let (config, mut tensors) = save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        tensors[0].1 = sample(&[3, 6], 1);
        tensors[1].0 = "base_model.model.other".into();
        let Err(Error::Mismatch(lines)) = load_adapter(&config, tensors, &sites, &info) else { panic!() };
        assert_eq!(lines.len(), 3, "{lines:?}");
        for bad in [
            json!({}),
            json!({ "peft_type": "XLORA" }),
            json!({ "peft_type": 3 }),
            json!([1]),
            json!({ "config": { "architecture": "lora" } }),
        ] {
            assert!(load_adapter(&bad, vec![], &sites, &info).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_copy_of_a_frozen_table_is_dropped_if_equal_and_put_below_if_not() {
        let (sites, info) = toy();
        let methods = [(chosen("lora", json!({ "rank": 2 })).0, Some(Targets::names(["tok"])))];
        let a = attached(&methods, &[]);
        stir(&a, 0.3);
        let (config, tensors) = save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        let load = |table: Tensor| {
            let more = tensors
                .iter()
                .cloned()
                .chain([("base_model.model.tok.base_layer.weight".to_string(), table)]);
            load_adapter(&config, more.collect(), &sites, &info)
        };
        assert_eq!(load(frozen("tok")).unwrap().adapter.params().len(), 2);
        let moved = frozen("tok").scale(1.5).unwrap();
        let other = load(moved.clone()).unwrap().adapter;
        assert_eq!((other.params().len(), other.trained_count()), (3, a.adapter.trained_count()));
        let merged = |adapter| engraft_nn::merged_tensors(&sites, adapter).unwrap()[0].value.clone();
        let change = merged(&a.adapter).sub(&frozen("tok")).unwrap();
        close(&merged(&other), &moved.add(&change).unwrap(), 1e-5);
        assert!(load(sample(&[12, 6], 1)).is_err(), "a resized vocabulary is not this model's");
    }
}
