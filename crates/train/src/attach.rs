//! The methods of a recipe to an adapter; whatever matches nothing is shown at its place in the recipe.

use std::path::Path;

use engraft_data::Tokenizer;
use engraft_method::algebra::one_base;
use engraft_method::{
    Ahead, Attached, Chosen, Field, FieldKind, Method, Named, SavedAdapter, Settings, attach, choose, find,
    in_present_names, load_adapter, not_in_peft, settle,
};
use engraft_nn::{Adapter, Model, Names, Sites, TargetError, Targets};
use engraft_recipe::{MethodTable, Problem, Recipe};
use engraft_store::{AdapterFiles, Limits, read_adapter};
use serde_json::{Value, json};

use crate::finite::without_numbers;
use crate::hub_head::{Parts, adapter_parts};
use crate::share::sized;
use crate::task_names::numbered;
use crate::tensors::named;
use crate::wanted::{
    dead_module, dead_patterns, dead_targets, idle, idle_in_file, partly_dead, targets, unheeded,
};
use crate::{Error, Result};

/// An adapter with what made it.
pub struct AttachedAdapter {
    /// The adapter.
    pub adapter: Adapter,
    /// Its methods.
    pub methods: Vec<Chosen>,
    /// Modules trained as a whole.
    pub train_also: Vec<String>,
    /// What the file names and the model does not have.
    pub notes: Vec<String>,
    /// Whether it was read from a file rather than made.
    pub saved: bool,
}

/// The tensors of an adapter's file by name.
pub fn adapter_tensors(files: &AdapterFiles) -> Result<Named> {
    named(&files.weights)
}

/// Reads an adapter directory onto `model`.
///
/// # Errors
/// A method that is not there, tensors that do not fit.
pub fn open_adapter(model: &dyn Model, dir: &Path, limits: &Limits) -> Result<AttachedAdapter> {
    open_adapter_choosing(model, dir, limits, &Settings::new())
}

/// Reads an adapter directory onto `model`, with `choices` made of what its methods leave open until it is used.
///
/// # Errors
/// As [`open_adapter`], and choices that are none of its.
pub fn open_adapter_choosing(
    model: &dyn Model,
    dir: &Path,
    limits: &Limits,
    choices: &Settings,
) -> Result<AttachedAdapter> {
    let files = read_adapter(dir, limits)?;
    let Parts { config, tensors, notes } = adapter_parts(&files, model)?;
    let made = numbered(choices, dir).and_then(|choices| Ok(choose(&config, &choices)?));
    let config = made.map_err(|error| Error::Choice(error.to_string()))?;
    let loaded = load_adapter(&config, tensors, model.sites(), model.info())?;
    let sites = model.sites().named(loaded.adapter.names());
    let dead = loaded.dead.iter().map(|name| format!("`{name}` is named and matches nothing in this model"));
    let idle = loaded.methods.iter().flat_map(|one| idle_in_file(&config, one, sites));
    let broken = without_numbers(&config, &loaded.adapter);
    let mut told: Vec<String> = Vec::new();
    for note in notes
        .into_iter()
        .chain(dead)
        .chain(idle)
        .chain(broken)
        .map(|note| format!("{}: {note}", dir.display()))
    {
        if !told.contains(&note) {
            told.push(note);
        }
    }
    Ok(AttachedAdapter {
        adapter: loaded.adapter,
        methods: loaded.methods,
        train_also: loaded.train_also,
        notes: told,
        saved: true,
    })
}

/// The adapter of a recipe, new or saved.
///
/// # Errors
/// All targets that match nothing, together.
pub(crate) fn from_recipe(
    recipe: &Recipe,
    methods: &[MethodTable],
    model: &dyn Model,
    tokenizer: Option<&Tokenizer>,
    new_tensors: &[String],
    choices: &Settings,
) -> std::result::Result<AttachedAdapter, Vec<Problem>> {
    if let Some(table) = methods.iter().find(|m| m.from.is_some()) {
        return saved(recipe, methods, table, model, choices).map_err(|problem| vec![problem]);
    }
    let (mut chosen, mut problems): (Vec<Chosen>, Vec<Problem>) = (vec![], vec![]);
    let mut notes = Vec::new();
    for table in methods {
        match method(recipe, table, model, tokenizer) {
            Ok((one, note)) => {
                chosen.push(one);
                notes.extend(note);
            }
            Err(found) => problems.extend(found),
        }
    }
    let mut train_also: Vec<String> = methods.iter().flat_map(|m| m.train_also.clone()).collect();
    for module in new_modules(model, new_tensors) {
        if !train_also.contains(&module) {
            notes.push(format!(
                "`{module}` is not in the model's files, so it is new and trained with the adapter"
            ));
            train_also.push(module);
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let attached = attach(&chosen, &train_also, model.sites(), model.info(), recipe.train.seed);
    let attached = attached.map_err(|e| match (e, methods) {
        (e @ engraft_nn::Error::Targets(TargetError::Dead { .. } | TargetError::LeftOut { .. }), [only]) => {
            vec![dead_targets(recipe, only, e)]
        }
        (e, _) => vec![unfit(recipe, methods, &e.to_string())],
    })?;
    let seed = recipe.train.seed;
    let attached = renamed(&mut chosen, methods, &train_also, model, attached, seed, &mut notes);
    for dead in &attached.dead_targets {
        // Each method's targets match, but not all under the same names.
        let title = format!(
            "`{dead}` and other targets are names of two versions of `transformers`; use one of them"
        );
        problems.push(recipe.problem_at("method", title));
    }
    for &number in &attached.without_targets {
        problems.extend(unheeded(recipe, &methods[number], chosen[number].0.as_ref()));
    }
    for dead in &attached.dead_modules {
        problems.push(dead_module(recipe, methods, dead, model.sites()));
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    if attached.adapter.trained_count() == 0 {
        return Err(vec![recipe.problem_at("method", "nothing would be trained")]);
    }
    let own_type = not_in_peft(&attached.adapter, &chosen, &train_also, model.sites(), model.info());
    notes.extend(own_type.map_err(|e| vec![recipe.problem_at("method", e.to_string())])?);
    notes.extend(doubts(&attached.adapter, &chosen, &train_also, model.sites()));
    Ok(AttachedAdapter { adapter: attached.adapter, methods: chosen, train_also, notes, saved: false })
}

/// An adapter whose targets go by a model's older names, under the present ones, which `peft` finds its modules by. Settings of
/// a method that name modules too keep it as it is.
fn renamed(
    chosen: &mut [Chosen],
    methods: &[MethodTable],
    train_also: &[String],
    model: &dyn Model,
    made: Attached,
    seed: u64,
    notes: &mut Vec<String>,
) -> Attached {
    if made.adapter.names() == Names::Current {
        return made;
    }
    let sites = model.sites();
    let texts = |v: &Value| match v {
        Value::Object(map) => !map.is_empty(),
        Value::Array(list) => list.iter().any(Value::is_string),
        _ => false,
    };
    let names_modules = methods.iter().any(|table| table.settings.values().any(texts));
    let present = |(method, targets): &Chosen| {
        let targets = Targets { train_also: train_also.to_vec(), ..targets.clone()? };
        in_present_names(&targets, method.as_ref(), sites).ok().flatten()
    };
    let kept = "the targets are names that modules had before `transformers` 5, and so are those in the adapter's file, in which \
                `peft` finds them under older versions alone";
    let found: Option<Vec<Targets>> = chosen.iter().map(present).collect();
    let Some(found) = found.filter(|_| !names_modules) else {
        notes.push(kept.into());
        return made;
    };
    let before: Vec<Option<Targets>> = chosen.iter().map(|one| one.1.clone()).collect();
    chosen.iter_mut().zip(found).for_each(|(one, targets)| one.1 = Some(targets));
    match attach(chosen, train_also, sites, model.info(), seed) {
        Ok(now) if now.dead_targets.is_empty() && now.dead_modules.is_empty() => {
            let told = "the targets are names that modules had before `transformers` 5; the adapter's file has the present ones, \
                        by which `peft` finds them";
            notes.push(told.into());
            now
        }
        _ => {
            chosen.iter_mut().zip(before).for_each(|(one, targets)| one.1 = targets);
            notes.push(kept.into());
            made
        }
    }
}

/// What the methods tell of their settings at the sites that they have.
fn doubts(adapter: &Adapter, methods: &[Chosen], train_also: &[String], sites: &Sites) -> Vec<String> {
    let sites = sites.named(adapter.names());
    let of = |(method, targets): &Chosen| {
        let targets = targets.clone().or_else(|| method.default_targets(sites));
        let targets = targets.map(|targets| Targets { train_also: train_also.to_vec(), ..targets });
        let Some(targets) = targets else { return method.doubts(&sites.iter().collect::<Vec<_>>()) };
        let found = method.resolve(&targets, sites).ok();
        let found: Vec<_> = found.into_iter().flat_map(|found| found.sites).map(|id| sites.get(id)).collect();
        [method.doubts(&found), method.followed(adapter, sites)].concat()
    };
    methods.iter().flat_map(of).collect()
}

/// Modules that start at random: left frozen, nothing could be learned through them. As `peft`, whole classifiers.
pub fn new_modules(model: &dyn Model, new_tensors: &[String]) -> Vec<String> {
    let mut modules: Vec<String> = Vec::new();
    for site in model.sites().iter().filter(|s| s.tensor.as_ref().is_some_and(|t| new_tensors.contains(t))) {
        let module = match site.path.split('.').next() {
            Some(head @ ("classifier" | "score")) => head,
            _ => site.path.strip_suffix(".bias").or(site.path.strip_suffix(".weight")).unwrap_or(&site.path),
        };
        if !modules.iter().any(|m| m == module) {
            modules.push(module.to_owned());
        }
    }
    modules
}

/// A saved adapter, from which training goes on.
fn saved(
    recipe: &Recipe,
    methods: &[MethodTable],
    table: &MethodTable,
    model: &dyn Model,
    choices: &Settings,
) -> std::result::Result<AttachedAdapter, Problem> {
    let at = format!("{}.from", table.at);
    if methods.len() > 1 {
        return Err(recipe.problem_at(&at, "a saved adapter cannot be one of several methods yet"));
    }
    let Some(from) = &table.from else { return Err(recipe.problem_at(&at, "`from` is missing")) };
    let problem = |text: String| recipe.problem_at(&at, text);
    open_adapter_choosing(model, &from.value, &Limits::default(), choices).map_err(|error| match error {
        Error::Choice(text) => Problem::new(text),
        other => problem(other.to_string()),
    })
}

/// A method with its targets, all of which exist, and what to tell of its size.
fn method(
    recipe: &Recipe,
    table: &MethodTable,
    model: &dyn Model,
    tokenizer: Option<&Tokenizer>,
) -> std::result::Result<(Chosen, Option<String>), Vec<Problem>> {
    let name = table.name.as_ref().map_or("", |name| name.value.as_str());
    let Some(entry) = find(name) else {
        return Err(vec![
            recipe.problem_at(&format!("{}.name", table.at), format!("there is no method `{name}`")),
        ]);
    };
    let settings = filled(&table.settings, entry.info.fields, tokenizer)
        .map_err(|(key, e)| vec![recipe.problem_at(&format!("{}.{key}", table.at), e)])?;
    let mut method = (entry.from_settings)(&settings).map_err(|e| wrong_settings(recipe, table, e))?;
    give_adapters(recipe, table, entry.info.fields, method.as_mut())?;
    let default = method.default_targets(model.sites());
    let targets = targets(recipe, table, method.as_ref(), default.clone())?;
    let effective = targets.clone().or(default);
    if let Some(effective) = effective {
        let effective = Targets { train_also: table.train_also.clone(), ..effective };
        let sites = model.sites();
        let all = |sites: &Sites| method.resolve(&effective, sites).is_ok_and(|found| found.dead.is_empty());
        let idle = idle(recipe, table, method.as_ref(), &effective, sites);
        if !idle.is_empty() {
            return Err(idle);
        }
        let dead = match method.resolve(&effective, sites) {
            Ok(found) if found.dead.is_empty() => None,
            _ if sites.older().is_some_and(|older| all(older)) => None,
            Ok(found) => partly_dead(method.as_ref(), &effective, found.dead, sites),
            Err(e) => Some(e),
        };
        if let Some(e) = dead {
            return Err(vec![dead_targets(recipe, table, e)]);
        }
        let dead = dead_patterns(recipe, table, method.as_ref(), &effective, sites);
        if !dead.is_empty() {
            return Err(dead);
        }
    }
    let found = sized(recipe, table, (entry, &settings, targets.as_ref()), model).map_err(|p| vec![p])?;
    let note = match found {
        Some((settings, note)) => {
            method = (entry.from_settings)(&settings).map_err(|e| wrong_settings(recipe, table, e))?;
            give_adapters(recipe, table, entry.info.fields, method.as_mut())?;
            Some(note)
        }
        None => None,
    };
    let targets = settle(method.as_mut(), targets, model.sites());
    Ok(((method, targets), note))
}

/// The settings with what a method needs of the texts and files they name: ids of tokens, where there is a tokenizer, and rows
/// of saved prompts.
fn filled(
    settings: &Settings,
    fields: &[Field],
    tokenizer: Option<&Tokenizer>,
) -> std::result::Result<Settings, (&'static str, String)> {
    let mut settings = settings.clone();
    for field in fields {
        let value = match (field.kind, settings.get(field.name), tokenizer) {
            (FieldKind::Tokens, Some(Value::String(text)), Some(tokenizer)) => {
                let ids = tokenizer.encode(text, true).map_err(|e| (field.name, e.to_string()))?.ids;
                json!({ "text": text, "ids": ids })
            }
            (FieldKind::Prompts, Some(Value::Array(paths)), _) => {
                let rows = paths.iter().filter_map(Value::as_str).map(saved_prompt);
                rows.collect::<std::result::Result<Value, String>>().map_err(|e| (field.name, e))?
            }
            _ => continue,
        };
        settings.insert(field.name.into(), value);
    }
    Ok(settings)
}

/// Gives the method what the saved adapters that its settings name hold.
fn give_adapters(
    recipe: &Recipe,
    table: &MethodTable,
    fields: &[Field],
    method: &mut dyn Method,
) -> std::result::Result<(), Vec<Problem>> {
    for field in fields.iter().filter(|field| matches!(field.kind, FieldKind::Adapters)) {
        let Some(Value::Array(paths)) = table.settings.get(field.name) else { continue };
        let (mut adapters, mut problems) = (vec![], vec![]);
        for (index, path) in paths.iter().filter_map(Value::as_str).enumerate() {
            match saved_adapter(path) {
                Ok(adapter) => adapters.push(adapter),
                Err(e) => {
                    let at = format!("{}.{}[{index}]", table.at, field.name);
                    problems.push(recipe.problem_at(&at, e.to_string()));
                }
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        one_base(&adapters, &table.settings).map_err(|e| wrong_settings(recipe, table, e))?;
        method.take_adapters(field.name, adapters).map_err(|e| wrong_settings(recipe, table, e))?;
    }
    Ok(())
}

fn saved_adapter(path: &str) -> Result<SavedAdapter> {
    let files = read_adapter(Path::new(path), &Limits::default())?;
    let tensors = adapter_tensors(&files)?;
    Ok(SavedAdapter { path: path.into(), config: files.config, tensors })
}

/// The rows of the prompt that is saved at `path`.
fn saved_prompt(path: &str) -> std::result::Result<Value, String> {
    let files = read_adapter(Path::new(path), &Limits::default()).map_err(|e| e.to_string())?;
    let kind = files.config.get("peft_type").and_then(Value::as_str).unwrap_or("none");
    let is_prompt = ["PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"].contains(&kind);
    let raw = files.weights.get("prompt_embeddings").filter(|raw| is_prompt && raw.shape.len() == 2);
    let Some(raw) = raw else {
        return Err(format!("{path} holds no rows that stand before an input: its peft_type is {kind}"));
    };
    let values = raw.to_f32().map_err(|e| e.to_string())?;
    let rows: Vec<&[f32]> = values.chunks(raw.shape[1].max(1)).collect();
    Ok(json!({ "path": path, "rows": rows }))
}

/// What a method says of its settings, each at its own place: its words begin with the setting's name.
fn wrong_settings(recipe: &Recipe, table: &MethodTable, error: engraft_nn::Error) -> Vec<Problem> {
    let engraft_nn::Error::Mismatch(lines) = error else {
        return vec![recipe.problem_at(&table.at, error.to_string())];
    };
    let place = |line: &String| {
        let setting = table.settings.iter().find(|(key, _)| line.starts_with(&format!("`{key}`")));
        let Some((key, value)) = setting else { return table.at.clone() };
        let patterns = value.as_object().into_iter().flatten().map(|(pattern, _)| pattern);
        let named = patterns.filter(|pattern| line.contains(&format!("`{pattern}`")));
        match named.max_by_key(|pattern| pattern.len()) {
            Some(pattern) => format!("{}.{key}.\"{pattern}\"", table.at),
            None => format!("{}.{key}", table.at),
        }
    };
    lines.iter().map(|line| recipe.problem_at(&place(line), line.clone())).collect()
}

/// What does not fit the model, at the setting that is named first and that one of the methods alone has.
fn unfit(recipe: &Recipe, methods: &[MethodTable], message: &str) -> Problem {
    let settings = methods.iter().flat_map(|table| table.settings.keys().map(move |key| (table, key)));
    let named: Vec<(usize, &MethodTable, &String)> =
        settings.filter_map(|(table, key)| Some((message.find(&format!("`{key}`"))?, table, key))).collect();
    let first = named.iter().map(|(at, ..)| *at).min();
    let mut there = named.iter().filter(|(at, ..)| Some(*at) == first);
    match (there.next(), there.next()) {
        (Some((_, table, key)), None) => recipe.problem_at(&format!("{}.{key}", table.at), message),
        _ => recipe.problem_at("method", message),
    }
}

/// What the methods say of the run that lies ahead, each at the setting that it begins with.
pub(crate) fn unsuited(
    recipe: &Recipe,
    tables: &[MethodTable],
    methods: &[Chosen],
    ahead: &Ahead,
) -> Vec<Problem> {
    let said = tables.iter().zip(methods).filter_map(|(table, (method, _))| {
        let lines = match method.suits(ahead).err()? {
            engraft_nn::Error::Mismatch(lines) => lines,
            other => vec![other.to_string()],
        };
        Some(wrong_settings(recipe, table, engraft_nn::Error::Mismatch(lines)))
    });
    said.flatten().collect()
}
