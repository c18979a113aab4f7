//! Pictures `pixel_values` [B, channels, height, width] of finite numbers, normalised as the model expects →
//! logits [B, outputs].

use std::path::{Path, PathBuf};

use engraft_nn::{Inputs, Picture};
use engraft_store::RawTensor;
use engraft_tensor::Tensor;

use super::{Logits, Users, forward};
use crate::engine::Engine;
use crate::failure::{BeforeWork, Failure, Outcome};

/// Most pixels of one forward, in all channels (256 MiB), so that a large file does not need memory for all of it.
const PIXELS_MAX: usize = 1 << 26;
/// Most pictures of one forward.
const PICTURES_MAX: usize = 64;

/// The pictures as read.
pub(super) struct Given {
    path: PathBuf,
    /// [B, channels, height, width]
    pixels: Tensor,
}

impl Given {
    pub(super) fn read(path: &Path, raw: &RawTensor) -> Outcome<Given> {
        let wrong = |message: String| {
            Err(Failure::before_work(format!("{}: `pixel_values`: {message}", path.display())))
        };
        let &[count, channels, height, width] = &raw.shape[..] else {
            return wrong(format!("expected [pictures, channels, height, width], found {:?}", raw.shape));
        };
        if raw.elements() == 0 {
            return wrong(format!("expected at least one pixel, found {:?}", raw.shape));
        }
        let values = match raw.to_f32() {
            Ok(values) => values,
            Err(e) => return wrong(e.to_string()),
        };
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            let (picture, rest) = (at / (channels * height * width), at % (channels * height * width));
            let (channel, row) = (rest / (height * width), rest % (height * width) / width);
            return wrong(format!(
                "expected finite numbers, found {} in picture {picture}, channel {channel}, row {row}, column {} (from 0)",
                values[at],
                rest % width
            ));
        }
        let pixels = Tensor::from_vec(values, [count, channels, height, width])?;
        Ok(Given { path: path.to_owned(), pixels })
    }

    pub(super) fn rows(&self) -> usize {
        self.pixels.dim(0)
    }

    /// All logits with their shape.
    pub(super) fn logits(&self, engine: &Engine, users: Option<&Users>) -> Outcome<Logits> {
        let info = engine.model.info();
        if let Some(Picture { channels, .. }) = info.picture.filter(|p| p.channels != self.pixels.dim(1)) {
            return Err(Failure::before_work(format!(
                "{}: `pixel_values`: expected {channels} channels, found {:?}",
                self.path.display(),
                self.pixels.shape()
            )));
        }
        let count = self.pixels.dim(0);
        let most = (PIXELS_MAX / (self.pixels.len() / count).max(1)).clamp(1, PICTURES_MAX);
        let mut values = Vec::new();
        for first in (0..count).step_by(most) {
            let last = (first + most).min(count);
            let part = Inputs::pixels(self.pixels.rows_between(first, last)?)?;
            let logits = forward(engine, &part, users, first..last);
            // A size that the model does not read shows with the first pictures.
            values.extend(if first == 0 { logits.before_work()? } else { logits? }.to_vec()?);
        }
        Ok((values, vec![count, info.outputs]))
    }
}
