//! The part of `adapter_config.json` that every method of `peft` has: targets, modules trained as a whole, the header.

use engraft_nn::{
    Adapter, Kind, LayerChoice, Matcher, ModelInfo, Names, Pattern, Result, Role, Site, SiteId, Sites, Stack,
    Targets, Task, TaskName,
};
use serde_json::{Map, Value, json};

use crate::assemble::is_union;
use crate::names::prefix;
use crate::read::{Reader, texts};
use crate::shared::parameters::means;
use crate::{Chosen, Info, Loaded, Method, layers, tied};

/// The version whose keys are written.
const VERSION: &str = "0.21.2";

/// The class of the base and where `peft` finds it, in files without a task.
pub(crate) const AUTO_MAPPING: &str = "auto_mapping";

/// Types whose configuration in `peft` has no `exclude_modules`.
const NO_EXCLUSION: &[&str] = &[
    "ADAMSS",
    "BEFT",
    "C3A",
    "FROD",
    "GLORA",
    "GRALORA",
    "OSF",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "TRAINABLE_TOKENS",
    "UNILORA",
    "VERA",
];

/// Types whose configuration in `peft` has no `modules_to_save`.
pub(crate) const NOTHING_BESIDE: &[&str] = &["ADAPTION_PROMPT", "TRAINABLE_TOKENS"];

/// Whether this is the configuration of `peft_type`.
pub(crate) fn is_type(config: &Value, peft_type: &str) -> bool {
    config.get("peft_type").and_then(Value::as_str) == Some(peft_type)
}

/// A method from a recipe's settings, whose names are those of its file.
pub(crate) fn own_settings<M: Method + 'static>(
    info: &'static Info,
    settings: &Map<String, Value>,
    read: impl FnOnce(&mut Reader<'_>) -> M,
) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, info.fields);
    let method = read(&mut r);
    r.finish()?;
    Ok(Box::new(method))
}

/// A method from its file, whose keys are a recipe's settings.
pub(crate) fn own_file<M: Method + 'static>(
    info: &'static Info,
    config: &Value,
    read: impl FnOnce(&mut Reader<'_>) -> M,
) -> Result<Option<Loaded>> {
    file_of(info.peft_type, config, read)
}

/// The same of a file of another `peft_type`.
pub(crate) fn file_of<M: Method + 'static>(
    peft_type: &str,
    config: &Value,
    read: impl FnOnce(&mut Reader<'_>) -> M,
) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| is_type(config, peft_type)) else { return Ok(None) };
    let mut r = Reader::file(map);
    let train_also = read_header(&mut r);
    let targets = read_targets(&mut r);
    let method = read(&mut r);
    let targets = targets.or_else(|| layers::read(&mut r, &method));
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(method), targets, train_also }))
}

/// A method from its file of `peft_type`, which names no targets: the method has sites of its own, in some layers or in all.
pub(crate) fn file_without_targets<M: Method + 'static>(
    peft_type: &str,
    config: &Value,
    read: impl FnOnce(&mut Reader<'_>) -> M,
) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| is_type(config, peft_type)) else { return Ok(None) };
    let mut r = Reader::file(map);
    let train_also = read_header(&mut r);
    let method = read(&mut r);
    let targets = if method.by_layers() { layers::read(&mut r, &method) } else { None };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(method), targets, train_also }))
}

/// Marks the keys of every configuration as known, and gives `modules_to_save`.
pub(crate) fn read_header(r: &mut Reader<'_>) -> Vec<String> {
    let header =
        ["peft_type", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode"];
    r.ignore(&header);
    r.ignore(&[AUTO_MAPPING]);
    r.texts("modules_to_save").unwrap_or_default()
}

/// `target_modules` and what narrows it; `None` where the file leaves the choice to the method.
pub(crate) fn read_targets(r: &mut Reader<'_>) -> Option<Targets> {
    let target = r.value("target_modules").cloned();
    let matcher = match &target {
        None => None,
        // No module where matrices are named by themselves; else what the method takes by default.
        Some(Value::Array(a)) if a.is_empty() => {
            r.gives("target_parameters").then(|| Matcher::Names(Vec::new()))
        }
        Some(Value::String(s)) if s.eq_ignore_ascii_case("all-linear") => Some(Matcher::AllLinear),
        Some(value) => names_or_pattern(r, "target_modules", value),
    };
    let exclude = r.value("exclude_modules").cloned();
    let exclude = exclude.and_then(|v| names_or_pattern(r, "exclude_modules", &v));
    let (layers, one_layer) = match r.value("layers_to_transform").cloned() {
        None => (None, false),
        Some(Value::Number(n)) => (n.as_u64().map(|n| vec![n as usize]), true),
        Some(Value::Array(a)) if a.is_empty() => (None, false),
        Some(_) => (r.counts("layers_to_transform"), false),
    };
    let (patterns, one_pattern) = match r.value("layers_pattern").cloned() {
        None => (Vec::new(), false),
        Some(Value::String(s)) if s.is_empty() => (Vec::new(), false),
        Some(Value::String(s)) => (vec![s], true),
        Some(_) => (r.texts("layers_pattern").unwrap_or_default(), false),
    };
    let layers = layers.map(|layers| LayerChoice { layers, patterns, one_layer, one_pattern });
    if layers.is_some() && !matches!(matcher, Some(Matcher::Names(_)) | None) {
        r.problem("`layers_to_transform` needs `target_modules` to be a list of names");
    }
    let targets = Targets { matcher: matcher?, exclude, layers, train_also: vec![] };
    Some(targets)
}

fn names_or_pattern(r: &mut Reader<'_>, key: &str, value: &Value) -> Option<Matcher> {
    match value {
        Value::String(s) => Some(Matcher::Regex(s.clone())),
        Value::Array(a) if a.is_empty() => None,
        value => {
            let names = texts(value);
            if names.is_none() {
                r.problem(format!("`{key}`: expected a pattern or a list of names, found {value}"));
            }
            names.map(Matcher::Names)
        }
    }
}

/// The keys of targets as `peft` reads them. Roles become names of modules in this model, and so does a choice of layers
/// where the method's configuration has no keys for it.
pub(crate) fn write_targets(
    targets: &Targets,
    method: &dyn Method,
    sites: &Sites,
    by_layer: bool,
) -> Result<Map<String, Value>> {
    if let Some(choice) = layers::own(Some(targets)) {
        return Ok([(layers::KEY.to_owned(), json!(choice.layers))].into_iter().collect());
    }
    let excludes = !NO_EXCLUSION.contains(&method.peft_type());
    let written = |m: &Matcher| match m {
        Matcher::Names(names) => json!(names),
        Matcher::Regex(pattern) => json!(pattern),
        Matcher::AllLinear => json!("all-linear"),
        Matcher::Roles(_) | Matcher::Own => Value::Null,
    };
    // Of a model of pictures `peft` takes the classifier for one of all linear layers.
    let takes_classifier =
        !method.peft_type().starts_with("ENGRAFT_") && sites.iter().any(|site| site.role == Role::PatchEmbed);
    let spelled = match (&targets.matcher, &targets.layers) {
        (Matcher::Roles(_), _) => true,
        (Matcher::AllLinear, _) if takes_classifier => true,
        _ if !excludes && targets.exclude.is_some() => true,
        (Matcher::Names(_), Some(_)) => !by_layer,
        (_, layers) => layers.is_some(),
    };
    let mut map = Map::new();
    if excludes {
        let exclude = targets.exclude.as_ref().filter(|_| !spelled).map_or(Value::Null, written);
        map.insert("exclude_modules".into(), exclude);
    }
    if spelled {
        map.insert("target_modules".into(), json!(module_names(targets, method, sites)?));
        return Ok(map);
    }
    map.insert("target_modules".into(), written(&targets.matcher));
    if let Some(layers) = &targets.layers {
        let one = layers.layers.first().filter(|_| layers.one_layer);
        map.insert("layers_to_transform".into(), one.map_or_else(|| json!(layers.layers), |n| json!(n)));
        map.insert(
            "layers_pattern".into(),
            match &layers.patterns[..] {
                [] => Value::Null,
                [one] if layers.one_pattern => json!(one),
                several => json!(several),
            },
        );
    }
    Ok(map)
}

/// Names that choose the same sites: the last components of their paths, or whole paths where these would catch more.
fn module_names(targets: &Targets, method: &dyn Method, sites: &Sites) -> Result<Vec<String>> {
    let chosen = method.resolve(targets, sites)?.sites;
    Ok(names_of(&chosen, &targets.train_also, method, sites))
}

/// The sites that `targets` choose by a model's older names, by its present ones; `None` where these have no such module.
///
/// # Errors
/// Targets that match nothing.
pub fn in_present_names(targets: &Targets, method: &dyn Method, sites: &Sites) -> Result<Option<Targets>> {
    let chosen = method.resolve(targets, sites.named(Names::Older))?.sites;
    if chosen.iter().any(|id| sites.get(*id).only == Some(Names::Older)) {
        return Ok(None);
    }
    let names = names_of(&chosen, &targets.train_also, method, sites);
    Ok(Some(Targets { train_also: targets.train_also.clone(), ..Targets::names(names) }))
}

fn names_of(chosen: &[SiteId], train_also: &[String], method: &dyn Method, sites: &Sites) -> Vec<String> {
    let path = |id: &SiteId| module_path(sites.get(*id)).to_string();
    let last = |path: String| path.rsplit('.').next().unwrap_or_default().to_string();
    let mut names: Vec<String> = chosen.iter().map(|id| last(path(id))).collect();
    names.sort();
    names.dedup();
    let same = Targets { train_also: train_also.to_vec(), ..Targets::names(names.clone()) };
    if method.resolve(&same, sites).is_ok_and(|found| found.sites == chosen) {
        return names;
    }
    let mut paths: Vec<String> = chosen.iter().map(path).collect();
    paths.dedup();
    paths
}

/// The module of a site's tensor: a vector stands for the module that has it.
fn module_path(site: &Site) -> &str {
    let path = &site.path;
    match site.kind {
        Kind::Vector { .. } => path.strip_suffix(".weight").or(path.strip_suffix(".bias")).unwrap_or(path),
        _ => path,
    }
}

/// Paths that were written for what a method takes by default are not those of the matrices in `target_parameters`.
pub(crate) fn agree_on_parameters(map: &mut Map<String, Value>) {
    let list = |key: &str| map.get(key).and_then(texts);
    if let (Some(mut targets), Some(parameters)) = (list("target_modules"), list("target_parameters")) {
        targets.retain(|module| !parameters.iter().any(|name| means(name, module)));
        map.insert("target_modules".into(), json!(targets));
    }
}

/// Lists of `feedforward_modules` must be among `target_modules`, text by text: where they are not, both become paths.
pub(crate) fn agree_on_feedforward(map: &mut Map<String, Value>, sites: &Sites, chosen: &[SiteId]) {
    let list = |key: &str| map.get(key).and_then(texts);
    let (Some(targets), Some(feedforward)) = (list("target_modules"), list("feedforward_modules")) else {
        return;
    };
    if feedforward.iter().all(|name| targets.contains(name)) {
        return;
    }
    let paths: Vec<&str> = chosen.iter().map(|id| sites.get(*id).path.as_str()).collect();
    let of: Vec<&str> =
        paths.iter().copied().filter(|p| feedforward.iter().any(|end| p.ends_with(end.as_str()))).collect();
    map.insert("feedforward_modules".into(), json!(of));
    map.insert("target_modules".into(), json!(paths));
    map.insert("exclude_modules".into(), Value::Null);
}

/// The tables below an adapter of which `peft` saves a copy: the one of the model's input and the head over its words where
/// they are among `chosen`, as soon as the targets name one that is called as in Llama.
pub(crate) fn copied_tables<'s>(
    map: &Map<String, Value>,
    sites: &'s Sites,
    info: &ModelInfo,
    chosen: &[SiteId],
) -> Vec<&'s Site> {
    const TABLES: [&str; 2] = ["embed_tokens", "lm_head"];
    let own = |name: &str| name.starts_with("ENGRAFT_") || name == "TRAINABLE_TOKENS";
    let rows_only = map.get("trainable_token_indices").is_some_and(|rows| !rows.is_null());
    if rows_only || map.get("peft_type").and_then(Value::as_str).is_none_or(own) {
        return Vec::new();
    }
    let named = match map.get("target_modules") {
        Some(Value::Array(names)) => names.iter().any(|n| TABLES.iter().any(|t| n == t)),
        // What is excluded counts as named.
        Some(Value::String(text)) if text != "all-linear" => Pattern::whole(text).is_ok_and(|pattern| {
            let tables = sites.iter().filter(|s| s.is_weight() && TABLES.contains(&s.module()));
            tables.into_iter().any(|s| pattern.is_match(&s.path))
        }),
        _ => false,
    };
    let words = |s: &Site| match s.kind {
        // T5's input is `shared`, which the tables of both sides only copy.
        Kind::Embedding { .. } => {
            s.role == Role::Embed && s.stack == Stack::Only && tied::own_name(sites, s).is_none()
        }
        Kind::Linear { out, .. } => {
            s.role == Role::Head && out == info.vocabulary && !info.task.is_classification()
        }
        _ => false,
    };
    let ties = map.get("ensure_weight_tying").and_then(Value::as_bool) == Some(true);
    // A head that follows its table is adapted without being named.
    let follows = |s: &Site| {
        let tables = chosen.iter().map(|id| sites.get(*id)).filter(|_| ties);
        tables.into_iter().any(|table| tied::heads(sites, table).any(|head| head.id == s.id))
    };
    let copied = |s: &&Site| named && words(s) && (chosen.contains(&s.id) || follows(s));
    sites.iter().filter(copied).collect()
}

/// Says in `fan_in_fan_out` how the files hold the adapted matrices: as `peft` leaves it, what holds for the last of them.
pub(crate) fn agree_on_storage(map: &mut Map<String, Value>, sites: &Sites, chosen: &[SiteId]) {
    // `peft` knows no parameters there, and leaves HiRA's key as it is given.
    let is_hira = map.get("peft_type").is_some_and(|name| name == "HIRA");
    if is_hira || map.get("target_parameters").is_some_and(|names| !names.is_null()) {
        return;
    }
    let linear = |id: &SiteId| match sites.get(*id).kind {
        Kind::Linear { transposed, .. } => Some(transposed),
        _ => None,
    };
    if let (Some(key), Some(transposed)) =
        (map.get_mut("fan_in_fan_out"), chosen.iter().rev().find_map(linear))
    {
        *key = transposed.into();
    }
}

/// `task_type`: what the adapter's file said, else what `peft` calls the model's task.
pub(crate) fn task_type<'a>(adapter: &'a Adapter, info: &ModelInfo) -> Option<&'a str> {
    match (adapter.task(), info.task) {
        (TaskName::Is(name), _) => Some(name),
        (TaskName::None, _) => None,
        (TaskName::OfModel, Task::CausalLm) => Some("CAUSAL_LM"),
        (TaskName::OfModel, Task::SequenceClassification) => Some("SEQ_CLS"),
        (TaskName::OfModel, Task::TokenClassification) => Some("TOKEN_CLS"),
        (TaskName::OfModel, Task::Embedding) => Some("FEATURE_EXTRACTION"),
        (TaskName::OfModel, Task::Seq2Seq) => Some("SEQ_2_SEQ_LM"),
        (TaskName::OfModel, Task::MaskedLm | Task::ImageClassification) => None,
    }
}

/// What `peft` finds the base's class by where a file has no task: an adapter that began here says it, another keeps what it said.
pub(crate) fn auto_mapping(adapter: &Adapter, info: &ModelInfo) -> Value {
    match (adapter.task(), task_type(adapter, info), info.class) {
        (TaskName::OfModel, None, Some(class)) => {
            let library = format!("transformers.models.{0}.modeling_{0}", info.architecture);
            json!({ "base_model_class": class, "parent_library": library })
        }
        _ => Value::Null,
    }
}

/// Whether a key is given and says nothing here: it holds nothing, or what `peft` knows the base's class by.
fn is_idle(key: &str, value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(table) => table.is_empty() || key == AUTO_MAPPING,
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// What a configuration gives that says nothing here, by its keys; those of one of several methods behind what precedes its
/// parameters.
pub(crate) fn idle_keys(config: &Value, methods: &[Chosen]) -> Map<String, Value> {
    let parts = config.get("methods").and_then(Value::as_array).filter(|_| is_union(config));
    let parts = parts.into_iter().flatten().enumerate().map(|(number, part)| (prefix(methods, number), part));
    let of = |(before, part): (String, &Value)| {
        let idle = part.as_object().into_iter().flatten().filter(|(key, value)| is_idle(key, value));
        idle.map(|(key, value)| (format!("{before}{key}"), value.clone())).collect::<Vec<_>>()
    };
    parts.chain([(String::new(), config)]).flat_map(of).collect()
}

/// Leaves what the file of `adapter` gave without a meaning here as it was, where there still is nothing to write: `peft` keeps it
/// too.
pub(crate) fn keep_idle(map: &mut Map<String, Value>, adapter: &Adapter, prefix: &str) {
    for (key, idle) in adapter.idle_keys() {
        // What stands behind a number is that method's own.
        let Some(key) = key.strip_prefix(prefix).filter(|key| !key.contains('.')) else { continue };
        let value = map.entry(key).or_insert(Value::Null);
        if value.is_null() {
            *value = idle.clone();
        }
    }
}

/// The keys of every configuration.
pub(crate) fn write_header(
    peft_type: &str,
    base_model: &str,
    task_type: Option<&str>,
    train_also: &[String],
) -> Map<String, Value> {
    let modules = if train_also.is_empty() { Value::Null } else { json!(train_also) };
    let header = json!({
        "auto_mapping": null, "base_model_name_or_path": base_model, "inference_mode": true, "modules_to_save": modules,
        "peft_type": peft_type, "peft_version": VERSION, "revision": null, "task_type": task_type,
    });
    let Value::Object(mut map) = header else { return Map::new() };
    if NOTHING_BESIDE.contains(&peft_type) && train_also.is_empty() {
        map.remove("modules_to_save");
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{attached, chosen, toy};
    use crate::{load_adapter, save_adapter};

    #[test]
    fn what_a_file_gives_without_a_meaning_stays_as_it_is_written() {
        let (sites, info) = toy();
        let lists = ["modules_to_save", "exclude_modules", "layers_to_transform", "target_parameters"];
        let emptied = |mut config: Value| {
            lists.iter().for_each(|key| config[*key] = json!([]));
            (config["layers_pattern"], config["rank_pattern"]) = (json!(""), json!({}));
            config["auto_mapping"] = json!({ "base_model_class": "ToyForTests", "parent_library": "toys" });
            config
        };
        let one = [chosen("lora", json!({}))];
        // What began here says it of itself.
        let masked = ModelInfo { task: Task::MaskedLm, class: Some("ToyForMaskedLM"), ..info.clone() };
        let a = attached(&one, &[]);
        let config = save_adapter(&a.adapter, &one, &[], "b", &sites, &masked).unwrap().0;
        let expected = json!({ "base_model_class": "ToyForMaskedLM", "parent_library": "transformers.models.toy.modeling_toy" });
        assert_eq!((&config["auto_mapping"], &config["task_type"]), (&expected, &Value::Null));
        let several = [chosen("prompt", json!({})), chosen("lora", json!({}))];
        for methods in [&one[..], &several] {
            let a = attached(methods, &[]);
            let (mut config, tensors) = save_adapter(&a.adapter, methods, &[], "b", &sites, &info).unwrap();
            match config["methods"].is_array() {
                true => {
                    config["modules_to_save"] = json!([]);
                    config["methods"][1] = emptied(config["methods"][1].take());
                }
                false => config = emptied(config),
            }
            let loaded = load_adapter(&config, tensors, &sites, &info).unwrap();
            let save = |also: &[String]| {
                save_adapter(&loaded.adapter, &loaded.methods, also, "b", &sites, &info).unwrap().0
            };
            assert_eq!(save(&[]), config);
            assert_eq!(save(&["head".into()])["modules_to_save"], json!(["head"]));
        }
    }
}
