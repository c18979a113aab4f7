//! `.npy` files (NumPy Enhancement Proposal 1): a text header with type and shape, then the values.
//!
//! Floats are levels divided by 255, as plotting libraries keep pictures, or whole levels up to 255; both become bytes.

use std::io::Read;
use std::path::Path;

use super::decode::within_limits;
use super::{Classes, Found, Store, labels_beside, one_label_each};
use crate::error::{Error, Result};
use crate::read::{FILE_LIMIT, Source};

/// The longest header; NumPy's own limit.
const HEADER_MAX: usize = 10_000;

pub(super) fn find(images: &Path, labels: Option<&Path>) -> Result<Found> {
    let mut guesses = Vec::new();
    let labels = labels_beside(images, labels, &mut guesses)?;
    let fail = |message: String| Error::Data { place: images.display().to_string(), message };
    let array = Array::read(images)?;
    let (count, height, width, channels) = match array.shape[..] {
        [count, height, width] => (count, height, width, 1),
        [count, height, width, channels @ (1 | 3)] => (count, height, width, channels),
        _ => {
            let expected = "expected [pictures, height, width] or [pictures, height, width, 1 or 3]";
            return Err(fail(format!("{expected}, found {:?}; transpose the array", array.shape)));
        }
    };
    within_limits(height, width).map_err(|limit| fail(format!("each picture {limit}")))?;
    if count == 0 {
        return Err(fail("holds no pictures".into()));
    }
    let levels = array.levels().map_err(fail)?;
    let classes = Array::read(&labels)?;
    let (found, numbers) =
        classes.numbers().map_err(|message| Error::Data { place: labels.display().to_string(), message })?;
    one_label_each(images, count, &labels, found)?;
    Ok(Found {
        images: Store::Levels { path: images.into(), height, width, channels, levels },
        labels: Classes::Numbered(numbers),
        rows: (0..count).collect(),
        guesses,
    })
}

/// An array as stored.
struct Array {
    /// `|u1`, `<f4` …: byte order, kind, bytes of a value.
    kind: String,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Array {
    fn read(path: &Path) -> Result<Array> {
        let fail = |message: String| Error::Data { place: path.display().to_string(), message };
        let io = |source| Error::Io { path: path.into(), source };
        let mut reader = Source::open_binary(path)?.reader;
        let mut start = Vec::new();
        (&mut reader).take(8).read_to_end(&mut start).map_err(io)?;
        let (wide, is_npy) = (start.get(6) > Some(&1), start.len() == 8 && start.starts_with(b"\x93NUMPY"));
        if !is_npy {
            return Err(fail("is not a .npy file; save the array with numpy.save".into()));
        }
        let mut length = Vec::new();
        (&mut reader).take(if wide { 4 } else { 2 }).read_to_end(&mut length).map_err(io)?;
        let length = length.iter().rev().fold(0, |length, byte| length << 8 | usize::from(*byte));
        if length > HEADER_MAX {
            return Err(fail(format!("has a header of {length} bytes, more than {HEADER_MAX}")));
        }
        let mut header = Vec::new();
        (&mut reader).take(length as u64).read_to_end(&mut header).map_err(io)?;
        let header = String::from_utf8_lossy(&header);
        let (kind, shape) =
            parse(&header).map_err(|problem| fail(format!("{problem}, found {:?}", header.trim())))?;
        let size = kind.get(2..).and_then(|size| size.parse::<usize>().ok()).filter(|size| *size <= 8);
        let size = size.ok_or_else(|| fail(format!("holds values of type `{kind}`, which are not read")))?;
        let total = shape.iter().try_fold(size, |total, side| total.checked_mul(*side));
        let total = total.filter(|total| *total as u64 <= FILE_LIMIT);
        let total =
            total.ok_or_else(|| fail(format!("says that it is {shape:?}, more than {FILE_LIMIT} bytes")))?;
        let mut bytes = Vec::new();
        reader.take(total as u64 + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() != total {
            let found = if bytes.len() > total { "more".into() } else { bytes.len().to_string() };
            return Err(fail(format!("expected {total} bytes for {shape:?}, found {found}; save it again")));
        }
        Ok(Array { kind, shape, bytes })
    }

    fn levels(self) -> std::result::Result<Vec<u8>, String> {
        let floats: Vec<f32> = match self.kind.as_str() {
            "|u1" | "<u1" | ">u1" => return Ok(self.bytes),
            "<f4" => {
                self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            ">f4" => {
                self.bytes.chunks_exact(4).map(|b| f32::from_be_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            other => {
                return Err(format!(
                    "holds values of type `{other}`; pictures are uint8 or float32: save .astype(\"uint8\")"
                ));
            }
        };
        let (low, high) =
            floats.iter().fold((0f32, 0f32), |(low, high), value| (low.min(*value), high.max(*value)));
        // `min` and `max` pass over NaN.
        let is_sound = low >= 0.0 && floats.iter().all(|value| value.is_finite());
        let is_whole = || floats.iter().all(|value| value.fract() == 0.0);
        match is_sound {
            true if high <= 1.0 => Ok(floats.iter().map(|value| (value * 255.0).round() as u8).collect()),
            true if high <= 255.0 && is_whole() => Ok(floats.iter().map(|value| *value as u8).collect()),
            _ => Err(format!(
                "expected floats from 0 to 1, or whole levels from 0 to 255, found {low} to {high}; scale them, or give \
                 them as `pixel_values` with data.format = \"tensors\""
            )),
        }
    }

    /// (how many, the numbers) of an array with one dimension.
    fn numbers(&self) -> std::result::Result<(usize, Vec<usize>), String> {
        let [count] = self.shape[..] else {
            return Err(format!("expected labels [pictures], found {:?}", self.shape));
        };
        let (order, kind) = (self.kind.chars().next(), self.kind.chars().nth(1));
        let (Some('i' | 'u'), Some(order)) = (kind, order) else {
            return Err(format!("expected whole numbers as labels, found type `{}`", self.kind));
        };
        let size = self.bytes.len() / count.max(1);
        let number = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            if order == '>' {
                bytes.reverse();
            }
            let negative = kind == Some('i') && bytes.last().is_some_and(|byte| *byte >= 128);
            bytes.resize(8, if negative { 0xFF } else { 0 });
            bytes.first_chunk::<8>().map_or(-1, |bytes| i64::from_le_bytes(*bytes))
        };
        let numbers: Vec<i64> = self.bytes.chunks_exact(size.max(1)).map(number).collect();
        let class = |(at, number): (usize, &i64)| {
            usize::try_from(*number).map_err(|_| format!("label {at} is {number}; classes count from 0"))
        };
        let classes: std::result::Result<Vec<usize>, String> =
            numbers.iter().enumerate().map(class).collect();
        Ok((count, classes?))
    }
}

/// Type and shape of `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 28, 28), }`.
fn parse(header: &str) -> std::result::Result<(String, Vec<usize>), String> {
    let after = |key: &str| {
        let (_, rest) = header.split_once(&format!("'{key}':"))?;
        Some(rest.trim_start())
    };
    let kind = after("descr").and_then(|rest| rest.strip_prefix('\'')?.split_once('\''));
    let kind = kind.map(|(kind, _)| kind.to_owned()).ok_or("expected a header with one type of values")?;
    if !after("fortran_order").is_some_and(|rest| rest.starts_with("False")) {
        return Err("expected rows first (C order): save numpy.ascontiguousarray(…)".into());
    }
    let shape = after("shape").and_then(|rest| rest.strip_prefix('(')?.split_once(')'));
    let (shape, _) = shape.ok_or("expected a header with a shape")?;
    let sides = shape.split(',').map(str::trim).filter(|side| !side.is_empty());
    let sides: std::result::Result<Vec<usize>, _> = sides.map(str::parse).collect();
    Ok((kind, sides.map_err(|_| "expected a shape of whole numbers")?))
}
