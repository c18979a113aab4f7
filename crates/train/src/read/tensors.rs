//! `format = "tensors"`: arrays that were made elsewhere, for comparing engines.

use std::path::Path;

use engraft_data::{Dataset, Labels, PixelTensors, Seq2SeqTensors, Tensors};
use engraft_recipe::Task;
use engraft_store::{Dtype, Limits, Weights};

use super::{Examples, Read, Reading, at, hold_out};
use crate::{Error, Result};

impl Reading<'_> {
    pub(super) fn tensors(&self) -> Read<Examples> {
        let shifted = self.task == Task::CausalLm;
        let mut train = at("data.path", self.tensor_file(&self.data.path, shifted))?;
        let mut eval = None;
        if let Some(path) = &self.data.eval_path {
            eval = Some(at("data.eval_path", self.tensor_file(path, shifted))?);
        } else if let Some(fraction) = self.data.eval_fraction {
            eval = Some(at("data.eval_fraction", hold_out(&mut train, fraction, self.seed, shifted))?);
        }
        let class = matches!(
            self.task,
            Task::SequenceClassification | Task::TokenClassification | Task::ImageClassification
        );
        let all = train.examples.iter().chain(eval.iter().flat_map(|e| &e.examples));
        let highest = all.filter_map(|e| match &e.labels {
            Labels::Class(class) => Some(i64::from(*class)),
            Labels::Tokens(labels) => labels.iter().copied().max(),
            _ => None,
        });
        let classes = highest.max().filter(|_| class).map(|highest| (highest + 1).max(1) as usize);
        Ok(Examples { train, eval, labels: self.data.labels.clone().filter(|_| class), classes })
    }

    /// `input_ids`, `attention_mask`, `token_type_ids`, `labels` of a safetensors file.
    fn tensor_file(&self, path: &Path, shifted: bool) -> Result<Dataset> {
        let file = Weights::open_file(path, &Limits::default())?;
        if file.get("pixel_values").is_some() {
            classes_not_scores(&file)?;
            return pixel_file(&file);
        }
        let ids = file.get("input_ids").ok_or_else(|| {
            let names: Vec<&str> = file.names().take(10).collect();
            Error::Setup(format!("{} holds no `input_ids` (there: {})", path.display(), names.join(", ")))
        })?;
        let [rows, width] = ids.shape[..] else {
            let text = format!("{}: input_ids must be [rows, tokens], found {:?}", path.display(), ids.shape);
            return Err(Error::Setup(text));
        };
        classes_not_scores(&file)?;
        let array = |name: &str| file.get(name).map(|t| t.to_i64()).transpose();
        let (mask, types, labels) = (array("attention_mask")?, array("token_type_ids")?, array("labels")?);
        let tasks = array("task_ids")?;
        if labels.is_none() {
            return Err(Error::Setup(format!(
                "{} holds no `labels`, so there is nothing to learn",
                path.display()
            )));
        }
        let tensors = Tensors {
            rows,
            width,
            input_ids: &ids.to_i64()?,
            attention_mask: mask.as_deref(),
            token_type_ids: types.as_deref(),
            labels: labels.as_deref(),
            task_ids: tasks.as_deref(),
        };
        if self.task != Task::Seq2Seq {
            return Ok(tensors.dataset(shifted, self.data.allow_empty)?);
        }
        let (given, mask) = (array("decoder_input_ids")?, array("decoder_attention_mask")?);
        let pairs = Seq2SeqTensors {
            source: Tensors { labels: None, ..tensors },
            labels_shape: file.get("labels").map_or(&[], |labels| &labels.shape),
            labels: labels.as_deref().unwrap_or_default(),
            decoder_input_ids: given.as_deref(),
            decoder_attention_mask: mask.as_deref(),
        };
        Ok(pairs.dataset(self.data.allow_empty)?)
    }
}

/// An error for labels of a type that only scores have.
fn classes_not_scores(file: &Weights) -> Result<()> {
    let float = |dtype| matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16);
    match file.get("labels") {
        Some(labels) if float(labels.dtype) => Err(Error::Setup(format!(
            "expected classes in `labels` (I64 or I32), found {}: scores, and regression is not trained yet",
            labels.dtype
        ))),
        _ => Ok(()),
    }
}

/// `pixel_values` and `labels` of a safetensors file.
fn pixel_file(file: &Weights) -> Result<Dataset> {
    let absent =
        |name: &str| Error::Setup(format!("the file holds no `{name}`, so there is nothing to learn"));
    let pixels = file.get("pixel_values").ok_or_else(|| absent("pixel_values"))?;
    let labels = file.get("labels").ok_or_else(|| absent("labels"))?;
    let tensors = PixelTensors {
        shape: &pixels.shape,
        pixel_values: pixels.to_f32()?,
        labels_shape: &labels.shape,
        labels: Some(&labels.to_i64()?),
    };
    Ok(tensors.dataset()?)
}
