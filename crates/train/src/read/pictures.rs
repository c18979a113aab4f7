//! Pictures with classes, processed as the model's `preprocessor_config.json` says.

use std::path::Path;

use engraft_data::{
    Dataset, ImageSource, Need, PictureModel, Processor, Task as DataTask, read, read_images,
};
use engraft_recipe as recipe;
use serde_json::Value;

use super::{Examples, Read, Reading, at, hold_out};
use crate::{Error, Result, names};

impl Reading<'_> {
    /// Training and evaluation pictures.
    pub(super) fn pictures(&self) -> Read<Examples> {
        let set = |path: &Path, labels_path, names| self.picture_set(path, labels_path, names);
        let first = |names| set(&self.data.path, self.data.labels_path.as_deref(), names);
        let known = self.known.filter(|_| self.data.labels.is_none());
        // Numbers mean the model's classes where it has so many; names are compared with its own.
        let numbered = matches!(self.data.format, recipe::Format::Idx | recipe::Format::Npy);
        let found = match known.filter(|_| numbered) {
            Some(known) => first(Some(known.clone())).or_else(|_| first(None)),
            None => first(self.data.labels.clone()),
        };
        let mut train = at("data.path", found)?;
        if let Some(known) = known {
            at("data.path", names::settle(&mut train, known))?;
        }
        let labels = train.labels.clone();
        let mut eval = None;
        if let Some(path) = &self.data.eval_path {
            let labels_path = self.data.eval_labels_path.as_deref();
            eval = Some(at("data.eval_path", set(path, labels_path, labels.clone()))?);
        } else if let Some(fraction) = self.data.eval_fraction {
            eval = Some(at("data.eval_fraction", hold_out(&mut train, fraction, self.seed, false))?);
        }
        for (key, part) in [("data.path", Some(&train)), ("data.eval_path", eval.as_ref())] {
            if let Some(images) = part.and_then(|part| part.images.as_ref()) {
                at(key, images.shape())?;
            }
        }
        let classes = labels.as_ref().map(Vec::len);
        Ok(Examples { train, eval, labels, classes })
    }

    fn picture_set(
        &self,
        path: &Path,
        labels_path: Option<&Path>,
        names: Option<Vec<String>>,
    ) -> Result<Dataset> {
        let processor = self.processor()?;
        let rows;
        let source = match self.data.format {
            recipe::Format::Images => ImageSource::Folder(path),
            recipe::Format::Idx => ImageSource::Idx { images: path, labels: labels_path },
            recipe::Format::Npy => ImageSource::Npy { images: path, labels: labels_path },
            _ => {
                let options =
                    engraft_data::ReadOptions { need: Need::Image, ..self.options(DataTask::Classify) };
                rows = read(path, &options)?;
                ImageSource::Rows(&rows)
            }
        };
        Ok(read_images(source, processor, names)?)
    }

    /// What the model's directory says about its pictures.
    fn processor(&self) -> Result<Processor> {
        let (dir, config) = self.model;
        let model = PictureModel {
            model_type: config.get("model_type").and_then(Value::as_str).unwrap_or_default(),
            channels: config.get("num_channels").and_then(Value::as_u64).unwrap_or(3) as usize,
        };
        Processor::open(dir, config, model)?.ok_or_else(|| {
            Error::Setup(format!(
                "{} holds no preprocessor_config.json, which says how pictures are made into numbers; take it from where the \
                 model came from",
                dir.display()
            ))
        })
    }
}
