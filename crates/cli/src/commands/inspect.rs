//! `engraft inspect`: what a model, adapter, run or checkpoint directory, or one safetensors file, holds.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use engraft_method::foreign::recognise;
use engraft_recipe::Problem;
use engraft_report::{Align, Events, Table, human};
use engraft_store::json::read_capped;
use engraft_store::{AdapterForm, Weights, disk, read_adapter, read_config};
use serde_json::{Value, json};

use crate::context::Context;
use crate::failure::{BeforeWork, Failure, Outcome};

const EVENTS_MAX: u64 = 4 << 30;

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft inspect models/all-minilm-l6-v2
  engraft inspect runs/quickstart/adapter --json
  engraft inspect runs/quickstart")]
pub struct Args {
    /// A directory, a Hub id, or a safetensors file
    path: String,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// Looks at the path and prints what it is.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    let path = PathBuf::from(&args.path);
    let found = if path.is_file() {
        let weights = Weights::open_file(&path, &cx.limits).before_work()?;
        Found { kind: "safetensors file", facts: lora(&weights), weights: Some(weights) }
    } else {
        directory(&cx.resolve(&args.path)?, cx).before_work()?
    };
    if args.json {
        cx.ui.json(found.object(&args.path));
    } else {
        cx.ui.print(&found.text(&args.path, cx.ui.width()));
    }
    Ok(())
}

/// What there is to say of a LoRA file of another program.
fn lora(weights: &Weights) -> Vec<(String, Value)> {
    let Some(found) = recognise(weights.iter().map(|(name, raw)| (name, raw.shape.as_slice()))) else {
        return Vec::new();
    };
    let ranks: BTreeSet<usize> = found.modules.iter().map(|m| m.rank).collect();
    let ranks = ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let mut facts = vec![
        ("lora".to_owned(), json!(format!("in the form of {}", found.form))),
        ("modules".to_owned(), json!(found.modules.len())),
        ("rank".to_owned(), json!(ranks)),
    ];
    if !found.others.is_empty() {
        facts.push(("trained whole".to_owned(), json!(found.others.len())));
    }
    facts
}

/// What was found.
struct Found {
    kind: &'static str,
    facts: Vec<(String, Value)>,
    weights: Option<Weights>,
}

fn directory(dir: &Path, cx: &Context) -> Outcome<Found> {
    let has = |name: &str| dir.join(name).is_file();
    if has("MANIFEST.json") {
        return checkpoint(dir, cx);
    }
    if has("plan.toml") || has("events.jsonl") {
        return run_directory(dir);
    }
    if engraft_store::is_adapter(dir) {
        return adapter(dir, cx);
    }
    if has("config.json") {
        return model(dir, cx);
    }
    let message = format!(
        "{}: expected a model (config.json), an adapter (adapter_config.json), a run (plan.toml) or a checkpoint \
         (MANIFEST.json)",
        dir.display()
    );
    let files = tensor_files(dir);
    if files.is_empty() {
        return Err(Failure::before_work(message));
    }
    let each: Vec<String> =
        files.iter().map(|file| format!("`engraft inspect {}`", file.display())).collect();
    let help = format!("it holds tensors all the same: {}", each.join(", "));
    Err(Failure::problem(Problem::new(message).help(help)))
}

/// The first safetensors files of a directory by name.
fn tensor_files(dir: &Path) -> Vec<PathBuf> {
    /// Files that are named.
    const MOST: usize = 5;
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_one = |path: &PathBuf| path.extension().is_some_and(|end| end == "safetensors") && path.is_file();
    let mut files: Vec<PathBuf> = entries.filter(is_one).collect();
    files.sort();
    files.truncate(MOST);
    files
}

fn model(dir: &Path, cx: &Context) -> Outcome<Found> {
    let config = read_config(&dir.join("config.json"), &cx.limits)?;
    let keys = [
        "model_type",
        "architectures",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "tie_word_embeddings",
    ];
    let facts = keys.iter().filter_map(|key| Some(((*key).to_owned(), config.get(key)?.clone()))).collect();
    Ok(Found { kind: "model", facts, weights: Some(Weights::open(dir, &cx.limits)?) })
}

fn adapter(dir: &Path, cx: &Context) -> Outcome<Found> {
    let files = read_adapter(dir, &cx.limits)?;
    let form = match files.form {
        AdapterForm::Peft => "peft",
        AdapterForm::AdapterHub => "AdapterHub",
    };
    let mut facts = vec![("form".to_owned(), Value::from(form))];
    // What is null or empty says nothing.
    let telling = |value: &Value| match value {
        Value::Null => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    };
    let config = files.config.as_object().into_iter().flatten();
    facts.extend(config.filter(|(_, value)| telling(value)).map(|(key, value)| (key.clone(), value.clone())));
    let mut weights = files.weights;
    if let Some(head) = files.head {
        let class =
            head.config.pointer("/config/head_type").or_else(|| head.config.get("model_class")).cloned();
        facts.push(("head".to_owned(), class.unwrap_or_else(|| "without a configuration".into())));
        weights.join(head.weights);
    }
    Ok(Found { kind: "adapter", facts, weights: Some(weights) })
}

fn checkpoint(dir: &Path, cx: &Context) -> Outcome<Found> {
    let manifest = engraft_store::checkpoint::verify(&disk::RealDisk, dir)?;
    let facts = vec![
        ("step".to_owned(), json!(manifest.stamp.step)),
        ("verified".to_owned(), json!("sizes and hashes of every file")),
    ];
    let weights = Weights::open_file(&dir.join("params.safetensors"), &cx.limits).ok();
    Ok(Found { kind: "checkpoint", facts, weights })
}

fn run_directory(dir: &Path) -> Outcome<Found> {
    let mut facts = Vec::new();
    let mut push = |name: &str, value: Value| facts.push((name.to_owned(), value));
    let path = dir.join("events.jsonl");
    if path.is_file() {
        let bytes = read_capped(&path, "event_line", EVENTS_MAX)?;
        let events = Events::parse(&String::from_utf8_lossy(&bytes))?;
        push("steps", json!(events.steps.last().map_or(0, |step| step.step)));
        if let Some(step) = events.steps.last() {
            push("last loss", json!(step.loss));
        }
        for (when, eval) in [("first", events.evals.first()), ("last", events.evals.last())] {
            let Some(eval) = eval else { continue };
            push(
                &format!("{when} eval"),
                json!({ "step": eval.step, "loss": eval.loss, "metrics": eval.metrics }),
            );
        }
        push("warnings", json!(events.warnings.len()));
        push("resumes", json!(events.resumes.len()));
        let end = events.end.as_ref().and_then(|end| end.reason.clone());
        push("end", json!(end.unwrap_or_else(|| "none: the run is under way or was cut off".into())));
    }
    let steps =
        engraft_store::checkpoint::steps(&disk::RealDisk, &dir.join("checkpoints")).unwrap_or_default();
    push("checkpoints", json!(steps));
    push("adapter", json!(dir.join("adapter/adapter_config.json").is_file()));
    Ok(Found { kind: "run", facts, weights: None })
}

impl Found {
    fn text(&self, path: &str, width: usize) -> String {
        let mut text = format!("{path}: {}\n", self.kind);
        let name_width = self.facts.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, value) in &self.facts {
            let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            text.push_str(&format!("  {name:name_width$}  {shown}\n"));
        }
        let Some(weights) = &self.weights else { return text };
        let right = Align::Right;
        let mut table = Table::new(&[
            ("tensor", Align::Left),
            ("type", Align::Left),
            ("shape", Align::Left),
            ("bytes", right),
        ]);
        let (mut elements, mut bytes) = (0u64, 0u64);
        for (name, tensor) in weights.iter() {
            let size = tensor.bytes().len() as u64;
            elements += tensor.elements() as u64;
            bytes += size;
            table.row([name, &tensor.dtype.to_string(), &format!("{:?}", tensor.shape), &human::bytes(size)]);
        }
        text.push_str(&format!(
            "  {} tensors, {elements} numbers, {}\n\n",
            weights.len(),
            human::bytes(bytes)
        ));
        text + &table.render(width)
    }

    fn object(&self, path: &str) -> Value {
        let facts: serde_json::Map<String, Value> = self.facts.iter().cloned().collect();
        let tensors: Option<Vec<Value>> = self.weights.as_ref().map(|weights| {
            let tensor = |(name, t): (&str, &engraft_store::RawTensor)| {
                json!({ "name": name, "dtype": t.dtype.to_string(), "shape": t.shape, "bytes": t.bytes().len() })
            };
            weights.iter().map(tensor).collect()
        });
        json!({ "path": path, "kind": self.kind, "facts": facts, "tensors": tensors })
    }
}
