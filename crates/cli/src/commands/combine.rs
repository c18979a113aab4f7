//! `engraft combine`: several adapters to one, and how far it is from their exact sum.

mod search;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engraft_method::algebra::{Combined, Found, Options, Rule, Sign, Term, combine, same_base};
use engraft_method::load_adapter;
use engraft_model::LoadOptions;
use engraft_nn::Task;
use engraft_report::human;
use engraft_tensor::Tensor;
use engraft_train::{label_names, write_adapter_files, write_label_names};
use serde_json::json;

use super::merge::refuse_full;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{BeforeWork, Failure, Outcome};
use crate::probe::{self, Measured, Probes, largest_difference};

/// How signs are elected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum SignOf {
    /// The sign of the sum.
    Total,
    /// The sign that more adapters have.
    Frequency,
}

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft combine a/adapter b/adapter --out both           their exact sum
  engraft combine a/adapter=0.7 b/adapter=0.3 --rule svd --rank 8 --out mixed
  engraft combine a/adapter b/adapter=-0.5 --out less-b    takes half of b away
  engraft combine a/adapter b/adapter --rule ties --density 0.2 --out ties
  engraft combine run0/adapter run1/adapter --rule average --out soup
  engraft combine a/adapter b/adapter c/adapter --rule lorahub \\
    --model DIR --data few.jsonl --out hub   weights that a search finds
  engraft combine a/adapter b/adapter --rule mera --out m  bottleneck adapters
  engraft combine a/adapter b/adapter --out both \\
    --model DIR --probe texts.txt")]
pub struct Args {
    /// Adapter directories, each with its weight after `=`; 1 where none is given. The weights of average are shares: they are divided by their sum
    #[arg(required = true, value_name = "ADAPTER[=WEIGHT]")]
    adapters: Vec<String>,
    /// The adapter directory to write; it must not exist or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// cat, average, mera, lorahub, linear, svd, ties, dare_linear, dare_ties, magnitude_prune; the last four also with _svd
    #[arg(long, default_value = "cat", value_name = "RULE", value_parser = rule)]
    rule: Rule,
    /// Rank of a result that is cut by singular values; the largest of the adapters' if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    rank: Option<u32>,
    /// Share of the numbers that a pruning rule keeps
    #[arg(long, value_name = "SHARE")]
    density: Option<f64>,
    /// How TIES elects signs: total if left out
    #[arg(long, value_enum)]
    sign: Option<SignOf>,
    /// Seed of what DARE drops and of the search of lorahub: 0 if left out
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Combines adapters whose bases are called differently, where both are one model
    #[arg(long)]
    any_base: bool,
    /// A base model, to compare logits of the result with those of the exact sum
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// A text file, a text a line, to compare on: 64 lines at most, 256 tokens of each
    #[arg(long, value_name = "FILE", requires = "model")]
    probe: Option<PathBuf>,
    #[command(flatten)]
    examples: search::Examples,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

fn rule(text: &str) -> Result<Rule, String> {
    let found = Rule::ALL.iter().find(|(name, _)| *name == text.replace('-', "_"));
    found.map(|(_, rule)| *rule).ok_or_else(|| {
        let names: Vec<&str> = Rule::ALL.iter().map(|(name, _)| *name).collect();
        format!("expected one of {}", names.join(", "))
    })
}

/// Combines, writes, and compares where a model is given.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    refuse_full(&args.out)?;
    check(args)?;
    if let Some(model) = &args.model {
        probe::check(args.probe.as_deref(), &cx.resolve(model)?)?;
    }
    let mut terms = args.adapters.iter().map(|text| term(text, cx)).collect::<Outcome<Vec<_>>>()?;
    let options = Options {
        rule: args.rule,
        rank: args.rank.map(|rank| rank as usize),
        density: args.density.unwrap_or(1.0),
        sign: if args.sign == Some(SignOf::Frequency) { Sign::Frequency } else { Sign::Total },
        seed: args.seed.unwrap_or(0),
    };
    same_base(&terms, args.any_base).before_work()?;
    let labels = labels(args, cx)?;
    let searched = search::find(args, &mut terms, cx)?;
    let combined = combine(&terms, &options).before_work()?;
    let compared = match &args.model {
        Some(model) => Some(compare(args, model, &terms, &options, &combined, cx)?),
        None => None,
    };
    // Sums are made without a model, and are F32.
    let sites = engraft_nn::Sites::default();
    write_adapter_files(&args.out, &combined.config, &combined.tensors, &combined.methods, &sites)?;
    if let Some(labels) = labels {
        write_label_names(&args.out, &labels)?;
    }
    tell(args, &combined, (searched.as_ref(), compared.as_ref()), cx);
    Ok(())
}

fn check(args: &Args) -> Outcome {
    if args.rule.prunes() && args.density.is_none() {
        return Err(Failure::before_work(
            "this rule keeps a share of the numbers; give it, such as --density 0.2",
        ));
    }
    if !args.rule.prunes() && args.density.is_some() {
        return Err(Failure::before_work("--density belongs to the rules ties, dare and magnitude_prune"));
    }
    if args.sign.is_some() && !args.rule.elects() {
        return Err(Failure::before_work("--sign belongs to ties and dare_ties, which elect signs"));
    }
    if args.examples.data.is_some() && args.rule != Rule::LoraHub {
        return Err(Failure::before_work("--data belongs to the rule lorahub, which looks for weights"));
    }
    let searches = args.examples.data.is_some();
    if args.seed.is_some() && !args.rule.draws() && !searches {
        return Err(Failure::before_work(
            "--seed belongs to dare_linear and dare_ties, which draw what they drop, and to the search of lorahub",
        ));
    }
    if args.rank.is_some() && !args.rule.cuts() {
        return Err(Failure::before_work("--rank belongs to svd and the rules that end in _svd"));
    }
    Ok(())
}

/// The classes that the adapters tell apart, where they say so.
fn labels(args: &Args, cx: &Context) -> Outcome<Option<Vec<String>>> {
    let mut found: Option<(&str, Vec<String>)> = None;
    for text in &args.adapters {
        let name = split(text).0;
        let Some(labels) = label_names(&cx.resolve(name)?).before_work()? else { continue };
        match &found {
            None => found = Some((name, labels)),
            Some((_, known)) if *known == labels => {}
            Some((first, known)) => {
                return Err(Failure::before_work(format!(
                    "{first} and {name} tell other classes apart ({} and {}): the rows of their classifiers do not belong together",
                    known.join(", "),
                    labels.join(", ")
                )));
            }
        }
    }
    Ok(found.map(|(_, labels)| labels))
}

/// A directory and what follows `=`, if anything does.
fn split(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once('=').filter(|_| !Path::new(text).is_dir()) {
        Some((name, weight)) => (name, Some(weight)),
        None => (text, None),
    }
}

/// An adapter and its weight, from `DIR` or `DIR=WEIGHT`.
fn term(text: &str, cx: &Context) -> Outcome<Term> {
    let (name, weight) = match split(text) {
        (name, None) => (name, 1.0),
        (name, Some(weight)) => match weight.parse::<f64>() {
            // Tensors are multiplied in 32 bits.
            Ok(weight) if (weight as f32).is_finite() && (weight == 0.0 || weight as f32 != 0.0) => {
                (name, weight)
            }
            Ok(weight) if weight.is_finite() => {
                return Err(Failure::before_work(format!(
                    "{text}: the weight {weight:e} is out of the range of 32 bits"
                )));
            }
            _ => {
                let message = format!("{text}: expected a weight after `=`, found `{weight}`");
                return Err(Failure::before_work(message));
            }
        },
    };
    let files = engraft_store::read_adapter(&cx.resolve(name)?, &cx.limits).before_work()?;
    let tensors = engraft_train::adapter_tensors(&files).before_work()?;
    if files.head.is_some() {
        cx.ui.note(&format!(
            "{name}: the head beside the adapter is left out; heads are combined in peft's form alone"
        ));
    }
    Ok(Term { name: name.to_owned(), config: files.config, tensors, weight })
}

/// What the result does to the model's outputs, beside the exact sum.
struct Compared {
    /// `None` where there is no exact sum.
    exact: Option<Measured>,
    result: Measured,
    base: Measured,
}

fn compare(
    args: &Args,
    model: &str,
    terms: &[Term],
    options: &Options,
    combined: &Combined,
    cx: &Context,
) -> Outcome<Compared> {
    let dir = cx.resolve(model)?;
    let tensors = combined.tensors.iter().map(|(name, t)| (name.as_str(), t.shape()));
    let config = engraft_store::read_config(&dir.join("config.json"), &cx.limits).before_work()?;
    let task = match combined.config.get("task_type").and_then(serde_json::Value::as_str) {
        Some("SEQ_CLS") => Some(Task::SequenceClassification),
        Some("TOKEN_CLS") => Some(Task::TokenClassification),
        _ => None,
    };
    let load = LoadOptions {
        task,
        labels: engraft_model::labels_in(&config, tensors),
        limits: cx.limits.clone(),
        ..LoadOptions::default()
    };
    let mut engine = Engine::open(&dir, &load, cx)?;
    let probes = Probes::of(args.probe.as_deref(), &engine, cx)?;
    let base = probes.measure(&engine)?;
    let mut with = |config: &serde_json::Value, tensors: &[(String, Tensor)]| -> Outcome<Measured> {
        let (sites, info) = (engine.model.sites().clone(), engine.model.info().clone());
        let loaded = load_adapter(config, tensors.to_vec(), &sites, &info).before_work()?;
        (engine.adapter, engine.methods) = (Some(Arc::new(loaded.adapter)), loaded.methods);
        probes.measure(&engine)
    };
    let result = with(&combined.config, &combined.tensors)?;
    let sum = |terms: &[Term]| combine(terms, &Options { rule: Rule::Cat, ..*options });
    let exact = match args.rule {
        Rule::Cat => Some(result.clone()),
        // A mean of factors is compared with the mean of products, where it is one of products.
        Rule::Average => {
            let total: f64 = terms.iter().map(|term| term.weight).sum();
            let shares: Vec<Term> =
                terms.iter().map(|term| Term { weight: term.weight / total, ..term.clone() }).collect();
            sum(&shares).ok().map(|sum| with(&sum.config, &sum.tensors)).transpose()?
        }
        Rule::Mera => None,
        _ => {
            let sum = sum(terms).before_work()?;
            Some(with(&sum.config, &sum.tensors)?)
        }
    };
    Ok(Compared { exact, result, base })
}

fn tell(
    args: &Args,
    combined: &Combined,
    (searched, compared): (Option<&Found>, Option<&Compared>),
    cx: &Context,
) {
    let perplexity = |m: &Measured| m.loss.map(f64::exp);
    if args.json {
        let compared = compared.map(|c| {
            json!({
                "largest_logit": c.result.largest(),
                "largest_logit_change": c.exact.as_ref().map(|exact| largest_difference(&exact.logits, &c.result.logits)),
                "perplexity_base": perplexity(&c.base), "perplexity_exact": c.exact.as_ref().and_then(perplexity),
                "perplexity": perplexity(&c.result),
            })
        });
        cx.ui.json(json!({
            "out": args.out.display().to_string(), "rank": combined.config["r"], "error": combined.error,
            "worst": combined.worst.as_ref().map(|(path, error)| json!({ "module": path, "error": error })),
            "notes": combined.notes, "compared": compared, "search": searched.map(|found| json!({
                "weights": found.weights, "objective": found.value, "objective_of_base": found.start,
                "evaluations": found.evaluations,
            })),
        }));
        return;
    }
    let mut line = format!("{} adapters combined", args.adapters.len());
    if let Some(rank) = combined.config["r"].as_u64() {
        line.push_str(&format!(", rank {rank}"));
    }
    if let Some(error) = combined.error {
        line.push_str(&format!("; {} of their exact sum is lost or added", percent(error)));
    }
    if let Some((path, error)) = combined.worst.as_ref().filter(|(_, error)| *error > 1e-5) {
        line.push_str(&format!(", most at {path}: {}", percent(*error)));
    }
    cx.ui.print(&format!("{line}\n"));
    if let Some(found) = searched {
        cx.ui.print(&weights(args, found));
    }
    combined.notes.iter().for_each(|note| cx.ui.note(note));
    if let Some(c) = compared {
        let change = match &c.exact {
            Some(exact) => {
                let change = largest_difference(&exact.logits, &c.result.logits);
                format!("largest logit change against the exact sum {}", human::number(change, 2))
            }
            None => {
                let change = largest_difference(&c.base.logits, &c.result.logits);
                format!(
                    "no exact sum to compare with; largest logit change against the base {}",
                    human::number(change, 2)
                )
            }
        };
        let found = [Some(&c.base), c.exact.as_ref(), Some(&c.result)].map(|m| m.and_then(perplexity));
        let named = ["alone", "exact", "combined"].iter().zip(found);
        let named: Vec<String> = named.filter_map(|(name, p)| Some(format!("{:.2} {name}", p?))).collect();
        let perplexities =
            if named.is_empty() { String::new() } else { format!("; perplexity {}", named.join(", ")) };
        cx.ui.print(&format!("{change}{perplexities}\n"));
    }
    cx.ui.print(&format!("adapter  {}\n", args.out.display()));
}

/// What a search found, in a line.
fn weights(args: &Args, found: &Found) -> String {
    let weights = args.adapters.iter().zip(&found.weights);
    let weights: Vec<String> = weights.map(|(name, w)| format!("{name}={}", human::number(*w, 3))).collect();
    format!(
        "weights {}; loss and penalty {} → {} in {} looks at the examples\n",
        weights.join(" "),
        human::number(found.start, 4),
        human::number(found.value, 4),
        found.evaluations
    )
}

fn percent(share: f64) -> String {
    format!("{}%", human::number(100.0 * share, 2))
}
