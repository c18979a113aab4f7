//! `engraft extract`: an adapter of what differs between a model and the one it was tuned from, of low rank or sparse.

mod low_rank;
mod sparse;

use std::path::PathBuf;
use std::sync::Arc;

use engraft_method::{Chosen, save_adapter};
use engraft_model::LoadOptions;
use engraft_nn::{Adapter, Base, Kind, Site, Value};
use engraft_report::human;
use engraft_tensor::{Tensor, no_grad};
use engraft_train::write_adapter_files;
use serde_json::json;

use super::merge::refuse_full;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Outcome};
use crate::probe::{Measured, Probes, largest_difference};

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft extract --model BASE --tuned TUNED --rank 32 --out adapter
  engraft extract --model BASE --tuned TUNED --density 0.005 --out adapter
  engraft extract --model BASE --tuned TUNED --out adapter --probe texts.txt

With a rank the adapter is a LoRA in peft's form: each weight that differs is cut to the rank by singular values. With a
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
    /// A text file, a text a line, on which base, adapter and tuned model are compared
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
    let mut engine = Engine::open(&cx.resolve(&args.model)?, &options, cx)?;
    let tuned = Engine::open(&cx.resolve(&args.tuned)?, &options, cx)?;
    let found = no_grad(|| differences((&args.model, &engine), (&args.tuned, &tuned)))?;
    if found.changes.is_empty() {
        let message =
            format!("{} and {} have the same weights: there is nothing to extract", args.model, args.tuned);
        return Err(Failure::before_work(message));
    }
    let whole = found.changes.iter().map(|(_, _, change)| squared(change)).sum::<Outcome<f64>>()?;
    let extracted = no_grad(|| match args.density {
        Some(density) => sparse::extract(&engine, &found.changes, density),
        None => low_rank::extract(&engine, &found.changes, args.rank),
    })?;
    let Extracted { adapter, methods, lost, form, rank, left_out } = extracted;
    let (sites, info) = (engine.model.sites().clone(), engine.model.info().clone());
    let (config, tensors) = save_adapter(&adapter, &methods, &[], &args.model, &sites, &info)?;
    let probes = Probes::of(args.probe.as_deref(), &engine)?;
    write_adapter_files(&args.out, &config, &tensors, &methods, &sites)?;
    let before = probes.measure(&engine)?;
    (engine.adapter, engine.methods) = (Some(Arc::new(adapter)), methods);
    let measured = [before, probes.measure(&engine)?, probes.measure(&tuned)?];
    tell(args, (&found, &left_out), (&form, rank), (lost / whole).sqrt(), &measured, cx);
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
            "left_out": left_out, "largest_logit_change": change, "largest_logit_change_of_base": apart,
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
        // A tied head is the table's own tensor; what a file holds as one matrix is several with rows of their own.
        let place = (site.tensor.clone(), site.rows.clone());
        if site.tensor.is_some() && seen.contains(&place) {
            continue;
        }
        seen.push(place);
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
