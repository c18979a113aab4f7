//! Safetensors files in the bytes that `safetensors.torch.save_file` writes, one or sharded.
//!
//! Entries are ordered by type, widest alignment first, then by name; the header is compact JSON
//! padded with spaces to 8 bytes. Tensors may be made only when their turn comes, so that writing a
//! model needs memory for one tensor.

use crate::atomic::write_atomic_on;
use crate::disk::RealDisk;
use crate::error::{Error, Result};
use crate::header::{Dtype, byte_size};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

/// Gives the bytes of a tensor when it is written.
type Make<'a> = Box<dyn Fn() -> Vec<u8> + 'a>;

enum Data<'a> {
    Bytes(Cow<'a, [u8]>),
    F32(&'a [f32]),
    Make(Make<'a>),
}

/// One tensor to write.
pub struct Entry<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    data: Data<'a>,
}

impl<'a> Entry<'a> {
    /// A tensor from its bytes, little endian and row-major.
    pub fn new(
        name: impl Into<String>,
        dtype: Dtype,
        shape: &[usize],
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec(), data: Data::Bytes(bytes.into()) }
    }

    /// An f32 tensor; converted to bytes only while it is written.
    pub fn f32(name: impl Into<String>, shape: &[usize], values: &'a [f32]) -> Self {
        let data = Data::F32(values);
        Self { name: name.into(), dtype: Dtype::F32, shape: shape.to_vec(), data }
    }

    /// A tensor whose bytes `make` gives when its turn comes.
    pub fn lazy(
        name: impl Into<String>,
        dtype: Dtype,
        shape: &[usize],
        make: impl Fn() -> Vec<u8> + 'a,
    ) -> Self {
        let data = Data::Make(Box::new(make));
        Self { name: name.into(), dtype, shape: shape.to_vec(), data }
    }

    fn size(&self) -> Result<usize> {
        let size = byte_size(self.dtype, &self.shape).ok_or_else(|| {
            Error::Request(format!("tensor `{}`: shape {:?} has no size", self.name, self.shape))
        })?;
        let found = match &self.data {
            Data::Bytes(bytes) => bytes.len(),
            Data::F32(values) => values.len() * 4,
            Data::Make(_) => size,
        };
        if found == size {
            return Ok(size);
        }
        Err(Error::Request(format!(
            "tensor `{}`: {} {:?} takes {size} bytes, {found} were given",
            self.name, self.dtype, self.shape
        )))
    }

    fn write_to(&self, out: &mut dyn Write) -> io::Result<()> {
        match &self.data {
            Data::Bytes(bytes) => out.write_all(bytes),
            Data::F32(values) => {
                let mut block = [0u8; 4096];
                for part in values.chunks(1024) {
                    for (to, from) in block.as_chunks_mut::<4>().0.iter_mut().zip(part) {
                        *to = from.to_le_bytes();
                    }
                    out.write_all(&block[..part.len() * 4])?;
                }
                Ok(())
            }
            Data::Make(make) => out.write_all(&make()),
        }
    }
}

/// The content of a file whose size is known before it is written.
pub struct Body<'a> {
    head: Cow<'a, [u8]>,
    entries: Vec<&'a Entry<'a>>,
    size: u64,
}

impl<'a> Body<'a> {
    /// Plain bytes.
    pub fn bytes(bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        let head = bytes.into();
        let size = head.len() as u64;
        Self { head, entries: Vec::new(), size }
    }

    /// A safetensors file. `__metadata__` always holds `"format": "pt"`, which `transformers` and
    /// `peft` require. A repeated name or a size that does not fit its shape is an error.
    pub fn safetensors(entries: &'a [Entry<'a>], metadata: &BTreeMap<String, String>) -> Result<Self> {
        Self::of(entries.iter().collect(), metadata)
    }

    fn of(mut entries: Vec<&'a Entry<'a>>, metadata: &BTreeMap<String, String>) -> Result<Self> {
        entries.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        let mut metadata = metadata.clone();
        metadata.entry("format".into()).or_insert_with(|| "pt".into());
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), json!(metadata));
        let mut at = 0usize;
        for entry in &entries {
            let end = at
                .checked_add(entry.size()?)
                .ok_or_else(|| Error::Request("the tensors exceed 64 bits of bytes".into()))?;
            let info =
                json!({"dtype": entry.dtype.to_string(), "shape": entry.shape, "data_offsets": [at, end]});
            if header.insert(entry.name.clone(), info).is_some() {
                return Err(Error::Request(format!("tensor `{}` is given twice", entry.name)));
            }
            at = end;
        }
        let mut text = Value::Object(header).to_string();
        text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
        let mut head = (text.len() as u64).to_le_bytes().to_vec();
        head.extend_from_slice(text.as_bytes());
        let size = (head.len() + at) as u64;
        Ok(Self { head: head.into(), entries, size })
    }

    /// Bytes that [`Body::write_to`] will write.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes the content.
    pub fn write_to(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&self.head)?;
        self.entries.iter().try_for_each(|entry| entry.write_to(out))
    }
}

/// Writes a safetensors file atomically.
pub fn write_safetensors(path: &Path, entries: &[Entry], metadata: &BTreeMap<String, String>) -> Result<()> {
    write_atomic_on(&RealDisk, path, &Body::safetensors(entries, metadata)?)
}

/// Writes a model's weights into `dir`: one `model.safetensors`, or shards of at most `shard_bytes`
/// of tensors (a larger tensor gets its own) and, last, their index. Tensors keep their order.
pub fn write_model(dir: &Path, entries: &[Entry], shard_bytes: u64) -> Result<()> {
    let metadata = BTreeMap::new();
    let mut shards: Vec<(u64, Vec<&Entry>)> = vec![(0, Vec::new())];
    for entry in entries {
        let size = entry.size()? as u64;
        let (bytes, shard) = shards.last_mut().expect("there is always a shard");
        if shard.is_empty() || bytes.saturating_add(size) <= shard_bytes {
            *bytes += size;
            shard.push(entry);
        } else {
            shards.push((size, vec![entry]));
        }
    }
    let count = shards.len();
    if count == 1 {
        return write_safetensors(&dir.join("model.safetensors"), entries, &metadata);
    }
    let total: u64 = shards.iter().map(|(bytes, _)| bytes).sum();
    let mut weight_map = BTreeMap::new();
    for (i, (_, shard)) in shards.into_iter().enumerate() {
        let name = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        for entry in &shard {
            if weight_map.insert(entry.name.clone(), name.clone()).is_some() {
                return Err(Error::Request(format!("tensor `{}` is given twice", entry.name)));
            }
        }
        write_atomic_on(&RealDisk, &dir.join(&name), &Body::of(shard, &metadata)?)?;
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    let text = crate::json::python_json(&index) + "\n";
    write_atomic_on(&RealDisk, &dir.join("model.safetensors.index.json"), &Body::bytes(text.into_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Limits, Weights};

    // Written by safetensors.torch.save_file 0.8 with metadata {"format": "pt"} from a dict in the order
    // b.weight, a, h, i, é, m, u, z.
    const PYTHON_HEADER: &str = r#"{"__metadata__":{"format":"pt"},"i":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[2],"data_offsets":[16,24]},"b.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[24,48]},"é":{"dtype":"F32","shape":[],"data_offsets":[48,52]},"z":{"dtype":"BF16","shape":[1],"data_offsets":[52,54]},"h":{"dtype":"F16","shape":[1],"data_offsets":[54,56]},"u":{"dtype":"U8","shape":[1],"data_offsets":[56,57]},"m":{"dtype":"BOOL","shape":[2],"data_offsets":[57,59]}}       "#;
    const PYTHON_DATA: &str = "030000000000000004000000000000000000c03f000000c0000000000000003f0000803f0000c03f000000400000204000002040803f003c070100";

    #[test]
    fn the_bytes_are_those_of_python() {
        let entries = [
            Entry::f32("b.weight", &[2, 3], &[0.0, 0.5, 1.0, 1.5, 2.0, 2.5]),
            Entry::lazy("a", Dtype::F32, &[2], || [1.5f32.to_le_bytes(), (-2f32).to_le_bytes()].concat()),
            Entry::new("h", Dtype::F16, &[1], vec![0x00, 0x3c]),
            Entry::new("i", Dtype::I64, &[2], [3i64.to_le_bytes(), 4i64.to_le_bytes()].concat()),
            Entry::f32("é", &[], &[2.5]),
            Entry::new("m", Dtype::BOOL, &[2], vec![1, 0]),
            Entry::new("u", Dtype::U8, &[1], vec![7]),
            Entry::new("z", Dtype::BF16, &[1], vec![0x80, 0x3f]),
        ];
        let body = Body::safetensors(&entries, &BTreeMap::new()).unwrap();
        let mut bytes = Vec::new();
        body.write_to(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, body.size());
        assert_eq!(bytes[..8], 488u64.to_le_bytes());
        assert_eq!(std::str::from_utf8(&bytes[8..496]).unwrap(), PYTHON_HEADER);
        let data: String = bytes[496..].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(data, PYTHON_DATA);
    }

    #[test]
    fn wrong_sizes_and_repeated_names_are_errors() {
        let none = BTreeMap::new();
        let short = [Entry::f32("a", &[3], &[1.0])];
        let e = Body::safetensors(&short, &none).err().unwrap().to_string();
        assert!(e.contains("`a`") && e.contains("12 bytes, 4 were given"), "{e}");
        let twice = [Entry::f32("a", &[], &[1.0]), Entry::f32("a", &[], &[1.0])];
        assert!(Body::safetensors(&twice, &none).is_err());
        let dir = tempfile::tempdir().unwrap();
        let liar = [Entry::lazy("a", Dtype::F32, &[3], || vec![0; 8])];
        assert!(write_safetensors(&dir.path().join("x"), &liar, &none).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_sharded_model_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let values: Vec<f32> = (0..100).map(|i| i as f32).collect();
        let names: Vec<String> = (0..7).map(|i| format!("t{i}")).collect();
        let entries: Vec<Entry> = names.iter().map(|n| Entry::f32(n, &[10, 10], &values)).collect();
        write_model(dir.path(), &entries, 1000).unwrap();
        let weights = Weights::open(dir.path(), &Limits::default()).unwrap();
        assert_eq!(weights.files().len(), 4);
        assert!(dir.path().join("model-00004-of-00004.safetensors").exists());
        assert!(weights.iter().all(|(_, t)| t.to_f32().unwrap() == values) && weights.len() == 7);
    }
}
