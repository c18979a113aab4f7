//! `engraft extract`: an adapter of what differs between a model and the one it was tuned from, of low rank or sparse.

mod low_rank;
mod sparse;

use std::path::PathBuf;
use std::sync::Arc;

use engraft_method::{Chosen, save_adapter};
use engraft_model::LoadOptions;
use engraft_nn::{Adapter, Base, Kind, Site, Task, Value};
use engraft_report::human;
use engraft_tensor::{Tensor, no_grad};
use engraft_train::{model_labels, new_modules, write_adapter_files, write_label_names};
use serde_json::json;

use super::merge::refuse_full;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Outcome};
use crate::probe::{self, Measured, Probes, largest_difference};

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft extract --model BASE --tuned TUNED --rank 32 --out adapter
  engraft extract --model BASE --tuned TUNED --density 0.005 --out adapter
  engraft extract --model BASE --tuned TUNED --out adapter --probe texts.txt

A classifier or other head that the base has not goes along as a whole. With a rank the adapter is a LoRA in peft's form: each weight that differs is cut to the rank by singular values. With a
density it is a sparse change in the form of lt_sft: of all linear weights together, the entries that differ most.")]
pub struct Args {
    /// The model before: a directory in Hugging Face form, or a Hub id
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// The same model after tuning
    #[arg(long, value_name = "MODEL")]
    tuned: String,
    /// Rank of every product
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    rank: u32,
    /// Share of the entries of all linear weights that a sparse change keeps, instead of products
    #[arg(long, value_name = "SHARE", conflicts_with = "rank", value_parser = share)]
    density: Option<f64>,
    /// The adapter directory to write; it must not exist or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A text file, a text a line, on which base, adapter and tuned model are compared: 64 lines at most, 256 tokens of each
    #[arg(long, value_name = "FILE")]
    probe: Option<PathBuf>,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "expected a share above 0 and at most 1".to_owned())
}

/// What differs between two models.
#[derive(Default)]
struct Differences {
    /// Path of a weight that differs, whether it is a table, and the change [out, in].
    changes: Vec<(String, bool, Tensor)>,
    /// Vectors that differ, which neither form can hold.
    vectors: Vec<String>,
    /// Tensors of the tuned model's head that the base does not have, by the names that they have in an adapter.
    head: Vec<(String, Tensor)>,
}

/// An adapter of changes, and how much of them it leaves out.
struct Extracted {
    adapter: Adapter,
    methods: Vec<Chosen>,
    /// Squared norm of what is left out.
    lost: f64,
    /// What it is, for people.
    form: String,
    /// The largest rank that a product has.
    rank: Option<usize>,
    /// Weights that differ and that this form does not hold.
    left_out: Vec<String>,
}

/// Extracts, writes, compares.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    refuse_full(&args.out)?;
    let options = LoadOptions { limits: cx.limits.clone(), ..LoadOptions::default() };
    let base = cx.resolve(&args.model)?;
    probe::check(args.probe.as_deref(), &base)?;
    let tuned = Engine::open(&cx.resolve(&args.tuned)?, &options, cx)?;
    let mut engine = Engine::read(&base, &with_head_of(&tuned, options))?;
    let found = no_grad(|| differences((&args.model, &engine), (&args.tuned, &tuned)))?;
    let head = match found.head[..] {
        [] => vec![],
        _ => new_modules(engine.model.as_ref(), &engine.new_tensors),
    };
    if found.changes.is_empty() && !head.is_empty() {
        return Err(Failure::before_work(format!(
            "{} and {} have the same weights but for {}, which the base does not have: that is no change of it",
            args.model,
            args.tuned,
            head.join(", ")
        )));
    }
    if found.changes.is_empty() {
        let message =
            format!("{} and {} have the same weights: there is nothing to extract", args.model, args.tuned);
        return Err(Failure::before_work(message));
    }
    let whole = found.changes.iter().map(|(_, _, change)| squared(change)).sum::<Outcome<f64>>()?;
    let extracted = no_grad(|| match args.density {
        Some(density) => sparse::extract(&engine, &found.changes, &head, density),
        None => low_rank::extract(&engine, &found.changes, &head, args.rank),
    })?;
    let Extracted { adapter, methods, lost, form, rank, left_out } = extracted;
    fill_head(&adapter, &found.head)?;
    let (sites, info) = (engine.model.sites().clone(), engine.model.info().clone());
    let (config, tensors) = save_adapter(&adapter, &methods, &head, &args.model, &sites, &info)?;
    let probes = Probes::of(args.probe.as_deref(), &engine, cx)?;
    write_adapter_files(&args.out, &config, &tensors, &methods, &sites)?;
    if let Some(names) = model_labels(&tuned.config).filter(|_| !head.is_empty()) {
        write_label_names(&args.out, &names)?;
    }
    let before = probes.measure(&engine)?;
    (engine.adapter, engine.methods) = (Some(Arc::new(adapter)), methods);
    let measured = [before, probes.measure(&engine)?, probes.measure(&tuned)?];
    tell(args, (&found, &left_out), (&form, rank), (lost / whole).sqrt(), &measured, cx);
    Ok(())
}

/// The head that the tuned model has, so that a base without it, or with one of another size, is given it anew.
fn with_head_of(tuned: &Engine, options: LoadOptions) -> LoadOptions {
    let info = tuned.model.info();
    let classifies = info.task.per_sequence() || info.task == Task::TokenClassification;
    let classifies = classifies && info.task != Task::Embedding;
    LoadOptions { task: Some(info.task), labels: classifies.then_some(info.outputs), ..options }
}

/// Gives the modules that are trained as a whole what the tuned model has.
fn fill_head(adapter: &Adapter, head: &[(String, Tensor)]) -> Outcome {
    for (name, value) in head {
        let Some(own) = adapter.params().iter().find(|p| p.name == *name) else {
            return Err(Failure::running(format!("{name} cannot be trained as a whole here")));
        };
        own.param.set(value.reshape(own.param.value().shape().to_vec())?)?;
    }
    Ok(())
}

/// `measured` are the base, the base with the adapter, and the tuned model.
fn tell(
    args: &Args,
    (found, left_out): (&Differences, &[String]),
    (form, rank): (&str, Option<usize>),
    error: f64,
    [before, after, aim]: &[Measured; 3],
    cx: &Context,
) {
    let (change, apart) =
        (largest_difference(&after.logits, &aim.logits), largest_difference(&before.logits, &aim.logits));
    let perplexities = [before, after, aim].map(|m| m.loss.map(f64::exp));
    if args.json {
        let left_out = [left_out, &found.vectors[..]].concat();
        cx.ui.json(json!({
            "out": args.out.display().to_string(), "weights": found.changes.len(), "form": form, "rank": rank, "error": error,
            "left_out": left_out, "head": found.head.iter().map(|(name, _)| name).collect::<Vec<_>>(), "largest_logit_change": change, "largest_logit_change_of_base": apart,
            "perplexity_base": perplexities[0], "perplexity": perplexities[1], "perplexity_tuned": perplexities[2],
        }));
        return;
    }
    cx.ui.print(&format!(
        "{} weights differ; {form} leaves out {}% of their change\n",
        found.changes.len(),
        human::number(100.0 * error, 2)
    ));
    for (paths, what) in [
        (left_out, "no linear weights: they are not in the adapter; --rank makes products of them"),
        (&found.vectors[..], "no weights: they are not in the adapter"),
    ] {
        let [first, rest @ ..] = paths else { continue };
        let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
        cx.ui.note(&format!("{first}{more} differ too and are {what}"));
    }
    if let Some((first, _)) = found.head.first() {
        cx.ui.note(&format!("the base has no {first}: the tuned model's head is in the adapter as a whole"));
    }
    let mut line = format!(
        "largest logit change against the tuned model {}, of the base {}",
        human::number(change, 2),
        human::number(apart, 2)
    );
    if let [Some(base), Some(adapted), Some(tuned)] = perplexities {
        line.push_str(&format!("; perplexity {base:.2} before, {adapted:.2} adapted, {tuned:.2} tuned"));
    }
    cx.ui.print(&format!("{line}\nadapter  {}\n", args.out.display()));
}

/// Both with their names.
fn differences((name, base): (&str, &Engine), (tuned_name, tuned): (&str, &Engine)) -> Outcome<Differences> {
    let mut found = Differences::default();
    let mut seen = Vec::new();
    for site in base.model.sites().iter() {
        let Some(other) = tuned.model.sites().iter().find(|s| s.path == site.path) else {
            return Err(unlike(site, "the tuned model does not have it"));
        };
        // A tied head is the table's own tensor, unless the tuned model has one of its own; what a file holds as one matrix is
        // several with rows of their own.
        let place = (site.tensor.clone(), other.tensor.clone(), site.rows.clone());
        if site.tensor.is_some() && seen.contains(&place) {
            continue;
        }
        seen.push(place);
        if site.tensor.as_ref().is_some_and(|name| base.new_tensors.contains(name)) {
            found.head.extend(whole(tuned, other, tuned_name)?);
            continue;
        }
        match (&site.value, &other.value) {
            (Value::Weight(a), Value::Weight(b)) => {
                if a.shape() != b.shape() {
                    return Err(unlike(site, &format!("{:?} before and {:?} after", a.shape(), b.shape())));
                }
                let (before, after) = (a.dense()?, b.dense()?);
                finite(&before, name, &site.path)?;
                finite(&after, tuned_name, &site.path)?;
                let change = after.sub(&before)?;
                if squared(&change)? > 0.0 {
                    found.changes.push((
                        site.path.clone(),
                        matches!(site.kind, Kind::Embedding { .. }),
                        change,
                    ));
                }
            }
            (Value::Vector(a), Value::Vector(b)) if a.to_vec()? != b.to_vec()? => {
                found.vectors.push(site.path.clone());
            }
            _ => {}
        }
    }
    Ok(found)
}

/// What the tuned model has at a site that its base lacks, as an adapter calls it; nothing where its files lack it too.
fn whole(tuned: &Engine, site: &Site, name: &str) -> Outcome<Option<(String, Tensor)>> {
    if site.tensor.as_ref().is_none_or(|tensor| tuned.new_tensors.contains(tensor)) {
        return Ok(None);
    }
    let found = match &site.value {
        Value::Weight(weight) => (format!("{}.weight", site.path), weight.dense()?),
        Value::Vector(vector) => (site.path.clone(), vector.clone()),
        _ => return Ok(None),
    };
    finite(&found.1, name, &site.path)?;
    Ok(Some(found))
}

fn finite(weight: &Tensor, model: &str, path: &str) -> Outcome {
    match weight.to_vec()?.iter().find(|value| !value.is_finite()) {
        Some(value) => {
            Err(Failure::before_work(format!("{model}: {path}: expected finite numbers, found {value}")))
        }
        None => Ok(()),
    }
}

fn unlike(site: &Site, what: &str) -> Failure {
    Failure::before_work(format!("{}: {what}; both must be one architecture of one size", site.path))
}

fn squared(t: &Tensor) -> Outcome<f64> {
    Ok(t.to_vec()?.iter().map(|&v| f64::from(v) * f64::from(v)).sum())
}
