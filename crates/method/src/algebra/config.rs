//! The configuration of a combined adapter.

use std::collections::{BTreeMap, BTreeSet};

use engraft_nn::{Error, Result};
use serde_json::{Map, Value, json};

use super::Term;
use super::factors::{FORMS, Found, Scales, path_of};
use super::tokens::{ROWS, united_config};
use crate::read::texts;

/// Keys that say nothing about what an adapter computes.
const ASIDE: [&str; 11] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "loftq_config",
    "model_class",
    "model_name",
    "name",
    "peft_version",
    "revision",
    "task_type",
    "version",
];

/// Whether a key says nothing about what an adapter computes: how it was trained, and how it started.
fn is_aside(key: &str) -> bool {
    ASIDE.contains(&key) || key.ends_with("dropout") || key.starts_with("init_")
}

/// Of the first, with the ranks of the result, scale 1, and the targets and modules of all.
///
/// # Errors
/// Matrices that one adapter names by themselves and another does not: their factors do not mean the same.
pub(super) fn lora_config(first: &Term, terms: &[Term], ranks: &BTreeMap<String, usize>) -> Result<Value> {
    let named = "target_parameters";
    if let Some(other) =
        terms.iter().find(|t| unordered(t.config.get(named)) != unordered(first.config.get(named)))
    {
        return Err(Error::Unsupported(format!(
            "`{named}` differ in {} and {}: what the factors of these matrices mean can differ too; merge one after another",
            first.name, other.name
        )));
    }
    same_tying(first, terms)?;
    let scales = Scales::of(&first.config)?;
    let mut map: Map<String, Value> = first.config.as_object().cloned().unwrap_or_default();
    // An adapter that says no task may be summed with one that does.
    let task = |term: &Term| term.config.get("task_type").filter(|task| !task.is_null()).cloned();
    if let Some(task) = task(first).or_else(|| terms.iter().find_map(task)) {
        map.insert("task_type".into(), task);
    }
    let rank = most_frequent(ranks.values().copied());
    let others: Map<String, Value> = ranks
        .iter()
        .filter(|(_, r)| **r != rank)
        .map(|(path, r)| (scales.name(path).into_owned(), json!(r)))
        .collect();
    map.insert("r".into(), json!(rank));
    map.insert("lora_alpha".into(), json!(rank));
    map.insert("rank_pattern".into(), Value::Object(others.clone()));
    map.insert("alpha_pattern".into(), Value::Object(others));
    for off in ["use_rslora", "use_dora"] {
        map.insert(off.into(), json!(false));
    }
    for form in FORMS {
        map.entry(form.0).and_modify(|config| *config = Value::Null);
    }
    map.insert("init_lora_weights".into(), json!(true));
    let narrow = ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"];
    let differ =
        |key: &&str| terms.iter().any(|t| unordered(t.config.get(*key)) != unordered(first.config.get(*key)));
    if narrow.iter().any(differ) {
        // What is named by itself is there already.
        let modules: Vec<&String> = ranks.keys().filter(|path| scales.name(path) == path.as_str()).collect();
        narrow.iter().for_each(|key| drop(map.insert((*key).into(), Value::Null)));
        map.insert("target_modules".into(), json!(modules));
    }
    let saved: BTreeSet<String> =
        terms.iter().filter_map(|t| texts(t.config.get("modules_to_save")?)).flatten().collect();
    map.insert("modules_to_save".into(), if saved.is_empty() { Value::Null } else { json!(saved) });
    map.insert("bias".into(), united_biases(first, terms)?);
    let product_bias = terms.iter().any(|t| t.config.get("lora_bias") == Some(&Value::Bool(true)));
    map.insert("lora_bias".into(), json!(product_bias));
    map.insert("trainable_token_indices".into(), united_config(terms)?);
    Ok(Value::Object(map))
}

/// Of the first, with the targets and modules of all.
pub(super) fn scales_config(terms: &[Term]) -> Result<Value> {
    const UNITED: [&str; 3] = ["target_modules", "feedforward_modules", "modules_to_save"];
    let apart = |term: &Term| {
        let mut term = Term { tensors: Vec::new(), ..term.clone() };
        let map = term.config.as_object_mut();
        map.into_iter().for_each(|map| UNITED.iter().for_each(|key| drop(map.remove(*key))));
        term
    };
    same_configuration(&terms.iter().map(apart).collect::<Vec<_>>())?;
    let mut config = terms[0].config.clone();
    for key in UNITED {
        let values: Vec<Value> = terms.iter().map(|t| unordered(t.config.get(key))).collect();
        let lists: Option<Vec<Vec<String>>> = values.iter().map(texts).collect();
        let patterns: Option<Vec<&str>> = values.iter().map(Value::as_str).collect();
        config[key] = match (lists, patterns) {
            _ if values.iter().all(|value| *value == values[0]) => continue,
            (Some(lists), _) => json!(lists.into_iter().flatten().collect::<BTreeSet<String>>()),
            (_, Some(patterns)) => {
                json!(patterns.iter().map(|p| format!("({p})")).collect::<Vec<_>>().join("|"))
            }
            _ if key == "modules_to_save" => {
                let named = values.iter().filter_map(texts).flatten();
                json!(named.collect::<BTreeSet<String>>())
            }
            _ => {
                return Err(Error::Unsupported(format!(
                    "`{key}` is a list in one of the adapters and a pattern, or left out, in another: write all of them alike"
                )));
            }
        };
    }
    Ok(config)
}

/// Refuses heads that follow their table in one adapter and do not in another.
fn same_tying(first: &Term, terms: &[Term]) -> Result<()> {
    let ties = |t: &Term| t.config.get("ensure_weight_tying").and_then(Value::as_bool) == Some(true);
    match terms.iter().find(|t| ties(t) != ties(first)) {
        None => Ok(()),
        Some(other) => Err(Error::Unsupported(format!(
            "`ensure_weight_tying` differs in {} and {}: the head follows its table in one of them; merge one after another",
            first.name, other.name
        ))),
    }
}

/// `bias` of the result: all where some adapter trains all, since its file then holds every bias.
fn united_biases(first: &Term, terms: &[Term]) -> Result<Value> {
    let of = |t: &Term| t.config.get("bias").and_then(Value::as_str).unwrap_or("none").to_owned();
    let own = of(first);
    match terms.iter().find(|t| of(t) != own) {
        None => Ok(json!(own)),
        Some(_) if terms.iter().any(|t| of(t) == "all") => Ok(json!("all")),
        Some(other) => Err(Error::Unsupported(format!(
            "`bias` is \"{own}\" in {} and \"{}\" in {}: one of them holds no biases of its targets, and a file of both would lack them; \
             merge one after another",
            first.name,
            of(other),
            other.name
        ))),
    }
}

/// Refuses a matrix that one adapter trains as a whole while another has a product or rows for it: a file holds one of the two.
pub(super) fn whole_or_product(found: &Found, terms: &[Term]) -> Result<()> {
    let whole = |key: &&str| found.others.contains_key(&format!("{key}.weight"));
    let products = found.modules.iter().map(|module| module.key.as_str());
    let Some(key) =
        products.chain(found.others.keys().filter_map(|name| name.strip_suffix(ROWS))).find(whole)
    else {
        return Ok(());
    };
    let names: Vec<&str> = terms.iter().map(|t| t.name.as_str()).collect();
    Err(Error::Site {
        path: path_of(key).to_owned(),
        message: format!(
            "it is trained as a whole in one of {}, and has a product or rows of single tokens in another, and a file holds one of the two; \
             merge one after another",
            names.join(", ")
        ),
    })
}

/// The most frequent; of equals the largest.
fn most_frequent(ranks: impl Iterator<Item = usize>) -> usize {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    ranks.for_each(|rank| *counts.entry(rank).or_default() += 1);
    counts.into_iter().max_by_key(|&(rank, count)| (count, rank)).map_or(1, |(rank, _)| rank)
}

/// Whether a value of a key `init_…` says what the tensors mean: what they are added to (PiSSA, OLoRA), or how they are read (MiSS).
fn is_form(value: &Value) -> bool {
    value.as_str().is_some_and(|text| ["pissa", "olora", "bat", "mini"].contains(&text))
}

/// A list whose order says nothing.
fn unordered(value: Option<&Value>) -> Value {
    match value.map(|v| (v, texts(v))) {
        Some((_, Some(mut list))) => {
            list.sort();
            json!(list)
        }
        Some((v, None)) => v.clone(),
        None => Value::Null,
    }
}

/// A value without what says nothing: the order of a list, and in AdapterHub's table how it was trained.
fn telling(value: Option<&Value>) -> Value {
    match value {
        Some(Value::Object(table)) => {
            let kept = table.iter().filter(|(key, _)| !is_aside(key));
            Value::Object(kept.map(|(key, value)| (key.clone(), unordered(Some(value)))).collect())
        }
        other => unordered(other),
    }
}

/// The name of an adapter of AdapterHub, which is part of the names of its tensors.
pub(super) fn hub_name(config: &Value) -> Option<&str> {
    config.get("config")?.as_object()?;
    config.get("name")?.as_str()
}

/// Adapters whose tensors mean the same.
///
/// # Errors
/// The first key that differs.
pub(super) fn same_configuration(terms: &[Term]) -> Result<()> {
    let Some(first) = terms.first() else { return Ok(()) };
    let keys: BTreeSet<&String> =
        terms.iter().filter_map(|t| t.config.as_object()).flat_map(|m| m.keys()).collect();
    let is_told = |key: &&String| {
        !is_aside(key)
            || key.starts_with("init_") && terms.iter().filter_map(|t| t.config.get(*key)).any(is_form)
    };
    for key in keys.into_iter().filter(is_told) {
        for term in &terms[1..] {
            let (a, b) = (telling(first.config.get(key)), telling(term.config.get(key)));
            if a != b {
                return Err(Error::Unsupported(format!(
                    "the tensors of adapters configured otherwise do not mean the same: `{key}` is {a} in {} and {b} in {}; LoRAs can be added with the rule cat",
                    first.name, term.name
                )));
            }
        }
    }
    Ok(())
}
