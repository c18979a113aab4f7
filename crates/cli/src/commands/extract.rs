//! `engraft extract`: a low-rank adapter of what differs between a model and the one it was tuned from.

use std::path::PathBuf;
use std::sync::Arc;

use engraft_method::algebra::cut;
use engraft_method::{Chosen, attach, find, save_adapter};
use engraft_model::LoadOptions;
use engraft_nn::{Adapter, Base, Kind, Site, Targets, Value};
use engraft_report::human;
use engraft_tensor::{Tensor, no_grad};
use engraft_train::write_adapter_files;
use serde_json::json;

use super::merge::refuse_full;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{BeforeWork, Failure, Outcome};
use crate::probe::{Probes, largest_difference};

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft extract --model BASE --tuned TUNED --rank 32 --out adapter
  engraft extract --model BASE --tuned TUNED --out adapter --probe texts.txt

The adapter is a LoRA in peft's form. Each weight that differs is cut to the rank by singular values.")]
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

/// What differs between two models.
#[derive(Default)]
struct Differences {
    /// Path of a weight and the factors of its change.
    products: Vec<(String, (Tensor, Tensor))>,
    /// Squared norms: of all changes of weights, and of what the factors leave out.
    whole: f64,
    lost: f64,
    /// Vectors that differ, which no product can hold.
    vectors: Vec<String>,
}

/// Extracts, writes, compares.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    refuse_full(&args.out)?;
    let options = LoadOptions { limits: cx.limits.clone(), ..LoadOptions::default() };
    let mut engine = Engine::open(&cx.resolve(&args.model)?, &options, cx)?;
    let tuned = Engine::open(&cx.resolve(&args.tuned)?, &options, cx)?;
    let found = no_grad(|| differences(&engine, &tuned, args.rank as usize))?;
    if found.products.is_empty() {
        let message =
            format!("{} and {} have the same weights: there is nothing to extract", args.model, args.tuned);
        return Err(Failure::before_work(message));
    }
    let methods = [method(&found, args.rank)?];
    let (sites, info) = (engine.model.sites().clone(), engine.model.info().clone());
    let adapter = attach(&methods, &[], &sites, &info, 0).before_work()?.adapter;
    fill(&adapter, found.products.iter())?;
    let (config, tensors) = save_adapter(&adapter, &methods, &[], &args.model, &sites, &info)?;
    write_adapter_files(&args.out, &config, &tensors, &methods)?;

    let probes = Probes::of(args.probe.as_deref(), &engine)?;
    let before = probes.measure(&engine)?;
    (engine.adapter, engine.methods) = (Some(Arc::new(adapter)), methods.into());
    let (after, aim) = (probes.measure(&engine)?, probes.measure(&tuned)?);
    let error = (found.lost / found.whole).sqrt();
    let (change, apart) =
        (largest_difference(&after.logits, &aim.logits), largest_difference(&before.logits, &aim.logits));
    let perplexities = [&before, &after, &aim].map(|m| m.loss.map(f64::exp));
    if args.json {
        cx.ui.json(json!({
            "out": args.out.display().to_string(), "weights": found.products.len(), "rank": args.rank, "error": error,
            "left_out": found.vectors, "largest_logit_change": change, "largest_logit_change_of_base": apart,
            "perplexity_base": perplexities[0], "perplexity": perplexities[1], "perplexity_tuned": perplexities[2],
        }));
        return Ok(());
    }
    cx.ui.print(&format!(
        "{} weights differ; rank {} leaves out {}% of their change\n",
        found.products.len(),
        args.rank,
        human::number(100.0 * error, 2)
    ));
    if let [first, rest @ ..] = &found.vectors[..] {
        let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
        cx.ui.note(&format!("{first}{more} differ too and are no products: they are not in the adapter"));
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
    Ok(())
}

fn differences(base: &Engine, tuned: &Engine, rank: usize) -> Outcome<Differences> {
    let mut found = Differences::default();
    let mut seen = Vec::new();
    for site in base.model.sites().iter() {
        let Some(other) = tuned.model.sites().iter().find(|s| s.path == site.path) else {
            return Err(unlike(site, "the tuned model does not have it"));
        };
        // A tied head is the table's own tensor.
        if site.tensor.is_some() && seen.contains(&site.tensor) {
            continue;
        }
        seen.push(site.tensor.clone());
        match (&site.value, &other.value) {
            (Value::Weight(a), Value::Weight(b)) => {
                if a.shape() != b.shape() {
                    return Err(unlike(site, &format!("{:?} before and {:?} after", a.shape(), b.shape())));
                }
                let change = b.dense()?.sub(&a.dense()?)?;
                let size = squared(&change)?;
                if size == 0.0 {
                    continue;
                }
                // A table's product is the transpose of its change.
                let change = if matches!(site.kind, Kind::Embedding { .. }) { change.t()? } else { change };
                let (a, b) = cut(&change, rank)?;
                found.lost += squared(&b.matmul(&a)?.sub(&change)?)?;
                found.whole += size;
                found.products.push((site.path.clone(), (a, b)));
            }
            (Value::Vector(a), Value::Vector(b)) if a.to_vec()? != b.to_vec()? => {
                found.vectors.push(site.path.clone());
            }
            _ => {}
        }
    }
    Ok(found)
}

fn unlike(site: &Site, what: &str) -> Failure {
    Failure::before_work(format!("{}: {what}; both must be one architecture of one size", site.path))
}

fn squared(t: &Tensor) -> Outcome<f64> {
    Ok(t.to_vec()?.iter().map(|&v| f64::from(v) * f64::from(v)).sum())
}

/// LoRA of scale 1 at the weights that differ, each with the rank that its product has.
fn method(found: &Differences, rank: u32) -> Outcome<Chosen> {
    let Some(entry) = find("lora") else { return Err(Failure::running("there is no method lora")) };
    let ranks = found.products.iter().filter(|(_, (a, _))| a.dim(0) != rank as usize);
    let ranks: serde_json::Map<String, serde_json::Value> =
        ranks.map(|(path, (a, _))| (path.clone(), json!(a.dim(0)))).collect();
    let settings = json!({ "rank": rank, "alpha": rank, "rank_pattern": ranks, "alpha_pattern": ranks });
    let settings = settings.as_object().cloned().unwrap_or_default();
    let method = (entry.from_settings)(&settings).before_work()?;
    Ok((method, Some(Targets::names(found.products.iter().map(|(path, _)| path.clone())))))
}

fn fill<'a>(adapter: &Adapter, products: impl Iterator<Item = &'a (String, (Tensor, Tensor))>) -> Outcome {
    for (path, (a, b)) in products {
        let of = |ends: [&str; 2]| {
            let named = |end: &str| format!("{path}.{end}");
            adapter.params().iter().find(|p| ends.iter().any(|end| p.name == named(end)))
        };
        for (param, value) in
            [(of(["lora_A.weight", "lora_embedding_A"]), a), (of(["lora_B.weight", "lora_embedding_B"]), b)]
        {
            let Some(param) = param else {
                return Err(Failure::running(format!("{path}: a low-rank product cannot be attached here")));
            };
            let shape = param.param.value().shape().to_vec();
            param.param.set(value.reshape(shape)?)?;
        }
    }
    Ok(())
}
