//! The header of a safetensors file, checked before anything is believed.
//!
//! `[u64 length, little endian][length bytes of JSON][data]`, where the JSON maps each name to
//! `{"dtype", "shape", "data_offsets": [begin, end)}` relative to the data, plus a string map
//! `__metadata__`. The tensors must tile the data exactly: no hole, no overlap, no remainder.
//! Source: <https://github.com/huggingface/safetensors#format>. The `safetensors` crate checks the
//! same but names no tensor for a wrong size; the tests hold the two to the same verdict.

use crate::error::{Error, Result};
use crate::json;
use crate::limits::{Limits, check};
use safetensors::tensor::TensorInfo;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

/// Key of the free-form string map.
const METADATA: &str = "__metadata__";

/// Type of the elements of a tensor.
pub use safetensors::Dtype;

/// A checked header.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Header {
    pub metadata: BTreeMap<String, String>,
    /// In the order of their bytes.
    pub tensors: Vec<(String, TensorEntry)>,
}

/// Where one tensor lies; the range counts from the start of the file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorEntry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
}

/// Reads the header of the file `path` whose whole content is `bytes`.
pub(crate) fn parse(path: &Path, bytes: &[u8], limits: &Limits) -> Result<Header> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let text = format!("expected a safetensors file, found {} bytes", bytes.len());
        return Err(Error::malformed(path, text));
    };
    let length = u64::from_le_bytes(*length);
    let most = limits.safetensors_header;
    check(path, "header size in bytes", "safetensors_header", most, length)?;
    let text = usize::try_from(length).ok().and_then(|n| rest.get(..n)).ok_or_else(|| {
        let left = rest.len();
        Error::malformed(path, format!("the header says {length} bytes, the file has {left} more; it is cut or not a safetensors file"))
    })?;
    let extent = json::scan(text);
    check(path, "JSON nesting", "json_depth", limits.json_depth, extent.depth)?;
    check(path, "number of tensors", "tensors", limits.tensors, extent.entries)?;
    check(path, "longest tensor name in bytes", "name", limits.name, extent.longest_key)?;
    check(path, "number of dimensions", "dims", limits.dims, extent.longest_array)?;
    let raw = deserialize(path, text)?;
    let data = 8 + text.len();
    tile(path, raw, data, bytes.len())
}

#[derive(Default)]
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
}

fn deserialize(path: &Path, text: &[u8]) -> Result<RawHeader> {
    let json_error = |e: serde_json::Error| {
        Error::malformed(path, format!("safetensors header, byte {}: {e}", e.column()))
    };
    let mut reader = serde_json::Deserializer::from_slice(text);
    let raw = reader.deserialize_map(HeaderVisitor).map_err(json_error)?;
    reader.end().map_err(json_error)?;
    Ok(raw)
}

/// Reads the map entry by entry, so that an error can name its tensor.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensor names to dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
        let mut raw = RawHeader::default();
        let mut has_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            let named = |e: A::Error| A::Error::custom(format!("`{name}`: {e}"));
            if name != METADATA {
                let info = map.next_value::<TensorInfo>().map_err(named)?;
                raw.tensors.push((name, info));
                continue;
            }
            if std::mem::replace(&mut has_metadata, true) {
                return Err(A::Error::custom("`__metadata__` appears twice"));
            }
            // The format allows null here.
            let found: Option<BTreeMap<String, String>> = map.next_value().map_err(named)?;
            raw.metadata = found.unwrap_or_default();
        }
        Ok(raw)
    }
}

/// Checks that the tensors cover `data..end` exactly and that each holds what its shape says.
fn tile(path: &Path, mut raw: RawHeader, data: usize, end: usize) -> Result<Header> {
    raw.tensors.sort_by(|a, b| (a.1.data_offsets, &a.0).cmp(&(b.1.data_offsets, &b.0)));
    let mut header = Header { metadata: raw.metadata, tensors: Vec::new() };
    let mut at = 0usize;
    for (name, info) in raw.tensors {
        let fail = |text: String| Error::malformed(path, format!("tensor `{name}`: {text}"));
        let (begin, stop) = info.data_offsets;
        if begin != at || stop < begin {
            let what = if begin < at { "overlap another tensor's" } else { "leave a hole" };
            return Err(fail(format!("its bytes {begin}..{stop} {what}; expected to begin at {at}")));
        }
        let size = byte_size(info.dtype, &info.shape).ok_or_else(|| {
            fail(format!("shape {:?} has no size in whole bytes that fits in 64 bits", info.shape))
        })?;
        if stop - begin != size {
            let (dtype, shape) = (info.dtype, &info.shape);
            return Err(fail(format!(
                "{dtype} {shape:?} takes {size} bytes, the header gives it {}",
                stop - begin
            )));
        }
        let last = data.checked_add(stop).filter(|last| *last <= end).ok_or_else(|| {
            fail(format!(
                "it ends at byte {stop} of the data, the file holds {}; the file is cut, copy it again",
                end - data
            ))
        })?;
        at = stop;
        let entry = TensorEntry { dtype: info.dtype, shape: info.shape, range: last - size..last };
        header.tensors.push((name, entry));
    }
    if data + at != end {
        let text = format!(
            "the tensors take {at} bytes, the file holds {}; it is damaged, copy it again",
            end - data
        );
        return Err(Error::malformed(path, text));
    }
    let mut names: Vec<&str> = header.tensors.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::malformed(path, format!("tensor `{}` appears twice", pair[0]))),
        None => Ok(header),
    }
}

/// Bytes of a tensor; none on overflow or when sub-byte elements do not fill whole bytes.
pub(crate) fn byte_size(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;
    use safetensors::SafeTensors;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Header> {
        parse(Path::new("m.safetensors"), bytes, &Limits::default())
    }

    fn message(header: &str, data: usize) -> String {
        read(&file(header, data)).unwrap_err().to_string()
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"a":{"dtype":"BF16","shape":[5],"data_offsets":[24,34]},"s":{"dtype":"I64","shape":[],"data_offsets":[34,42]},"e":{"dtype":"F16","shape":[0,3],"data_offsets":[42,42]}}"#;

    #[test]
    fn a_good_header() {
        let header = read(&file(GOOD, 42)).unwrap();
        assert_eq!(header.metadata["format"], "pt");
        let at = 8 + GOOD.len();
        assert_eq!(header.tensors[1].0, "a");
        assert_eq!(header.tensors[1].1.range, at + 24..at + 34);
        assert_eq!(header.tensors.len(), 4);
    }

    #[test]
    fn errors_name_the_tensor() {
        let one = |dtype: &str, shape: &str, begin: u64, end: u64| {
            format!(r#"{{"w.x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#)
        };
        assert!(message(&one("F32", "[2]", 4, 12), 12).contains("`w.x`: its bytes 4..12 leave a hole"));
        assert!(message(&one("F32", "[2]", 0, 12), 12).contains("`w.x`: F32 [2] takes 8 bytes"));
        assert!(message(&one("F33", "[2]", 0, 8), 8).contains("`w.x`: unknown variant `F33`"));
        assert!(message(&one("F32", "[2]", 0, 8), 7).contains("`w.x`: it ends at byte 8"));
        assert!(message(&one("F32", "[2]", 0, 8), 9).contains("the file holds 9"));
        assert!(message(&one("F4", "[3]", 0, 1), 1).contains("no size in whole bytes"));
        let two = r#"{"p":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"q":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
        assert!(message(two, 6).contains("`q`: its bytes 2..6 overlap"));
        let twice = r#"{"p":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"p":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#;
        assert!(message(twice, 8).contains("`p` appears twice"));
    }

    #[test]
    fn limits_hold_before_parsing() {
        let huge = u64::MAX.to_le_bytes();
        assert!(read(&huge).unwrap_err().to_string().contains("safetensors_header = 33554432"));
        let many: Vec<String> = (0..100_001)
            .map(|i| format!(r#""t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#))
            .collect();
        let e = message(&format!("{{{}}}", many.join(",")), 0);
        assert!(e.contains("number of tensors is 100001") && e.contains("--limit tensors=N"), "{e}");
        let name = format!(r#"{{"{}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}}}"#, "n".repeat(513));
        assert!(message(&name, 0).contains("name = 512"));
        let dims = r#"{"d":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}"#;
        assert!(message(dims, 1).contains("dims = 8"));
    }

    #[test]
    fn every_combination_of_overflowing_sizes_is_an_error() {
        let sizes: [u64; 6] = [0, 1, 1 << 31, 1 << 32, 1 << 63, u64::MAX];
        for a in sizes {
            for b in sizes {
                for begin in sizes {
                    for end in sizes {
                        let text = format!(
                            r#"{{"w":{{"dtype":"F32","shape":[{a},{b}],"data_offsets":[{begin},{end}]}}}}"#
                        );
                        let result = read(&file(&text, 0));
                        // An empty tensor is the only one that a file without data can hold.
                        let empty = (a == 0 || b == 0) && begin == 0 && end == 0;
                        assert_eq!(result.is_ok(), empty, "{text}");
                    }
                }
            }
        }
    }

    /// Name, shape, bytes.
    type Plain = (String, Vec<usize>, Vec<u8>);

    /// The verdict of the `safetensors` crate on the same bytes.
    fn peer(bytes: &[u8]) -> Option<Vec<Plain>> {
        let tensors = SafeTensors::deserialize(bytes).ok()?;
        let mut all: Vec<_> = tensors
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec()))
            .collect();
        all.sort();
        Some(all)
    }

    #[test]
    fn corrupted_files_give_an_error_or_what_the_safetensors_crate_reads() {
        let good = file(GOOD, 42);
        let (mut accepted, mut refused) = (0, 0);
        for seed in 0..4000 {
            let mutant = Rng::new(seed).corrupt(&good);
            let Ok(header) = read(&mutant) else {
                refused += 1;
                continue;
            };
            let mut ours: Vec<_> = header
                .tensors
                .into_iter()
                .map(|(name, t)| (name, t.shape, mutant[t.range].to_vec()))
                .collect();
            ours.sort();
            assert_eq!(Some(ours), peer(&mutant), "seed {seed}");
            accepted += 1;
        }
        assert!(accepted > 20 && refused > 2000, "{accepted} accepted, {refused} refused");
    }

    #[test]
    fn every_truncation_is_an_error() {
        let good = file(GOOD, 42);
        for length in 0..good.len() {
            assert!(read(&good[..length]).is_err(), "{length}");
        }
    }
}
