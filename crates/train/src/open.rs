//! A recipe to a [`Session`]: what it names is found and read, and all that is wrong with it is reported at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engraft_data::{Labels, TemplateOptions, Tokenizer};
use engraft_method::{Ahead, Settings};
use engraft_model::{LoadOptions, Loaded, Packed, load, token_limit};
use engraft_nn::Task;
use engraft_nn::weight::Storage;
use engraft_recipe::{self as recipe, Dtype, Facts, Plan, Problem, Quantize, Recipe};
use engraft_store::hub::{Hub, Progress};
use engraft_store::{Limits, Weights, read_adapter, read_config};
use engraft_tensor::frozen::Precision;
use serde_json::Value;

use crate::Result;
use crate::attach::{AttachedAdapter, from_recipe, unsuited};
use crate::batch::Feed;
use crate::fingerprint::{Fingerprint, of_data, of_weights};
use crate::hub_head::labels_of_adapter;
use crate::labels::label_names;
use crate::names;
use crate::objective::Objective;
use crate::read::{Examples, Reading, config_classes, decide_task, known_labels};
use crate::session::{Session, feed_options};
use crate::sizes;
use crate::target::Shift;
use crate::task_names::TaskNames;
use crate::wanted::rate_without_head;

/// What a session needs of its surroundings.
pub struct SessionOptions<'a> {
    /// Where Hub ids come from.
    pub hub: &'a Hub,
    /// Told of downloads.
    pub progress: &'a mut dyn FnMut(Progress),
    /// Relative paths of `--set` start here.
    pub working_dir: PathBuf,
    /// What files may ask for.
    pub limits: Limits,
    /// Weights that other sessions have packed: sessions that share them hold one base.
    pub packed: Packed,
    /// What chat templates may ask for, and where they are rendered.
    pub templates: TemplateOptions,
    /// Settings that the methods of a saved adapter leave open until it is used.
    pub choices: Settings,
}

impl Session {
    /// Loads everything that `recipe` names. Nothing is written.
    ///
    /// # Errors
    /// [`crate::Error::Recipe`] with all mistakes that the recipe, the model and the data show together; a model that cannot be
    /// read.
    pub fn open(recipe: &Recipe, options: &mut SessionOptions<'_>) -> Result<Session> {
        let missing = missing_files(recipe);
        let model_dir = model_dir(recipe, options)
            .map_err(|problem| recipe.problems([vec![problem], missing.clone()].concat()))?;
        let config = read_config(&model_dir.join("config.json"), &options.limits)?;
        let (task, known_labels) = (decide_task(recipe, &config), known_labels(&config));
        classes_only(recipe, task, &config)?;
        let (tokenizer, max_length) = tokenizer(recipe, &model_dir, &config)?;
        let (data, tasks) = (with_labels_of_adapter(recipe, task)?, TaskNames::of(recipe)?);
        let reading = Reading {
            task,
            data: &data,
            tasks: &tasks,
            tokenizer: tokenizer.as_ref(),
            max_length,
            seed: recipe.train.seed,
            known: known_labels.as_ref(),
            templates: &options.templates,
            model: (&model_dir, &config),
        };
        let fault = |fault: crate::read::Fault| vec![recipe.problem_at(&fault.key, fault.error.to_string())];
        let mut problems: Vec<Problem> = too_long(recipe, &config).into_iter().collect();
        let examples = match missing.is_empty() {
            true => keep(reading.examples().map_err(fault), &mut problems),
            false => keep(Err(missing), &mut problems),
        };
        let own = own_classes(recipe, &config, &options.limits);
        let classes = classes(&data, task, examples.as_ref(), own);
        let loaded =
            load_model(recipe, &model_dir, &load_options(recipe, task, classes, options), &mut problems)?;
        let facts = facts(recipe, task, examples.as_ref(), max_length, &options.working_dir)?;
        let plan = keep(recipe.plan(&facts).map_err(|found| found.list), &mut problems);
        let methods = plan.as_ref().map_or(&recipe.methods, |plan| &plan.methods);
        // Under a head of a guessed size a saved adapter's own is no mistake.
        let guessed = examples.is_none() && classes.is_some() && data.labels.is_none();
        let made = attached(recipe, methods, &loaded, tokenizer.as_ref(), (&options.choices, guessed));
        let attached = keep(made, &mut problems);
        if let Some(examples) = &examples {
            problems.extend(misfits(recipe, examples, &loaded, (plan.as_ref(), attached.as_ref(), &tasks)));
        }
        let sound = problems.is_empty();
        let (Some(examples), Some(plan), Some(attached), true) = (examples, plan, attached, sound) else {
            return Err(recipe.problems(problems).into());
        };
        let weights = Weights::open(&model_dir, &options.limits)?;
        let fingerprint = Fingerprint::new(of_weights(&weights), of_data(&examples.train));
        let session = Session {
            notes: [attached.notes, doubts(recipe, &examples, &config, &loaded)].concat(),
            objective: Objective::of(loaded.model.info().task)?,
            shift: Shift::of(&config),
            plan,
            model: loaded.model,
            model_dir,
            model_bytes: loaded.bytes,
            new_tensors: loaded.new_tensors,
            adapter: Arc::new(attached.adapter),
            methods: attached.methods,
            goes_on: attached.saved,
            train_also: attached.train_also,
            tokenizer,
            train: examples.train,
            eval: examples.eval,
            labels: examples.labels,
            tasks,
            fingerprint,
        };
        session.levels().map_err(|e| recipe.problems(vec![recipe.problem_at("data.path", e.to_string())]))?;
        Ok(session)
    }
}

/// The adapter of the recipe's methods; nothing, and no mistake, where a saved one does not fit a model that has a `guessed` head.
fn attached(
    recipe: &Recipe,
    methods: &[recipe::MethodTable],
    loaded: &Loaded,
    tokenizer: Option<&Tokenizer>,
    (choices, guessed): (&Settings, bool),
) -> std::result::Result<AttachedAdapter, Vec<Problem>> {
    let made = from_recipe(recipe, methods, loaded.model.as_ref(), tokenizer, &loaded.new_tensors, choices);
    let made = made.and_then(|made| match rate_without_head(recipe, &made.adapter, loaded.model.sites()) {
        Some(problem) => Err(vec![problem]),
        None => Ok(made),
    });
    let saved = recipe.methods.iter().any(|method| method.from.is_some());
    if guessed && saved { made.map_err(|_| vec![]) } else { made }
}

/// The recipe's data with the names of the classes that the adapter it starts from knows: its head means these.
fn with_labels_of_adapter(recipe: &Recipe, task: recipe::Task) -> Result<recipe::Data> {
    use recipe::Task::{ImageClassification, SequenceClassification, TokenClassification};
    let mut data = recipe.data.clone();
    let classifies = matches!(task, SequenceClassification | TokenClassification | ImageClassification);
    if let (true, None, [method]) = (classifies, &data.labels, &recipe.methods[..])
        && let Some(from) = &method.from
    {
        data.labels = label_names(&from.value)?;
        for task in &mut data.tasks {
            task.data.labels.clone_from(&data.labels);
        }
    }
    Ok(data)
}

/// The value, or its mistakes put with the others.
fn keep<T>(result: std::result::Result<T, Vec<Problem>>, problems: &mut Vec<Problem>) -> Option<T> {
    result.map_err(|found| problems.extend(found)).ok()
}

/// The model; where it cannot be loaded the error joins the mistakes found before.
fn load_model(
    recipe: &Recipe,
    dir: &Path,
    options: &LoadOptions,
    problems: &mut Vec<Problem>,
) -> Result<Loaded> {
    match load(dir, options) {
        Ok(loaded) => Ok(loaded),
        Err(e @ engraft_model::Error::Task { .. }) => {
            problems.push(recipe.problem_at("task", e.to_string()));
            Err(recipe.problems(std::mem::take(problems)).into())
        }
        Err(e) if problems.is_empty() => Err(e.into()),
        Err(e) => {
            problems.push(Problem::new(e.to_string()));
            Err(recipe.problems(std::mem::take(problems)).into())
        }
    }
}

/// What to tell where the model's own head serves classes of other names. An adapter brings a head of its own.
fn kept_head(recipe: &Recipe, examples: &Examples, config: &Value, loaded: &Loaded) -> Option<String> {
    let continues = recipe.methods.iter().any(|method| method.from.is_some());
    let (names, known) = (examples.labels.as_ref()?, known_labels(config)?);
    let is_own = loaded.new_tensors.is_empty() && !continues;
    is_own.then(|| names::kept_head(names, &known, loaded.model.sites()))?
}

/// What to tell where a method is set to know more tasks than the data have.
fn spare_tasks(recipe: &Recipe, examples: &Examples) -> Vec<String> {
    let there = examples.train.examples.iter().filter_map(|e| e.task).max().map_or(1, |last| last + 1);
    let set = |table: &recipe::MethodTable| {
        let known =
            table.settings.get("tasks").and_then(Value::as_u64).filter(|known| *known > there as u64)?;
        Some(format!(
            "`{}.tasks` is {known}, and the data have {there}: what the adapter holds for the others is never trained",
            table.at
        ))
    };
    recipe.methods.iter().filter_map(set).collect()
}

/// Guesses about the data, and what can be trained but hardly is what was meant.
fn doubts(recipe: &Recipe, examples: &Examples, config: &Value, loaded: &Loaded) -> Vec<String> {
    let mut doubts = examples.train.report.guesses.clone();
    doubts.extend(kept_head(recipe, examples, config, loaded));
    doubts.extend(spare_tasks(recipe, examples));
    let rate = recipe.train.learning_rate;
    if rate > 1.0 {
        doubts.push(format!(
            "train.learning_rate is {rate}; rates above 1 hardly ever train, 1e-5 to 1e-2 is usual"
        ));
    }
    let classes: std::collections::BTreeSet<i64> = examples
        .train
        .examples
        .iter()
        .filter_map(|e| match &e.labels {
            Labels::Class(class) => Some(i64::from(*class)),
            _ => None,
        })
        .collect();
    if classes.len() == 1 {
        doubts.push(
            "all rows have the same label, so there is nothing to tell apart; check the label column".into(),
        );
    }
    doubts
}

/// What the plan needs to know of model and data.
fn facts(
    recipe: &Recipe,
    task: recipe::Task,
    examples: Option<&Examples>,
    model_length: usize,
    working_dir: &Path,
) -> Result<Facts> {
    Ok(Facts {
        model_dir: recipe.model_path.is_dir().then(|| recipe.model_path.clone()),
        task,
        model_length,
        steps_per_epoch: examples.map_or(Ok(1), |e| steps_per_epoch(recipe, e, model_length))?,
        working_dir: working_dir.to_owned(),
    })
}

/// Labels of the head that the adapter brings from which training goes on, else of the model's.
fn own_classes(recipe: &Recipe, config: &Value, limits: &Limits) -> Option<usize> {
    let of_adapter = || {
        let [method] = &recipe.methods[..] else { return None };
        // One that cannot be read is told of where it is attached.
        labels_of_adapter(config, &read_adapter(&method.from.as_ref()?.value, limits).ok()?)
    };
    of_adapter().or_else(|| config_classes(config))
}

/// Labels that the head must tell apart, `own` being those of the model's or the adapter's; `None` is the head's own number.
fn classes(
    data: &recipe::Data,
    task: recipe::Task,
    examples: Option<&Examples>,
    own: Option<usize>,
) -> Option<usize> {
    use recipe::Task::{ImageClassification, SequenceClassification, TokenClassification};
    if !matches!(task, SequenceClassification | TokenClassification | ImageClassification) {
        return None;
    }
    // `transformers` takes two labels where a configuration says nothing.
    let own = own.unwrap_or(2);
    Some(match (examples.and_then(|e| e.classes), data.format) {
        // Arrays have no names: a class that no row has may still be one of the model's.
        (Some(found), recipe::Format::Tensors) => found.max(own),
        (Some(found), _) => found,
        // The data could not be read: a head of the named classes, or any, will do to find the other mistakes.
        (None, _) => data.labels.as_ref().map_or(own, Vec::len),
    })
}

/// An error for a classifier that `transformers` would train on something else than one class a row: scores, or several
/// classes at once.
fn classes_only(recipe: &Recipe, task: recipe::Task, config: &Value) -> Result<()> {
    let class = match task {
        recipe::Task::SequenceClassification => "ForSequenceClassification",
        recipe::Task::ImageClassification => "ForImageClassification",
        _ => return Ok(()),
    };
    let kind = config.get("problem_type").and_then(Value::as_str);
    let has_head = config["architectures"][0].as_str().is_some_and(|name| name.contains(class));
    let title = match kind {
        Some("single_label_classification") => return Ok(()),
        Some(other) => format!("`problem_type` of config.json is `{other}`, which is not trained yet"),
        None if has_head && config_classes(config) == Some(1) => {
            "the model's head has one output (`num_labels` = 1: regression), which is not trained yet".into()
        }
        None => return Ok(()),
    };
    let help = "trained are classes, one a row: take a base without this head, or set `problem_type` = \"single_label_classification\" and the labels in config.json";
    Err(recipe.problems(vec![recipe.problem_at("model", title).help(help)]).into())
}

/// The model's directory: the path of the recipe, else a Hub id.
fn model_dir(recipe: &Recipe, options: &mut SessionOptions<'_>) -> std::result::Result<PathBuf, Problem> {
    let (name, path) = (&recipe.model.value, &recipe.model_path);
    let found = options.hub.resolve_from(name, path, None, options.progress);
    found.map_err(|e| recipe.problem_at("model", e.to_string()))
}

/// Data files that are not there, both at once.
fn missing_files(recipe: &Recipe) -> Vec<Problem> {
    let sets = recipe.data.sets().into_iter().enumerate();
    let files = sets.flat_map(|(index, set)| {
        let files = [("data.path", Some(&set.path)), ("data.eval_path", set.eval_path.as_ref())];
        files.into_iter().filter_map(move |(key, path)| Some((index, key, path?)))
    });
    let fault = |(index, key, path): (usize, &str, &PathBuf)| {
        let error = path.metadata().err()?;
        let key = recipe.data.key(index, key);
        Some(recipe.problem_at(&key, format!("cannot read {}: {error}", path.display())))
    };
    files.filter_map(fault).collect()
}

/// More tokens a row than the model has positions.
fn too_long(recipe: &Recipe, config: &Value) -> Option<Problem> {
    let limit = token_limit(config).filter(|limit| limit.is_table)?.tokens;
    let asked = recipe.data.max_length?;
    let title = format!("`data.max_length` is {asked}, the model takes {limit} tokens");
    (asked > limit).then(|| recipe.problem_at("data.max_length", title).saying(format!("at most {limit}")))
}

/// The tokenizer where the data are text, and the tokens a row.
fn tokenizer(recipe: &Recipe, dir: &Path, config: &Value) -> Result<(Option<Tokenizer>, usize)> {
    let needed = recipe.data.sets().iter().any(|set| set.format != recipe::Format::Tensors);
    let there = dir.join("tokenizer.json").exists();
    // With arrays the tokenizer only makes the report readable, so a damaged one is no reason to stop.
    let tokenizer = match (there, needed) {
        (true, true) => Some(Tokenizer::open(dir)?),
        (true, false) => Tokenizer::open(dir).ok(),
        (false, _) => None,
    };
    let model = token_limit(config).map(|limit| limit.tokens);
    let named = tokenizer.as_ref().and_then(|t| t.model_max_length).filter(|n| *n > 1);
    let length = model.unwrap_or(usize::MAX).min(named.unwrap_or(usize::MAX));
    let length = if length == usize::MAX { 1024 } else { length };
    Ok((tokenizer, recipe.data.max_length.unwrap_or(length.clamp(1, 1024))))
}

fn load_options(
    recipe: &Recipe,
    task: recipe::Task,
    labels: Option<usize>,
    options: &SessionOptions<'_>,
) -> LoadOptions {
    let task = match task {
        recipe::Task::Auto => None,
        recipe::Task::CausalLm => Some(Task::CausalLm),
        recipe::Task::SequenceClassification => Some(Task::SequenceClassification),
        recipe::Task::TokenClassification => Some(Task::TokenClassification),
        recipe::Task::MaskedLm => Some(Task::MaskedLm),
        recipe::Task::Seq2Seq => Some(Task::Seq2Seq),
        recipe::Task::ImageClassification => Some(Task::ImageClassification),
        recipe::Task::Embedding => Some(Task::Embedding),
    };
    let storage = match recipe.base.quantize {
        Quantize::None => Storage::Dense,
        Quantize::Nf4 => Storage::Nf4 { block: recipe.base.block_size, double: recipe.base.double_quant },
    };
    let precision = match recipe.train.dtype {
        Dtype::F32 => Precision::F32,
        Dtype::Bf16 => Precision::Bf16,
    };
    LoadOptions {
        task,
        labels,
        seed: recipe.train.seed,
        precision,
        storage,
        limits: options.limits.clone(),
        packed: options.packed.clone(),
    }
}

fn steps_per_epoch(recipe: &Recipe, examples: &Examples, max_length: usize) -> Result<u64> {
    Ok(Feed::new(&examples.train, feed_options(&recipe.data, &recipe.train, max_length, None, None))?
        .steps_per_epoch())
}

/// The rows of a prompt take positions too: there must be some left, and the longest example with them must not have more than
/// the model has: a table has no more, and turned positions were trained no further.
fn no_room(
    recipe: &Recipe,
    examples: &Examples,
    attached: Option<&AttachedAdapter>,
    loaded: &Loaded,
) -> Option<Problem> {
    let limit = token_limit(&loaded.config)?;
    // What scales turned positions reaches further.
    let limit = if limit.is_table { limit.tokens } else { loaded.model.info().max_positions };
    let adapter = &attached?.adapter;
    // Those that enter later have places of their own where positions are turned, and none in a table.
    let rows = adapter.cache_rows();
    if rows >= limit {
        let title = format!("the prompt takes {rows} positions, and the model has {limit}");
        let help = format!("`tokens` of at most {} leave room for a token", limit.saturating_sub(1));
        return Some(recipe.problem_at("method", title).help(&help));
    }
    let rows = adapter.prompt_rows();
    let parts = [Some(&examples.train), examples.eval.as_ref()];
    let longest = parts.into_iter().flatten().flat_map(|part| part.lengths()).max()?;
    let title = format!(
        "the longest example has {longest} tokens, the prompt {rows} rows, and the model has {limit} positions"
    );
    let help = format!("at most {} tokens a row leave room for the prompt", limit.saturating_sub(rows));
    (rows > 0 && longest + rows > limit).then(|| recipe.problem_at("data.max_length", title).help(&help))
}

/// Pictures of a size that the model does not read, ids that it has no embedding for, labels that its head has no output for.
fn misfits(
    recipe: &Recipe,
    examples: &Examples,
    loaded: &Loaded,
    (plan, attached, names): (Option<&Plan>, Option<&AttachedAdapter>, &TaskNames),
) -> Vec<Problem> {
    let info = loaded.model.info();
    let mut problems: Vec<Problem> = no_room(recipe, examples, attached, loaded).into_iter().collect();
    if let (Some(plan), Some(attached)) = (plan, attached) {
        let tasks = examples.train.examples.iter().filter_map(|e| e.task).max().map(|last| last + 1);
        let ahead = Ahead { steps: plan.steps, task: info.task, tasks };
        match names.without_place(recipe, &attached.methods) {
            Some(problem) => problems.push(problem),
            None => problems.extend(unsuited(recipe, &plan.methods, &attached.methods, &ahead)),
        }
    }
    let parts = [("data.path", Some(&examples.train)), ("data.eval_path", examples.eval.as_ref())];
    for (key, data) in parts.into_iter().filter_map(|(key, data)| Some((key, data?))) {
        problems.extend(data.images.iter().filter_map(|images| sizes::misfit(recipe, key, images, info)));
        let bad_id = data
            .examples
            .iter()
            .find_map(|e| e.ids.iter().find(|id| **id as usize >= info.vocabulary).map(|id| (e.row, *id)));
        if let Some((row, id)) = bad_id {
            let title =
                format!("row {row} holds the token {id}; the model has tokens 0 to {}", info.vocabulary - 1);
            problems.push(recipe.problem_at(key, title));
        }
        let highest = |labels: &Labels| match labels {
            Labels::Class(class) => Some(i64::from(*class)),
            Labels::Tokens(labels) => labels.iter().copied().max(),
            Labels::Target(target) => target.labels.iter().copied().max(),
            _ => None,
        };
        let bad_label = data.examples.iter().find_map(|e| {
            highest(&e.labels).filter(|label| *label >= info.outputs as i64).map(|label| (e.row, label))
        });
        if let Some((row, label)) = bad_label {
            let title =
                format!("row {row} has the label {label}; the model's head has {} outputs", info.outputs);
            problems.push(recipe.problem_at(key, title));
        }
        let fits = |labels: &Labels| match labels {
            Labels::Class(_) => info.task.per_sequence(),
            Labels::Target(_) => info.task == Task::Seq2Seq,
            _ => !info.task.per_sequence() && info.task != Task::Seq2Seq,
        };
        if let Some(example) = data.examples.iter().find(|e| !fits(&e.labels)) {
            let expected = match info.task {
                Task::Seq2Seq => "a target beside the source: a prompt and a completion",
                task if task.per_sequence() => "one label a row",
                _ => "one label a token",
            };
            let title = format!("row {}: the task {} takes {expected}", example.row, info.task.name());
            problems.push(recipe.problem_at(key, title));
        }
    }
    problems
}
