//! `engraft eval`: loss and metrics of a model and its adapter, of a recipe, of a finished run.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use engraft_model::Packed;
use engraft_nn::Task;
use engraft_recipe::Recipe;
use engraft_report::{Align, Table, human};
use engraft_store::{read_config, write_atomic};
use engraft_train::{Evaluation, Session, evaluate, model_classes, model_labels};
use serde_json::{Value, json};

use super::train::open_choosing;
use crate::answers::{Question, answers, lines, questions, scores};
use crate::beam::Search;
use crate::context::Context;
use crate::engine::{Choice, Dtype, Engine, Quantize, choices, without_first};
use crate::failure::{BeforeWork, Failure, Outcome, code};
use crate::gate::Gate;
use crate::generation::{Writing, ends_of};
use crate::recipes::{file_of, read};
use engraft_train::method_specs;

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft eval runs/quickstart
  engraft eval recipe.toml --adapter runs/a/adapter
  engraft eval --model DIR --adapter runs/a/adapter --data test.csv \\
      --format csv --task sequence-classification
  engraft eval runs/quickstart --json --fail-if 'accuracy < 0.9'
  engraft eval runs/quickstart --choose eval_rank=4
  engraft eval runs/e2e --generate --beams 4 --save answers.jsonl

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
    /// Leaves the adapter out of the model's first N layers
    #[arg(long, value_name = "N")]
    drop_layers: Option<usize>,
    /// Chooses anew what the adapter leaves open, such as eval_rank=4; `engraft methods NAME` tells what that is
    #[arg(long, value_name = "SETTING=VALUE")]
    choose: Vec<Choice>,
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
    #[command(flatten)]
    texts: Texts,
    /// Ends with exit code 3 if this holds, such as 'accuracy < 0.9'; may be given several times
    #[arg(long, value_name = "CONDITION")]
    fail_if: Vec<Gate>,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// How texts are written and scored.
#[derive(clap::Args)]
struct Texts {
    /// Lets the model answer every prompt of the data and adds bleu, rouge and exact_match
    #[arg(long)]
    generate: bool,
    /// Keeps the N most probable texts at every step; 1 takes the most probable token each time
    #[arg(long, value_name = "N", default_value_t = 1, requires = "generate", value_parser = clap::value_parser!(u64).range(1..=64))]
    beams: u64,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 128, requires = "generate", value_parser = clap::value_parser!(u64).range(1..))]
    max_tokens: u64,
    /// Answers only the first N prompts
    #[arg(long, value_name = "N", requires = "generate", value_parser = clap::value_parser!(u64).range(1..))]
    prompts: Option<u64>,
    /// Writes prompts, texts and the answers of the data as JSON lines
    #[arg(long, value_name = "FILE", requires = "generate")]
    save: Option<PathBuf>,
}

/// Evaluates, prints, and judges the gates.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    let (recipe, with_adapter) = recipe(args, cx)?;
    if !args.choose.is_empty() && !with_adapter {
        return Err(Failure::before_work("--choose needs an adapter; give --adapter DIR"));
    }
    let mut session = open_choosing(&recipe, &Packed::default(), &choices(&args.choose)?, cx)?;
    if let Some(problem) = session.tasks.not_known(&recipe).filter(|_| with_adapter) {
        return Err(Failure::problems(recipe.problems(vec![problem])));
    }
    session.notes.iter().for_each(|note| cx.ui.note(note));
    if let Some(count) = args.drop_layers {
        if !with_adapter {
            return Err(Failure::before_work("--drop-layers needs an adapter; give --adapter DIR"));
        }
        let adapter = std::mem::take(&mut session.adapter);
        session.adapter = without_first(Some(adapter), session.model.as_ref(), count)?.unwrap_or_default();
    }
    if session.eval.is_none() {
        let message =
            "there are no evaluation data; give --set data.eval_path=FILE or data.eval_fraction=0.1";
        return Err(Failure::before_work(message));
    }
    if !with_adapter {
        expect_own_head(&session, cx)?;
    }
    for name in session.new_tensors.iter().filter(|_| !with_adapter) {
        cx.ui.note(&format!("{name} is not in the model's files and starts at random"));
    }
    let questions = if args.texts.generate { Some(asked(&args.texts, &session, cx)?) } else { None };
    let task = session.model.info().task;
    let found = score(&session, with_adapter, cx)?;
    let mut metrics = found.metrics.clone();
    metrics.insert("loss".into(), found.loss);
    if let Some(questions) = questions {
        metrics.extend(answered(&args.texts, questions, session, with_adapter, cx)?);
    }
    let mut failed = Vec::new();
    for gate in &args.fail_if {
        if gate.fails(&metrics)? {
            failed.push(gate.text());
        }
    }
    if args.json {
        cx.ui.json(object(task, &metrics, found.labels, &failed));
    } else {
        cx.ui.print(&table(&metrics, found.labels, cx.ui.width()));
        failed.iter().for_each(|gate| cx.ui.error(&format!("the gate was not met: {gate}")));
    }
    if failed.is_empty() { Ok(()) } else { Err(Failure::said(code::GATE)) }
}

fn score(session: &Session, with_adapter: bool, cx: &Context) -> Outcome<Evaluation> {
    let Some(data) = &session.eval else { return Err(Failure::before_work("there are no evaluation data")) };
    let bar = cx.ui.bar();
    let found = evaluate(&session.evaluated(with_adapter)?, data, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    Ok(found?)
}

/// The prompts of the evaluation data, and the tokens that end an answer.
fn asked(texts: &Texts, session: &Session, cx: &Context) -> Outcome<(Vec<Question>, HashSet<u32>)> {
    let task = session.model.info().task;
    if !matches!(task, Task::CausalLm | Task::Seq2Seq) {
        return Err(Failure::before_work(format!(
            "--generate needs a model that writes text, not {}",
            task.name()
        )));
    }
    let (Some(data), Some(tokenizer)) = (&session.eval, &session.tokenizer) else {
        let message = "--generate needs the model's tokenizer.json, which turns tokens into text";
        return Err(Failure::before_work(message));
    };
    let ends = ends_of(&session.model_dir, tokenizer, &cx.limits).before_work()?;
    let mut found = questions(data, tokenizer, &ends)?;
    if found.is_empty() {
        let message = "--generate needs evaluation data with prompts and answers (columns prompt and completion, alpaca, \
                       chats); these hold text alone";
        return Err(Failure::before_work(message));
    }
    let longest = found.iter().map(|question| question.prompt.len()).max().unwrap_or(0);
    let limit = session.model.info().max_positions;
    let rows = session.adapter.prompt_rows();
    if task == Task::CausalLm && longest + rows + texts.max_tokens as usize > limit {
        let also =
            if rows > 0 { format!(", the adapter puts {rows} rows before them,") } else { String::new() };
        let message = format!(
            "the longest prompt has {longest} tokens{also} and the model was made for {limit}: with --max-tokens {} there is no room; \
             give less, or set data.max_length",
            texts.max_tokens
        );
        return Err(Failure::before_work(message));
    }
    found.truncate(texts.prompts.map_or(usize::MAX, |n| n as usize));
    Ok((found, ends))
}

/// The scores of the model's own answers.
fn answered(
    texts: &Texts,
    (questions, ends): (Vec<Question>, HashSet<u32>),
    session: Session,
    with_adapter: bool,
    cx: &Context,
) -> Outcome<BTreeMap<String, f64>> {
    let Some(tokenizer) = &session.tokenizer else { return Ok(BTreeMap::new()) };
    let config = read_config(&session.model_dir.join("config.json"), &cx.limits).before_work()?;
    let tasks = session.tasks.names();
    let engine = Engine {
        dir: session.model_dir,
        config,
        model: session.model,
        adapter: with_adapter.then_some(session.adapter),
        methods: if with_adapter { session.methods } else { Vec::new() },
        beside: Vec::new(),
        labels: None,
        tasks: Vec::new(),
        new_tensors: Vec::new(),
    };
    let by = Search { beams: texts.beams as usize, length_penalty: 1.0, early_stopping: false };
    let writing = Writing { most: texts.max_tokens as usize, by: (texts.beams > 1).then_some(by) };
    let bar = cx.ui.bar();
    let found = answers(&engine, tokenizer, questions, writing, &ends, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    if let Some(path) = &texts.save {
        write_atomic(path, lines(&found, tokenizer)?.as_bytes())?;
    }
    Ok(scores(&found, &tasks))
}

/// A model whose head tells other classes apart than the data have is not scored with a new one in its place.
fn expect_own_head(session: &Session, cx: &Context) -> Outcome {
    let config = read_config(&session.model_dir.join("config.json"), &cx.limits).before_work()?;
    let (Some(own), Some(labels)) = (model_classes(&config), &session.labels) else { return Ok(()) };
    if own == labels.len() || session.new_tensors.is_empty() {
        return Ok(());
    }
    Err(Failure::before_work(format!(
        "the model's head tells {own} classes apart, and the data have {}; name all of the head's in their order: --set \
         data.labels=[…]",
        labels.len()
    )))
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
    if !engraft_store::is_adapter(&adapter) {
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
    // Those of single tasks last.
    let mut rows: Vec<(&String, &f64)> = metrics.iter().collect();
    rows.sort_by_key(|(name, _)| name.contains('.'));
    for (name, value) in rows {
        table.row([name.as_str(), &human::number(*value, 4)]);
    }
    table.row(["labels", &labels.to_string()]);
    table.render(width)
}

fn object(task: Task, metrics: &BTreeMap<String, f64>, labels: u64, failed: &[&str]) -> Value {
    json!({ "task": task.name(), "labels": labels, "metrics": metrics, "failed": failed })
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
