//! `engraft convert`: a LoRA file of another program to an adapter directory in `peft`'s form; an adapter to AdapterHub's; the first
//! ranks of a DyLoRA to a LoRA; a LoRA whose start was taken off the base to one that fits the base as it is.

use std::path::PathBuf;

use engraft_method::foreign::convert;
use engraft_method::{LoadedAdapter, joined_start, load_adapter, save_adapter, sliced_dylora};
use engraft_model::LoadOptions;
use engraft_nn::Task;
use engraft_store::Weights;
use engraft_tensor::Tensor;
use engraft_train::{
    HubModel, adapter_parts, adapter_tensors, write_adapter_files, write_hub_files, write_label_names,
};
use serde_json::json;

use super::merge::refuse_full;
use crate::context::Context;
use crate::engine::{Dtype, Engine, ModelArgs};
use crate::failure::{BeforeWork, Failure, Outcome};

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft convert lora.safetensors --model roberta-base --alpha 16 --out adapter
  engraft inspect lora.safetensors          whose form it is, and what it holds
  engraft convert runs/a/adapter --to adapterhub --model bert-base --out hub
  engraft convert runs/dylora/adapter --rank 4 --model qwen3-0.6b --out lora-4
  engraft convert pissa --model qwen3-0.6b --out lora

Reads the names of loralib, and peft's without their prefix; tensors trained as a whole come along. With --to adapterhub an
adapter directory is written as AdapterHub's library reads it, a trained head beside it, a fusion with its adapters as a setup: bottleneck,
Compacter, ReFT, UniPELT and MAM adapters, fusions of serial bottlenecks, prefixes and prompts that were trained with form = \"adapterhub\",
LoRA and (IA)³ at queries, keys, values and the matrices of an MLP but its gate. The library loads it by
model.load_adapter(DIR, use_safetensors=True). With --rank the first ranks
of a DyLoRA become a LoRA, which peft reads. An adapter directory of peft with the start pissa or olora becomes a plain LoRA of twice the
rank, the start taken off as a product of its own.")]
pub struct Args {
    /// A safetensors file, or an adapter directory with --to adapterhub, --rank or a start that was taken off the base
    file: PathBuf,
    /// Whose form to write
    #[arg(long, value_enum, default_value_t = Form::Peft)]
    to: Form,
    /// The model it belongs to: a directory in Hugging Face form, or a Hub id
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Scale times rank, as it was trained with; needed where the file does not hold it
    #[arg(long, value_name = "NUMBER")]
    alpha: Option<f64>,
    /// The first ranks of a DyLoRA that are taken, as a LoRA
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// The adapter directory to write; it must not exist or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// Whose form an adapter is written in.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    /// That of `peft`.
    Peft,
    /// That of AdapterHub's library.
    #[value(name = "adapterhub")]
    AdapterHub,
}

/// An adapter directory in AdapterHub's form, read and written on its model: every name and shape is checked.
fn to_adapter_hub(args: &Args, cx: &Context) -> Outcome {
    let engine = on_model(args, cx)?;
    let (sites, info) = (engine.model.sites(), engine.model.info());
    let files = engraft_store::read_adapter(&cx.resolve(&args.file.display().to_string())?, &cx.limits);
    let files = files.before_work()?;
    let parts = adapter_parts(&files, engine.model.as_ref()).before_work()?;
    let loaded = load_adapter(&parts.config, parts.tensors, sites, info).before_work()?;
    let (config, tensors) =
        save_adapter(&loaded.adapter, &loaded.methods, &loaded.train_also, &args.model, sites, info)?;
    let count = tensors.len();
    let of = HubModel {
        model: engine.model.as_ref(),
        config: &engine.config,
        name: &args.model,
        labels: engine.labels.as_deref(),
    };
    let left_out = write_hub_files(&args.out, &config, tensors, &of).before_work()?;
    if let Some(first) = left_out.first() {
        let text = format!(
            "{} tensors such as {first} are no part of an adapter there nor of a head, and were left out",
            left_out.len()
        );
        cx.ui.note(&text);
    }
    if args.json {
        cx.ui.json(json!({
            "out": args.out.display().to_string(), "tensors": count - left_out.len(), "left_out": left_out,
        }));
        return Ok(());
    }
    cx.ui.print(&format!("{} tensors\nadapter  {}\n", count - left_out.len(), args.out.display()));
    Ok(())
}

/// The first `rank` ranks of a DyLoRA, as a LoRA.
fn of_rank(args: &Args, rank: usize, cx: &Context) -> Outcome {
    let engine = on_model(args, cx)?;
    let files = engraft_store::read_adapter(&cx.resolve(&args.file.display().to_string())?, &cx.limits);
    let files = files.before_work()?;
    let (config, tensors) = sliced_dylora(&files.config, &adapter_tensors(&files)?, rank).before_work()?;
    let loaded = load_adapter(&config, tensors, engine.model.sites(), engine.model.info()).before_work()?;
    write(args, &loaded, &engine, cx)?;
    Ok(engine.labels.iter().try_for_each(|labels| write_label_names(&args.out, labels))?)
}

/// A LoRA that fits only a base without its start, as one that fits the base.
fn of_start(args: &Args, cx: &Context) -> Outcome {
    let files = engraft_store::read_adapter(&cx.resolve(&args.file.display().to_string())?, &cx.limits);
    let files = files.before_work()?;
    let Some(plain) = joined_start(&files.config).before_work()? else {
        return Err(Failure::before_work(format!(
            "{}: this adapter directory fits its base as it is, with no start to take off; --to adapterhub writes it in AdapterHub's form, \
             --rank takes the first ranks of a DyLoRA",
            args.file.display()
        )));
    };
    let engine = on_model(args, cx)?;
    let (sites, info) = (engine.model.sites(), engine.model.info());
    let loaded = load_adapter(&files.config, adapter_tensors(&files)?, sites, info).before_work()?;
    write(args, &LoadedAdapter { methods: vec![plain], ..loaded }, &engine, cx)?;
    Ok(engine.labels.iter().try_for_each(|labels| write_label_names(&args.out, labels))?)
}

/// The model with the adapter of the directory that is converted.
fn on_model(args: &Args, cx: &Context) -> Outcome<Engine> {
    let model = ModelArgs {
        model: args.model.clone(),
        adapter: Some(args.file.display().to_string()),
        drop_layers: None,
        choose: Vec::new(),
        dtype: Dtype::F32,
        quantize: None,
    };
    Engine::load(&model, cx)
}

/// Converts, on the model that it belongs to: every name and shape is checked.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    refuse_full(&args.out)?;
    let is_file = args.file.is_file() || args.file.extension().is_some_and(|end| end == "safetensors");
    let of_directory = args.to == Form::AdapterHub || args.rank.is_some() || !is_file;
    if of_directory && args.alpha.is_some() {
        return Err(Failure::before_work("--alpha is for files without one; an adapter directory has it"));
    }
    match args.rank {
        Some(rank) => return of_rank(args, rank, cx),
        None if args.to == Form::AdapterHub => return to_adapter_hub(args, cx),
        None if !is_file => return of_start(args, cx),
        None => {}
    }
    let weights = Weights::open_file(&args.file, &cx.limits).before_work()?;
    let tensor = |(name, raw): (&str, &engraft_store::RawTensor)| {
        let values = raw.to_f32().before_work()?;
        if values.iter().any(|v| !v.is_finite()) {
            let message = format!("{}: `{name}` holds numbers that are not finite", args.file.display());
            return Err(Failure::before_work(message));
        }
        Ok((name.to_owned(), Tensor::from_vec(values, raw.shape.clone())?))
    };
    let tensors = weights.iter().map(tensor).collect::<Outcome<Vec<_>>>()?;
    let (config, tensors) = convert(tensors, args.alpha).before_work()?;
    let dir = cx.resolve(&args.model)?;
    let model_config = engraft_store::read_config(&dir.join("config.json"), &cx.limits).before_work()?;
    let shapes = tensors.iter().map(|(name, t)| (name.as_str(), t.shape()));
    let labels = engraft_model::labels_in(&model_config, shapes);
    let options = LoadOptions {
        task: labels.map(|_| Task::SequenceClassification),
        labels,
        limits: cx.limits.clone(),
        ..LoadOptions::default()
    };
    let engine = Engine::open(&dir, &options, cx)?;
    let (sites, info) = (engine.model.sites(), engine.model.info());
    let mut loaded = load_adapter(&config, tensors, sites, info).before_work()?;
    // The file was none of `peft`'s, which says what an adapter is for.
    loaded.adapter.set_task(engraft_nn::TaskName::OfModel);
    write(args, &loaded, &engine, cx)
}

/// A LoRA as an adapter directory, and what it is.
fn write(args: &Args, lora: &LoadedAdapter, engine: &Engine, cx: &Context) -> Outcome {
    let (sites, info) = (engine.model.sites(), engine.model.info());
    let (config, tensors) =
        save_adapter(&lora.adapter, &lora.methods, &lora.train_also, &args.model, sites, info)?;
    write_adapter_files(&args.out, &config, &tensors, &lora.methods, sites)?;
    if args.json {
        cx.ui.json(json!({
            "out": args.out.display().to_string(), "tensors": tensors.len(), "rank": config["r"], "alpha": config["lora_alpha"],
            "trained": lora.adapter.trained_count(),
        }));
        return Ok(());
    }
    cx.ui.print(&format!(
        "{} tensors, rank {}, alpha {}\nadapter  {}\n",
        tensors.len(),
        config["r"],
        config["lora_alpha"],
        args.out.display()
    ));
    Ok(())
}
