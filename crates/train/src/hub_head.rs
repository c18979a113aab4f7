//! The head that AdapterHub's library saves beside an adapter, read and written.
//!
//! That of a class of `transformers` is the model's own head: trained whole with the adapter, as what `peft` calls
//! `modules_to_save`. A flexible head is built by the library after a description; it is read where the model's own computes the
//! same, and is an error where it tells classes apart and the model's does not: logits would be those of another head. Heads over
//! words are the model's, but for what was trained of them.

use std::path::Path;

use engraft_method::{HubDirectory, Named, adapter_hub};
use engraft_model::{Architecture, Flexible, flexible_task, has_head, labels_in};
use engraft_nn::{Base, Model, Site, Task, Value as Frozen};
use engraft_store::{AdapterFiles, AdapterForm, Entry, HEAD_CONFIG, HEAD_WEIGHTS, SavedHead};
use engraft_tensor::Tensor;
use serde_json::{Map, Value, json};

use crate::attach::adapter_tensors;
use crate::read::{config_classes, known_labels};
use crate::tensors::named;
use crate::{Error, Result};

/// What precedes the model's own tensors in an adapter's file.
const OF_MODEL: &str = "base_model.model.";

/// A saved adapter as it is for a model.
pub struct Parts {
    /// Its configuration, with the head that is trained whole.
    pub config: Value,
    /// Its tensors, with those of the head.
    pub tensors: Named,
    /// What was left out.
    pub notes: Vec<String>,
}

/// The adapter of `files` with the head beside it, as it is for `model`.
///
/// # Errors
/// A head that the model does not have.
pub fn adapter_parts(files: &AdapterFiles, model: &dyn Model) -> Result<Parts> {
    let mut parts =
        Parts { config: files.config.clone(), tensors: adapter_tensors(files)?, notes: Vec::new() };
    let Some(architecture) = architecture_of(model).filter(|_| files.form == AdapterForm::AdapterHub) else {
        return Ok(parts);
    };
    below_trunk(&mut parts.tensors, architecture, model);
    let Some(head) = &files.head else { return Ok(parts) };
    let tensors = match own_tensors(head, architecture, model)? {
        Ok(tensors) => tensors,
        Err(note) => {
            parts.notes.push(note);
            return Ok(parts);
        }
    };
    if !model.info().task.is_classification() && are_the_models(&tensors, model)? {
        return Ok(parts);
    }
    let mut modules: Vec<&str> = tensors.iter().filter_map(|(name, _)| name.split('.').next()).collect();
    modules.sort_unstable();
    modules.dedup();
    if let Some(config) = parts.config.as_object_mut() {
        config.insert("modules_to_save".into(), json!(modules));
    }
    parts.tensors.extend(tensors.into_iter().map(|(name, tensor)| (format!("{OF_MODEL}{name}"), tensor)));
    Ok(parts)
}

fn architecture_of(model: &dyn Model) -> Option<&'static Architecture> {
    Architecture::of(&json!({ "model_type": model.info().architecture }))
}

/// Names as this model has them, whether the adapter was saved from the trunk alone or from a class with a head.
fn below_trunk(tensors: &mut Named, architecture: &Architecture, model: &dyn Model) {
    let prefix = architecture.trunk_prefix();
    if prefix.is_empty() {
        return;
    }
    let below = |name: &str| name.starts_with(prefix);
    let model_has = model.sites().iter().any(|site| below(&site.path));
    match (model_has, tensors.iter().any(|(name, _)| below(name))) {
        (true, false) => tensors.iter_mut().for_each(|(name, _)| name.insert_str(0, prefix)),
        (false, true) => {
            let without = |name: &mut String| *name = name.strip_prefix(prefix).unwrap_or(name).to_owned();
            tensors.iter_mut().for_each(|(name, _)| without(name));
        }
        _ => {}
    }
}

/// The description of a flexible head.
fn description(head: &SavedHead) -> Option<&Value> {
    head.config.get("config").filter(|config| config.is_object())
}

/// What a head computes, if it tells classes apart.
fn classes_of(head: &SavedHead, architecture: &Architecture) -> Option<Task> {
    let task = match description(head) {
        Some(described) => flexible_task(described),
        None => architecture.task_of(head.config.get("model_class")?.as_str()?),
    };
    task.filter(|task| task.is_classification())
}

/// The tensors of a head by their names in the model, or why it is left out.
fn own_tensors(
    head: &SavedHead,
    architecture: &Architecture,
    model: &dyn Model,
) -> Result<std::result::Result<Named, String>> {
    let info = model.info();
    let tensors = named(&head.weights)?;
    let class = head.config.get("model_class").and_then(Value::as_str);
    let described = description(head);
    let task = match (described, class) {
        (Some(described), _) => flexible_task(described),
        (None, Some(class)) => architecture.task_of(class),
        // A head without a configuration is tried.
        (None, None) => Some(info.task),
    };
    let flexible = described.and_then(|described| architecture.flexible(described));
    let fits = task == Some(info.task);
    let renamed = match (described, flexible) {
        (None, _) => Some(tensors).filter(|_| fits),
        (Some(_), Some(flexible)) if fits => renamed(tensors, flexible, model),
        _ => None,
    };
    if let Some(tensors) = renamed {
        return Ok(Ok(tensors));
    }
    let kinds = ["causal_lm", "masked_lm", "seq2seq_lm"];
    let says = described.and_then(|described| described.get("head_type")).and_then(Value::as_str);
    let over_words =
        says.is_some_and(|kind| kinds.contains(&kind)) || task.is_some_and(|task| !task.is_classification());
    unread(&head.config, model, over_words).map(Err)
}

/// What is told of a head that the model does not have: a note where it is `over_words`, since the model then has one of its own.
///
/// # Errors
/// Any other.
fn unread(config: &Value, model: &dyn Model, over_words: bool) -> Result<String> {
    let class = config.get("model_class").and_then(Value::as_str);
    let what = match config.get("config").filter(|described| described.is_object()) {
        Some(described) => format!("a flexible head ({})", summary(described)),
        None => format!("that of {}", class.unwrap_or("another model")),
    };
    let info = model.info();
    let has = info.class.unwrap_or(info.task.name());
    if over_words {
        return Ok(format!("the head beside the adapter, {what}, is left out: the model is loaded as {has}"));
    }
    Err(Error::Setup(format!(
        "{HEAD_CONFIG}: the head beside the adapter is {what}, which is none of {has}; take {HEAD_CONFIG} and {HEAD_WEIGHTS} out of \
         the directory to use the adapter without it"
    )))
}

/// What a description says of a head's computation.
fn summary(described: &Value) -> String {
    let shown = |key: &str| {
        let value = described.get(key).filter(|value| !value.is_null())?;
        Some(format!("{key} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
    };
    let keys = ["head_type", "layers", "activation_function", "use_pooler", "bias"];
    keys.iter().filter_map(|key| shown(key)).collect::<Vec<_>>().join(", ")
}

/// A flexible head's tensors, called `heads.NAME.NUMBER.…`, by the names that the model has for them; `None` where the two do not
/// have the same.
fn renamed(tensors: Named, flexible: &Flexible, model: &dyn Model) -> Option<Named> {
    let name = |key: &str| {
        let (module, end) = key.strip_prefix("heads.")?.rsplit_once('.')?;
        let number: usize = module.rsplit_once('.')?.1.parse().ok()?;
        let (_, own) = flexible.modules.iter().find(|(n, _)| *n == number)?;
        Some(format!("{own}.{end}"))
    };
    let tensors = tensors.into_iter().map(|(key, t)| Some((name(&key)?, t))).collect::<Option<Named>>()?;
    let within = |path: &str| {
        flexible.modules.iter().any(|(_, own)| path.strip_prefix(own).is_some_and(|end| end.starts_with('.')))
    };
    let own: Vec<String> = model.sites().iter().map(Site::tensor_name).filter(|name| within(name)).collect();
    let has = |name: &String| tensors.iter().any(|(held, _)| held == name);
    (own.len() == tensors.len() && own.iter().all(has)).then_some(tensors)
}

fn own_value(site: &Site) -> Result<Option<Tensor>> {
    Ok(match &site.value {
        Frozen::Weight(weight) => Some(weight.dense()?),
        Frozen::Vector(vector) => Some(vector.clone()),
        Frozen::None => None,
    })
}

/// Whether these are the model's own values, up to the rounding of bf16, in which it may be held.
fn are_the_models(tensors: &Named, model: &dyn Model) -> Result<bool> {
    for site in model.sites().iter() {
        let Some((_, held)) = tensors.iter().find(|(name, _)| *name == site.tensor_name()) else { continue };
        let Some(own) = own_value(site)? else { continue };
        let same = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() / 128.0;
        if own.shape() != held.shape() || !own.to_vec()?.iter().zip(&held.to_vec()?).all(same) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What a saved adapter says that a model with this `config.json` is to compute; `None` is what the model's class does.
pub fn task_of_adapter(config: &Value, files: &AdapterFiles) -> Option<Task> {
    if let (Some(head), Some(architecture)) = (&files.head, Architecture::of(config)) {
        return classes_of(head, architecture);
    }
    match files.config.get("task_type").and_then(Value::as_str) {
        Some("CAUSAL_LM") => Some(Task::CausalLm),
        Some("SEQ_CLS") => Some(Task::SequenceClassification),
        Some("TOKEN_CLS") => Some(Task::TokenClassification),
        Some("FEATURE_EXTRACTION") => {
            // `peft` takes any class; an adapter of one with a head keeps it.
            let names = files.weights.iter().map(|(name, _)| name);
            (!has_head(config, names)).then_some(Task::Embedding)
        }
        Some("SEQ_2_SEQ_LM") => Some(Task::Seq2Seq),
        _ => None,
    }
}

/// Labels of the classifier that a saved adapter carries for a model with this `config.json`.
pub fn labels_of_adapter(config: &Value, files: &AdapterFiles) -> Option<usize> {
    let shapes = |weights: &engraft_store::Weights| {
        labels_in(config, weights.iter().map(|(name, raw)| (name, raw.shape.as_slice())))
    };
    let of_head = |head: &SavedHead| {
        let described = || description(head)?.get("num_labels")?.as_u64().map(|n| n as usize);
        classes_of(head, Architecture::of(config)?)?;
        shapes(&head.weights).or_else(described)
    };
    shapes(&files.weights).or_else(|| of_head(files.head.as_ref()?))
}

/// The names of the classes that a head tells apart.
pub(crate) fn names_of_head(config: &Value) -> Option<Vec<String>> {
    let inner = config.get("config").filter(|inner| inner.is_object()).unwrap_or(config);
    let numbers = inner.get("label2id")?.as_object()?;
    let names: Map<String, Value> =
        numbers.iter().map(|(name, number)| (number.to_string(), name.as_str().into())).collect();
    known_labels(&json!({ "id2label": names }))
}

/// The model that an adapter is written for in AdapterHub's form.
pub struct HubModel<'a> {
    /// The model.
    pub model: &'a dyn Model,
    /// Its `config.json`.
    pub config: &'a Value,
    /// As the user named it.
    pub name: &'a str,
    /// The names of its classes.
    pub labels: Option<&'a [String]>,
}

/// Writes the adapter as AdapterHub's library reads it, with a trained head beside it; gives the tensors that it has no place for.
///
/// # Errors
/// An adapter whose form is not AdapterHub's.
pub fn write_hub_files(dir: &Path, config: &Value, tensors: Named, of: &HubModel<'_>) -> Result<Vec<String>> {
    let info = of.model.info();
    let about = json!({
        "hidden_size": info.width, "model_class": info.class, "model_name": of.name, "model_type": info.architecture,
        "version": "adapters.1.3.0",
    });
    let about = about.as_object().cloned().unwrap_or_default();
    let mut files = adapter_hub(config, tensors, &about, (of.model.sites(), info))?;
    let (head, left_out) = head_of(files.rest, of)?;
    for HubDirectory { name, config: (file, config), weights } in &mut files.directories {
        // A setup says whether a head lies beside it.
        if let Some(beside) = config.get_mut("head_setup").filter(|_| !head.is_empty()) {
            *beside = true.into();
        }
        let entries = weights.as_ref().map_or(Ok(Vec::new()), |(_, tensors)| entries(tensors))?;
        let weights = weights.as_ref().map(|(file, _)| (*file, &entries[..]));
        let own = if name.is_empty() { dir.to_owned() } else { dir.join(name) };
        engraft_store::write_adapter_as(&own, (*file, config), weights)?;
    }
    if !head.is_empty() {
        let config = head_config(about, of);
        let entries = entries(&head)?;
        engraft_store::write_adapter_as(dir, (HEAD_CONFIG, &config), Some((HEAD_WEIGHTS, &entries)))?;
    }
    Ok(left_out)
}

fn entries(tensors: &Named) -> Result<Vec<Entry<'static>>> {
    tensors.iter().map(|(name, tensor)| crate::tensors::entry(name, tensor)).collect()
}

/// The whole head of which `rest` holds what was trained, by the model's names, and what is in no head.
fn head_of(rest: Named, of: &HubModel<'_>) -> Result<(Named, Vec<String>)> {
    let architecture = architecture_of(of.model).filter(|_| of.model.info().class.is_some());
    let own = |name: &str| name.strip_prefix(OF_MODEL).unwrap_or(name).to_owned();
    let is_head = |name: &str| architecture.is_some_and(|a| a.in_head(&own(name)));
    let (head, others): (Named, Named) = rest.into_iter().partition(|(name, _)| is_head(name));
    let mut head: Named = head.into_iter().map(|(name, tensor)| (own(&name), tensor)).collect();
    if !head.is_empty() {
        for site in of.model.sites().iter() {
            let name = site.tensor_name();
            let missing = is_head(&name) && head.iter().all(|(held, _)| *held != name);
            if let Some(value) = if missing { own_value(site)? } else { None } {
                head.push((name, value));
            }
        }
    }
    head.sort_by(|a, b| a.0.cmp(&b.0));
    Ok((head, others.into_iter().map(|(name, _)| name).collect()))
}

/// `head_config.json` of a class of `transformers`: `about` the model and its labels.
fn head_config(mut about: Map<String, Value>, of: &HubModel<'_>) -> Value {
    let info = of.model.info();
    // Heads over words have the labels that every configuration has.
    let count =
        if info.task.is_classification() { info.outputs } else { config_classes(of.config).unwrap_or(2) };
    let of_model = known_labels(of.config);
    let named = of.labels.or(of_model.as_deref()).filter(|names| names.len() == count);
    let name = |i: usize| named.map_or_else(|| format!("LABEL_{i}"), |names| names[i].clone());
    let numbers: Map<String, Value> = (0..count).map(|i| (name(i), i.into())).collect();
    about.insert("config".into(), Value::Null);
    about.insert("name".into(), Value::Null);
    about.insert("label2id".into(), numbers.into());
    about.insert("num_labels".into(), count.into());
    about.into()
}
