//! `preprocessor_config.json` to a [`Processor`]: the settings of the image processors of ViT, DeiT, BiT (used by
//! DINOv2) and CLIP, and those of the older feature extractors. All that is wrong with the file is said at once.

use std::path::Path;

use engraft_words::nearest;
use serde_json::{Map, Value, json};

use super::decode::{Alpha, SIDE_MAX};
use super::processor::{Processor, Size};
use super::resize::Filter;
use crate::error::{Error, Result};
use crate::read::{kind, read_limited};

const FILE: &str = "preprocessor_config.json";
const BYTES_MAX: u64 = 4 << 20;

/// What is known of the model whose pictures are processed.
#[derive(Clone, Copy, Debug)]
pub struct PictureModel<'a> {
    /// `model_type` of its `config.json`; decides where the file names no class.
    pub model_type: &'a str,
    /// Channels that it reads, `num_channels` of its `config.json`.
    pub channels: usize,
}

/// What a class of processors does where the file says nothing.
struct Defaults {
    /// The beginnings of the names it goes by: `ViT` in `ViTImageProcessor`, `ViTImageProcessorFast`, `ViTFeatureExtractor`.
    names: &'static [&'static str],
    models: &'static [&'static str],
    size: Size,
    filter: Filter,
    crop: Option<usize>,
    mean: [f64; 3],
    std: [f64; 3],
    to_rgb: bool,
}

const HALF: [f64; 3] = [0.5; 3];
const CLIP_MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const CLIP_STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

/// `transformers` 5.23, `models/*/image_processing_pil_*.py`.
const CLASSES: [Defaults; 3] = [
    Defaults {
        names: &["ViT"],
        models: &["vit"],
        size: Size::Exact { height: 224, width: 224 },
        filter: Filter::Bilinear,
        crop: None,
        mean: HALF,
        std: HALF,
        to_rgb: false,
    },
    Defaults {
        names: &["DeiT"],
        models: &["deit"],
        size: Size::Exact { height: 256, width: 256 },
        filter: Filter::Bicubic,
        crop: Some(224),
        mean: HALF,
        std: HALF,
        to_rgb: false,
    },
    Defaults {
        names: &["Bit", "CLIP"],
        models: &["bit", "dinov2", "dinov2_with_registers", "clip", "clip_vision_model"],
        size: Size::Edges { shortest: 224, longest: None },
        filter: Filter::Bicubic,
        crop: Some(224),
        mean: CLIP_MEAN,
        std: CLIP_STD,
        to_rgb: true,
    },
];

/// Keys that change nothing about the numbers.
const WITHOUT_EFFECT: [&str; 9] = [
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "default_to_square",
    "data_format",
    "disable_grouping",
    "return_tensors",
    "_valid_processor_keys",
    "_valid_kwargs_names",
];

/// Keys that are read.
const READ: [&str; 11] = [
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
];

impl Processor {
    /// The processor of the model in `dir`; `None` when it has no `preprocessor_config.json`, and `config.json`, which is
    /// `config`, does not have its keys.
    ///
    /// # Errors
    /// A file that cannot be read, and as [`Processor::from_json`].
    pub fn open(dir: &Path, config: &Value, model: PictureModel) -> Result<Option<Processor>> {
        let path = dir.join(FILE);
        if !path.exists() {
            let place = dir.join("config.json").display().to_string();
            return within_config(config).map(|s| Self::from_json(&place, &s, model)).transpose();
        }
        let bytes = read_limited(&path, BYTES_MAX, "check that this is the model's own file")?;
        let place = path.display().to_string();
        let value = serde_json::from_slice(&bytes)
            .map_err(|error| Error::Data { place: place.clone(), message: format!("not JSON: {error}") })?;
        Processor::from_json(&place, &value, model).map(Some)
    }

    /// The processor that `settings` describe; `{}` is the usual one of the model. `place` names them in errors.
    ///
    /// # Errors
    /// [`Error::Several`] with every setting that is unknown, of a wrong kind or impossible for the model.
    pub fn from_json(place: &str, settings: &Value, model: PictureModel) -> Result<Processor> {
        let fail = |problems: Vec<String>| Err(Error::Several { place: place.into(), problems });
        let Some(fields) = settings.as_object() else {
            return fail(vec![format!("expected an object of settings, found {}", kind(settings))]);
        };
        let class = match class(fields, model.model_type) {
            Ok(class) => class,
            Err(problem) => return fail(vec![problem]),
        };
        let mut reader = Reader { fields, problems: unknown(fields), class, model };
        let processor = reader.processor();
        match reader.problems.is_empty() {
            true => Ok(processor),
            false => fail(reader.problems),
        }
    }
}

/// The settings in a `config.json` that gives `image_mean` itself, as small models outside `transformers` do: pictures of
/// `image_size`, normalised.
fn within_config(config: &Value) -> Option<Value> {
    let mean = config.get("image_mean")?;
    let mut settings = json!({
        "image_processor_type": "ViTImageProcessor",
        "image_mean": mean,
        "image_std": config.get("image_std"),
    });
    settings["size"] = match config.get("image_size")? {
        Value::Array(sides) if sides.len() == 2 => json!({"height": sides[0], "width": sides[1]}),
        side => side.clone(),
    };
    Some(settings)
}

/// The class that the file names, else that of the model.
fn class(fields: &Map<String, Value>, model_type: &str) -> std::result::Result<&'static Defaults, String> {
    let known = "those of ViT, DeiT, BiT (DINOv2) and CLIP are read";
    let named =
        ["image_processor_type", "feature_extractor_type"].into_iter().find_map(|key| fields.get(key));
    let Some(name) = named.and_then(Value::as_str) else {
        let of_model = CLASSES.iter().find(|class| class.models.contains(&model_type));
        return of_model.ok_or_else(|| {
            format!(
                "names no `image_processor_type`, and the model type `{model_type}` has no usual one; {known}"
            )
        });
    };
    let endings = ["ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"];
    let is_called = |start: &&str| name.strip_prefix(*start).is_some_and(|end| endings.contains(&end));
    CLASSES
        .iter()
        .find(|class| class.names.iter().any(is_called))
        .ok_or_else(|| format!("`image_processor_type` is `{name}`, which is not read; {known}"))
}

/// Settings that are not known. One that is null or switched off asks for nothing.
fn unknown(fields: &Map<String, Value>) -> Vec<String> {
    let asks = |(key, value): &(&String, &Value)| {
        let known = READ.contains(&key.as_str()) || WITHOUT_EFFECT.contains(&key.as_str());
        !known && !matches!(value, Value::Null | Value::Bool(false))
    };
    let problem = |(key, _): (&String, &Value)| match nearest(key, READ) {
        Some(near) => format!("`{key}` is not a known setting; did you mean `{near}`?"),
        None => format!("`{key}` is not a known setting; known are {}", READ.join(", ")),
    };
    fields.iter().filter(asks).map(problem).collect()
}

struct Reader<'a> {
    fields: &'a Map<String, Value>,
    problems: Vec<String>,
    class: &'static Defaults,
    model: PictureModel<'a>,
}

impl Reader<'_> {
    fn processor(&mut self) -> Processor {
        let alpha = self.channels();
        let resize = self.flag("do_resize", true).then(|| (self.size(), self.filter()));
        let crop = self.flag("do_center_crop", self.class.crop.is_some()).then(|| self.crop());
        let scale = match self.flag("do_rescale", true) {
            true => self.number("rescale_factor", 1.0 / 255.0),
            false => 1.0,
        };
        let mut values = vec![[0f32; 256]; self.model.channels];
        let normalize = self.flag("do_normalize", true);
        let mean = if normalize { self.channel_values("image_mean", self.class.mean) } else { Vec::new() };
        let std = if normalize { self.channel_values("image_std", self.class.std) } else { Vec::new() };
        if std.contains(&0.0) {
            self.problems.push("`image_std` holds 0, by which nothing can be divided".into());
        }
        for (channel, values) in values.iter_mut().enumerate() {
            for (level, value) in values.iter_mut().enumerate() {
                // Rescaled in double precision and normalised in single, as NumPy does it.
                *value = (level as f64 * scale) as f32;
                if let (Some(mean), Some(std)) = (mean.get(channel), std.get(channel)) {
                    *value = (*value - *mean as f32) / *std as f32;
                }
            }
        }
        Processor { channels: self.model.channels, alpha, resize, crop, values }
    }

    /// Whether the channels of the model and the processor agree; what becomes of alpha.
    ///
    /// Without `do_convert_rgb` `transformers` takes no picture that needs conversion, so it is done before as Pillow does.
    fn channels(&mut self) -> Alpha {
        let to_rgb = self.flag("do_convert_rgb", self.class.to_rgb);
        match self.model.channels {
            1 if to_rgb => self
                .problems
                .push("`do_convert_rgb` makes three channels, the model reads one; set it to false".into()),
            1 | 3 => {}
            other => self.problems.push(format!("the model reads {other} channels; pictures have 1 or 3")),
        }
        let first = |value: &Value| value.as_str().is_none_or(|text| text.to_lowercase().ends_with("first"));
        if !self.fields.get("data_format").is_none_or(first) {
            self.problems
                .push("`data_format` is expected to be `channels_first`, which the models read".into());
        }
        if to_rgb { Alpha::OnWhite } else { Alpha::Dropped }
    }

    fn present(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&mut self, key: &str, expected: &str) {
        let found = self.fields.get(key).map_or("nothing".into(), |value| match kind(value) {
            "a number" | "text" => value.to_string(),
            kind => kind.to_owned(),
        });
        self.problems.push(format!("`{key}` is expected to be {expected}, found {found}"));
    }

    fn flag(&mut self, key: &str, usual: bool) -> bool {
        match self.present(key).map(Value::as_bool) {
            None => usual,
            Some(Some(value)) => value,
            Some(None) => {
                self.wrong(key, "true or false");
                usual
            }
        }
    }

    fn number(&mut self, key: &str, usual: f64) -> f64 {
        let Some(value) = self.present(key) else { return usual };
        let number = value.as_f64().filter(|number| *number > 0.0 && (*number as f32).is_finite());
        number.unwrap_or_else(|| {
            self.wrong(key, "a number above 0");
            usual
        })
    }

    fn filter(&mut self) -> Filter {
        let Some(value) = self.present("resample") else { return self.class.filter };
        value.as_u64().and_then(Filter::from_id).unwrap_or_else(|| {
            let ids = "0 (nearest), 1 (Lanczos), 2 (bilinear), 3 (bicubic), 4 (box) or 5 (Hamming)";
            self.wrong("resample", ids);
            self.class.filter
        })
    }

    fn size(&mut self) -> Size {
        let Some(value) = self.present("size") else { return self.class.size };
        let keeps = matches!(self.class.size, Size::Edges { .. });
        let square = self.present("default_to_square").and_then(Value::as_bool).unwrap_or(!keeps);
        if let Some(edge) = side(value) {
            return match square {
                true => Size::Exact { height: edge, width: edge },
                false => Size::Edges { shortest: edge, longest: None },
            };
        }
        match (exact(value), edges(value)) {
            (Some((height, width)), _) => Size::Exact { height, width },
            (_, Some(size)) => size,
            _ => {
                let forms = "{height, width}, {shortest_edge}, {shortest_edge, longest_edge} or a number, of 1 to 16384";
                self.wrong("size", forms);
                self.class.size
            }
        }
    }

    fn crop(&mut self) -> (usize, usize) {
        let usual = self.class.crop.unwrap_or(224);
        match self.present("crop_size") {
            None if self.class.crop.is_none() => {
                self.problems
                    .push("`do_center_crop` is set without a `crop_size`; give {height, width}".into());
                (usual, usual)
            }
            None => (usual, usual),
            Some(value) => {
                side(value).map(|edge| (edge, edge)).or_else(|| exact(value)).unwrap_or_else(|| {
                    self.wrong("crop_size", "{height, width} or a number, of 1 to 16384");
                    (usual, usual)
                })
            }
        }
    }

    /// A value for each channel: a list, or one number for all.
    fn channel_values(&mut self, key: &str, usual: [f64; 3]) -> Vec<f64> {
        let channels = self.model.channels;
        let number = |value: &Value| value.as_f64().filter(|number| (*number as f32).is_finite());
        let found = match self.present(key) {
            // The usual values of a colour processor that are one number suit grey as well.
            None if usual == [usual[0]; 3] => Some(vec![usual[0]; channels]),
            None => Some(usual.to_vec()),
            Some(Value::Array(list)) => list.iter().map(number).collect(),
            Some(value) => number(value).map(|number| vec![number; channels]),
        };
        match found {
            Some(list) if list.len() == channels => list,
            Some(list) => {
                let count = list.len();
                self.problems
                    .push(format!("`{key}` has {count} values, the model reads {channels} channels"));
                vec![0.5; channels]
            }
            None => {
                self.wrong(key, "a list of numbers");
                vec![0.5; channels]
            }
        }
    }
}

/// A length that a side may have.
fn side(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|edge| usize::try_from(edge).ok()).filter(|edge| (1..=SIDE_MAX).contains(edge))
}

/// (height, width) of `{height, width}` or `[height, width]`.
fn exact(value: &Value) -> Option<(usize, usize)> {
    let pair = match value {
        Value::Object(fields) if fields.len() == 2 => (fields.get("height")?, fields.get("width")?),
        Value::Array(list) if list.len() == 2 => (&list[0], &list[1]),
        _ => return None,
    };
    Some((side(pair.0)?, side(pair.1)?))
}

/// `{shortest_edge}` with or without `longest_edge`.
fn edges(value: &Value) -> Option<Size> {
    let fields = value.as_object()?;
    let shortest = side(fields.get("shortest_edge")?)?;
    match fields.get("longest_edge").filter(|edge| !edge.is_null()) {
        None if fields.keys().all(|key| key.ends_with("est_edge")) => {
            Some(Size::Edges { shortest, longest: None })
        }
        Some(longest) if fields.len() == 2 => Some(Size::Edges { shortest, longest: Some(side(longest)?) }),
        _ => None,
    }
}
