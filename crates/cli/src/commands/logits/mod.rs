//! `engraft logits`: one forward on given tensors, for comparing engines.
//!
//! The inputs are named as in `transformers`. Words: `input_ids` [B, T] and optionally `attention_mask`,
//! `token_type_ids`, `position_ids`, and `decoder_input_ids` with their mask (see [`tokens`]); pictures: `pixel_values` [B, channels, height, width] (see
//! [`pictures`]). Written is `logits` f32: [B, T, outputs], or [B, outputs] for models that answer once a row.

mod pictures;
mod tokens;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engraft_store::run::require_place;
use engraft_store::{Entry, Weights, write_safetensors};

use crate::context::Context;
use crate::engine::{Engine, ModelArgs};
use crate::failure::{BeforeWork, Failure, Outcome};

pub use tokens::pack;

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft logits --model DIR --inputs in.safetensors --out out.safetensors
  engraft logits --model DIR --adapter runs/a/adapter \\
      --inputs in.safetensors --out out.safetensors --dtype bf16
  engraft logits --model DIR --adapter runs/a/adapter --choose eval_rank=4 \\
      --inputs in.safetensors --out out.safetensors

The input file holds input_ids [B, T] and may hold attention_mask, token_type_ids, position_ids; for encoder-decoder
models also decoder_input_ids [B, U], and decoder_attention_mask; for models that read pictures it holds pixel_values [B, channels, height, width].")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A safetensors file with the inputs
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
    /// The safetensors file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Values with their shape.
type Logits = (Vec<f32>, Vec<usize>);

/// Computes and writes the logits.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    require_place(&args.out).before_work()?;
    let given = Given::read(&args.inputs, cx).before_work()?;
    let engine = Engine::load(&args.model, cx)?;
    let (values, shape) = given.logits(&args.inputs, &engine)?;
    let entry = Entry::f32("logits", &shape, &values);
    write_safetensors(&args.out, &[entry], &BTreeMap::new())?;
    cx.ui.say(&format!("logits {shape:?} written to {}", args.out.display()));
    Ok(())
}

/// What a file holds.
enum Given {
    Tokens(tokens::Given),
    Pictures(pictures::Given),
}

impl Given {
    fn read(path: &Path, cx: &Context) -> Outcome<Given> {
        let file = Weights::open_file(path, &cx.limits)?;
        match (file.get("input_ids"), file.get("pixel_values")) {
            (Some(_), Some(_)) => Err(Failure::before_work(format!(
                "{}: holds both `input_ids` and `pixel_values`; give one of them",
                path.display()
            ))),
            (None, Some(pixels)) => Ok(Given::Pictures(pictures::Given::read(path, pixels)?)),
            _ => Ok(Given::Tokens(tokens::Given::read(path, &file)?)),
        }
    }

    fn logits(&self, path: &Path, engine: &Engine) -> Outcome<Logits> {
        let (given, read) = match self {
            Given::Tokens(_) => ("input_ids", false),
            Given::Pictures(_) => ("pixel_values", true),
        };
        let wanted = if engine.model.info().picture.is_some() { "pixel_values" } else { "input_ids" };
        if read != engine.model.info().picture.is_some() {
            return Err(Failure::before_work(format!(
                "{}: expected a tensor `{wanted}`, which this model reads, found `{given}`",
                path.display()
            )));
        }
        match self {
            Given::Tokens(tokens) => tokens.logits(engine),
            Given::Pictures(pictures) => pictures.logits(engine),
        }
    }
}
