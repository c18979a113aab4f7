//! Tensors of adapters and checkpoints, to and from files: numbers are f32, places and counters whole.

use engraft_method::{Named, Stored};
use engraft_store::{Dtype, Entry, RawTensor, Weights};
use engraft_tensor::{DType, Tensor};
use half::{bf16, f16};

use crate::{Error, Result};

/// A tensor in the type that it has.
pub(crate) fn entry(name: impl Into<String>, tensor: &Tensor) -> Result<Entry<'static>> {
    let dtype = match tensor.dtype() {
        DType::F32 => Dtype::F32,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
    };
    Ok(Entry::new(name, dtype, tensor.shape(), tensor.to_bytes()?))
}

/// A tensor in the type that its method's file has it in; whole numbers that the engine holds as such keep theirs.
pub(crate) fn stored(stored: Stored, name: &str, tensor: &Tensor) -> Result<Entry<'static>> {
    if tensor.dtype() != DType::F32 || stored == Stored::F32 {
        return entry(name, tensor);
    }
    let values = tensor.to_vec()?;
    let (dtype, bytes): (Dtype, Vec<u8>) = match stored {
        Stored::U8 => (Dtype::U8, values.iter().map(|&v| v as u8).collect()),
        Stored::I16 => (Dtype::I16, values.iter().flat_map(|&v| (v as i16).to_le_bytes()).collect()),
        Stored::I32 => (Dtype::I32, values.iter().flat_map(|&v| (v as i32).to_le_bytes()).collect()),
        Stored::I64 => (Dtype::I64, values.iter().flat_map(|&v| (v as i64).to_le_bytes()).collect()),
        Stored::BF16 => (Dtype::BF16, values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()),
        Stored::F16 => {
            let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
            // A finite value beyond 65504 would become infinite.
            if let Some(at) = (0..halves.len()).find(|&i| values[i].is_finite() && !halves[i].is_finite()) {
                let value = values[at];
                return Err(Error::Setup(format!(
                    "{name}: {value} does not fit into f16, which is the base's type"
                )));
            }
            (Dtype::F16, halves.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        Stored::F32 => return entry(name, tensor),
    };
    Ok(Entry::new(name, dtype, tensor.shape(), bytes))
}

/// A tensor of a file: whole numbers as they are where the engine has their type, others as f32.
pub(crate) fn tensor(raw: &RawTensor) -> Result<Tensor> {
    Ok(match raw.dtype {
        Dtype::I64 => Tensor::from_i64(raw.to_i64()?, raw.shape.clone())?,
        Dtype::I32 => {
            let values = raw.to_i64()?.into_iter().map(|v| v as i32).collect();
            Tensor::from_i32(values, raw.shape.clone())?
        }
        _ => Tensor::from_vec(raw.numbers()?, raw.shape.clone())?,
    })
}

/// The tensors of a file by name.
pub(crate) fn named(weights: &Weights) -> Result<Named> {
    let read = |(name, raw): (&str, &RawTensor)| match tensor(raw) {
        Ok(tensor) => Ok((name.to_owned(), tensor)),
        Err(error) => Err(Error::Setup(format!("{name}: {error}"))),
    };
    weights.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use engraft_store::{Limits, Weights, write_safetensors};

    use super::*;

    #[test]
    fn every_type_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let tensors = [
            ("a", Tensor::from_vec(vec![0.5, -2.0], [2]).unwrap()),
            ("b", Tensor::from_i64(vec![-1, 1 << 40], [2, 1]).unwrap()),
            ("c", Tensor::from_i32(vec![i32::MIN, 3], [1, 2]).unwrap()),
        ];
        let entries: Vec<Entry> = tensors.iter().map(|(name, t)| entry(*name, t).unwrap()).collect();
        write_safetensors(&path, &entries, &BTreeMap::new()).unwrap();
        let weights = Weights::open_file(&path, &Limits::default()).unwrap();
        for (name, expected) in tensors {
            let found = tensor(weights.get(name).unwrap()).unwrap();
            assert_eq!((found.dtype(), found.shape()), (expected.dtype(), expected.shape()));
            assert_eq!(found.to_bytes().unwrap(), expected.to_bytes().unwrap());
        }
    }
}
