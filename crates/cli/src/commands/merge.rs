//! `engraft merge`: a plain model directory with the adapter folded in, and what that changed.
//!
//! The directory is made aside and renamed when whole. Then it is loaded like any other model, and its logits on a few
//! texts are compared with those of base and adapter side by side.

use std::path::{Path, PathBuf};

use engraft_model::LoadOptions;
use engraft_nn::Task;
use engraft_report::human;
use engraft_store::run::require_writable;
use engraft_store::{Weights, python_json, write_atomic, write_model};
use serde_json::json;

use crate::context::Context;
use crate::engine::{Choice, Dtype, Engine, ModelArgs};
use crate::failure::{BeforeWork, Failure, Outcome};
use crate::merge::Merge;
use crate::probe::{self, Measured, Probes, largest_difference};

/// Files of a model directory that hold weights in some form and are not copied.
const WEIGHT_ENDS: [&str; 10] =
    ["safetensors", "bin", "pt", "pth", "h5", "msgpack", "onnx", "gguf", "ot", "safetensors.index.json"];

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft merge --model DIR --adapter runs/a/adapter --out merged
  engraft merge --model DIR --adapter runs/a/adapter --out merged --dtype bf16
  engraft merge --model DIR --adapter runs/a/adapter --out merged \\
    --choose eval_rank=4
  engraft merge --model DIR --adapter runs/a/adapter --out merged \\
    --probe held-out.txt --json")]
pub struct Args {
    /// A model directory in Hugging Face form, or a Hub id
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// An adapter directory, or a Hub id
    #[arg(long, value_name = "ADAPTER")]
    adapter: String,
    /// Chooses anew what the adapter leaves open, such as eval_rank=4; `engraft methods NAME` tells what that is
    #[arg(long, value_name = "SETTING=VALUE")]
    choose: Vec<Choice>,
    /// The directory to write; it must not exist or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Type of the written numbers; that of the base's files if left out
    #[arg(long, value_enum, value_name = "TYPE")]
    dtype: Option<WrittenType>,
    /// A text file, a text a line, on which merged and adapted model are compared: 64 lines at most, 256 tokens of each
    #[arg(long, value_name = "FILE")]
    probe: Option<PathBuf>,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// What numbers may be written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum WrittenType {
    /// 32 bits
    F32,
    /// bfloat16
    Bf16,
    /// 16 bits, up to 65504
    F16,
}

impl WrittenType {
    fn dtype(self) -> engraft_store::Dtype {
        match self {
            WrittenType::F32 => engraft_store::Dtype::F32,
            WrittenType::Bf16 => engraft_store::Dtype::BF16,
            WrittenType::F16 => engraft_store::Dtype::F16,
        }
    }
}

/// Merges, then compares.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    refuse_full(&args.out)?;
    probe::check(args.probe.as_deref(), &cx.resolve(&args.model)?)?;
    let model = ModelArgs {
        drop_layers: None,
        choose: args.choose.clone(),
        model: args.model.clone(),
        adapter: Some(args.adapter.clone()),
        dtype: Dtype::F32,
        quantize: None,
    };
    let engine = Engine::load(&model, cx)?;
    let probes = Probes::of(args.probe.as_deref(), &engine, cx)?;
    let adapted = probes.measure(&engine)?;

    let (changed, untied, added, bytes) = write(&engine, args, cx)?;
    let (options, task) =
        (LoadOptions { limits: cx.limits.clone(), ..LoadOptions::default() }, engine.model.info().task);
    drop(engine);
    let merged = Engine::open(&args.out, &LoadOptions { task: Some(task), ..options }, cx);
    if merged.is_err() {
        // What cannot be loaded is of no use; if it cannot be removed either, the first error is the one to show.
        let _ = std::fs::remove_dir_all(&args.out);
    }
    let merged = merged?;
    let merged = probes.measure(&merged)?;
    if !merged.largest().is_finite() {
        let before = if adapted.largest().is_finite() { "are" } else { "are not either" };
        return Err(Failure::running(format!(
            "the logits of {} are not finite; those of the base with the adapter beside it {before}",
            args.out.display()
        )));
    }
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

/// Refuses a place that holds something, or that cannot be made and written.
pub(super) fn refuse_full(out: &Path) -> Outcome {
    let is_empty = |dir: &Path| std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    if out.symlink_metadata().is_ok() && !is_empty(out) {
        let message = format!("{} exists and is not an empty directory; choose another --out", out.display());
        return Err(Failure::before_work(message));
    }
    require_writable(out).before_work()
}

/// Writes the merged model beside `out` and renames it: (changed tensors, untied head, added tensors, bytes).
fn write(engine: &Engine, args: &Args, cx: &Context) -> Outcome<(usize, Option<String>, Vec<String>, u64)> {
    let adapter =
        engine.adapter.as_deref().ok_or_else(|| Failure::before_work("there is no adapter to merge"))?;
    let weights = Weights::open(&engine.dir, &cx.limits).before_work()?;
    let (merge, out) =
        (Merge::new(engine, adapter, &weights, args.dtype.map(WrittenType::dtype))?, args.out.as_path());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_with_anything_in_it_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(refuse_full(dir.path()).is_ok() && refuse_full(&dir.path().join("new")).is_ok());
        std::fs::write(dir.path().join("x"), "").unwrap();
        assert!(refuse_full(dir.path()).is_err());
        assert!(refuse_full(&dir.path().join("x")).is_err());
    }
}
