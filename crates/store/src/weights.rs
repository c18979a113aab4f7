//! The tensors of a model directory or file, mapped and never copied until asked for.
//!
//! A directory holds `model.safetensors`, or shards named by `model.safetensors.index.json`
//! (`{"weight_map": {tensor name: shard file name}}`). A tensor is row-major; `rows` below means
//! slices of its first dimension.

use crate::error::{Error, Result};
use crate::header::{self, Dtype, TensorEntry};
use crate::json::{open_regular, read_json};
use crate::limits::{Limits, check};
use crate::paths;
use crate::pickle::{convert_once, is_pickle};
use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::Mmap;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Tensors by name, from one file or several.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    tensors: BTreeMap<String, RawTensor>,
    metadata: BTreeMap<String, String>,
    files: Vec<PathBuf>,
}

/// One tensor's type, shape and bytes. Holds the map alive; cloning is cheap.
#[derive(Clone)]
pub struct RawTensor {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Sizes, slowest first; empty for a scalar.
    pub shape: Vec<usize>,
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl std::fmt::Debug for RawTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.dtype, self.shape)
    }
}

impl Weights {
    /// Opens the weights of a model directory.
    pub fn open(dir: &Path, limits: &Limits) -> Result<Self> {
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if single.exists() {
            paths::allowed_link(dir, &single)?;
            return Self::open_file(&single, limits);
        }
        if index.exists() {
            paths::allowed_link(dir, &index)?;
            return Self::open_shards(dir, &index, limits);
        }
        Err(no_weights(dir))
    }

    /// Opens one safetensors file.
    pub fn open_file(path: &Path, limits: &Limits) -> Result<Self> {
        let (map, header) = map_file(path, limits)?;
        let map = Arc::new(map);
        let tensors = header
            .tensors
            .into_iter()
            .map(|(name, TensorEntry { dtype, shape, range })| {
                (name, RawTensor { dtype, shape, map: Arc::clone(&map), range })
            })
            .collect();
        Ok(Self { tensors, metadata: header.metadata, files: vec![path.to_owned()] })
    }

    fn open_shards(dir: &Path, index: &Path, limits: &Limits) -> Result<Self> {
        let weight_map = read_weight_map(index, limits)?;
        let shards: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
        check(index, "number of tensors", "tensors", limits.tensors, weight_map.len() as u64)?;
        let mut all = Self::default();
        for shard in shards {
            let path = paths::beneath(dir, shard, index)?;
            if !path.exists() {
                return Err(Error::missing(
                    &path,
                    format!("{INDEX} names this shard and it is not there; download the model again"),
                ));
            }
            let part = Self::open_file(&path, limits)?;
            for (name, tensor) in part.tensors {
                // As transformers does, a tensor counts only in the shard that the index names.
                if weight_map.get(&name).is_some_and(|s| s == shard) {
                    all.tensors.insert(name, tensor);
                }
            }
            all.metadata.extend(part.metadata);
            all.files.push(path);
        }
        let absent: Vec<&str> = weight_map
            .iter()
            .filter(|(name, _)| !all.tensors.contains_key(*name))
            .map(|(name, _)| name.as_str())
            .collect();
        if absent.is_empty() {
            return Ok(all);
        }
        let shown = absent[..absent.len().min(5)].join("`, `");
        let text = format!(
            "{} tensors are not in the shard that the index names: `{shown}`{}",
            absent.len(),
            if absent.len() > 5 { " …" } else { "" }
        );
        Err(Error::malformed(index, text))
    }

    /// Takes in the tensors of another file.
    pub fn join(&mut self, other: Weights) {
        self.tensors.extend(other.tensors);
        self.metadata.extend(other.metadata);
        self.files.extend(other.files);
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// All tensors with their names, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &RawTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&RawTensor> {
        self.tensors.get(name)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// True when there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The string map `__metadata__`; of several shards, the union.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The files read.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }
}

impl RawTensor {
    /// The bytes as stored: little endian, row-major, of any alignment.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// All elements of an f32, f16 or bf16 tensor, exactly; another type is an error.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.elements()];
        widen(self.dtype, self.bytes(), &mut out)?;
        Ok(out)
    }

    /// As [`RawTensor::to_f32`], whole numbers included (places that an adapter holds).
    pub fn numbers(&self) -> Result<Vec<f32>> {
        let bytes = self.bytes();
        Ok(match self.dtype {
            Dtype::U8 => bytes.iter().map(|&b| f32::from(b)).collect(),
            Dtype::I16 => bytes.as_chunks().0.iter().map(|&b| f32::from(i16::from_le_bytes(b))).collect(),
            Dtype::I32 => bytes.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b) as f32).collect(),
            Dtype::I64 => bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as f32).collect(),
            _ => return self.to_f32(),
        })
    }

    /// Rows `range` of the first dimension into `out` (`[range.len(), …]`), as [`RawTensor::to_f32`].
    pub fn rows_f32(&self, range: Range<usize>, out: &mut [f32]) -> Result<()> {
        let rows = self.shape.first().copied().unwrap_or(1);
        let width: usize = self.shape.iter().skip(1).product();
        if range.start > range.end || range.end > rows || out.len() != range.len() * width {
            return Err(Error::Request(format!(
                "rows {range:?} of a tensor of shape {:?} do not fill {} elements",
                self.shape,
                out.len()
            )));
        }
        let row_bytes = width * self.dtype.bitsize() / 8;
        let bytes = &self.bytes()[range.start * row_bytes..range.end * row_bytes];
        widen(self.dtype, bytes, out)
    }

    /// The same elements in another shape.
    ///
    /// # Errors
    /// A shape of another number of elements.
    pub fn reshaped(&self, shape: &[usize]) -> Result<RawTensor> {
        let count = |shape: &[usize]| shape.iter().try_fold(1usize, |all, n| all.checked_mul(*n));
        if count(shape) != count(&self.shape) {
            let message = format!("a tensor of shape {:?} cannot be seen as {shape:?}", self.shape);
            return Err(Error::Request(message));
        }
        Ok(RawTensor { shape: shape.to_vec(), ..self.clone() })
    }

    /// Rows `range` of the first dimension as a tensor of their own; nothing is copied.
    ///
    /// # Errors
    /// Rows that the tensor does not have, elements that are parts of a byte.
    pub fn rows(&self, range: Range<usize>) -> Result<RawTensor> {
        let (rows, bits) = (self.shape.first().copied().unwrap_or(0), self.dtype.bitsize());
        if range.start > range.end || range.end > rows || !bits.is_multiple_of(8) {
            let message = format!("a tensor of {} {:?} has no rows {range:?}", self.dtype, self.shape);
            return Err(Error::Request(message));
        }
        let row = self.shape[1..].iter().product::<usize>() * bits / 8;
        let (start, mut shape) = (self.range.start, self.shape.clone());
        shape[0] = range.len();
        Ok(RawTensor { shape, range: start + range.start * row..start + range.end * row, ..self.clone() })
    }

    /// All elements of an i64 or i32 tensor; another type is an error.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        let bytes = self.bytes();
        match self.dtype {
            Dtype::I64 => Ok(bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()),
            Dtype::I32 => Ok(bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect()),
            other => Err(Error::Request(format!("expected a tensor of I64 or I32, found {other}"))),
        }
    }
}

fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    match dtype {
        Dtype::F32 => {
            for (to, from) in out.iter_mut().zip(bytes.as_chunks().0) {
                *to = f32::from_le_bytes(*from);
            }
        }
        Dtype::BF16 => {
            for (to, from) in out.iter_mut().zip(bytes.as_chunks().0) {
                *to = f32::from_bits(u32::from(u16::from_le_bytes(*from)) << 16);
            }
        }
        Dtype::F16 => {
            // The slice conversion uses the processor's instruction; a small copy gives it alignment.
            let mut block = [f16::ZERO; 64];
            for (to, from) in out.chunks_mut(64).zip(bytes.chunks(128)) {
                for (b, pair) in block.iter_mut().zip(from.as_chunks().0) {
                    *b = f16::from_le_bytes(*pair);
                }
                block[..to.len()].convert_to_f32_slice(to);
            }
        }
        // Rounded to the nearest: nothing is computed in 64 bits.
        Dtype::F64 => {
            for (to, from) in out.iter_mut().zip(bytes.as_chunks().0) {
                *to = f64::from_le_bytes(*from) as f32;
            }
        }
        other => {
            return Err(Error::Request(format!("expected a tensor of F64, F32, F16 or BF16, found {other}")));
        }
    }
    Ok(())
}

fn map_file(path: &Path, limits: &Limits) -> Result<(Mmap, header::Header)> {
    let file = open_regular(path)?;
    // SAFETY: the map is read-only and private to us. Model files are replaced by rename, never
    // rewritten in place, by every writer of this format, ours included; a file that another process
    // truncates meanwhile ends this process with a bus error, not with wrong memory.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))?;
    let header = header::parse(path, &map, limits).map_err(|error| match is_pickle(&map) {
        true => {
            let name = path.file_name().map_or("".into(), |name| name.to_string_lossy());
            let to = Path::new(name.as_ref()).with_extension("safetensors");
            Error::malformed(path, format!("it is {}", convert_once(&name, &to.to_string_lossy())))
        }
        false => error,
    })?;
    Ok((map, header))
}

fn read_weight_map(index: &Path, limits: &Limits) -> Result<BTreeMap<String, String>> {
    let json = read_json(index, "index_json", limits.index_json, limits.json_depth)?;
    let Some(Value::Object(entries)) = json.get("weight_map") else {
        return Err(Error::malformed(index, "expected an object `weight_map`, found none"));
    };
    let pair = |(name, shard): (&String, &Value)| match shard.as_str() {
        Some(shard) => Ok((name.clone(), shard.to_owned())),
        None => {
            Err(Error::malformed(index, format!("`weight_map.{name}` must be a file name, found {shard}")))
        }
    };
    entries.iter().map(pair).collect()
}

/// Says what the directory holds instead, and what to do about pickled weights.
fn no_weights(dir: &Path) -> Error {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Error::missing(dir, "no such directory; expected a model directory or a Hub id");
    };
    let mut names: Vec<String> =
        entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let pickled = names.iter().find(|n| {
        n.starts_with("pytorch_model") || n.ends_with(".bin") || n.ends_with(".pt") || n.ends_with(".pth")
    });
    match pickled {
        Some(name) => Error::missing(dir, format!("the weights are only in {}", convert_once(name, SINGLE))),
        None => Error::missing(
            dir,
            format!(
                "expected {SINGLE} or {INDEX}, found {}",
                if names.is_empty() {
                    "an empty directory".into()
                } else {
                    names[..names.len().min(12)].join(", ")
                }
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write::{Entry, write_safetensors};

    fn save(path: &Path, entries: &[Entry]) {
        write_safetensors(path, entries, &BTreeMap::new()).unwrap();
    }

    fn message(dir: &Path) -> String {
        Weights::open(dir, &Limits::default()).unwrap_err().to_string()
    }

    #[test]
    fn other_types_become_f32_exactly() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let values: Vec<f32> = (0..200).map(|i| (i as f32 - 100.0) * 0.25).collect();
        let f16s: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let f64s: Vec<u8> = values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        save(
            &path,
            &[
                Entry::new("h", Dtype::F16, &[10, 20], f16s),
                Entry::new("d", Dtype::F64, &[10, 20], f64s),
                Entry::new("b", Dtype::BF16, &[10, 20], bf16s),
                Entry::f32("f", &[10, 20], &values),
                Entry::new("i", Dtype::I64, &[2], [(-1i64).to_le_bytes(), 7i64.to_le_bytes()].concat()),
            ],
        );
        let weights = Weights::open(dir.path(), &Limits::default()).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["b", "d", "f", "h", "i"]);
        for name in ["h", "b", "f", "d"] {
            let tensor = weights.get(name).unwrap();
            assert_eq!(tensor.to_f32().unwrap(), values, "{name}");
            let mut rows = vec![0.0; 60];
            tensor.rows_f32(3..6, &mut rows).unwrap();
            assert_eq!(rows, values[60..120], "{name}");
            assert!(tensor.rows_f32(9..11, &mut rows[..40]).is_err());
            assert!(tensor.rows_f32(3..6, &mut rows[..59]).is_err());
        }
        assert_eq!(weights.get("i").unwrap().to_i64().unwrap(), [-1, 7]);
        assert!(weights.get("i").unwrap().to_f32().is_err());
    }

    #[test]
    fn shards_and_their_faults() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join(INDEX);
        save(&dir.path().join("s1.safetensors"), &[Entry::f32("a", &[1], &[1.0])]);
        save(&dir.path().join("s2.safetensors"), &[Entry::f32("b", &[1], &[2.0])]);
        let set = |map: &str| std::fs::write(&index, format!("{{\"weight_map\":{map}}}")).unwrap();
        set(r#"{"a":"s1.safetensors","b":"s2.safetensors"}"#);
        let weights = Weights::open(dir.path(), &Limits::default()).unwrap();
        assert_eq!(weights.get("b").unwrap().to_f32().unwrap(), [2.0]);
        set(r#"{"a":"s1.safetensors","b":"s1.safetensors"}"#);
        assert!(message(dir.path()).contains("`b`"));
        set(r#"{"a":"s3.safetensors"}"#);
        assert!(message(dir.path()).contains("names this shard"));
        for bad in ["../s1.safetensors", "/etc/passwd", "x/../s1.safetensors", "\\u0000"] {
            set(&format!(r#"{{"a":"{bad}"}}"#));
            assert!(message(dir.path()).contains("plain file name"), "{bad}");
        }
        set("3");
        assert!(message(dir.path()).contains("weight_map"));
    }

    #[test]
    fn a_pickle_is_called_one() {
        let dir = tempfile::tempdir().unwrap();
        for (name, begin) in
            [("lora.pt", &b"PK\x03\x04\0\0\x08\x08"[..]), ("old.bin", &b"\x80\x02\x8a\nl\xfc"[..])]
        {
            let path = dir.path().join(name);
            std::fs::write(&path, [begin, &[0; 64]].concat()).unwrap();
            let said = Weights::open_file(&path, &Limits::default()).unwrap_err().to_string();
            let stem = name.split('.').next().unwrap();
            assert!(said.contains("a pickle") && said.contains(&format!("'{stem}.safetensors'")), "{said}");
        }
    }

    #[test]
    fn a_directory_without_safetensors_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        assert!(message(dir.path()).contains("empty directory"));
        std::fs::write(dir.path().join("pytorch_model.bin"), b"x").unwrap();
        assert!(message(dir.path()).contains("convert it once"));
        std::fs::write(dir.path().join(SINGLE), b"").unwrap();
        assert!(message(dir.path()).contains("found 0 bytes"), "{}", message(dir.path()));
        assert!(message(&dir.path().join("none")).contains("no such directory"));
    }
}
