//! Model architectures, one file each, blind to methods.
//!
//! [`load`] reads a directory in Hugging Face form. An architecture is one file of wiring and one entry of
//! [`ARCHITECTURES`]; its arithmetic is `engraft_nn`'s.

mod bert;
mod config;
mod dinov2;
mod error;
mod facts;
mod fused;
mod gpt2;
mod llama;
mod packed;
mod picture;
mod pooling;
mod positions;
mod post_vit;
mod reader;
mod relative;
mod rope;
mod sources;
mod stretch;
mod t5;
mod vit;

use std::path::Path;
use std::sync::Arc;

use engraft_nn::weight::Storage;
use engraft_nn::{Model, Numbers, Task};
use engraft_store::{Dtype, Limits, Weights, read_config};
use engraft_tensor::frozen::Precision;
use serde_json::Value;

pub use error::{Error, Mismatch, MismatchRow, Result};
pub use facts::{
    Facts, Flexible, TokenLimit, flexible_task, has_head, labels_in, ties_by_values, token_limit,
};
pub use packed::Packed;

use config::Config;
use reader::{Prefixes, Reader};

/// An architecture of the registry.
pub struct Architecture {
    /// `model_type` of `config.json`.
    pub name: &'static str,
    /// The classes of `transformers` that it reads, with what their head computes.
    pub classes: &'static [(&'static str, Task)],
    /// Prefix of the trunk's modules in those classes.
    prefix: &'static str,
    /// The class that is the trunk alone, whose files have no prefix.
    trunk: &'static [&'static str],
    /// What the tensors of its heads begin with, whichever task they serve.
    heads: &'static [&'static str],
    /// What must be known before a model is built.
    facts: Facts,
    build: Build,
}

/// Builds a model; called twice (see [`reader`]).
type Build = fn(&Architecture, &mut Config<'_>, &mut Reader<'_>, Head) -> Result<Arc<dyn Model>>;

/// What is to be computed.
#[derive(Clone, Copy)]
pub(crate) struct Head {
    pub task: Task,
    /// Number of labels, of a classification.
    pub labels: usize,
}

/// Every architecture.
pub static ARCHITECTURES: &[&Architecture] = &[
    &llama::LLAMA,
    &llama::MISTRAL,
    &llama::QWEN2,
    &llama::QWEN3,
    &gpt2::GPT2,
    &t5::T5,
    &bert::BERT,
    &bert::ROBERTA,
    &vit::VIT,
    &vit::DEIT,
    &dinov2::DINOV2,
    &post_vit::POST_VIT,
];

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// What the head computes; `None` is what the class in `config.json` says.
    pub task: Option<Task>,
    /// Labels of a classification; a head that the files do not hold in this size is made new.
    pub labels: Option<usize>,
    /// Seed of a new head.
    pub seed: u64,
    /// What products are computed in.
    pub precision: Precision,
    /// How the matrices of blocks are kept; embeddings, norms and heads stay dense.
    pub storage: Storage,
    /// What the files may ask for.
    pub limits: Limits,
    /// Weights that other models of this process have packed.
    pub packed: Packed,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            task: None,
            labels: None,
            seed: 0,
            precision: Precision::F32,
            storage: Storage::Dense,
            limits: Limits::default(),
            packed: Packed::default(),
        }
    }
}

/// Bytes of memory by part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Matrices of the blocks.
    pub blocks: usize,
    /// Embeddings, where they are also packed as a head; looked-up tables stay in the mapped file.
    pub embeddings: usize,
    /// Matrices of head and pooler.
    pub head: usize,
    /// Norms and biases.
    pub vectors: usize,
    /// Size of the mapped files, read through and dropped by the system as it needs.
    pub mapped: u64,
}

impl Bytes {
    /// Memory beside the mapped files.
    pub fn resident(&self) -> usize {
        self.blocks + self.embeddings + self.head + self.vectors
    }
}

/// A model and what was noticed while loading it.
pub struct Loaded {
    /// The model.
    pub model: Arc<dyn Model>,
    /// `config.json`.
    pub config: Value,
    /// Names of tensors that the files do not hold and that start fresh.
    pub new_tensors: Vec<String>,
    /// Tensors of the files that this task does not use (heads of other tasks).
    pub unused_tensors: Vec<String>,
    /// Memory.
    pub bytes: Bytes,
}

/// Loads the model in `dir`. All mismatches between `config.json` and the tensors are one [`Error::Tensors`].
pub fn load(dir: &Path, options: &LoadOptions) -> Result<Loaded> {
    let path = dir.join("config.json");
    let config = read_config(&path, &options.limits)?;
    let architecture = architecture(&path, &config)?;
    let class_task = class_task(&path, &config, architecture)?;
    let task = task(&path, architecture, class_task, options)?;
    let mut c = Config::new(&path, &config);
    let labels = if task.is_classification() { labels(&mut c, class_task == Some(task), options) } else { 0 };
    let head = Head { task, labels };
    let weights = Weights::open(dir, &options.limits)?;
    let prefixes = architecture.prefixes(&weights, task);

    let numbers = numbers(&config, &weights);
    let mut dry = Reader::new(dir, &weights, options, prefixes.clone(), true);
    (architecture.build)(architecture, &mut c, &mut dry, head)?;
    c.finish()?;
    let unused = architecture.check_extra(&weights, &prefixes, &mut dry);
    if !dry.rows.is_empty() {
        return Err(Error::Tensors(mismatch(dir, &weights, &config, dry)));
    }
    engraft_tensor::device::compute_in(options.precision);
    let mut reader = Reader::new(dir, &weights, options, prefixes, false);
    reader.sites.set_numbers(numbers);
    reader.sites.set_mlp_reversed(architecture.facts.mlp_reversed);
    let model = (architecture.build)(architecture, &mut c, &mut reader, head)?;
    let mapped = weights.files().iter().filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum();
    Ok(Loaded {
        model,
        new_tensors: reader.new_tensors,
        unused_tensors: unused,
        bytes: Bytes { mapped, ..reader.bytes },
        config,
    })
}

/// What `transformers` makes the model's numbers: what `config.json` says, else the type of the first tensor.
fn numbers(config: &Value, weights: &Weights) -> Numbers {
    let told = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(key)?.as_str());
    match told.map(|name| name.strip_prefix("torch.").unwrap_or(name)) {
        Some("float16") => Numbers::F16,
        Some("bfloat16") => Numbers::BF16,
        Some("float32") => Numbers::F32,
        _ => match weights.iter().map(|(_, t)| t.dtype).find(|t| FLOATS.contains(t)) {
            Some(Dtype::F16) => Numbers::F16,
            Some(Dtype::BF16) => Numbers::BF16,
            _ => Numbers::F32,
        },
    }
}

/// Types that the weights of a model may have.
const FLOATS: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16];

/// The architecture of a `config.json`.
fn architecture(path: &Path, config: &Value) -> Result<&'static Architecture> {
    if let Some(found) = Architecture::of(config) {
        return Ok(found);
    }
    let found = config.get("model_type").and_then(Value::as_str);
    let known: Vec<&str> = ARCHITECTURES.iter().map(|a| a.name).collect();
    let found = found.map_or("`model_type` is missing".to_owned(), |f| {
        format!("`model_type` is `{f}`, which is not there yet")
    });
    Err(Error::Architecture {
        path: path.to_owned(),
        message: format!("{found}; readable are {}", known.join(", ")),
    })
}

/// What the class in `architectures` computes; `None` where no class is named.
fn class_task(path: &Path, config: &Value, architecture: &Architecture) -> Result<Option<Task>> {
    let Some(class) = config.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str) else {
        return Ok(None);
    };
    if let Some((_, task)) = architecture.classes.iter().find(|(name, _)| *name == class) {
        return Ok(Some(*task));
    }
    // The trunk alone, or a class whose head is not there: its trunk can still serve another task.
    if architecture.trunk.contains(&class) || class.starts_with(family(architecture)) {
        return Ok(None);
    }
    let known: Vec<&str> = architecture.classes.iter().map(|(name, _)| *name).collect();
    let message =
        format!("`architectures` names `{class}`, which is not there; readable are {}", known.join(", "));
    Err(Error::Architecture { path: path.to_owned(), message })
}

/// What all class names of the architecture begin with.
fn family(architecture: &Architecture) -> &'static str {
    architecture.trunk.first().map_or("", |class| class.strip_suffix("Model").unwrap_or(class))
}

fn task(
    path: &Path,
    architecture: &Architecture,
    class: Option<Task>,
    options: &LoadOptions,
) -> Result<Task> {
    let offered = |task: Task| architecture.classes.iter().any(|(_, t)| *t == task);
    // A trunk whose classes all have the same task (pictures) can serve no other.
    let first = architecture.classes.first().map(|(_, task)| *task);
    let only = first.filter(|only| architecture.classes.iter().all(|(_, task)| task == only));
    let wanted = options.task.or(class).or(only);
    match wanted {
        Some(task) if offered(task) => Ok(task),
        Some(task) => {
            let mut offered: Vec<&str> = architecture.classes.iter().map(|(_, task)| task.name()).collect();
            offered.dedup();
            Err(Error::Task { task: task.name(), architecture: architecture.name, offered })
        }
        None => {
            let known: Vec<&str> = architecture.classes.iter().map(|(name, _)| *name).collect();
            let message = format!(
                "`architectures` does not say what the model computes; expected one of {}, or a task in the recipe",
                known.join(", ")
            );
            Err(Error::Architecture { path: path.to_owned(), message })
        }
    }
}

/// Number of labels: as asked for, else `num_labels`, else the size of `id2label`, else two where the class has such a
/// head (`transformers`' default).
fn labels(c: &mut Config<'_>, class_has_head: bool, options: &LoadOptions) -> usize {
    let named = c.get("id2label").and_then(Value::as_object).map(|m| m.len()).filter(|&n| n > 0);
    let found = options.labels.or(c.size("num_labels")).or(named).or(class_has_head.then_some(2));
    if found.is_none_or(|n| n == 0) {
        c.problem(
            "the number of labels is not known; expected `num_labels` or `id2label`, or labels in the data",
        );
    }
    found.unwrap_or(1)
}

impl Architecture {
    /// How paths map to the names in these files.
    fn prefixes(&self, weights: &Weights, task: Task) -> Prefixes {
        let file = if weights.names().any(|n| n.starts_with(self.prefix)) { self.prefix } else { "" };
        Prefixes { path: self.path(task), file }
    }

    /// Prefix of the trunk's module paths. The sentence encoder is the trunk's own class: its modules have none.
    fn path(&self, task: Task) -> &'static str {
        if task == Task::Embedding { "" } else { self.prefix }
    }

    /// Tensors that no part of the model used: heads of other tasks are given back, buffers are passed over, all others
    /// are mismatches.
    fn check_extra(&self, weights: &Weights, prefixes: &Prefixes, dry: &mut Reader<'_>) -> Vec<String> {
        // Of any family: counted positions, and frequencies of rotations.
        let buffers = ["position_ids", "rotary_emb.inv_freq"];
        let buffer = |n: &str| buffers.iter().chain(self.facts.buffers).any(|end| n.ends_with(end));
        let pooler = |n: &str| n.strip_prefix(prefixes.file).is_some_and(|n| n.starts_with("pooler."));
        let head = |n: &str| self.heads.iter().any(|head| n.starts_with(head));
        let mut unused = Vec::new();
        for (name, tensor) in weights.iter().filter(|(n, _)| !dry.used.contains(*n) && !buffer(n)) {
            if head(name) || pooler(name) {
                unused.push(name.to_owned());
            } else {
                let (tensor, found) = (name.to_owned(), format!("{:?}", tensor.shape));
                dry.rows.push(MismatchRow { tensor, expected: "nothing".into(), found });
            }
        }
        unused
    }
}

/// The report on tensors that do not fit.
fn mismatch(dir: &Path, weights: &Weights, config: &Value, dry: Reader<'_>) -> Mismatch {
    let mut notes = Vec::new();
    let mut help = "take weights and config.json from one revision".to_owned();
    let vocabulary = config.get("vocab_size").and_then(Value::as_u64).unwrap_or(0);
    for row in dry.rows.iter().filter(|r| r.found != "absent" && r.expected != "nothing") {
        let embedding =
            row.tensor.ends_with("embed_tokens.weight") || row.tensor.ends_with("word_embeddings.weight");
        let Some(rows) = weights.get(&row.tensor).and_then(|t| t.shape.first()) else { continue };
        if embedding && *rows as u64 != vocabulary {
            notes.push(format!("`vocab_size` is {vocabulary}; `{}` has {rows} rows", row.tensor));
            help += &format!(", or set `vocab_size = {rows}` in config.json");
        }
    }
    if dry.rows.iter().any(|r| r.tensor == "lm_head.weight" && r.found == "absent") {
        notes.push("`tie_word_embeddings` is false, so the head needs a matrix of its own".into());
    }
    Mismatch { dir: dir.to_owned(), total: weights.len(), rows: dry.rows, notes, help }
}
