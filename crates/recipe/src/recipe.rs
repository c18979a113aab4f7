//! The typed recipe: what the text said, defaults filled in from the table of keys, and the place of every value
//! kept, so that a later mistake (a target that matches nothing, a label nobody has) is shown where it was written.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::check::Section;
use crate::problem::{Place, Problem, Problems, Source};
use crate::spec::{MethodSpec, Origin};
use crate::tree::{self, Node};

/// A value and the place it was written at.
#[derive(Clone, Debug, PartialEq)]
pub struct Spanned<T> {
    /// The value.
    pub value: T,
    /// Where it stands.
    pub place: Place,
}

/// A recipe without mistakes, as far as its text alone can tell.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// The model as written: a directory or a Hub id.
    pub model: Spanned<String>,
    /// The directory that `model` means if it is one: relative to the recipe, or to the working directory in `--set`.
    pub model_path: PathBuf,
    /// What is trained.
    pub task: Task,
    /// How the frozen model is held.
    pub base: Base,
    /// What is trained, in the order written; at least one.
    pub methods: Vec<MethodTable>,
    /// What it is trained on.
    pub data: Data,
    /// How it is trained.
    pub train: Train,
    pub(crate) sections: Vec<Section>,
    pub(crate) specs: Vec<MethodSpec>,
    pub(crate) tree: Node,
    pub(crate) sources: Arc<[Source]>,
}

/// What a model is trained to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// As the model and the data say.
    Auto,
    /// The next token.
    CausalLm,
    /// A target given a source.
    #[serde(rename = "seq2seq")]
    Seq2Seq,
    /// One class a row.
    SequenceClassification,
    /// One tag a word.
    TokenClassification,
    /// The hidden tokens.
    MaskedLm,
    /// One class a picture.
    ImageClassification,
    /// A vector a row.
    Embedding,
}

/// Storage of the frozen linear weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantize {
    /// As the files hold them.
    None,
    /// Four-bit normal floats.
    Nf4,
}

/// `[base]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Storage of the frozen linear weights.
    pub quantize: Quantize,
    /// Whether the scales are quantized too.
    pub double_quant: bool,
    /// Weights that share a scale.
    pub block_size: usize,
}

/// Which weights, by `peft`'s rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Every linear weight but the head.
    AllLinear,
    /// One regular expression over the whole path (a plain name is one too).
    Pattern(String),
    /// Names: a path or its last parts.
    Names(Vec<String>),
}

/// One `[method]` table.
#[derive(Clone, Debug, PartialEq)]
pub struct MethodTable {
    /// The path of the table, `method` or `method[1]`, for [`Recipe::place`].
    pub at: String,
    /// The method; absent only where `from` says it.
    pub name: Option<Spanned<String>>,
    /// A saved adapter to start from, resolved.
    pub from: Option<Spanned<PathBuf>>,
    /// Which weights; absent where roles say it or the method has its own choice.
    pub targets: Option<Targets>,
    /// Which weights by role.
    pub roles: Vec<String>,
    /// What is left out.
    pub exclude: Option<Targets>,
    /// The layers adapted; all when absent.
    pub layers: Option<Vec<usize>>,
    /// Names of the list of layers.
    pub layers_pattern: Vec<String>,
    /// Trained numbers over those of the model, from which the method's size follows.
    pub trained_share: Option<f64>,
    /// Modules trained whole.
    pub train_also: Vec<String>,
    /// The method's own settings as written, checked against its [`MethodSpec`]; defaults are not filled in.
    pub settings: Map<String, Value>,
}

/// The form of a data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Cells between commas.
    Csv,
    /// Cells between tabs.
    Tsv,
    /// One JSON object a line.
    Jsonl,
    /// Plain text, cut into blocks.
    Text,
    /// One list of messages a line.
    Chat,
    /// Instruction, input, output.
    Alpaca,
    /// One list of conversations a line.
    Sharegpt,
    /// Token ids or pixel values in a safetensors file.
    Tensors,
    /// A folder of pictures for each class.
    Images,
    /// Pictures and labels in two IDX files, as MNIST has them.
    Idx,
    /// Pictures and labels in two NumPy files.
    Npy,
}

/// `[data.columns]`: which column is what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    /// The input text.
    pub text: Option<String>,
    /// The second text of a pair.
    pub text_pair: Option<String>,
    /// The class.
    pub label: Option<String>,
    /// The instruction or question.
    pub prompt: Option<String>,
    /// The answer that is learned.
    pub completion: Option<String>,
    /// The list of chat messages.
    pub messages: Option<String>,
    /// The list of words.
    pub tokens: Option<String>,
    /// The list of tags, one a word.
    pub tags: Option<String>,
    /// The path of a picture.
    pub image: Option<String>,
}

/// A chat template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Template {
    /// The text itself.
    Text(String),
    /// A file, resolved.
    Path(PathBuf),
}

/// `[data]`. Paths are resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Data {
    /// The form of the files.
    pub format: Format,
    /// The training file, or a folder of pictures.
    pub path: PathBuf,
    /// The labels beside the pictures of idx and npy files.
    pub labels_path: Option<PathBuf>,
    /// The evaluation file.
    pub eval_path: Option<PathBuf>,
    /// The labels beside the pictures of `eval_path`.
    pub eval_labels_path: Option<PathBuf>,
    /// Share of the training rows held out for evaluation, above 0 and below 1.
    pub eval_fraction: Option<f64>,
    /// Tasks are drawn in proportion to rows^(1/temperature).
    pub temperature: f64,
    /// New order of the rows in each epoch.
    pub shuffle: bool,
    /// Tokens a row; absent: the model's limit, at most 1024. A [`Plan`](crate::Plan) has it.
    pub max_length: Option<usize>,
    /// The labels in the order of their numbers.
    pub labels: Option<Vec<String>>,
    /// The first line of csv and tsv names the columns.
    pub header: bool,
    /// The chat template.
    #[serde(skip)]
    pub template: Option<Template>,
    /// Rows of like length share a batch.
    pub group_by_length: bool,
    /// Several rows share one row of the batch.
    pub packing: bool,
    /// Skips rows without anything to learn.
    pub allow_empty: bool,
    /// Which column is what.
    #[serde(skip)]
    pub columns: Columns,
    /// Data sets of several tasks; empty where there is one without a name.
    #[serde(skip)]
    pub tasks: Vec<TaskData>,
}

impl Data {
    /// The data sets: the tasks', or the one.
    pub fn sets(&self) -> Vec<&Data> {
        if self.tasks.is_empty() { vec![self] } else { self.tasks.iter().map(|task| &task.data).collect() }
    }

    /// Whether anything is held back to evaluate on.
    pub fn evaluates(&self) -> bool {
        self.sets().iter().any(|set| set.eval_path.is_some() || set.eval_fraction.is_some())
    }

    /// Where a key of set `index` stands in a recipe.
    pub fn key(&self, index: usize, key: &str) -> String {
        match key.strip_prefix("data.").filter(|_| !self.tasks.is_empty()) {
            Some(own) => format!("data.tasks[{index}].{own}"),
            None => key.to_owned(),
        }
    }
}

/// A `[[data.tasks]]` table.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskData {
    /// What it is called.
    pub name: String,
    /// `[data]` with what the task has of its own.
    pub data: Data,
}

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Length {
    /// Passes over the data, above 0.
    Epochs(f64),
    /// Optimizer steps, at least 1.
    Steps(u64),
}

/// How long the learning rate rises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Warmup {
    /// Share of the steps, 0 to 1.
    #[serde(rename = "warmup_ratio")]
    Ratio(f64),
    /// Steps.
    #[serde(rename = "warmup_steps")]
    Steps(u64),
}

/// The learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls to zero in a line.
    Linear,
    /// Falls to zero in half a cosine.
    Cosine,
}

/// The type of the computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32 bits.
    F32,
    /// bfloat16, the upper half of f32.
    Bf16,
}

/// What the best checkpoint is best at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// Mean loss; less is better.
    Loss,
    /// Share of right answers; more is better.
    Accuracy,
    /// Mean F1 over the classes; more is better.
    F1,
    /// Exponential of the loss; less is better.
    Perplexity,
}

impl Metric {
    /// Whether a greater value is better.
    pub fn greater_is_better(self) -> bool {
        matches!(self, Metric::Accuracy | Metric::F1)
    }
}

/// `[train]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Train {
    /// `epochs` or `steps`.
    #[serde(flatten)]
    pub length: Length,
    /// Rows a micro-batch.
    pub batch_size: usize,
    /// Micro-batches an optimizer step.
    pub gradient_accumulation: usize,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Highest learning rate of the head's own tensors, where they have one of their own.
    pub head_learning_rate: Option<f64>,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The rate after the warm-up.
    pub schedule: Schedule,
    /// `warmup_ratio` or `warmup_steps`.
    #[serde(flatten)]
    pub warmup: Warmup,
    /// Gradients are scaled down to this norm; 0 is off.
    pub max_grad_norm: f64,
    /// Decay of the first moment.
    pub adam_beta1: f64,
    /// Decay of the second moment.
    pub adam_beta2: f64,
    /// Added to the root of the second moment.
    pub adam_epsilon: f64,
    /// Type of the computation.
    pub dtype: Dtype,
    /// Start of all random numbers.
    pub seed: u64,
    /// Threads; 0 takes every core.
    pub threads: usize,
    /// Computes each block twice to hold less memory.
    pub gradient_checkpointing: bool,
    /// Steps between lines of the log.
    pub log_every: u64,
    /// Steps between checkpoints; 0 writes one at the end.
    pub checkpoint_every: u64,
    /// Checkpoints at multiples of this are never deleted; 0 is off.
    pub keep_every: u64,
    /// Steps between evaluations; 0 evaluates before and after. A [`Plan`](crate::Plan) always has it.
    pub eval_every: Option<u64>,
    /// Evaluations without a better metric before the run stops; 0 is off.
    pub early_stopping_patience: u64,
    /// What the best checkpoint is best at.
    pub best_metric: Metric,
}

impl Recipe {
    /// Reads a recipe. `file_name` is its path as the user gave it: it names the file in messages, and the paths
    /// written in the recipe are relative to its directory. `sets` are the arguments of `--set`, `a.b=value` each.
    ///
    /// # Errors
    /// All mistakes of the text, together.
    pub fn parse(
        source: &str,
        file_name: &str,
        sets: &[String],
        methods: &[MethodSpec],
    ) -> Result<Recipe, Problems> {
        tree::read(source, file_name, sets)
            .and_then(|document| crate::check::recipe(document, file_name, methods))
    }

    /// [`Recipe::parse`] of bytes as they come from a file.
    ///
    /// # Errors
    /// A first byte that is no UTF-8, by its line; otherwise as `parse`.
    pub fn parse_bytes(
        source: &[u8],
        file_name: &str,
        sets: &[String],
        methods: &[MethodSpec],
    ) -> Result<Recipe, Problems> {
        match std::str::from_utf8(source) {
            Ok(text) => Recipe::parse(text, file_name, sets, methods),
            Err(error) => {
                let line = source[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count() + 1;
                let problem = Problem::new(format!("line {line} of {file_name} is not UTF-8"))
                    .help("save the file as UTF-8");
                let source = Source { name: file_name.to_owned(), text: String::new() };
                Err(Problems::new([source].into(), vec![problem]))
            }
        }
    }

    /// The place of the value at `path` (`train.epochs`, `method[1].rank`, `method.targets[0]`), of the key of
    /// `method.rank_pattern."a.b"`, or of the table around it where that key is not written. `None` where neither is.
    pub fn place(&self, path: &str) -> Option<Place> {
        self.tree.nearest(path)
    }

    /// Where the value of `path` comes from.
    pub fn origin(&self, path: &str) -> Origin {
        match self.tree.find(path) {
            Some(node) => node.place.origin(),
            None => Origin::Default,
        }
    }

    /// A mistake at the value of `path`: `title` above, the value underlined. Labels, notes and helps can be added.
    pub fn problem_at(&self, path: &str, title: impl Into<String>) -> Problem {
        match self.place(path) {
            Some(place) => Problem::new(title).label(place, ""),
            None => Problem::new(title),
        }
    }

    /// Mistakes found later, ready to be shown with the lines of this recipe.
    pub fn problems(&self, list: Vec<Problem>) -> Problems {
        Problems::new(self.sources.clone(), list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::table;

    const SMALL: &str = "model = \"m\"\n[method]\nfrom = \"a\"\n[data]\nformat = \"csv\"\npath = \"t.csv\"\n";

    /// The keys of a struct as serde writes them.
    fn keys(value: impl Serialize) -> Vec<String> {
        let mut keys: Vec<String> =
            serde_json::to_value(value).unwrap().as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    }

    fn listed(path: &str, without: &[&str]) -> Vec<String> {
        let fields = table(path).unwrap().fields.iter().map(|field| field.name.to_owned());
        let mut keys: Vec<String> = fields.filter(|name| !without.contains(&name.as_str())).collect();
        keys.sort();
        keys
    }

    #[test]
    fn structs_and_tables_have_the_same_keys() {
        let recipe = Recipe::parse(SMALL, "r.toml", &[], &[]).unwrap();
        assert_eq!(keys(&recipe.base), listed("base", &[]));
        assert_eq!(keys(&recipe.data), listed("data", &["template"]));
        assert_eq!(keys(&recipe.data.columns), listed("data.columns", &[]));
        assert_eq!(keys(&recipe.train), listed("train", &["steps", "warmup_steps"]));
    }

    #[test]
    fn every_name_of_a_choice_has_its_variant() {
        let accepted = |key: &str, line: &str| {
            let table = if key == "format" { SMALL.replace("\"csv\"", line) } else { String::new() };
            let text = match key {
                "format" => table,
                "task" => format!("task = {line}\n{SMALL}"),
                "quantize" => format!("{SMALL}[base]\n{key} = {line}\n"),
                _ => format!("{SMALL}eval_fraction = 0.5\n[train]\n{key} = {line}\n"),
            };
            Recipe::parse(&text, "r.toml", &[], &[]).unwrap_or_else(|problems| panic!("{problems}"))
        };
        for table in crate::keys::tables() {
            for field in &table.fields {
                if let crate::spec::FieldKind::OneOf(names) = field.kind {
                    names.iter().for_each(|name| drop(accepted(field.name, &format!("\"{name}\""))));
                }
            }
        }
    }
}
