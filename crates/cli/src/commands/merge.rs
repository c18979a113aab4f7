//! `engraft merge`: a plain model directory with the adapter folded in, and what that changed.
//!
//! The directory is made aside and renamed when whole. Then it is loaded like any other model, and its logits on a few
//! texts are compared with those of base and adapter side by side.

use std::path::{Path, PathBuf};

use engraft_data::{Example, Tokenizer};
use engraft_model::LoadOptions;
use engraft_nn::{Init, Inputs, Picture, Task};
use engraft_report::human;
use engraft_store::{Weights, python_json, write_atomic, write_model};
use serde_json::json;

use super::logits::pack;
use crate::context::Context;
use crate::engine::{Dtype, Engine, ModelArgs};
use crate::failure::{BeforeWork, Failure, Outcome};
use crate::merge::Merge;

/// Texts on which the merged model is compared when none are given.
const PROBES: [&str; 6] = [
    "Once upon a time there was a little girl who lived near the sea with her old grandfather.",
    "The committee has reviewed your application and will write to you before the end of the month.",
    "Water boils at 100 degrees Celsius at sea level, and at a lower temperature in the mountains.",
    "I cannot log in since this morning; my password seems to have expired over the weekend.",
    "def add(a, b):\n    return a + b\n",
    "The ship left the harbour at dawn, and nobody on board knew where the captain meant to go.",
];
/// Tokens of a probe.
const PROBE_TOKENS: usize = 256;
/// Files of a model directory that hold weights in some form and are not copied.
const WEIGHT_ENDS: [&str; 10] =
    ["safetensors", "bin", "pt", "pth", "h5", "msgpack", "onnx", "gguf", "ot", "safetensors.index.json"];

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft merge --model DIR --adapter runs/a/adapter --out merged
  engraft merge --model DIR --adapter runs/a/adapter --out merged \\
    --probe held-out.txt --json")]
pub struct Args {
    /// A model directory in Hugging Face form, or a Hub id
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// An adapter directory, or a Hub id
    #[arg(long, value_name = "ADAPTER")]
    adapter: String,
    /// The directory to write; it must not exist or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A text file, a text a line, on which merged and adapted model are compared
    #[arg(long, value_name = "FILE")]
    probe: Option<PathBuf>,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// Merges, then compares.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    refuse_full(&args.out)?;
    let model = ModelArgs {
        model: args.model.clone(),
        adapter: Some(args.adapter.clone()),
        dtype: Dtype::F32,
        quantize: None,
    };
    let engine = Engine::load(&model, cx)?;
    let probes = probes(args, &engine).before_work()?;
    let adapted = measure(&engine, &probes)?;

    let (changed, untied, added, bytes) = write(&engine, &args.out, cx)?;
    let (options, task) =
        (LoadOptions { limits: cx.limits.clone(), ..LoadOptions::default() }, engine.model.info().task);
    drop(engine);
    let merged = Engine::open(&args.out, &LoadOptions { task: Some(task), ..options }, cx)?;
    let merged = measure(&merged, &probes)?;
    let change = largest_difference(&adapted.logits, &merged.logits);
    let perplexity = |measured: &Measured| measured.loss.map(f64::exp);
    if args.json {
        cx.ui.json(json!({
            "out": args.out.display().to_string(), "merged": changed, "bytes": bytes, "untied": untied, "added": added,
            "largest_logit": adapted.largest(), "largest_logit_change": change,
            "perplexity_before": perplexity(&adapted), "perplexity_after": perplexity(&merged),
        }));
        return Ok(());
    }
    let mut line = format!("{changed} weights merged; largest logit change {}", human::number(change, 2));
    if let (Some(before), Some(after)) = (perplexity(&adapted), perplexity(&merged)) {
        line.push_str(&format!("; perplexity {before:.2} → {after:.2}"));
    }
    cx.ui.print(&format!("{line}\n"));
    if let Some(name) = untied {
        cx.ui.note(&format!("{name} has a tensor of its own now: it and the embedding changed differently"));
    }
    cx.ui.say(&format!("{} in {}", human::bytes(bytes), args.out.display()));
    let next = if task == Task::CausalLm { "generate --prompt '…' --model" } else { "inspect" };
    cx.ui.say(&format!("next  engraft {next} {}", args.out.display()));
    Ok(())
}

fn refuse_full(out: &Path) -> Outcome {
    let is_empty = |dir: &Path| std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    if out.symlink_metadata().is_ok() && !is_empty(out) {
        let message = format!("{} exists and is not an empty directory; choose another --out", out.display());
        return Err(Failure::before_work(message));
    }
    Ok(())
}

/// Writes the merged model beside `out` and renames it: (changed tensors, untied head, added tensors, bytes).
fn write(engine: &Engine, out: &Path, cx: &Context) -> Outcome<(usize, Option<String>, Vec<String>, u64)> {
    let adapter =
        engine.adapter.as_deref().ok_or_else(|| Failure::before_work("there is no adapter to merge"))?;
    let weights = Weights::open(&engine.dir, &cx.limits).before_work()?;
    let merge = Merge::new(engine, adapter, &weights)?;
    let name = out.file_name().ok_or_else(|| Failure::before_work("--out needs the name of a directory"))?;
    let aside = out.with_file_name(format!(".{}.tmp-{}", name.to_string_lossy(), std::process::id()));
    let io = |action: &'static str, path: &Path| {
        let path = path.to_owned();
        move |e| engraft_store::Error::io(action, &path, e)
    };
    std::fs::create_dir_all(&aside).map_err(io("create", &aside)).before_work()?;
    let filled = fill(engine, &merge, &weights, &aside);
    let moved = filled.and_then(|bytes| {
        if out.is_dir() {
            std::fs::remove_dir(out).map_err(io("replace", out))?;
        }
        std::fs::rename(&aside, out).map_err(io("rename to", out))?;
        let above = out.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::File::open(above).and_then(|dir| dir.sync_all()).map_err(io("sync", above))?;
        Ok(bytes)
    });
    if moved.is_err() {
        // What is left aside is of no use; if it cannot be removed either, the first error is the one to show.
        let _ = std::fs::remove_dir_all(&aside);
    }
    Ok((merge.changed, merge.untied.clone(), merge.added.clone(), moved?))
}

/// All files of the merged model in `dir`; gives the bytes of its weights.
fn fill(engine: &Engine, merge: &Merge<'_>, weights: &Weights, dir: &Path) -> Outcome<u64> {
    copy_others(&engine.dir, dir)?;
    let config = python_json(&merge.config(engine)) + "\n";
    write_atomic(&dir.join("config.json"), config.as_bytes())?;
    // A sharded model stays sharded, in pieces no larger than it had.
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |meta| meta.len());
    let shard = match weights.files() {
        [_] => u64::MAX,
        files => files.iter().map(size).max().unwrap_or(u64::MAX),
    };
    merge.finish(write_model(dir, &merge.entries()?, shard))?;
    let files = Weights::open(dir, &engraft_store::Limits::default())?;
    Ok(files.files().iter().map(size).sum())
}

/// Copies what is neither weights nor hidden: tokenizer, templates, licence, pooling.
fn copy_others(from: &Path, to: &Path) -> Outcome {
    let io = |action: &'static str, path: &Path| {
        let path = path.to_owned();
        move |e| engraft_store::Error::io(action, &path, e)
    };
    for entry in std::fs::read_dir(from).map_err(io("read", from))? {
        let entry = entry.map_err(io("read", from))?;
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if name.starts_with('.')
            || name == "config.json"
            || WEIGHT_ENDS.iter().any(|end| name.ends_with(&format!(".{end}")))
        {
            continue;
        }
        // Follows links: in the Hub's cache every file is one.
        let target = to.join(&name);
        if path.is_file() {
            std::fs::copy(&path, &target).map_err(io("copy", &path))?;
        } else if path.is_dir() && path.join("config.json").is_file() {
            std::fs::create_dir(&target).map_err(io("create", &target))?;
            std::fs::copy(path.join("config.json"), target.join("config.json")).map_err(io("copy", &path))?;
        }
    }
    Ok(())
}

/// Logits and loss on the probes.
struct Measured {
    logits: Vec<f32>,
    /// Mean loss of the next token; for models that predict it and texts that are words.
    loss: Option<f64>,
}

impl Measured {
    fn largest(&self) -> f64 {
        self.logits.iter().fold(0.0, |most, x| f64::max(most, f64::from(x.abs())))
    }
}

/// What merged and adapted model are compared on.
enum Probes {
    /// Token ids, and whether they are text.
    Tokens { examples: Vec<Example>, is_text: bool },
    /// Pictures of noise.
    Pictures(Box<Inputs>),
}

fn probes(args: &Args, engine: &Engine) -> Outcome<Probes> {
    let example = |ids: Vec<u32>| Example { ids, ..Example::default() };
    if let Some(Picture { channels, height, width }) = engine.model.info().picture {
        let shape = [4, channels, height, width];
        let inputs = Inputs::pixels(Init::Normal(1.0).tensor(&shape, 0, "probes")?)?;
        return Ok(Probes::Pictures(Box::new(inputs)));
    }
    if !engine.dir.join("tokenizer.json").is_file() {
        // Without a tokenizer any ids show whether the logits agree; they say nothing of perplexity.
        let vocabulary = engine.model.info().vocabulary as u64;
        let mut random = engraft_data::rng::Random::new(0, 0, 0);
        let mut ids = || (0..16).map(|_| random.below(vocabulary) as u32).collect();
        return Ok(Probes::Tokens { examples: (0..4).map(|_| example(ids())).collect(), is_text: false });
    }
    let tokenizer = Tokenizer::open(&engine.dir)?;
    let text = match &args.probe {
        Some(path) => {
            let bytes = engraft_store::json::read_capped(path, "config_json", 4 << 20)?;
            String::from_utf8(bytes)
                .map_err(|_| Failure::before_work(format!("{} is not UTF-8", path.display())))?
        }
        None => PROBES.join("\u{0}"),
    };
    let separator = if args.probe.is_some() { '\n' } else { '\u{0}' };
    let limit = engine.model.info().max_positions.min(PROBE_TOKENS);
    let mut examples = Vec::new();
    for line in text.split(separator).filter(|line| !line.trim().is_empty()).take(64) {
        examples.push(example(tokenizer.encode_cut(line, None, limit)?.0.ids));
    }
    examples.retain(|e| e.ids.len() > 1);
    if examples.is_empty() {
        return Err(Failure::before_work("the probe file holds no text; give it a few lines"));
    }
    Ok(Probes::Tokens { examples, is_text: true })
}

fn measure(engine: &Engine, probes: &Probes) -> Outcome<Measured> {
    let info = engine.model.info();
    let (examples, is_text) = match probes {
        Probes::Pictures(inputs) => {
            return Ok(Measured { logits: engine.logits(inputs)?.to_vec()?, loss: None });
        }
        Probes::Tokens { examples, is_text } => (examples, *is_text),
    };
    let (mut logits, mut loss, mut count) = (Vec::new(), 0.0, 0usize);
    for example in examples {
        let inputs = pack(std::slice::from_ref(example))?;
        // A decoder is given the same text as its encoder.
        let inputs = match info.task {
            Task::Seq2Seq => {
                let (ids, layout) = (inputs.ids()?.clone(), inputs.layout.clone());
                inputs.with_target(ids, layout)
            }
            _ => inputs,
        };
        let rows = engine.logits(&inputs)?.to_vec()?;
        if info.task == Task::CausalLm {
            let next = example.ids.iter().skip(1);
            for (row, id) in rows.chunks_exact(info.outputs).zip(next) {
                loss += negative_log_likelihood(row, *id as usize);
                count += 1;
            }
        }
        logits.extend(rows);
    }
    let loss = (is_text && count > 0).then(|| loss / count as f64);
    Ok(Measured { logits, loss })
}

/// −log softmax of `row` at `id`, in f64.
fn negative_log_likelihood(row: &[f32], id: usize) -> f64 {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
    sum.ln() - f64::from(row.get(id).copied().unwrap_or(largest) - largest)
}

fn largest_difference(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).fold(0.0, |most, (a, b)| f64::max(most, f64::from((a - b).abs())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_is_minus_log_softmax() {
        let row = [1.0f32, 2.0, 3.0];
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        assert!((negative_log_likelihood(&row, 0) - (sum.ln() - 1.0)).abs() < 1e-6);
    }

    #[test]
    fn a_directory_with_anything_in_it_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(refuse_full(dir.path()).is_ok() && refuse_full(&dir.path().join("new")).is_ok());
        std::fs::write(dir.path().join("x"), "").unwrap();
        assert!(refuse_full(dir.path()).is_err());
        assert!(refuse_full(&dir.path().join("x")).is_err());
    }
}
