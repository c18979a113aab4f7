//! The largest numbers of each row.

use crate::device::{Buffer, Indices, device};
use crate::error::{Result, shape_error};
use crate::tensor::Tensor;

impl Tensor {
    /// The `k` largest numbers of each row, the largest first and of equal ones the earliest, and their columns:
    /// x [.., n] → ([.., k], `I64` [.., k]). Gradients go where the numbers came from.
    pub fn top_k(&self, k: usize) -> Result<(Tensor, Tensor)> {
        self.expect_f32("top k")?;
        let n = self.width();
        if self.shape().is_empty() || k == 0 || k > n {
            return shape_error("top k", format!("rows of at least {k}"), format!("{:?}", self.shape()));
        }
        let mut shape = self.shape().to_vec();
        *shape.last_mut().expect("has a width") = k;
        let count = self.rows() * k;
        let (mut y, mut columns) = (Buffer::f32(count), Buffer::I64(Indices::output(count)));
        device().top_k(self, n, k, &mut y, &mut columns);
        let columns = Tensor::new(shape.clone(), columns);
        let (edge, before, chosen) = (self.edge(), self.shape().to_vec(), columns.clone());
        let y = Tensor::new(shape, y).on_tape("top k", &[self], move |dy, sink| {
            let places = chosen.i64().iter().enumerate().map(|(at, &c)| (at / k * n) as i64 + c).collect();
            let places = Tensor::from_i64(places, [chosen.len()])?;
            let dx = dy.reshape([dy.len()])?.scatter_add(&places, before.iter().product())?;
            sink.add(&edge, dx.reshape(before)?)
        });
        Ok((y, columns))
    }
}

impl Tensor {
    /// Indices as floats, to be stored: exact below 2²⁴. No gradient goes through.
    pub fn to_f32(&self) -> Tensor {
        match self.dtype() {
            crate::DType::I64 => {
                let floats: Vec<f32> = self.i64().iter().map(|&i| i as f32).collect();
                Tensor::new(self.shape(), floats.into())
            }
            _ => self.detach(),
        }
    }

    /// Floats that hold indices as `I64`.
    pub fn as_i64(&self) -> Tensor {
        match self.dtype() {
            crate::DType::F32 => Tensor::new(
                self.shape(),
                Buffer::I64(self.host_f32().iter().map(|&v| v as i64).collect::<Vec<_>>().into()),
            ),
            _ => self.detach(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::check_gradients;

    #[test]
    fn finds_the_largest_and_sends_gradients_back() {
        let x =
            Tensor::from_vec(vec![1.0, 5.0, 3.0, 5.0, -1.0, 0.5, -2.0, f32::NEG_INFINITY], [2, 4]).unwrap();
        let (y, columns) = x.top_k(3).unwrap();
        assert_eq!(y.to_vec().unwrap(), [5.0, 5.0, 3.0, 0.5, -1.0, -2.0]);
        assert_eq!(columns.i64(), [1, 3, 2, 1, 0, 2]);
        assert_eq!(columns.to_f32().as_i64().i64(), columns.i64());
        // Many are found in another way: the first of them are the same.
        let ties = (0..200).map(|i| (i * 37 % 23) as f32).collect();
        let ties = Tensor::from_vec(ties, [2, 100]).unwrap();
        let ((many, places), (few, first)) = (ties.top_k(70).unwrap(), ties.top_k(12).unwrap());
        assert_eq!(many.narrow(1, 0, 12).unwrap().to_vec().unwrap(), few.to_vec().unwrap());
        for row in 0..2 {
            assert_eq!(places.i64()[70 * row..70 * row + 12], first.i64()[12 * row..12 * (row + 1)]);
        }
        assert_eq!(
            ties.top_k(100).unwrap().0.sum().unwrap().item().unwrap(),
            ties.sum().unwrap().item().unwrap()
        );
        // Far enough apart that a finite difference changes no order.
        let apart = (0..42).map(|i| (i * 25 % 42) as f32 / 8.0 - 2.0).collect();
        let apart = Tensor::from_vec(apart, [3, 2, 7]).unwrap();
        check_gradients(&[apart], |v| Ok(v[0].top_k(3)?.0)).unwrap();
        assert!(x.top_k(5).is_err() && x.top_k(0).is_err());
    }
}
