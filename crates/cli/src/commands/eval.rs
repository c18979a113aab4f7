//! `engraft eval`: loss and metrics of a model and its adapter, of a recipe, of a finished run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engraft_recipe::Recipe;
use engraft_report::{Align, Table, human};
use engraft_store::read_config;
use engraft_train::{Evaluation, Session, evaluate, model_labels};
use serde_json::{Value, json};

use super::train::open;
use crate::context::Context;
use crate::engine::{Dtype, Quantize};
use crate::failure::{BeforeWork, Failure, Outcome, code};
use crate::gate::Gate;
use crate::recipes::{file_of, read};
use crate::specs::method_specs;

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft eval runs/quickstart
  engraft eval recipe.toml --adapter runs/a/adapter
  engraft eval --model DIR --adapter runs/a/adapter --data test.csv \\
      --format csv --task sequence-classification
  engraft eval runs/quickstart --json --fail-if 'accuracy < 0.9'

A run is scored with its adapter on its evaluation data.")]
pub struct Args {
    /// A run directory or a recipe; its evaluation data are used
    #[arg(required_unless_present = "model", conflicts_with_all = ["model", "data"])]
    run: Option<PathBuf>,
    /// A model directory or Hub id
    #[arg(long, value_name = "MODEL", requires = "data")]
    model: Option<String>,
    /// An adapter directory; `none` scores the base alone
    #[arg(long, value_name = "DIR")]
    adapter: Option<String>,
    /// A data file
    #[arg(long, value_name = "FILE", requires = "model")]
    data: Option<PathBuf>,
    /// Form of the data, as in a recipe: csv, jsonl, images, …
    #[arg(long, value_name = "FORMAT", requires = "data")]
    format: Option<String>,
    /// Task, as in a recipe: causal-lm, seq2seq, …
    #[arg(long, value_name = "TASK", requires = "data")]
    task: Option<String>,
    /// Rows a batch
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Type of the computation
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Keeps the frozen linear weights in four bits
    #[arg(long, value_enum, value_name = "FORMAT")]
    quantize: Option<Quantize>,
    /// Sets a value of the recipe, such as data.max_length=128 or data.columns.label=intent
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Ends with exit code 3 if this holds, such as 'accuracy < 0.9'; may be given several times
    #[arg(long, value_name = "CONDITION")]
    fail_if: Vec<Gate>,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// Evaluates, prints, and judges the gates.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    let (recipe, with_adapter) = recipe(args, cx)?;
    let session = open(&recipe, cx)?;
    if session.eval.is_none() {
        let message =
            "there are no evaluation data; give --set data.eval_path=FILE or data.eval_fraction=0.1";
        return Err(Failure::before_work(message));
    }
    for name in session.new_tensors.iter().filter(|_| !with_adapter) {
        cx.ui.note(&format!("{name} is not in the model's files and starts at random"));
    }
    let found = score(&session, with_adapter, cx)?;
    let mut metrics = found.metrics.clone();
    metrics.insert("loss".into(), found.loss);
    let mut failed = Vec::new();
    for gate in &args.fail_if {
        if gate.fails(&metrics)? {
            failed.push(gate.text());
        }
    }
    if args.json {
        cx.ui.json(object(&session, &metrics, found.labels, &failed));
    } else {
        cx.ui.print(&table(&metrics, found.labels, cx.ui.width()));
        failed.iter().for_each(|gate| cx.ui.error(&format!("the gate was not met: {gate}")));
    }
    if failed.is_empty() { Ok(()) } else { Err(Failure::said(code::GATE)) }
}

fn score(session: &Session, with_adapter: bool, cx: &Context) -> Outcome<Evaluation> {
    let Some(data) = &session.eval else { return Err(Failure::before_work("there are no evaluation data")) };
    let bar = match cx.ui.is_terminal() {
        true => indicatif::ProgressBar::new(0),
        false => indicatif::ProgressBar::hidden(),
    };
    let found = evaluate(&session.evaluated(with_adapter)?, data, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    Ok(found?)
}

/// The recipe to open, and whether its adapter takes part.
fn recipe(args: &Args, cx: &Context) -> Outcome<(Recipe, bool)> {
    let sets = sets(args);
    let none = args.adapter.as_deref() == Some("none");
    let Some(run) = &args.run else {
        let adapter = args.adapter.as_deref().filter(|_| !none);
        let adapter = adapter.map(|name| cx.resolve(name)).transpose()?;
        let text = data_recipe(args, adapter.as_deref())?;
        let parsed = Recipe::parse(&text, "the arguments", &sets, &method_specs());
        let mut recipe = parsed.map_err(Failure::problems)?;
        if adapter.is_none() && recipe.data.labels.is_none() {
            // A model scored as it is knows its own classes, and other names in the data are a mistake: nothing is trained
            // that could take them on.
            let dir = cx.resolve(&recipe.model.value)?;
            let config = read_config(&dir.join("config.json"), &cx.limits).before_work()?;
            recipe.data.labels = model_labels(&config);
        }
        return Ok((recipe, adapter.is_some()));
    };
    let file = file_of(run);
    let adapter = match &args.adapter {
        Some(_) if none => None,
        Some(name) => Some(cx.resolve(name)?),
        None if run.is_dir() => Some(run.join("adapter")),
        None => None,
    };
    let Some(adapter) = adapter else {
        // A recipe without an adapter scores its model as it is before training.
        return Ok((read(&file, &sets)?, false));
    };
    if !adapter.join("adapter_config.json").is_file() {
        let message = format!(
            "{} holds no adapter; the run has not ended yet (--adapter none scores the base)",
            adapter.display()
        );
        return Err(Failure::before_work(message));
    }
    let bytes = engraft_store::json::read_capped(&file, "recipe", 1 << 20).before_work()?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Failure::before_work(format!("{} is not UTF-8", file.display())))?;
    // The mistakes of the recipe itself come first, at their places.
    read(&file, &sets)?;
    let text = with_adapter(&text, &absolute(&adapter)?);
    let name = file.display().to_string();
    Ok((Recipe::parse(&text, &name, &sets, &method_specs()).map_err(Failure::problems)?, true))
}

fn sets(args: &Args) -> Vec<String> {
    let mut sets = args.set.clone();
    sets.extend(args.batch_size.map(|n| format!("train.batch_size={n}")));
    sets.extend(args.dtype.map(|dtype| match dtype {
        Dtype::F32 => "train.dtype=\"f32\"".to_owned(),
        Dtype::Bf16 => "train.dtype=\"bf16\"".to_owned(),
    }));
    sets.extend(args.quantize.map(|Quantize::Nf4| "base.quantize=\"nf4\"".to_owned()));
    sets
}

/// The text of a recipe with its method replaced by a saved adapter.
fn with_adapter(text: &str, adapter: &Path) -> String {
    let mut kept = String::new();
    let mut inside = false;
    for line in text.lines() {
        if line.trim_start().starts_with('[') {
            let name = line.trim_start().trim_start_matches('[').trim_start();
            inside = name.starts_with("method");
        }
        // Lines stay where they were, so that places in messages are those of the file.
        kept.push_str(if inside { "" } else { line });
        kept.push('\n');
    }
    kept + &format!("[method]\nfrom = {}\n", Value::from(adapter.to_string_lossy()))
}

/// A recipe for data given on the command line.
fn data_recipe(args: &Args, adapter: Option<&Path>) -> Outcome<String> {
    let quoted = |text: &str| Value::from(text).to_string();
    let data = args.data.as_deref().ok_or_else(|| Failure::before_work("--model needs --data"))?;
    let format = match &args.format {
        Some(format) => format.clone(),
        None => engraft_data::sniff(data).before_work()?.format.name().to_owned(),
    };
    let path = quoted(&absolute(data)?.to_string_lossy());
    let model = args.model.as_deref().unwrap_or_default();
    let model = match Path::new(model).is_dir() {
        true => absolute(Path::new(model))?.to_string_lossy().into_owned(),
        false => model.to_owned(),
    };
    let mut text = format!("model = {}\n", quoted(&model));
    if let Some(task) = &args.task {
        text.push_str(&format!("task = {}\n", quoted(task)));
    }
    let method = match adapter {
        Some(adapter) => format!("from = {}", quoted(&absolute(adapter)?.to_string_lossy())),
        // A recipe has a method; this one fits every model and takes no part.
        None => "name = \"lora\"\nrank = 1\ntargets = \"all-linear\"".into(),
    };
    text.push_str(&format!("[method]\n{method}\n"));
    text.push_str(&format!("[data]\nformat = {}\npath = {path}\neval_path = {path}\n", quoted(&format)));
    Ok(text)
}

fn absolute(path: &Path) -> Outcome<PathBuf> {
    path.canonicalize().map_err(|e| engraft_store::Error::io("find", path, e)).before_work()
}

fn table(metrics: &BTreeMap<String, f64>, labels: u64, width: usize) -> String {
    let mut table = Table::new(&[("metric", Align::Left), ("value", Align::Right)]);
    for (name, value) in metrics {
        table.row([name.as_str(), &human::number(*value, 4)]);
    }
    table.row(["labels", &labels.to_string()]);
    table.render(width)
}

fn object(session: &Session, metrics: &BTreeMap<String, f64>, labels: u64, failed: &[&str]) -> Value {
    json!({ "task": session.model.info().task.name(), "labels": labels, "metrics": metrics, "failed": failed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_takes_the_place_of_the_methods() {
        let text =
            "model = \"m\"\n[[method]]\nname = \"lora\"\n[[method]]\nname = \"ia3\"\n[data]\npath = \"d\"\n";
        let expected = "model = \"m\"\n\n\n\n\n[data]\npath = \"d\"\n[method]\nfrom = \"/a\"\n";
        assert_eq!(with_adapter(text, Path::new("/a")), expected);
    }
}
