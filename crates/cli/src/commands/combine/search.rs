//! LoRAHub's search: the weights of adapters under which a model does best on a few examples.

use std::path::Path;
use std::sync::Arc;

use engraft_data::Dataset;
use engraft_method::algebra::{Found, Search, Term, search};
use engraft_method::{Chosen, load_adapter};
use engraft_model::Packed;
use engraft_nn::Adapter;
use engraft_recipe::Recipe;
use engraft_train::{Evaluated, Session, evaluate, method_specs};
use serde_json::Value;

use super::Args;
use crate::commands::train::open;
use crate::context::Context;
use crate::failure::{BeforeWork, Failure, Outcome};

/// Where the examples are, and how often they are looked at.
#[derive(clap::Args)]
pub struct Examples {
    /// lorahub: a data file whose examples say which weights are good; without it the weights are those given
    #[arg(long, value_name = "FILE", requires = "model")]
    pub data: Option<std::path::PathBuf>,
    /// Form of the data, as in a recipe: csv, jsonl, text, …
    #[arg(long, value_name = "FORMAT", requires = "data")]
    format: Option<String>,
    /// Task, as in a recipe: causal-lm, seq2seq, …
    #[arg(long, value_name = "TASK", requires = "data")]
    task: Option<String>,
    /// Sets a value of a recipe for the data, such as data.max_length=128
    #[arg(long, value_name = "KEY=VALUE", requires = "data")]
    set: Vec<String>,
    /// How often the search looks at the examples: 40 if left out
    #[arg(long, value_name = "N", requires = "data", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    evaluations: Option<u32>,
    /// Factor on the sum of the weights' sizes, added to the loss: 0.05 if left out
    #[arg(long, value_name = "NUMBER", requires = "data")]
    penalty: Option<f64>,
}

/// Sets the weights of `terms`; `None` where no examples were given.
pub fn find(args: &Args, terms: &mut [Term], cx: &Context) -> Outcome<Option<Found>> {
    let (Some(data), Some(model)) = (&args.examples.data, &args.model) else { return Ok(None) };
    if let Some(weighted) = args.adapters.iter().zip(terms.iter()).find(|(text, term)| **text != term.name) {
        let message =
            format!("{}: the search finds the weights; leave yours out, or leave --data out", weighted.0);
        return Err(Failure::before_work(message));
    }
    let defaults = Search::default();
    let how = Search {
        penalty: args.examples.penalty.unwrap_or(defaults.penalty),
        evaluations: args.examples.evaluations.map_or(defaults.evaluations, |n| n as usize),
        seed: args.seed.unwrap_or(defaults.seed),
        ..defaults
    };
    if !how.penalty.is_finite() || how.penalty < 0.0 {
        let message = format!("--penalty: expected a number of at least 0, found {}", how.penalty);
        return Err(Failure::before_work(message));
    }
    let session = open(&recipe(&args.examples, data, model)?, &Packed::default(), cx)?;
    let Some(examples) = &session.eval else { return Err(Failure::before_work("there are no examples")) };
    let bar = cx.ui.bar();
    bar.set_length(how.evaluations as u64);
    let mut failed = None;
    let found = search(terms, &how, &mut |config, tensors| {
        let adapter = load_adapter(config, tensors.clone(), session.model.sites(), session.model.info())?;
        let loss = loss(&session, &Arc::new(adapter.adapter), &adapter.methods, examples);
        bar.inc(1);
        loss.map_err(|error| {
            failed = Some(Failure::from(error));
            engraft_nn::Error::Unsupported("the examples cannot be scored".into())
        })
    });
    bar.finish_and_clear();
    match failed {
        Some(failure) => Err(failure),
        None => found.map(Some).before_work(),
    }
}

/// The mean loss of the model with an adapter on the examples.
fn loss(
    session: &Session,
    adapter: &Arc<Adapter>,
    methods: &[Chosen],
    examples: &Dataset,
) -> engraft_train::Result<f64> {
    let of = Evaluated { adapter: Some(adapter), methods, ..session.evaluated(false)? };
    Ok(evaluate(&of, examples, &mut |_, _| {})?.loss)
}

/// A recipe for data given on the command line; its method fits every model and takes no part.
fn recipe(examples: &Examples, data: &Path, model: &str) -> Outcome<Recipe> {
    let quoted = |text: &str| Value::from(text).to_string();
    let absolute = |path: &Path| {
        path.canonicalize().map_err(|e| engraft_store::Error::io("find", path, e)).before_work()
    };
    let format = match &examples.format {
        Some(format) => format.clone(),
        None => engraft_data::sniff(data).before_work()?.format.name().to_owned(),
    };
    let path = quoted(&absolute(data)?.to_string_lossy());
    let model = match Path::new(model).is_dir() {
        true => absolute(Path::new(model))?.to_string_lossy().into_owned(),
        false => model.to_owned(),
    };
    let task = examples.task.as_ref().map_or_else(String::new, |task| format!("task = {}\n", quoted(task)));
    let text = format!(
        "model = {}\n{task}[method]\nname = \"lora\"\nrank = 1\ntargets = \"all-linear\"\n[data]\nformat = {}\npath = {path}\neval_path = {path}\n",
        quoted(&model),
        quoted(&format)
    );
    Recipe::parse(&text, "the arguments", &examples.set, &method_specs()).map_err(Failure::problems)
}
