//! `engraft init`: looks at data, shows what would be trained, and writes a recipe in which every guess has its reason.

use std::path::{Component, Path, PathBuf};

use engraft_data::{
    ChatTemplate, Content, Dataset, EncodeOptions, Format, Labels, Need, ReadOptions, Rows, Sniff, Task,
    TemplateOptions, Tokenizer,
};
use engraft_model::Architecture;
use engraft_store::{read_config, write_atomic};
use serde_json::Value;

use crate::context::Context;
use crate::failure::{BeforeWork, Failure, Outcome};

const TRAIN: &str = include_str!("../../../../data/helpdesk/train.csv");
const TEST: &str = include_str!("../../../../data/helpdesk/test.csv");
/// The encoder of the demonstration: 22 million weights, 45 MB.
const DEMO_MODEL: &str = "sentence-transformers/all-MiniLM-L6-v2";
/// Rows longer than this are cut unless the recipe says otherwise.
const LENGTH_MAX: usize = 1024;

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft init chat.jsonl --model models/qwen3-0.6b --out recipe.toml
  engraft init tickets.csv --model sentence-transformers/all-MiniLM-L6-v2
  engraft init --demo --model models/all-minilm-l6-v2
  engraft train demo/recipe.toml

Without --model the demonstration takes its model from the Hub, 45 MB; models/all-minilm-l6-v2 is in the repository.")]
pub struct Args {
    /// A data file: csv, tsv, jsonl, chat, alpaca, sharegpt or plain text
    #[arg(required_unless_present = "demo", conflicts_with = "demo")]
    data: Option<PathBuf>,
    /// Writes the help-desk data that the program carries and a recipe for it
    #[arg(long)]
    demo: bool,
    /// A model directory or Hub id
    #[arg(long, required_unless_present = "demo", value_name = "MODEL")]
    model: Option<String>,
    /// The recipe to write; with --demo a directory
    #[arg(
        long,
        value_name = "PATH",
        default_value = "recipe.toml",
        default_value_if("demo", "true", "demo")
    )]
    out: PathBuf,
}

/// Writes a recipe.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    match (&args.data, &args.model) {
        (Some(data), Some(model)) => for_data(data, model, &args.out, cx),
        _ => demo(args.model.as_deref().unwrap_or(DEMO_MODEL), &args.out, cx),
    }
}

fn demo(model: &str, dir: &Path, cx: &Context) -> Outcome {
    refuse_existing(&dir.join("recipe.toml"))?;
    std::fs::create_dir_all(dir).map_err(|e| engraft_store::Error::io("create", dir, e)).before_work()?;
    let recipe = dir.join("recipe.toml");
    let text = Draft {
        model: model_for(model, &recipe),
        task: ("sequence-classification", "14 intents of requests to a help desk".into()),
        data: vec![
            ("format", "\"csv\"".into(), String::new()),
            ("path", "\"train.csv\"".into(), "1009 requests".into()),
            ("eval_path", "\"test.csv\"".into(), "426 others, none of them in training".into()),
            ("columns", "{ text = \"text\", label = \"intent\" }".into(), String::new()),
            ("max_length", "64".into(), "the longest has 55 tokens".into()),
        ],
        learning_rate: "2e-3",
        epochs: 6,
        batch_size: 32,
    }
    .text("the help-desk demonstration");
    for (name, text) in [("train.csv", TRAIN), ("test.csv", TEST), ("recipe.toml", &text)] {
        write_atomic(&dir.join(name), text.as_bytes())?;
    }
    write_atomic(&dir.join(SCHEMA), super::schema::text().as_bytes())?;
    cx.ui.print(&format!("{}\n", recipe.display()));
    cx.ui.say(&format!("next  engraft train {}", recipe.display()));
    Ok(())
}

/// Name of the schema beside a recipe, for editors.
const SCHEMA: &str = "engraft.schema.json";

fn for_data(data: &Path, model: &str, out: &Path, cx: &Context) -> Outcome {
    refuse_existing(out)?;
    let dir = cx.resolve(model)?;
    let sniff = engraft_data::sniff(data).before_work()?;
    let config = read_config(&dir.join("config.json"), &cx.limits).before_work()?;
    let tokenizer = Tokenizer::open(&dir).before_work()?;
    let (task, name) = task(&sniff, &config)?;
    let limit = length_limit(&config, &tokenizer);
    let rows = read(data, &sniff, task).before_work()?;
    // A fixed date: what is written must not depend on the day.
    let templates = TemplateOptions { now: None, ..cx.templates()? };
    let dataset = encode(&rows, &tokenizer, task, limit, &templates).before_work()?;
    show(&sniff, &rows, &dataset, task, limit, cx);
    let max_length = dataset.report.length_99.next_power_of_two().clamp(16, limit);
    let text = draft(data, model, out, &sniff, &dataset, name, max_length).text(&data.display().to_string());
    write_atomic(out, text.as_bytes())?;
    let schema = out.with_file_name(SCHEMA);
    if !schema.exists() {
        write_atomic(&schema, super::schema::text().as_bytes())?;
    }
    cx.ui.print(&format!("{}\n", out.display()));
    cx.ui.say(&format!("next  engraft train {} --check", out.display()));
    Ok(())
}

fn refuse_existing(path: &Path) -> Outcome {
    if path.exists() {
        let message = format!("{} exists and is left as it is; choose another --out", path.display());
        return Err(Failure::before_work(message));
    }
    Ok(())
}

/// The task that data and model allow, and its name in recipes.
fn task(sniff: &Sniff, config: &Value) -> Outcome<(Task, &'static str)> {
    let architecture = Architecture::of(config);
    let computes = |task| architecture.is_some_and(|a| a.classes.iter().any(|(_, t)| *t == task));
    // It reads both ways, and so has no next token to predict.
    let encoder = computes(engraft_nn::Task::MaskedLm);
    let writes_answers = computes(engraft_nn::Task::Seq2Seq);
    match sniff.need {
        Need::Completion if writes_answers => Ok((Task::Seq2Seq, "seq2seq")),
        Need::Text if writes_answers => Err(Failure::before_work(
            "the rows are plain text, and this model writes an answer to each text it reads; give it questions with \
             answers (columns prompt and completion), or choose a model that goes on from a text (Llama, GPT-2)",
        )),
        Need::Image => Err(Failure::before_work(
            "the rows name pictures; `init` writes recipes for text. Write one with task = \"image-classification\" and \
             data.format = \"images\" (a folder for each class), \"idx\", \"npy\" or \"csv\"",
        )),
        Need::Label => Ok((Task::Classify, "sequence-classification")),
        Need::Tags => Ok((Task::Tags, "token-classification")),
        Need::Text if encoder => Ok((Task::Masked, "masked-lm")),
        Need::Text => Ok((Task::Causal, "causal-lm")),
        Need::Completion if encoder => Err(Failure::before_work(
            "the rows hold questions with answers, and this model reads text but does not write any; choose a model \
             that generates (Llama, Mistral, Qwen), or data with labels",
        )),
        Need::Completion => Ok((Task::Completion, "causal-lm")),
    }
}

/// The most tokens a row may have.
fn length_limit(config: &Value, tokenizer: &Tokenizer) -> usize {
    let positions = config.get("max_position_embeddings").and_then(Value::as_u64).unwrap_or(u64::MAX);
    let limit = tokenizer
        .model_max_length
        .unwrap_or(usize::MAX)
        .min(usize::try_from(positions).unwrap_or(usize::MAX));
    limit.clamp(16, LENGTH_MAX)
}

fn read(data: &Path, sniff: &Sniff, task: Task) -> engraft_data::Result<Rows> {
    let options = ReadOptions {
        header: sniff.header,
        columns: sniff.columns.clone(),
        lines: task == Task::Masked,
        ..ReadOptions::new(sniff.format, task.need())
    };
    engraft_data::read(data, &options)
}

fn encode(
    rows: &Rows,
    tokenizer: &Tokenizer,
    task: Task,
    limit: usize,
    templates: &TemplateOptions,
) -> engraft_data::Result<Dataset> {
    let chat = rows.rows.iter().any(|row| matches!(row.content, Content::Chat(_)));
    let template = match chat {
        true if tokenizer.templates.is_empty() => Some(ChatTemplate::plain(tokenizer)?),
        true => Some(ChatTemplate::of(tokenizer, None, templates)?),
        false => None,
    };
    let options =
        EncodeOptions { max_length: limit, labels: None, template: template.as_ref(), allow_empty: true };
    engraft_data::encode(rows, tokenizer, task, &options)
}

/// Says what was found and what of it would be trained.
fn show(sniff: &Sniff, rows: &Rows, dataset: &Dataset, task: Task, limit: usize, cx: &Context) {
    let report = &dataset.report;
    let ui = &cx.ui;
    ui.say(&format!("{} rows  {}: {}", rows.rows.len(), sniff.format.name(), sniff.reasons.join("; ")));
    ui.say(&format!(
        "tokens  median {}, 99% {}, longest {}; {} rows cut at {limit}",
        report.median_length, report.length_99, report.max_length, report.truncated_rows
    ));
    if let (Some(row), Some(example)) = (rows.rows.first(), dataset.examples.first()) {
        let trained = match &example.labels {
            Labels::Class(class) => format!(
                "label {}",
                dataset.labels.as_ref().and_then(|l| l.get(*class as usize)).map_or("", String::as_str)
            ),
            _ => format!("{} of {} tokens trained", example.trained(task.shifted()), example.ids.len()),
        };
        ui.say(&format!("row {}   {}   {trained}", row.line, excerpt(&row.content)));
    }
    if let Some(labels) = &dataset.labels {
        let shown = labels.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = if labels.len() > 8 { ", …" } else { "" };
        ui.say(&format!("labels  {}: {shown}{more}", labels.len()));
    }
    ui.say(&format!(
        "{} rows without trained tokens; {} duplicates",
        report.untrained_rows.len(),
        report.duplicates
    ));
    report.guesses.iter().for_each(|guess| ui.reason(&format!("guess   {guess}")));
}

/// A row in one line.
fn excerpt(content: &Content) -> String {
    let cut = |text: &str| {
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let short: String = line.chars().take(40).collect();
        if short.len() < line.len() { short + "…" } else { short }
    };
    match content {
        Content::Text { text, pair: None, .. } => cut(text),
        Content::Text { text, pair: Some(pair), .. } => format!("{} ‖ {}", cut(text), cut(pair)),
        Content::Words { words, .. } => cut(&words.join(" ")),
        Content::Completion { prompt, completion } => format!("{} ‖ {}", cut(prompt), cut(completion)),
        Content::Image { path, .. } => path.clone(),
        Content::Chat(messages) => {
            let part = |m: &engraft_data::Message| format!("<{}> {}", m.role, cut(&m.content));
            messages.iter().take(3).map(part).collect::<Vec<_>>().join(" ‖ ")
        }
    }
}

/// The values of a recipe with the reason of each.
struct Draft {
    model: String,
    task: (&'static str, String),
    data: Vec<(&'static str, String, String)>,
    learning_rate: &'static str,
    epochs: u32,
    batch_size: u32,
}

fn draft(
    data: &Path,
    model: &str,
    out: &Path,
    sniff: &Sniff,
    dataset: &Dataset,
    task: &'static str,
    max_length: usize,
) -> Draft {
    let classes = dataset.labels.as_ref().map_or(0, Vec::len);
    let reason = match classes {
        0 => sniff.reasons.last().cloned().unwrap_or_default(),
        n => format!("{n} labels"),
    };
    let path = relative(data, out).unwrap_or_else(|| data.to_owned());
    let report = &dataset.report;
    let mut lines = vec![
        ("format", quoted(sniff.format.name()), sniff.reasons.first().cloned().unwrap_or_default()),
        ("path", quoted(&path.to_string_lossy()), format!("{} rows", sniff.rows)),
        ("eval_fraction", "0.1".into(), "held out to see whether it learns; or eval_path = \"test…\"".into()),
        (
            "max_length",
            max_length.to_string(),
            format!("99 of 100 rows have at most {} tokens", report.length_99),
        ),
    ];
    if matches!(sniff.format, Format::Csv | Format::Tsv) && !sniff.header {
        lines.push(("header", "false".into(), "the first line is taken as a row".into()));
    }
    if let Some(columns) = columns(sniff) {
        lines.push(("columns", columns, "by what is in them; change it if the guess is wrong".into()));
    }
    let encoder = task != "causal-lm";
    Draft {
        model: model_for(model, out),
        task: (task, reason),
        data: lines,
        learning_rate: if encoder { "1e-3" } else { "2e-4" },
        epochs: 3,
        batch_size: if encoder { 32 } else { 8 },
    }
}

/// The columns that the usual names would not find.
fn columns(sniff: &Sniff) -> Option<String> {
    let known = &sniff.columns;
    let pairs: Vec<String> = [
        ("text", &known.text),
        ("text_pair", &known.text_pair),
        ("label", &known.label),
        ("prompt", &known.prompt),
        ("completion", &known.completion),
        ("messages", &known.messages),
        ("tokens", &known.tokens),
        ("tags", &known.tags),
    ]
    .iter()
    .filter_map(|(key, name)| Some(format!("{key} = {}", quoted(name.as_ref()?))))
    .collect();
    (!pairs.is_empty()).then(|| format!("{{ {} }}", pairs.join(", ")))
}

impl Draft {
    fn text(&self, subject: &str) -> String {
        let line = |(key, value, reason): &(&str, String, String)| match reason.as_str() {
            "" => format!("{key} = {value}\n"),
            reason => format!("{:34} # {reason}\n", format!("{key} = {value}")),
        };
        let own = |key: &'static str, value: String, reason: &str| line(&(key, value, reason.to_owned()));
        let mut text = format!("#:schema ./{SCHEMA}\n# Written by `engraft init` for {subject}.\n\n");
        text += &own("model", quoted(&self.model), "");
        text += &own("task", quoted(self.task.0), &self.task.1);
        text += "\n[method]\n";
        text += &own("name", quoted("lora"), "`engraft methods` shows the others");
        text += &own("rank", "8".into(), "the numbers a weight may move in");
        text += &own("alpha", "16".into(), "twice the rank is a usual start");
        text += &own("targets", quoted("all-linear"), "every linear weight; a new head is trained besides");
        text += "\n[data]\n";
        text.extend(self.data.iter().map(line));
        text += "\n[train]\n";
        text += &own("epochs", self.epochs.to_string(), "");
        text += &own("batch_size", self.batch_size.to_string(), "");
        text += &own("learning_rate", self.learning_rate.into(), "about ten times that of full fine-tuning");
        text += &own("schedule", quoted("linear"), "");
        text += &own("warmup_ratio", "0.06".into(), "");
        text
    }
}

/// A TOML string.
fn quoted(text: &str) -> String {
    // TOML's basic strings take JSON's escapes.
    Value::from(text).to_string()
}

/// The model as the recipe names it: a directory relative to the recipe, or the Hub id.
fn model_for(model: &str, recipe: &Path) -> String {
    let path = Path::new(model);
    match path.is_dir() {
        true => relative(path, recipe).unwrap_or_else(|| path.to_owned()).to_string_lossy().into_owned(),
        false => model.to_owned(),
    }
}

/// `path` as seen from the directory of `file`, if both are there.
fn relative(path: &Path, file: &Path) -> Option<PathBuf> {
    let path = path.canonicalize().ok()?;
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = dir.canonicalize().ok()?;
    let shared = path.components().zip(dir.components()).take_while(|(a, b)| a == b).count();
    if shared <= 1 {
        return Some(path);
    }
    let up = dir.components().skip(shared).map(|_| Component::ParentDir);
    Some(up.chain(path.components().skip(shared)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_seen_from_the_recipe() {
        let root = tempfile::tempdir().unwrap();
        let (data, deep) = (root.path().join("data"), root.path().join("a/b"));
        std::fs::create_dir_all(&data).unwrap();
        std::fs::create_dir_all(&deep).unwrap();
        assert_eq!(relative(&data, &deep.join("r.toml")), Some(PathBuf::from("../../data")));
        assert_eq!(relative(&deep, &root.path().join("r.toml")), Some(PathBuf::from("a/b")));
    }

    #[test]
    fn a_draft_is_toml_whatever_the_names_hold() {
        let draft = Draft {
            model: "a\"b\\c\n".into(),
            task: ("causal-lm", "why".into()),
            data: vec![("path", quoted("é\u{7f}\""), String::new())],
            learning_rate: "2e-4",
            epochs: 3,
            batch_size: 8,
        };
        let text = draft.text("x").replace('\u{7f}', "");
        assert!(text.contains("model = \"a\\\"b\\\\c\\n\""), "{text}");
    }
}
