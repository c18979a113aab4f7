//! Data files to examples: which task they are for, which names the classes have, what is held out.

mod pictures;
mod tasks;
mod tensors;

use std::path::Path;

use engraft_data::rng::Random;
use engraft_data::{
    ChatTemplate, Columns, Dataset, EncodeOptions, Format, Need, ReadOptions, Rows, Task as DataTask,
    TemplateOptions, Tokenizer, encode, read, sniff,
};
use engraft_recipe as recipe;
use engraft_recipe::{Data, Recipe, Task, Template};
use engraft_store::{Limits, Weights, json};
use serde_json::Value;

use crate::task_names::TaskNames;
use crate::{Error, Result};

const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

/// The recipe's keys of [`Columns::pairs`], in their order.
const COLUMN_KEYS: [&str; 9] = [
    "data.columns.text",
    "data.columns.text_pair",
    "data.columns.label",
    "data.columns.prompt",
    "data.columns.completion",
    "data.columns.messages",
    "data.columns.tokens",
    "data.columns.tags",
    "data.columns.image",
];

/// The examples of a recipe.
pub(crate) struct Examples {
    pub train: Dataset,
    pub eval: Option<Dataset>,
    /// Names of the classes.
    pub labels: Option<Vec<String>>,
    /// Number of classes that the data need.
    pub classes: Option<usize>,
}

/// A mistake in the data, with the key of the recipe that it belongs to.
pub(crate) struct Fault {
    pub key: String,
    pub error: Box<Error>,
}

type Read<T> = std::result::Result<T, Fault>;

fn at<T, E: Into<Error>>(key: &'static str, result: std::result::Result<T, E>) -> Read<T> {
    result.map_err(|error| Fault { key: key.to_owned(), error: Box::new(error.into()) })
}

/// The task: as the recipe says, else as the class in `config.json` and the data do.
pub(crate) fn decide_task(recipe: &Recipe, config: &Value) -> Task {
    if recipe.task != Task::Auto {
        return recipe.task;
    }
    let class = config["architectures"][0].as_str().unwrap_or_default();
    let has_head = |names: &[&str]| names.iter().any(|name| class.ends_with(name));
    if has_head(&["ForCausalLM", "LMHeadModel"]) {
        return Task::CausalLm;
    } else if has_head(&["ForSequenceClassification"]) {
        return Task::SequenceClassification;
    } else if has_head(&["ForTokenClassification"]) {
        return Task::TokenClassification;
    } else if has_head(&["ForConditionalGeneration"]) {
        return Task::Seq2Seq;
    } else if has_head(&["ForImageClassification", "ForImageClassificationWithTeacher"]) {
        return Task::ImageClassification;
    }
    // An encoder without a head of classes: the data say whether there are classes.
    match seems(recipe.data.sets()[0]) {
        Need::Label => Task::SequenceClassification,
        Need::Tags => Task::TokenClassification,
        Need::Text | Need::Completion | Need::Image => Task::MaskedLm,
    }
}

/// What the rows of the data seem to hold.
fn seems(data: &Data) -> Need {
    match data.format {
        recipe::Format::Tensors => match Weights::open_file(&data.path, &Limits::default()) {
            Ok(file) if file.get("labels").is_some_and(|l| l.shape.len() == 1) => Need::Label,
            _ => Need::Text,
        },
        recipe::Format::Text => Need::Text,
        recipe::Format::Images | recipe::Format::Idx | recipe::Format::Npy => Need::Image,
        recipe::Format::Chat | recipe::Format::Alpaca | recipe::Format::Sharegpt => Need::Completion,
        recipe::Format::Csv | recipe::Format::Tsv | recipe::Format::Jsonl => {
            let columns = &data.columns;
            if columns.tags.is_some() {
                Need::Tags
            } else if columns.label.is_some() {
                Need::Label
            } else if columns.completion.is_some() || columns.messages.is_some() {
                Need::Completion
            } else if columns.text.is_some() {
                Need::Text
            } else {
                // A file that cannot be read is reported where it is read.
                sniff(&data.path).map_or(Need::Text, |found| found.need)
            }
        }
    }
}

/// What the data crate makes of the rows for `task`.
fn data_task(task: Task, data: &Data) -> Result<DataTask> {
    Ok(match task {
        Task::SequenceClassification => DataTask::Classify,
        Task::TokenClassification => DataTask::Tags,
        Task::MaskedLm => DataTask::Masked,
        Task::CausalLm if seems(data) == Need::Completion => DataTask::Completion,
        Task::CausalLm => DataTask::Causal,
        Task::Seq2Seq => DataTask::Seq2Seq,
        Task::ImageClassification => {
            return Err(Error::Setup(
                "pictures are read from data.format = \"images\", \"idx\", \"npy\" or \"tensors\"".into(),
            ));
        }
        Task::Embedding | Task::Auto => {
            return Err(Error::Setup(
                "sentence embeddings are computed, not trained; set task = \"sequence-classification\" to train classes"
                    .into(),
            ));
        }
    })
}

/// What the files are read with.
#[derive(Clone, Copy)]
pub(crate) struct Reading<'a> {
    pub task: Task,
    pub data: &'a Data,
    pub tasks: &'a TaskNames,
    pub tokenizer: Option<&'a Tokenizer>,
    pub max_length: usize,
    pub seed: u64,
    /// `id2label` of the model's configuration, in order.
    pub known: Option<&'a Vec<String>>,
    /// What chat templates may ask for, and where they are rendered.
    pub templates: &'a TemplateOptions,
    /// The model's directory and its `config.json`, for how pictures are processed.
    pub model: (&'a Path, &'a Value),
}

impl Reading<'_> {
    /// Training and evaluation examples, of all tasks.
    pub fn examples(&self) -> Read<Examples> {
        if self.data.tasks.is_empty() {
            return self.one_set();
        }
        let sets = self.data.tasks.iter().enumerate().map(|(index, task)| {
            let read = Reading { data: &task.data, ..*self }.one_set();
            read.map_err(|fault| Fault { key: self.data.key(index, &fault.key), ..fault })
        });
        let numbers = self.data.tasks.iter().map(|task| self.tasks.number(&task.name));
        let numbers: Vec<usize> = numbers.enumerate().map(|(index, known)| known.unwrap_or(index)).collect();
        at("data.tasks", tasks::joined(sets.collect::<Read<Vec<_>>>()?, &numbers, self.task))
    }

    fn one_set(&self) -> Read<Examples> {
        match (self.data.format, self.tokenizer) {
            (recipe::Format::Tensors, _) => self.tensors(),
            _ if self.task == Task::ImageClassification => self.pictures(),
            (recipe::Format::Images | recipe::Format::Idx | recipe::Format::Npy, _) => {
                let text = "pictures go with task = \"image-classification\" and a model that reads them";
                at("data.format", Err(Error::Setup(text.into())))
            }
            (_, Some(tokenizer)) => self.text(tokenizer),
            (_, None) => {
                let text =
                    "the model has no tokenizer.json, which text data need; give data.format = \"tensors\"";
                at("data.format", Err(Error::Setup(text.into())))
            }
        }
    }

    /// The rows of a file; a column that is not there belongs to the key that names it.
    fn rows(&self, key: &'static str, path: &Path, task: DataTask) -> Read<Rows> {
        let options = self.options(task);
        read(path, &options).map_err(|error| {
            let given = |column: &str| {
                let named = |(_, name): &(&str, &Option<String>)| name.as_deref() == Some(column);
                options.columns.pairs().iter().position(named).map(|index| COLUMN_KEYS[index])
            };
            let column = match &error {
                engraft_data::Error::Column { column, .. } => given(column),
                _ => None,
            };
            Fault { key: column.unwrap_or(key).to_owned(), error: Box::new(error.into()) }
        })
    }

    /// Room for a token beside the special ones.
    fn room(&self, tokenizer: &Tokenizer, task: DataTask) -> Result<()> {
        let added = tokenizer.added(false);
        // Blocks are cut from one run of tokens, and conversations bring their own.
        if self.max_length > added || matches!(task, DataTask::Causal | DataTask::Completion) {
            return Ok(());
        }
        Err(Error::Setup(format!(
            "`data.max_length` is {}, and {added} special tokens are added to each row; set {} or more",
            self.max_length,
            added + 1
        )))
    }

    fn text(&self, tokenizer: &Tokenizer) -> Read<Examples> {
        let task = at("task", data_task(self.task, self.data))?;
        at("data.max_length", self.room(tokenizer, task))?;
        let rows = self.rows("data.path", &self.data.path, task)?;
        // Text cut into blocks has no rows to hold out: the blocks are.
        let by_rows = task != DataTask::Causal;
        let (rows, held) = match self.data.eval_fraction {
            Some(fraction) if by_rows => {
                let (rest, held) = at("data.eval_fraction", rows.split(fraction, self.seed))?;
                (rest, Some(held))
            }
            _ => (rows, None),
        };
        let template = at("data.template", self.template(tokenizer, task))?;
        let encoded = |key, rows: &Rows, labels: Option<Vec<String>>| {
            let options = EncodeOptions {
                max_length: self.max_length,
                labels,
                template: template.as_ref(),
                allow_empty: self.data.allow_empty,
            };
            at(key, encode(rows, tokenizer, task, &options))
        };
        let mut train = encoded("data.path", &rows, self.data.labels.clone())?;
        if self.data.labels.is_none() {
            at("data.path", classes_not_scores(train.labels.as_deref().unwrap_or_default()))?;
        }
        if let Some(known) = self.known_names(&train) {
            train = encoded("data.path", &rows, Some(known))?;
        }
        let labels = train.labels.clone();
        let mut eval = None;
        if let Some(path) = &self.data.eval_path {
            let rows = self.rows("data.eval_path", path, task)?;
            eval = Some(encoded("data.eval_path", &rows, labels.clone())?);
        } else if let Some(held) = held {
            eval = Some(encoded("data.eval_fraction", &held, labels.clone())?);
        } else if let Some(fraction) = self.data.eval_fraction {
            eval = Some(at("data.eval_fraction", hold_out(&mut train, fraction, self.seed, task.shifted()))?);
        }
        let classes = labels.as_ref().map(Vec::len);
        Ok(Examples { train, eval, labels, classes })
    }

    /// The model's own names where it was trained for the classes of the data: its head then keeps its meaning.
    fn known_names(&self, train: &Dataset) -> Option<Vec<String>> {
        let (known, found) = (self.known?, train.labels.as_ref()?);
        let all = self.data.labels.is_none() && found.iter().all(|name| known.contains(name));
        (all && known != found).then(|| known.clone())
    }

    fn options(&self, task: DataTask) -> ReadOptions {
        let format = match self.data.format {
            recipe::Format::Csv => Format::Csv,
            recipe::Format::Tsv => Format::Tsv,
            recipe::Format::Jsonl => Format::Jsonl,
            recipe::Format::Chat => Format::Chat,
            recipe::Format::Alpaca => Format::Alpaca,
            recipe::Format::Sharegpt => Format::Sharegpt,
            recipe::Format::Text
            | recipe::Format::Tensors
            | recipe::Format::Images
            | recipe::Format::Idx
            | recipe::Format::Npy => Format::Text,
        };
        let c = &self.data.columns;
        let columns = Columns {
            text: c.text.clone(),
            text_pair: c.text_pair.clone(),
            label: c.label.clone(),
            prompt: c.prompt.clone(),
            completion: c.completion.clone(),
            messages: c.messages.clone(),
            tokens: c.tokens.clone(),
            tags: c.tags.clone(),
            image: c.image.clone(),
        };
        ReadOptions {
            format,
            need: task.need(),
            header: self.data.header,
            lines: task == DataTask::Masked,
            columns,
        }
    }

    fn template(&self, tokenizer: &Tokenizer, task: DataTask) -> Result<Option<ChatTemplate>> {
        let (bos, eos) = (tokenizer.bos.as_deref(), tokenizer.eos.as_deref());
        Ok(match &self.data.template {
            _ if task != DataTask::Completion => None,
            Some(Template::Text(text)) if text == "plain" => Some(ChatTemplate::plain(tokenizer)?),
            Some(Template::Text(text)) => Some(ChatTemplate::new(text, bos, eos, self.templates)?),
            Some(Template::Path(path)) => {
                let bytes = json::read_capped(path, "chat_template", TEMPLATE_BYTES_MAX)?;
                Some(ChatTemplate::new(&String::from_utf8_lossy(&bytes), bos, eos, self.templates)?)
            }
            None if tokenizer.templates.is_empty() => None,
            None => Some(ChatTemplate::of(tokenizer, None, self.templates)?),
        })
    }
}

/// An error for labels that are numbers between whole ones: as classes each would be a name like any other.
fn classes_not_scores(names: &[String]) -> Result<()> {
    let numbers: Option<Vec<f64>> = names.iter().map(|name| name.trim().parse().ok()).collect();
    let between = numbers.and_then(|numbers| numbers.iter().position(|n| n.is_finite() && n.fract() != 0.0));
    let Some(index) = between else { return Ok(()) };
    Err(Error::Setup(format!(
        "expected classes as labels, found scores such as {}: regression is not trained yet; round them to classes, or \
         list them in data.labels if each of the {} is a class of its own",
        names[index],
        names.len()
    )))
}

/// Takes a share of the examples out of `train`, drawn by `seed`.
fn hold_out(train: &mut Dataset, fraction: f64, seed: u64, shifted: bool) -> Result<Dataset> {
    let all = train.examples.len();
    let held = (all as f64 * fraction).round() as usize;
    if held == 0 || held >= all {
        return Err(Error::Setup(format!(
            "a share of {fraction} of {all} examples holds out {held}, so one part is empty; set data.eval_path or another share"
        )));
    }
    let mut order: Vec<usize> = (0..all).collect();
    Random::new(seed, 3, 0).shuffle(&mut order);
    let mut out = vec![false; all];
    order[..held].iter().for_each(|&index| out[index] = true);
    let mut eval =
        Dataset { images: train.images.clone(), labels: train.labels.clone(), ..Dataset::default() };
    let mut rest = Vec::with_capacity(all - held);
    for (example, out) in std::mem::take(&mut train.examples).into_iter().zip(out) {
        if out { eval.examples.push(example) } else { rest.push(example) }
    }
    train.examples = rest;
    train.report.measure(&train.examples, shifted);
    eval.report.measure(&eval.examples, shifted);
    Ok(eval)
}

/// The names of classes in a model's configuration, unless they are the placeholders LABEL_0, LABEL_1 ….
pub(crate) fn known_labels(config: &Value) -> Option<Vec<String>> {
    let names = config.get("id2label")?.as_object()?;
    let of = |i: usize| names.get(&i.to_string())?.as_str().map(str::to_owned);
    let names: Option<Vec<String>> = (0..names.len()).map(of).collect();
    names.filter(|names| !names.is_empty() && !names.iter().all(|name| name.starts_with("LABEL_")))
}

/// Number of classes of a model's configuration.
pub(crate) fn config_classes(config: &Value) -> Option<usize> {
    let named = config.get("id2label").and_then(Value::as_object).map(serde_json::Map::len);
    named.or_else(|| config.get("num_labels").and_then(Value::as_u64).map(|n| n as usize))
}
