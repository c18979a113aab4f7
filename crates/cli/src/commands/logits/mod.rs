//! `engraft logits`: one forward on given tensors, for comparing engines.
//!
//! The inputs are named as in `transformers`. Words: `input_ids` [B, T] and optionally `attention_mask`,
//! `token_type_ids`, `position_ids`, and `decoder_input_ids` with their mask (see [`tokens`]); pictures: `pixel_values` [B, channels, height, width] (see
//! [`pictures`]). `adapter_ids` `[B]` says which row uses which adapter where there are several. Written is `logits` f32: [B, T, outputs], or [B, outputs] for models that answer once a row.

mod pictures;
mod tokens;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use engraft_model::token_limit;
use engraft_nn::Inputs;
use engraft_store::run::require_place;
use engraft_store::{Entry, Weights, write_safetensors};
use engraft_tensor::Tensor;

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
  engraft logits --model DIR --adapter runs/a/adapter --beside runs/b/adapter \\
      --inputs mixed.safetensors --out out.safetensors

The input file holds input_ids [B, T] and may hold attention_mask, token_type_ids, position_ids; for encoder-decoder
models also decoder_input_ids [B, U], and decoder_attention_mask; for models that read pictures it holds pixel_values [B, channels, height, width]. With --beside it holds adapter_ids [B] too:
of each row -1 for the base alone, 0 for --adapter, 1 for the first --beside, and so on; all are run in one batch. The model has the
task of --adapter, and a head of its size: where that is another size than the model's own, every row must be of an adapter that
brings its head.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Another adapter that rows of the batch may use; may be repeated
    #[arg(long, value_name = "ADAPTER", requires = "adapter")]
    beside: Vec<String>,
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
    let mut engine = Engine::load(&args.model, cx)?;
    args.beside.iter().try_for_each(|name| engine.open_beside(name, cx))?;
    given.check_users(&args.inputs, &engine)?;
    given.check_heads(&args.inputs, &engine, cx)?;
    given.tell_length(&engine, cx);
    let (values, shape) = given.logits(&args.inputs, &engine)?;
    let entry = Entry::f32("logits", &shape, &values);
    write_safetensors(&args.out, &[entry], &BTreeMap::new())?;
    cx.ui.say(&format!("logits {shape:?} written to {}", args.out.display()));
    Ok(())
}

/// What a file holds.
struct Given {
    words: Words,
    users: Option<Users>,
}

/// What the model reads.
enum Words {
    Tokens(tokens::Given),
    Pictures(pictures::Given),
}

/// Of each row the number of its adapter, or none for the base alone.
struct Users(Vec<Option<usize>>);

impl Users {
    /// `adapter_ids` `[B]`: -1 for none.
    fn read(path: &Path, file: &Weights, rows: usize) -> Outcome<Option<Users>> {
        let Some(raw) = file.get("adapter_ids") else { return Ok(None) };
        let wrong =
            |message: String| Failure::before_work(format!("{}: `adapter_ids`: {message}", path.display()));
        let ids = raw.to_i64().map_err(|e| wrong(e.to_string()))?;
        if raw.shape != [rows] {
            return Err(wrong(format!(
                "expected one number for each of the {rows} rows, found {:?}",
                raw.shape
            )));
        }
        let number = |id: i64| match id {
            -1 => Ok(None),
            id => usize::try_from(id).map(Some).map_err(|_| {
                wrong(format!("expected -1 for the base alone, or an adapter from 0, found {id}"))
            }),
        };
        ids.into_iter().map(number).collect::<Outcome<Vec<_>>>().map(|users| Some(Users(users)))
    }
}

/// The logits of these rows, each with its adapter.
fn forward(
    engine: &Engine,
    inputs: &Inputs,
    users: Option<&Users>,
    rows: Range<usize>,
) -> engraft_nn::Result<Tensor> {
    match users {
        Some(Users(users)) => engine.logits_of(inputs, &users[rows]),
        None => engine.logits(inputs),
    }
}

impl Given {
    fn read(path: &Path, cx: &Context) -> Outcome<Given> {
        let file = Weights::open_file(path, &cx.limits)?;
        let words = match (file.get("input_ids"), file.get("pixel_values")) {
            (Some(_), Some(_)) => {
                return Err(Failure::before_work(format!(
                    "{}: holds both `input_ids` and `pixel_values`; give one of them",
                    path.display()
                )));
            }
            (None, Some(pixels)) => Words::Pictures(pictures::Given::read(path, pixels)?),
            _ => Words::Tokens(tokens::Given::read(path, &file)?),
        };
        let rows = match &words {
            Words::Tokens(tokens) => tokens.rows(),
            Words::Pictures(pictures) => pictures.rows(),
        };
        Ok(Given { words, users: Users::read(path, &file, rows)? })
    }

    /// An error unless every row names an adapter that there is, and no adapter is opened for nothing.
    fn check_users(&self, path: &Path, engine: &Engine) -> Outcome {
        let count = usize::from(engine.adapter.is_some()) + engine.beside.len();
        let wrong = |message: String| Err(Failure::before_work(format!("{}: {message}", path.display())));
        match &self.users {
            None if count > 1 => wrong(format!(
                "expected a tensor `adapter_ids`, which says which row uses which of the {count} adapters (-1 for none)"
            )),
            Some(Users(users)) => {
                match users.iter().position(|user| user.is_some_and(|user| user >= count)) {
                    Some(row) => wrong(format!(
                        "`adapter_ids`: row {row} (from 0) asks for adapter {}, and {count} are given, from 0 (--adapter, then --beside)",
                        users[row].unwrap_or_default()
                    )),
                    None => Ok(()),
                }
            }
            None => Ok(()),
        }
    }

    /// An error where a row would be answered by a head made at random though the model has one, of another number of outputs than
    /// that of --adapter; a note where it has none.
    fn check_heads(&self, path: &Path, engine: &Engine, cx: &Context) -> Outcome {
        let Some(Users(users)) = &self.users else { return Ok(()) };
        let of = |(row, user): (usize, &Option<usize>)| Some((row, *user, engine.random_of(*user).next()?));
        let Some((row, user, name)) = users.iter().enumerate().find_map(of) else { return Ok(()) };
        let whose = match user {
            None => "the base alone (-1)".to_owned(),
            Some(number) => format!("adapter {number}, which brings no head"),
        };
        if Weights::open(&engine.dir, &cx.limits).before_work()?.get(name).is_none() {
            cx.ui.note(&format!(
                "row {row} (from 0) is of {whose}, and {name} is not in the model's files: its logits are of a random head"
            ));
            return Ok(());
        }
        Err(Failure::before_work(format!(
            "{}: `adapter_ids`: row {row} (from 0) is of {whose}, and the model's own head has another number of outputs than the {} \
             of --adapter's, which all rows of a batch have; compute such rows in a run of their own",
            path.display(),
            engine.model.info().outputs
        )))
    }

    /// A note where positions go beyond those that a model was made for and can be computed all the same.
    fn tell_length(&self, engine: &Engine, cx: &Context) {
        let limit = token_limit(&engine.config).filter(|limit| !limit.is_table);
        let (Words::Tokens(tokens), Some(_)) = (&self.words, limit) else { return };
        let own = engine.adapter.iter().chain(engine.beside.iter().map(|(adapter, _)| adapter));
        let rows = own.map(|adapter| adapter.prompt_rows()).max().unwrap_or(0);
        let (longest, made_for) = (tokens.longest(), engine.model.info().max_positions);
        if longest + rows > made_for {
            let also = if rows > 0 { format!(" and prompts of {rows} rows") } else { String::new() };
            cx.ui.note(&format!(
                "the inputs have up to {longest} tokens{also}, and the model was made for {made_for} positions"
            ));
        }
    }

    fn logits(&self, path: &Path, engine: &Engine) -> Outcome<Logits> {
        let (given, read) = match self.words {
            Words::Tokens(_) => ("input_ids", false),
            Words::Pictures(_) => ("pixel_values", true),
        };
        let wanted = if engine.model.info().picture.is_some() { "pixel_values" } else { "input_ids" };
        if read != engine.model.info().picture.is_some() {
            return Err(Failure::before_work(format!(
                "{}: expected a tensor `{wanted}`, which this model reads, found `{given}`",
                path.display()
            )));
        }
        match &self.words {
            Words::Tokens(tokens) => tokens.logits(engine, self.users.as_ref()),
            Words::Pictures(pictures) => pictures.logits(engine, self.users.as_ref()),
        }
    }
}
