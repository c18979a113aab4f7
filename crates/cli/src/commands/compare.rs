//! `engraft compare`: how alike saved prompts, and other adapters, are.

use engraft_data::Tokenizer;
use engraft_method::{active_neurons, overlap, prompt_similarity};
use engraft_nn::{Inputs, Layout, Task};
use engraft_report::{Align, Table, human};
use engraft_store::{AdapterFiles, read_adapter};
use engraft_tensor::Tensor;
use engraft_train::{decoder_start, open_adapter};
use serde_json::json;

use crate::context::Context;
use crate::engine::{Dtype, Engine, ModelArgs, Quantize};
use crate::failure::{BeforeWork, Failure, Outcome};

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft compare --model t5-base runs/mnli/adapter runs/qqp/adapter

neurons is the share of the model's active neurons that two adapters have in common, seen at a token that says nothing (a mask,
or the first that a decoder writes): of prompts, that which says most about which of them a new one should start from
(from_prompts). average and pairs compare the rows of prompts: the cosine of their means, the mean of the cosines of all pairs.")]
pub struct Args {
    /// Adapter directories of one model, two or more
    #[arg(required = true, num_args = 2..)]
    adapters: Vec<String>,
    /// The model: a directory in Hugging Face form, or a Hub id
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Type of the computation
    #[arg(long, value_enum, default_value_t)]
    dtype: Dtype,
    /// Keeps the frozen linear weights in four bits
    #[arg(long, value_enum, value_name = "FORMAT")]
    quantize: Option<Quantize>,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// One of the adapters.
struct Seen {
    name: String,
    neurons: Vec<bool>,
    /// The rows that it puts before an input, where it does.
    rows: Option<Vec<Vec<f32>>>,
}

/// Compares each with each.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    // The first says which head the model has, where adapters bring one.
    let model = ModelArgs {
        model: args.model.clone(),
        adapter: args.adapters.first().cloned(),
        drop_layers: None,
        choose: Vec::new(),
        dtype: args.dtype,
        quantize: args.quantize,
    };
    let engine = Engine::load(&model, cx)?;
    let inputs = nothing(&engine)?;
    let see = |name: &String| -> Outcome<Seen> {
        let dir = cx.resolve(name)?;
        let files = read_adapter(&dir, &cx.limits).before_work()?;
        let opened = open_adapter(engine.model.as_ref(), &dir, &cx.limits).before_work()?;
        let neurons =
            active_neurons(engine.model.as_ref(), opened.adapter, &opened.methods, &inputs).before_work()?;
        Ok(Seen { name: name.clone(), neurons, rows: rows(&files)? })
    };
    let all = args.adapters.iter().map(see).collect::<Outcome<Vec<_>>>()?;
    let mut table = Table::new(&[
        ("adapter", Align::Left),
        ("and", Align::Left),
        ("neurons", Align::Right),
        ("average", Align::Right),
        ("pairs", Align::Right),
    ]);
    let mut found = Vec::new();
    for (i, a) in all.iter().enumerate() {
        for b in &all[i + 1..] {
            let neurons = overlap(&a.neurons, &b.neurons);
            let of_rows = a.rows.as_ref().zip(b.rows.as_ref());
            let alike = |pairs| of_rows.map(|(a, b)| prompt_similarity(a, b, pairs));
            let shown = |value: Option<f64>| value.map_or("–".into(), |value| human::number(value, 4));
            let (average, pairs) = (alike(false), alike(true));
            table.row([a.name.as_str(), &b.name, &shown(Some(neurons)), &shown(average), &shown(pairs)]);
            found.push(json!({ "adapters": [a.name, b.name], "neurons": neurons, "average": average, "pairs": pairs }));
        }
    }
    if args.json {
        cx.ui.json(json!({ "pairs": found, "neurons": all.first().map_or(0, |seen| seen.neurons.len()) }));
    } else {
        cx.ui.print(&table.render(cx.ui.width()));
    }
    Ok(())
}

/// One token that says nothing.
fn nothing(engine: &Engine) -> Outcome<Inputs> {
    let tokenizer = Tokenizer::open(&engine.dir).ok();
    let own = tokenizer.as_ref().and_then(|t| t.mask_id().or(t.bos_id()).or(t.eos_id()).or(t.pad_id()));
    let named = |key: &str| engine.config.get(key).and_then(serde_json::Value::as_u64).map(|id| id as u32);
    let id = own
        .or_else(|| named("bos_token_id"))
        .or_else(|| named("eos_token_id"))
        .or_else(|| named("pad_token_id"));
    let Some(id) = id else {
        let message =
            "the model names no token that says nothing: neither a mask nor one that begins or ends texts";
        return Err(Failure::before_work(message));
    };
    let one = |id: i64| Tensor::from_i64(vec![id], [1]);
    let inputs = Inputs::tokens(one(i64::from(id))?, None, Layout::counted(&[1])?);
    if engine.model.info().task != Task::Seq2Seq {
        return Ok(inputs);
    }
    let start = decoder_start(&engine.config)
        .ok_or_else(|| Failure::before_work("config.json has no decoder_start_token_id"))?;
    Ok(inputs.with_target(one(i64::from(start))?, Layout::counted(&[1])?))
}

/// The rows of a saved prompt.
fn rows(files: &AdapterFiles) -> Outcome<Option<Vec<Vec<f32>>>> {
    let Some(raw) = files.weights.get("prompt_embeddings").filter(|raw| raw.shape.len() == 2) else {
        return Ok(None);
    };
    let values = raw.to_f32().before_work()?;
    Ok(Some(values.chunks(raw.shape[1].max(1)).map(<[f32]>::to_vec).collect()))
}
