//! IDX files, the format of MNIST (<http://yann.lecun.com/exdb/mnist>): two zero bytes, the type of the values, the
//! number of dimensions, each dimension as 4 bytes with the highest first, then the values.

use std::io::Read;
use std::path::Path;

use super::decode::within_limits;
use super::{Classes, Found, Store, labels_beside, one_label_each};
use crate::error::{Error, Result};
use crate::read::{FILE_LIMIT, Source};

pub(super) fn find(images: &Path, labels: Option<&Path>) -> Result<Found> {
    let mut guesses = Vec::new();
    let labels = labels_beside(images, labels, &mut guesses)?;
    let ([count, height, width], levels) = read::<3>(images, "pictures: [pictures, height, width]")?;
    let fail = |message| Error::Data { place: images.display().to_string(), message };
    within_limits(height, width).map_err(|limit| fail(format!("each picture {limit}")))?;
    if count == 0 {
        return Err(fail("holds no pictures".into()));
    }
    let ([found], classes) = read::<1>(&labels, "labels: [pictures]")?;
    one_label_each(images, count, &labels, found)?;
    Ok(Found {
        images: Store::Levels { path: images.into(), height, width, channels: 1, levels },
        labels: Classes::Numbered(classes.into_iter().map(usize::from).collect()),
        rows: (0..count).collect(),
        guesses,
    })
}

/// Dimensions and values of a file of bytes with `N` dimensions.
fn read<const N: usize>(path: &Path, expected: &str) -> Result<([usize; N], Vec<u8>)> {
    let fail = |message: String| Error::Data { place: path.display().to_string(), message };
    let io = |source| Error::Io { path: path.into(), source };
    let mut reader = Source::open_binary(path)?.reader;
    let mut head = Vec::new();
    (&mut reader).take(4 + 4 * N as u64).read_to_end(&mut head).map_err(io)?;
    let [0, 0, kind, dimensions, sizes @ ..] = &head[..] else {
        return Err(fail(
            "is not an IDX file: it does not begin with two zero bytes; check data.format".into(),
        ));
    };
    if (*kind, usize::from(*dimensions)) != (0x08, N) {
        return Err(fail(format!(
            "expected {expected} of bytes (type 0x08, {N} dimensions), found type {kind:#04x} and {dimensions} dimensions"
        )));
    }
    if sizes.len() != 4 * N {
        return Err(fail("ends in its header; copy it again".into()));
    }
    let size = |at: usize| sizes[at * 4..][..4].iter().fold(0, |size, byte| size << 8 | usize::from(*byte));
    let sizes: [usize; N] = std::array::from_fn(size);
    let total = sizes.iter().try_fold(1usize, |total, size| total.checked_mul(*size));
    let total = total.filter(|total| *total as u64 <= FILE_LIMIT);
    let total =
        total.ok_or_else(|| fail(format!("says that it is {sizes:?}, more than {FILE_LIMIT} bytes")))?;
    let mut values = Vec::new();
    reader.take(total as u64 + 1).read_to_end(&mut values).map_err(io)?;
    if values.len() != total {
        let found = if values.len() > total { "more".into() } else { values.len().to_string() };
        return Err(fail(format!("expected {total} values for {sizes:?}, found {found}; copy it again")));
    }
    Ok((sizes, values))
}
