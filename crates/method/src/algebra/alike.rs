//! What adapters must have in common, and what each must be in itself, before they are combined.

use std::collections::BTreeSet;

use engraft_nn::{Error, Kind, Result, Role, Sites, TargetError};
use serde_json::Value;

use super::Term;
use super::factors::{ENDS, Scales, path_of};
use crate::shared::fields::ANY_BASE;
use crate::{SavedAdapter, Settings};

/// Refuses adapters of different bases, and heads of different tasks. `any_base` allows bases that are called differently: a
/// model may lie in two places.
///
/// # Errors
/// What the first adapter has and what another has instead.
pub fn same_base(terms: &[Term], any_base: bool) -> Result<()> {
    let Some(first) = terms.first() else { return Ok(()) };
    for other in &terms[1..] {
        if let (Some(a), Some(b), false) = (base_of(&first.config), base_of(&other.config), any_base)
            && called(a) != called(b)
        {
            return Err(Error::Unsupported(format!(
                "adapters of different bases do not add: {} belongs to {a} and {} to {b}; where both are one model, --any-base combines them",
                first.name, other.name
            )));
        }
        let heads = [first, other].iter().any(|term| term.tensors.iter().any(|(name, _)| is_whole(name)));
        if let (Some(a), Some(b), true) =
            (text(&first.config, "task_type"), text(&other.config, "task_type"), heads)
            && a != b
        {
            return Err(Error::Unsupported(format!(
                "heads of different tasks do not add: {} is for {a} and {} for {b}",
                first.name, other.name
            )));
        }
    }
    Ok(())
}

/// Refuses saved adapters of bases that are called differently, where a method puts them on one and its settings do not allow it.
///
/// # Errors
/// The first pair of bases.
pub fn one_base(adapters: &[SavedAdapter], settings: &Settings) -> Result<()> {
    if settings.get(ANY_BASE.name) == Some(&Value::Bool(true)) {
        return Ok(());
    }
    let mut named = adapters.iter().filter_map(|adapter| Some((&adapter.path, base_of(&adapter.config)?)));
    let Some((first, base)) = named.next() else { return Ok(()) };
    match named.find(|(_, other)| called(other) != called(base)) {
        Some((path, other)) => Err(Error::Mismatch(vec![format!(
            "`adapters`: adapters of different bases do not work on one: {first} belongs to {base} and {path} to {other}; where both are one \
             model, set `any_base = true`"
        )])),
        None => Ok(()),
    }
}

fn text<'a>(config: &'a Value, key: &str) -> Option<&'a str> {
    config.get(key).and_then(Value::as_str).filter(|text| !text.is_empty())
}

/// `peft`'s name of the base, or AdapterHub's.
fn base_of(config: &Value) -> Option<&str> {
    text(config, "base_model_name_or_path").or_else(|| text(config, "model_name"))
}

/// The last part of a path or a Hub id: where a model lies is not which one it is.
fn called(base: &str) -> String {
    base.trim_end_matches('/').rsplit('/').next().unwrap_or(base).to_lowercase()
}

/// Whether a tensor of a LoRA's file is one that is trained as a whole.
fn is_whole(name: &str) -> bool {
    !name.contains("lora_")
}

/// The start that the product of a LoRA's file is missing, which only the base's decomposition gives: W' = W − start + s·B·A.
pub(super) fn start_off_base(config: &Value) -> Option<&str> {
    text(config, "init_lora_weights").filter(|start| ["pissa", "olora"].contains(start))
}

/// Refuses a product that is no change of the base.
fn changes_base(term: &Term) -> Result<()> {
    let Some(start) = start_off_base(&term.config) else { return Ok(()) };
    let base = base_of(&term.config).unwrap_or("MODEL");
    Err(of(
        term,
        &format!(
            "`init_lora_weights` is \"{start}\": its product changes a base from which the start was taken off, and what it was only the base \
             says; make it a plain LoRA first, with `engraft convert {} --model {base} --out DIR`, or average adapters configured alike with \
             the rule average",
            term.name
        ),
    ))
}

/// Checks that a LoRA's configuration speaks of its tensors: ranks, and the modules that it names.
///
/// # Errors
/// A change that is no plain product, a rank of none, a rank unlike the configuration's, modules that the configuration does not name or that are not there.
pub(super) fn fits_itself(term: &Term) -> Result<()> {
    changes_base(term)?;
    for (key, what) in
        [("kasa_config", "KaSA"), ("use_bdlora", "BD-LoRA"), ("alora_invocation_tokens", "aLoRA")]
    {
        if term.config.get(key).is_some_and(|value| !value.is_null() && *value != Value::Bool(false)) {
            return Err(of(
                term,
                &format!(
                    "the change of {what} is no plain product of two factors, so it does not add; merge one after another, or average adapters configured alike with the rule average"
                ),
            ));
        }
    }
    let scales = Scales::of(&term.config).map_err(|e| of(term, &e.to_string()))?;
    let mut paths = BTreeSet::new();
    for (name, tensor) in &term.tensors {
        let Some(ends) = ENDS.iter().find(|ends| name.ends_with(ends.0)) else { continue };
        let path = path_of(&name[..name.len() - ends.0.len()]);
        paths.insert(path);
        let (found, expected) = (tensor.shape().first().copied().unwrap_or(0), scales.rank_at(path));
        if found == 0 {
            return Err(of(term, &format!("{name} has rank 0: nothing can be made of it")));
        }
        if found != expected {
            let message = format!(
                "{name} has rank {found}, and adapter_config.json says {expected} (`r`, `rank_pattern`): they do not belong together"
            );
            return Err(of(term, &message));
        }
    }
    // A tied head has a product that only the table's name asked for.
    if term.config.get("ensure_weight_tying") == Some(&Value::Bool(true)) {
        return Ok(());
    }
    named(term, &paths)
}

fn of(term: &Term, message: &str) -> Error {
    Error::Unsupported(format!("{}: {message}", term.name))
}

/// That `target_modules` names all of `paths`, and nothing that is not among them.
fn named(term: &Term, paths: &BTreeSet<&str>) -> Result<()> {
    let loaded = crate::from_file(&term.config).map_err(|e| of(term, &e.to_string()))?;
    let Some(targets) = loaded.targets else { return Ok(()) };
    let mut sites = Sites::default();
    for path in paths {
        sites.add(*path, Role::Q, None, Kind::Linear { out: 1, inn: 1, transposed: false });
    }
    let found = loaded.method.resolve(&targets, &sites).map_err(|e| match e {
        Error::Targets(TargetError::Dead { .. }) => of(
            term,
            "`target_modules` of adapter_config.json names none of the modules that its tensors belong to",
        ),
        other => of(term, &format!("`target_modules`: {other}")),
    })?;
    let chosen: BTreeSet<&str> = found.sites.iter().map(|&id| sites.get(id).path.as_str()).collect();
    match paths.iter().find(|path| !chosen.contains(**path)) {
        Some(path) => Err(of(
            term,
            &format!(
                "it holds a product at {path}, which `target_modules` of adapter_config.json does not name"
            ),
        )),
        None => Ok(()),
    }
}
