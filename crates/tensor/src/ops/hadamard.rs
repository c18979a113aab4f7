//! The Walsh–Hadamard transform, which mixes all numbers of a row with signs alone.

use crate::device::{Buffer, device};
use crate::error::{Result, shape_error};
use crate::tensor::Tensor;

impl Tensor {
    /// x·H along the last dimension, a power of two, not divided: H has the entries (−1)^(bits that both places share), so
    /// that H·H is their number times the identity. Its gradient is the same transform.
    pub fn hadamard(&self) -> Result<Tensor> {
        self.expect_f32("hadamard")?;
        let n = self.width();
        if self.shape().is_empty() || !n.is_power_of_two() {
            return shape_error("hadamard", "rows of a power of two", format!("{:?}", self.shape()));
        }
        let mut y = Buffer::f32(self.len());
        device().copy_block(self, &mut y, 0);
        device().hadamard(n, &mut y);
        let edge = self.edge();
        Ok(Tensor::new(self.shape(), y)
            .on_tape("hadamard", &[self], move |dy, sink| sink.add(&edge, dy.hadamard()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, close, sample};

    #[test]
    fn is_the_signed_sum_and_its_own_inverse() {
        for n in [1, 2, 8, 64] {
            let x = sample(&[3, n], n as u64);
            let v = x.to_vec().unwrap();
            let sum = |row: usize, i: usize| -> f32 {
                let sign = |j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                (0..n).map(|j| sign(j) * v[row * n + j]).sum()
            };
            let expected = (0..3 * n).map(|at| sum(at / n, at % n)).collect();
            close(&x.hadamard().unwrap(), &Tensor::from_vec(expected, [3, n]).unwrap(), 1e-5);
            check_gradients(&[x], |v| v[0].hadamard()).unwrap();
        }
        let long = sample(&[2, 1 << 14], 1);
        let twice = long.hadamard().unwrap().hadamard().unwrap().scale(1.0 / (1 << 14) as f32).unwrap();
        close(&twice, &long, 1e-5);
        assert!(sample(&[6], 1).hadamard().is_err());
    }
}
