//! Words: `input_ids` [B, T] and optionally `attention_mask`, `token_type_ids`, `position_ids`, and `task_ids` `[B]`,
//! all of whole numbers.
//!
//! Masked places are dropped and every token keeps its column as its position, so that a row gives the same logits
//! whichever side it is padded on. Logits are [B, T, outputs] with zeros at masked places, or [B, outputs] for models that
//! answer once a row. Rows of virtual tokens are left out.
//!
//! Encoder–decoder models also read `decoder_input_ids` [B, U] and optionally `decoder_attention_mask`; their logits are
//! [B, U, outputs].

use std::ops::Range;
use std::path::{Path, PathBuf};

use engraft_data::{Example, Tensors};
use engraft_nn::{Inputs, Layout, Task};
use engraft_store::Weights;
use engraft_tensor::Tensor;

use super::{Logits, Users, forward};
use crate::engine::Engine;
use crate::failure::{Failure, Outcome};

/// Most tokens of one forward, so that a large file does not need memory for all of it at once.
const TOKENS_MAX: usize = 16_384;
/// Most logits of one forward (1 GiB).
const LOGITS_MAX: usize = 1 << 28;

/// The inputs as read: one example a row, and the width of a padded row.
pub(super) struct Given {
    path: PathBuf,
    examples: Vec<Example>,
    /// Column of each token, by example.
    columns: Vec<Vec<usize>>,
    width: usize,
    /// Whether `position_ids` were given.
    positioned: bool,
    /// What the decoder reads, a row for each of these.
    target: Option<Box<Given>>,
}

impl Given {
    pub(super) fn read(path: &Path, file: &Weights) -> Outcome<Given> {
        let mut given = Self::side(path, file, "")?;
        if file.get("decoder_input_ids").is_some() {
            let target = Self::side(path, file, "decoder_")?;
            let (expected, found) = (given.examples.len(), target.examples.len());
            if expected != found {
                return Err(Failure::before_work(format!(
                    "{}: expected `decoder_input_ids` with {expected} rows, as many as `input_ids`, found {found}",
                    path.display()
                )));
            }
            given.target = Some(Box::new(target));
        }
        Ok(given)
    }

    /// The tensors whose names begin with `before`.
    fn side(path: &Path, file: &Weights, before: &str) -> Outcome<Given> {
        let find = |name: &str| -> Outcome<Option<(Vec<i64>, Vec<usize>)>> {
            let name = format!("{before}{name}");
            let Some(raw) = file.get(&name) else { return Ok(None) };
            let values = raw
                .to_i64()
                .map_err(|e| Failure::before_work(format!("{}: `{name}`: {e}", path.display())))?;
            Ok(Some((values, raw.shape.clone())))
        };
        let (ids, shape) = find("input_ids")?.ok_or_else(|| {
            let names = file.names().take(10).collect::<Vec<_>>().join(", ");
            Failure::before_work(format!("{}: expected a tensor `input_ids`, found {names}", path.display()))
        })?;
        let [rows, width] = shape[..] else {
            let message = format!(
                "{}: expected `{before}input_ids` of shape [rows, tokens], found {shape:?}",
                path.display()
            );
            return Err(Failure::before_work(message));
        };
        let side = |name: &str| -> Outcome<Option<Vec<i64>>> {
            match find(name)? {
                Some((_, found)) if found != shape => {
                    let message = format!(
                        "{}: expected `{before}{name}` of shape {shape:?}, found {found:?}",
                        path.display()
                    );
                    Err(Failure::before_work(message))
                }
                found => Ok(found.map(|(values, _)| values)),
            }
        };
        let (mask, types) = (side("attention_mask")?, side("token_type_ids")?);
        let positions = side("position_ids")?;
        if let Some(at) = mask.iter().flatten().position(|value| !matches!(value, 0 | 1)) {
            let found = mask.iter().flatten().nth(at).copied().unwrap_or_default();
            return Err(Failure::before_work(format!(
                "{}: `{before}attention_mask`: expected 0 or 1, found {found} in row {}, column {} (from 0)",
                path.display(),
                at / width.max(1),
                at % width.max(1)
            )));
        }
        let tasks = find("task_ids")?;
        let tensors = Tensors {
            rows,
            width,
            input_ids: &ids,
            attention_mask: mask.as_deref(),
            token_type_ids: types.as_deref(),
            labels: None,
            task_ids: tasks.as_ref().map(|(tasks, _)| &tasks[..]),
        };
        let mut examples = tensors.dataset(false, true)?.examples;
        let kept =
            |row: usize, column: &usize| mask.as_ref().is_none_or(|mask| mask[row * width + column] != 0);
        let columns: Vec<Vec<usize>> =
            (0..rows).map(|row| (0..width).filter(|column| kept(row, column)).collect()).collect();
        if let Some(positions) = &positions {
            for (row, (example, columns)) in examples.iter_mut().zip(&columns).enumerate() {
                example.positions = Some(
                    columns.iter().map(|c| position(positions[row * width + c])).collect::<Outcome<_>>()?,
                );
            }
        }
        let positioned = positions.is_some();
        Ok(Given { path: path.to_owned(), examples, columns, width, positioned, target: None })
    }

    /// Refuses ids that the model's embedding does not have.
    fn check_ids(&self, vocabulary: usize) -> Outcome {
        for (row, (example, columns)) in self.examples.iter().zip(&self.columns).enumerate() {
            let bad = example.ids.iter().zip(columns).find(|(id, _)| **id as usize >= vocabulary);
            if let Some((id, column)) = bad {
                return Err(Failure::before_work(format!(
                    "{}: `input_ids`: expected ids below {vocabulary}, found {id} in row {row}, column {column} (from 0)",
                    self.path.display()
                )));
            }
        }
        Ok(())
    }

    /// The tokens of the longest row.
    pub(super) fn longest(&self) -> usize {
        self.examples.iter().map(|example| example.ids.len()).max().unwrap_or(0)
    }

    pub(super) fn rows(&self) -> usize {
        self.examples.len()
    }

    /// All logits with their shape.
    pub(super) fn logits(&self, engine: &Engine, users: Option<&Users>) -> Outcome<Logits> {
        let info = engine.model.info();
        self.check_sides(info.task)?;
        self.check_ids(info.vocabulary)?;
        let answering = self.target.as_deref().unwrap_or(self);
        answering.check_ids(info.vocabulary)?;
        let (rows, outputs) = (self.examples.len(), info.outputs);
        let by_row = info.task.per_sequence();
        let width = answering.width;
        let shape = if by_row { vec![rows, outputs] } else { vec![rows, width, outputs] };
        let size = shape.iter().try_fold(1usize, |size, n| size.checked_mul(*n)).ok_or_else(|| {
            Failure::before_work(format!("logits of shape {shape:?} do not fit into memory; give fewer rows"))
        })?;
        let mut values = vec![0.0; size];
        let most = (LOGITS_MAX / outputs.max(1)).clamp(1, TOKENS_MAX);
        let mut first = 0;
        while first < rows {
            let last = first + self.rows_within(first, most);
            let part = forward(engine, &self.padded(first..last)?, users, first..last)?.to_vec()?;
            if by_row {
                values[first * outputs..last * outputs].copy_from_slice(&part);
            } else {
                let places =
                    (first..last).flat_map(|row| answering.columns[row].iter().map(move |c| row * width + c));
                for (place, logits) in places.zip(part.chunks_exact(outputs)) {
                    values[place * outputs..(place + 1) * outputs].copy_from_slice(logits);
                }
            }
            first = last;
        }
        Ok((values, shape))
    }

    /// An error unless there are decoder inputs just where the model reads them.
    fn check_sides(&self, task: Task) -> Outcome {
        let message = match (task == Task::Seq2Seq, self.target.is_some()) {
            (true, false) => {
                "expected a tensor `decoder_input_ids` beside `input_ids`, which this model needs"
            }
            (false, true) => "holds `decoder_input_ids`, which this model does not read; leave them out",
            _ => return Ok(()),
        };
        Err(Failure::before_work(format!("{}: {message}", self.path.display())))
    }

    /// The rows packed, with the length that they had; given positions say all that there is.
    fn padded(&self, rows: Range<usize>) -> engraft_nn::Result<Inputs> {
        let inputs = pack(&self.examples[rows.clone()])?;
        let layout = if self.positioned { inputs.layout } else { inputs.layout.with_columns(self.width) };
        let inputs = Inputs { layout, ..inputs };
        let Some(target) = &self.target else { return Ok(inputs) };
        let target = target.padded(rows)?;
        Ok(inputs.with_target(target.ids()?.clone(), target.layout))
    }

    /// How many rows from `first` on hold at most `most` tokens; at least one.
    fn rows_within(&self, first: usize, most: usize) -> usize {
        let mut tokens = 0;
        let of = |given: &Given, row: usize| given.columns[row].len();
        let fits = (first..self.columns.len()).take_while(|&row| {
            tokens += of(self, row) + self.target.as_deref().map_or(0, |target| of(target, row));
            tokens <= most
        });
        fits.count().max(1)
    }
}

fn position(value: i64) -> Outcome<u32> {
    u32::try_from(value).map_err(|_| {
        Failure::before_work(format!("`position_ids`: expected whole numbers from 0, found {value}"))
    })
}

/// Examples one after another, without padding.
pub fn pack(examples: &[Example]) -> engraft_nn::Result<Inputs> {
    let lengths: Vec<usize> = examples.iter().map(|e| e.ids.len()).collect();
    let tokens: usize = lengths.iter().sum();
    let ids = examples.iter().flat_map(|e| e.ids.iter().map(|id| i64::from(*id))).collect();
    let positions = examples.iter().flat_map(|e| match &e.positions {
        Some(positions) => positions.iter().map(|p| *p as i32).collect::<Vec<_>>(),
        None => (0..e.ids.len() as i32).collect(),
    });
    let layout = Layout::new(&lengths, positions.collect())?;
    let types = |e: &Example| match &e.type_ids {
        Some(types) => types.iter().map(|t| i64::from(*t)).collect(),
        None => vec![0; e.ids.len()],
    };
    let type_ids = match examples.iter().any(|e| e.type_ids.is_some()) {
        true => Some(Tensor::from_i64(examples.iter().flat_map(types).collect(), [tokens])?),
        false => None,
    };
    let layout = match examples.iter().any(|e| e.task.is_some()) {
        true => layout.with_tasks(examples.iter().map(|e| e.task.unwrap_or(0)).collect()),
        false => layout,
    };
    Ok(Inputs::tokens(Tensor::from_i64(ids, [tokens])?, type_ids, layout))
}
