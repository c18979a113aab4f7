//! `pixel_values` that were made elsewhere, as a model of pictures reads them.

use super::fail;
use crate::error::Result;
use crate::example::{Dataset, Labels};
use crate::images;

/// Pictures as read, row after row.
#[derive(Clone, Debug, Default)]
pub struct PixelTensors<'a> {
    /// The shape of `pixel_values`: `[rows, channels, height, width]`.
    pub shape: &'a [usize],
    /// Its values.
    pub pixel_values: Vec<f32>,
    /// The shape of `labels`: `[rows]`.
    pub labels_shape: &'a [usize],
    /// The classes; absent for inference.
    pub labels: Option<&'a [i64]>,
}

impl PixelTensors<'_> {
    /// The examples of the rows; each reads the picture of its row.
    ///
    /// # Errors
    /// Shapes that are not those above or do not agree, values that are no numbers, labels that are no classes.
    pub fn dataset(self) -> Result<Dataset> {
        let [rows, channels, height, width] = *self.shape else {
            let found = format!("expected [rows, channels, height, width], found {:?}", self.shape);
            return Err(fail("pixel_values", found));
        };
        let size = self.shape.iter().try_fold(1usize, |size, side| size.checked_mul(*side));
        if size.filter(|size| *size > 0) != Some(self.pixel_values.len()) {
            let found = self.pixel_values.len();
            return Err(fail("pixel_values", format!("{:?} does not go with {found} values", self.shape)));
        }
        if let Some(at) = self.pixel_values.iter().position(|value| !value.is_finite()) {
            let row = at / (channels * height * width);
            return Err(fail("pixel_values", format!("row {row} holds {}", self.pixel_values[at])));
        }
        let labels = match self.labels {
            None => vec![Labels::None; rows],
            Some(labels) if self.labels_shape == [rows] && labels.len() == rows => {
                labels.iter().enumerate().map(class).collect::<Result<_>>()?
            }
            Some(_) => {
                let message =
                    format!("expected [{rows}], a class for each picture, found {:?}", self.labels_shape);
                return Err(fail("labels", message));
            }
        };
        Ok(images::ready([channels, height, width], self.pixel_values, labels))
    }
}

fn class((row, label): (usize, &i64)) -> Result<Labels> {
    let class = u32::try_from(*label);
    class
        .map(Labels::Class)
        .map_err(|_| fail("labels", format!("row {row}: {label} is no class; classes count from 0")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(shape: &'static [usize], count: usize, labels: &'static [i64]) -> PixelTensors<'static> {
        let pixel_values = (0..count).map(|value| value as f32).collect();
        PixelTensors { shape, pixel_values, labels_shape: &[2], labels: Some(labels) }
    }

    #[test]
    fn each_row_reads_its_picture() {
        let data = tensors(&[2, 1, 2, 3], 12, &[1, 0]).dataset().unwrap();
        let images = data.images.unwrap();
        assert_eq!((images.len(), images.shape().unwrap()), (2, [1, 2, 3]));
        assert_eq!(images.pixels(1).unwrap(), [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
        assert_eq!((data.examples[1].image, &data.examples[1].labels), (Some(1), &Labels::Class(0)));
        assert_eq!((data.report.examples, data.report.duplicates, data.report.trained_share), (2, 0, 1.0));
    }

    #[test]
    fn shapes_and_classes_are_checked() {
        let message = |tensors: PixelTensors| tensors.dataset().unwrap_err().to_string();
        let wrong = message(tensors(&[2, 6], 12, &[1, 0]));
        assert!(wrong.contains("expected [rows, channels, height, width], found [2, 6]"), "{wrong}");
        assert!(message(tensors(&[2, 1, 2, 3], 11, &[1, 0])).contains("does not go with 11 values"));
        assert!(message(tensors(&[0, 1, 2, 3], 0, &[])).contains("does not go with 0 values"));
        assert!(message(tensors(&[3, 1, 2, 2], 12, &[1, 0])).contains("expected [3]"));
        assert!(message(tensors(&[2, 1, 2, 3], 12, &[1, -1])).contains("row 1: -1 is no class"));
        let mut broken = tensors(&[2, 1, 2, 3], 12, &[1, 0]);
        broken.pixel_values[7] = f32::NAN;
        assert!(message(broken).contains("row 1 holds NaN"));
    }
}
