//! Every key of a recipe, in one table: name, kind, range, default, meaning. Nothing else in the crate repeats them.

use std::fmt::Write;
use std::sync::LazyLock;

use crate::spec::{ABOVE_ZERO, BELOW_ONE, FieldKind, FieldSpec};

/// One table of the recipe and its keys.
#[derive(Clone, Debug)]
pub struct TableSpec {
    /// Where it stands: `""` for the top of the file, `"train"`, `"data.columns"`.
    pub path: &'static str,
    /// One sentence.
    pub doc: &'static str,
    /// Its keys, in the order of the reference page and of `plan.toml`.
    pub fields: Vec<FieldSpec>,
    /// The keys that must be there.
    pub required: &'static [&'static str],
}

/// Two keys of which at most one may be set: the table's path, the keys, and what each of them states.
/// A `--set` of one takes the place of the other in the recipe.
pub(crate) const EXCLUSIVE: &[(&str, &str, &str, &str)] = &[
    ("train", "epochs", "steps", "length"),
    ("train", "warmup_ratio", "warmup_steps", "warm-up"),
    ("data", "eval_path", "eval_fraction", "evaluation data"),
    ("data.tasks", "eval_path", "eval_fraction", "evaluation data"),
    ("method", "targets", "roles", "choice of sites"),
];

/// All tables of a recipe. `[method]` stands here with the keys that every method shares.
pub fn tables() -> &'static [TableSpec] {
    static TABLES: LazyLock<Vec<TableSpec>> =
        LazyLock::new(|| vec![top(), base(), method(), data(), columns(), tasks(), train()]);
    &TABLES
}

/// The table at `path`, if there is one.
pub(crate) fn table(path: &str) -> Option<&'static TableSpec> {
    tables().iter().find(|table| table.path == path)
}

const COUNT: FieldKind = FieldKind::Int { min: 1, max: 1_000_000_000 };
const COUNT_OR_ZERO: FieldKind = FieldKind::Int { min: 0, max: 1_000_000_000 };
const SHARE: FieldKind = FieldKind::Float { min: 0.0, max: 1.0 };
const NOT_NEGATIVE: FieldKind = FieldKind::Float { min: 0.0, max: f64::MAX };

fn key(name: &'static str, kind: FieldKind, doc: &'static str) -> FieldSpec {
    FieldSpec::new(name, kind, doc)
}

fn top() -> TableSpec {
    let tasks = &[
        "auto",
        "causal-lm",
        "seq2seq",
        "sequence-classification",
        "token-classification",
        "masked-lm",
        "image-classification",
        "embedding",
    ] as &[_];
    TableSpec {
        path: "",
        doc: "The model and what it is trained to do.",
        required: &["model"],
        fields: vec![
            key("model", FieldKind::Text, "A directory in Hugging Face form, or a Hub id."),
            key("task", FieldKind::OneOf(tasks), "What is trained; `auto` follows the model and the data.")
                .or("auto"),
        ],
    }
}

fn base() -> TableSpec {
    TableSpec {
        path: "base",
        doc: "How the frozen model is held in memory.",
        required: &[],
        fields: vec![
            key("quantize", FieldKind::OneOf(&["none", "nf4"]), "Storage of the frozen linear weights.")
                .or("none"),
            key("double_quant", FieldKind::Bool, "Quantizes the scales of `nf4` too.").or(false),
            key(
                "block_size",
                FieldKind::Int { min: 16, max: 4096 },
                "Weights that share one scale in `nf4`.",
            )
            .or(64),
        ],
    }
}

fn method() -> TableSpec {
    TableSpec {
        path: "method",
        doc: "What is trained; several `[[method]]` tables make a union.",
        required: &[],
        fields: vec![
            key("name", FieldKind::Text, "The method; `engraft methods` lists them."),
            key("from", FieldKind::Path, "A saved adapter to start from; its config is the method."),
            key(
                "targets",
                FieldKind::TextOrList,
                "Weights by peft's rules: names, one regex, or \"all-linear\".",
            ),
            key("roles", FieldKind::TextList, "Weights by role, for any model: q, k, v, o, gate, up, down."),
            key("exclude", FieldKind::TextOrList, "Names or one regex of what to leave out."),
            key("layers", FieldKind::Layers, "Layers to adapt, a list or \"0-5\"; all when left out."),
            key(
                "layers_pattern",
                FieldKind::TextOrList,
                "Name of the list of layers, where it is not the usual one.",
            ),
            key(
                "trained_share",
                FieldKind::Float { min: ABOVE_ZERO, max: BELOW_ONE },
                "Trained numbers over those of the model; sets the method's size (its rank, tokens, reduction …).",
            ),
            key("train_also", FieldKind::TextList, "Modules trained whole and saved with the adapter."),
        ],
    }
}

fn data() -> TableSpec {
    let formats =
        &["csv", "tsv", "jsonl", "text", "chat", "alpaca", "sharegpt", "tensors", "images", "idx", "npy"]
            as &[_];
    TableSpec {
        path: "data",
        doc: "What it is trained on.",
        required: &["format", "path"],
        fields: vec![
            key("format", FieldKind::OneOf(formats), "The form of the files."),
            key(
                "path",
                FieldKind::Path,
                "The training file, or a folder with a folder of pictures for each class.",
            ),
            key("labels_path", FieldKind::Path, "The labels beside pictures in idx and npy files."),
            key("eval_path", FieldKind::Path, "The evaluation file."),
            key("eval_labels_path", FieldKind::Path, "The labels beside the pictures of eval_path."),
            key(
                "eval_fraction",
                FieldKind::Float { min: ABOVE_ZERO, max: BELOW_ONE },
                "Share of the training rows held out for evaluation.",
            ),
            key(
                "temperature",
                FieldKind::Float { min: 1.0, max: 1e9 },
                "Tasks are drawn in proportion to rows^(1/temperature): 1 as they are, the more evenly the higher.",
            )
            .or(1.0),
            key("shuffle", FieldKind::Bool, "New order of the rows in each epoch.").or(true),
            key(
                "max_length",
                COUNT,
                "Tokens a row; longer rows are cut and counted. Left out: the model's limit, at most 1024.",
            ),
            key(
                "labels",
                FieldKind::TextList,
                "The labels in the order of their numbers; found in the data when left out.",
            ),
            key("header", FieldKind::Bool, "The first line of csv and tsv names the columns.").or(true),
            key(
                "template",
                FieldKind::Text,
                "Chat template: a path, the text itself, or \"plain\"; the model's own when left out.",
            ),
            key("group_by_length", FieldKind::Bool, "Rows of like length share a batch: less padding.")
                .or(false),
            key("packing", FieldKind::Bool, "Several short rows share one row of the batch.").or(false),
            key(
                "allow_empty",
                FieldKind::Bool,
                "Skips rows without anything to learn instead of refusing them.",
            )
            .or(false),
        ],
    }
}

fn columns() -> TableSpec {
    let column = |name, doc| key(name, FieldKind::Text, doc);
    TableSpec {
        path: "data.columns",
        doc: "Which column of the file is what; left out, the usual names are looked for.",
        required: &[],
        fields: vec![
            column("text", "The input text."),
            column("text_pair", "The second text of a pair."),
            column("label", "The class."),
            column("prompt", "The instruction or question."),
            column("completion", "The answer that is learned."),
            column("messages", "The list of chat messages."),
            column("tokens", "The list of words."),
            column("tags", "The list of tags, one a word."),
            column("image", "The path of a picture, from the file's folder."),
        ],
    }
}

/// Names of `[data.columns]`.
pub(crate) const COLUMNS: &[&str] =
    &["text", "text_pair", "label", "prompt", "completion", "messages", "tokens", "tags", "image"];

/// The keys of `[data]` that a task may have of its own.
pub(crate) const OF_A_TASK: &[&str] =
    &["path", "eval_path", "eval_fraction", "format", "labels", "header", "template", "allow_empty"];

fn tasks() -> TableSpec {
    let mut fields = vec![key("name", FieldKind::Text, "What the task is called.")];
    let shared = data().fields.into_iter().filter(|field| OF_A_TASK.contains(&field.name));
    fields.extend(shared.map(|field| FieldSpec { default: None, ..field }));
    fields.push(key("columns", FieldKind::TextMap(COLUMNS), "As `[data.columns]`, for this task."));
    TableSpec {
        path: "data.tasks",
        doc: "Several data sets, one `[[data.tasks]]` each, numbered from 0; what one leaves out is taken from `[data]`.",
        required: &["name", "path"],
        fields,
    }
}

fn train() -> TableSpec {
    let mut fields = train_length();
    fields.extend(train_rest());
    TableSpec { path: "train", doc: "How it is trained.", required: &[], fields }
}

fn train_length() -> Vec<FieldSpec> {
    vec![
        key("epochs", FieldKind::Float { min: ABOVE_ZERO, max: 1e6 }, "Passes over the data.").or(3.0),
        key("steps", COUNT, "Optimizer steps, in place of `epochs`."),
        key("batch_size", FieldKind::Int { min: 1, max: 1 << 20 }, "Rows a micro-batch.").or(16),
        key(
            "gradient_accumulation",
            FieldKind::Int { min: 1, max: 1 << 20 },
            "Micro-batches an optimizer step.",
        )
        .or(1),
        key("learning_rate", FieldKind::Float { min: ABOVE_ZERO, max: 10.0 }, "Highest learning rate.")
            .or(2e-4),
        key(
            "head_learning_rate",
            FieldKind::Float { min: ABOVE_ZERO, max: 10.0 },
            "Highest learning rate of the tensors of the task's head that are trained themselves; left out: `learning_rate`.",
        ),
        key("weight_decay", NOT_NEGATIVE, "Decoupled decay of the trained weights.").or(0.0),
        key("schedule", FieldKind::OneOf(&["constant", "linear", "cosine"]), "The rate after the warm-up.")
            .or("linear"),
        key("warmup_ratio", SHARE, "Share of the steps in which the rate rises.").or(0.0),
        key("warmup_steps", COUNT_OR_ZERO, "Steps in which the rate rises, in place of `warmup_ratio`."),
        key("max_grad_norm", NOT_NEGATIVE, "Gradients are scaled down to this norm; 0 is off.").or(1.0),
        key("adam_beta1", FieldKind::Float { min: 0.0, max: BELOW_ONE }, "Decay of the first moment.")
            .or(0.9),
        key("adam_beta2", FieldKind::Float { min: 0.0, max: BELOW_ONE }, "Decay of the second moment.")
            .or(0.999),
        key(
            "adam_epsilon",
            FieldKind::Float { min: ABOVE_ZERO, max: 1.0 },
            "Added to the root of the second moment.",
        )
        .or(1e-8),
    ]
}

fn train_rest() -> Vec<FieldSpec> {
    vec![
        key(
            "dtype",
            FieldKind::OneOf(&["f32", "bf16"]),
            "Type of the computation; adapters and optimizer stay f32.",
        )
        .or("f32"),
        key("seed", FieldKind::Int { min: 0, max: i64::MAX }, "Start of all random numbers.").or(0),
        key("threads", FieldKind::Int { min: 0, max: 4096 }, "Threads; 0 takes every core.").or(0),
        key("gradient_checkpointing", FieldKind::Bool, "Computes each block twice to hold less memory.")
            .or(false),
        key("log_every", COUNT, "Steps between lines of the log.").or(1),
        key("checkpoint_every", COUNT_OR_ZERO, "Steps between checkpoints; 0 writes one at the end.").or(100),
        key(
            "keep_every",
            COUNT_OR_ZERO,
            "Checkpoints at multiples of this are never deleted; 0 keeps the newest two and the best.",
        )
        .or(0),
        key(
            "eval_every",
            COUNT_OR_ZERO,
            "Steps between evaluations; 0 evaluates before and after. Left out: ten times in the run.",
        ),
        key(
            "early_stopping_patience",
            COUNT_OR_ZERO,
            "Evaluations without a better metric before the run stops; 0 is off.",
        )
        .or(0),
        key(
            "best_metric",
            FieldKind::OneOf(&["loss", "accuracy", "f1", "perplexity"]),
            "What the best checkpoint is best at.",
        )
        .or("loss"),
    ]
}

/// The reference page in Markdown: one section a table, one row a key.
pub fn reference() -> String {
    let mut page = String::new();
    for table in tables() {
        let title =
            if table.path.is_empty() { "Top of the file".into() } else { format!("`[{}]`", table.path) };
        let _ = write!(
            page,
            "## {title}\n\n{}\n\n| key | takes | default | meaning |\n| --- | --- | --- | --- |\n",
            table.doc
        );
        for field in &table.fields {
            let default = match &field.default {
                Some(value) => format!("`{}`", crate::value::toml(value)),
                None if table.required.contains(&field.name) => "required".into(),
                None => String::new(),
            };
            let takes = crate::read::takes(&field.kind);
            let _ = writeln!(page, "| `{}` | {takes} | {default} | {} |", field.name, field.doc);
        }
        page.push('\n');
    }
    page
}
