//! Masks of one bit an entry, the lowest bit of a byte first; in files bytes.

use engraft_nn::{Builder, Init, Result};
use engraft_tensor::{Param, Tensor};

use crate::shared::kept::Kept;

/// The end of a mask's name.
pub(crate) const MASK: &str = ".mask";

/// Bytes of these bits, as numbers.
pub(crate) fn pack(bits: &[bool]) -> Result<Tensor> {
    let byte = |chunk: &[bool]| chunk.iter().rev().fold(0u8, |sum, &bit| sum << 1 | u8::from(bit));
    let bytes: Vec<f32> = bits.chunks(8).map(|chunk| f32::from(byte(chunk))).collect();
    let count = bytes.len();
    Ok(Tensor::from_vec(bytes, [count])?)
}

/// One or zero for each of the bits of `bytes`, in this shape.
pub(crate) fn unpack(bytes: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let bytes = bytes.as_i64();
    let (bytes, count) = (bytes.ids()?, shape.iter().product::<usize>());
    let bit = |i: usize| (bytes[i / 8] >> (i % 8) & 1) as f32;
    Ok(Tensor::from_vec((0..count).map(bit).collect(), shape)?)
}

/// A mask of an adapter, all ones at first, saved as NAME.mask.
pub(crate) struct Bits {
    bytes: Param,
    shape: Vec<usize>,
    unpacked: Kept<Tensor>,
}

impl Bits {
    pub fn new(b: &mut Builder<'_>, name: &str, shape: &[usize]) -> Result<Bits> {
        let ones = pack(&vec![true; shape.iter().product()])?;
        let bytes = b.fixed(&format!("{name}{MASK}"), &[ones.len()], Init::Values(ones))?;
        Ok(Bits { bytes, shape: shape.to_vec(), unpacked: Kept::new() })
    }

    /// One or zero for each entry.
    pub fn mask(&self) -> Result<Tensor> {
        self.unpacked.read(&self.bytes, |bytes| unpack(bytes, &self.shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::toy;

    #[test]
    fn bits_survive_packing() {
        let bits: Vec<bool> = (0..21).map(|i| i % 3 == 0 || i == 10).collect();
        let bytes = pack(&bits).unwrap();
        assert_eq!(bytes.to_vec().unwrap()[0], f32::from(0b0100_1001u8));
        let mask = unpack(&bytes, &[3, 7]).unwrap().to_vec().unwrap();
        assert!(bits.iter().zip(&mask).all(|(bit, m)| f32::from(u8::from(*bit)) == *m));
        let (sites, info) = toy();
        let mut b = Builder::new(&sites, &info, 1);
        let own = Bits::new(&mut b, "w", &[3, 7]).unwrap();
        assert!(own.mask().unwrap().to_vec().unwrap().iter().all(|m| *m == 1.0));
        own.bytes.set(bytes).unwrap();
        assert_eq!(own.mask().unwrap().to_vec().unwrap(), mask);
    }
}
