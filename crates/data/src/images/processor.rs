//! Pictures to the numbers a model reads, as `preprocessor_config.json` says and `transformers` does with Pillow.
//!
//! In this order: channels, resize, center crop, rescale, normalise. Levels stay 8-bit until rescaling, so the last two
//! are a table of 256 numbers a channel. Only the class's rounding is followed, not its library: with `torchvision`
//! `transformers` may differ from this by one level.

use super::decode::{Alpha, OUTPUT_POINTS_MAX, within_limits};
use super::picture::Picture;
use super::resize::{Filter, resize};

/// To which size a picture is brought.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// Exactly this, whatever the picture's proportions.
    Exact {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// Proportions kept.
    Edges {
        /// The length of the shorter side …
        shortest: usize,
        /// … unless the longer one would pass this.
        longest: Option<usize>,
    },
}

/// What is done to every picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Processor {
    /// Channels that the model reads, 1 or 3.
    pub(super) channels: usize,
    pub(super) alpha: Alpha,
    pub(super) resize: Option<(Size, Filter)>,
    /// (height, width) cut from the middle; where the picture is smaller, zeros are put around it.
    pub(super) crop: Option<(usize, usize)>,
    /// The number for each level of each channel, `[channels][256]`.
    pub(super) values: Vec<[f32; 256]>,
}

impl Processor {
    /// Channels of the results.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The size that every picture gets, (height, width), where it is the same for all.
    pub fn fixed_size(&self) -> Option<(usize, usize)> {
        match (self.crop, self.resize) {
            (Some(crop), _) => Some(crop),
            (None, Some((Size::Exact { height, width }, _))) => Some((height, width)),
            _ => None,
        }
    }

    /// The size, (height, width), that a picture of `height` and `width` gets.
    ///
    /// # Errors
    /// In words: the picture would be resized beyond the limits, or have more points than a model can read.
    pub fn output_size(&self, height: usize, width: usize) -> Result<(usize, usize), String> {
        let resized = self.resized(height, width)?;
        let (height, width) = self.crop.unwrap_or(resized);
        match height * width <= OUTPUT_POINTS_MAX {
            true => Ok((height, width)),
            false => Err(format!(
                "becomes {height} × {width} pixels, and a model may be given {OUTPUT_POINTS_MAX} of a picture; set {} in \
                 preprocessor_config.json to what the model was trained on",
                self.size_keys()
            )),
        }
    }

    /// The settings of `preprocessor_config.json` that decide the size, in words that "to" may follow.
    pub fn size_keys(&self) -> &'static str {
        match (self.crop, self.resize) {
            (Some(_), _) => "crop_size",
            (None, Some((Size::Exact { .. }, _))) => "size",
            (None, Some(_)) => "do_center_crop to true and crop_size",
            (None, None) => "do_resize to true and size",
        }
    }

    fn resized(&self, height: usize, width: usize) -> Result<(usize, usize), String> {
        let Some((size, _)) = self.resize else { return Ok((height, width)) };
        let (to_height, to_width) = size.of(height, width);
        within_limits(to_height, to_width).map_err(|limit| {
            format!("is {width} wide and {height} high; resized as the model's processor says it {limit}")
        })?;
        Ok((to_height, to_width))
    }

    /// The numbers of a picture, `[channels, height, width]`.
    ///
    /// # Errors
    /// As [`Processor::output_size`].
    pub fn pixels(&self, picture: Picture) -> Result<Vec<f32>, String> {
        let (height, width) = self.resized(picture.height, picture.width)?;
        let mut picture = picture.with_channels(self.channels);
        if let Some((_, filter)) = self.resize {
            picture = resize(&picture, height, width, filter);
        }
        if let Some((height, width)) = self.crop {
            picture = center_crop(&picture, height, width);
        }
        let values = self.values.iter().enumerate().flat_map(|(channel, values)| {
            picture
                .levels
                .iter()
                .skip(channel)
                .step_by(self.channels)
                .map(|level| values[usize::from(*level)])
        });
        Ok(values.collect())
    }
}

impl Size {
    /// The size of a picture of `height` and `width` after resizing, as `get_resize_output_image_size` and
    /// `get_size_with_aspect_ratio` of `transformers` compute it.
    fn of(self, height: usize, width: usize) -> (usize, usize) {
        // Python's int(a * b / c): an exact product, one division, cut off.
        let scaled = |a: f64, b: usize, c: usize| (a * b as f64 / c as f64) as usize;
        match self {
            Size::Exact { height, width } => (height, width),
            Size::Edges { shortest, longest: None } if width <= height => {
                (scaled(shortest as f64, height, width), shortest)
            }
            Size::Edges { shortest, longest: None } => (shortest, scaled(shortest as f64, width, height)),
            Size::Edges { shortest, longest: Some(longest) } => {
                let (short, long) = (height.min(width) as f64, height.max(width) as f64);
                let (mut exact, mut edge) = (shortest as f64, shortest);
                if long / short * exact > longest as f64 {
                    exact = longest as f64 * short / long;
                    edge = exact.round_ties_even() as usize;
                }
                match () {
                    _ if height.min(width) == edge => (height, width),
                    _ if width < height => (scaled(exact, height, width), edge),
                    _ => (edge, scaled(exact, width, height)),
                }
            }
        }
    }
}

/// The middle of a picture; zeros where it ends before. An odd row or column goes where `transformers` puts it.
fn center_crop(picture: &Picture, height: usize, width: usize) -> Picture {
    // (first place in the picture, first place in the result, how many) along one side.
    let along = |from: usize, to: usize| match from >= to {
        true => ((from - to) / 2, 0, to),
        false => (0, (to - from).div_ceil(2), from),
    };
    let (top, down, rows) = along(picture.height, height);
    let (left, across, columns) = along(picture.width, width);
    let channels = picture.channels;
    let mut levels = vec![0; height * width * channels];
    for row in 0..rows {
        let from = ((top + row) * picture.width + left) * channels;
        let to = ((down + row) * width + across) * channels;
        levels[to..to + columns * channels].copy_from_slice(&picture.levels[from..from + columns * channels]);
    }
    Picture { height, width, channels, levels }
}
