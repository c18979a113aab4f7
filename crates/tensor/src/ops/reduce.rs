//! Sums and means.

use crate::device::{Buffer, device};
use crate::error::{Result, shape_error};
use crate::tensor::Tensor;

impl Tensor {
    /// Sums so that the result has `shape`, which must broadcast to this shape.
    pub fn sum_to(&self, shape: &[usize]) -> Result<Tensor> {
        if self.shape() == shape {
            return Ok(self.clone());
        }
        let rank = self.shape().len();
        if shape.len() > rank {
            return shape_error("sum_to", format!("at most {rank} dimensions"), format!("{shape:?}"));
        }
        let mut padded = vec![1; rank - shape.len()];
        padded.extend_from_slice(shape);
        if padded.iter().zip(self.shape()).any(|(&to, &from)| to != from && to != 1) {
            return shape_error(
                "sum_to",
                format!("a shape that broadcasts to {:?}", self.shape()),
                format!("{shape:?}"),
            );
        }
        let mut y = Buffer::f32(padded.iter().product());
        device().sum_to(self, &padded, &mut y);
        let (edge, before) = (self.edge(), self.shape().to_vec());
        Ok(Tensor::new(shape, y).on_tape("sum_to", &[self], move |dy, sink| {
            let dy = dy.reshape(padded)?;
            sink.add(&edge, Tensor::zeros(before).add(&dy)?)
        }))
    }

    /// Sum of all elements, shape `[]`.
    pub fn sum(&self) -> Result<Tensor> {
        self.sum_to(&[])
    }

    /// Mean of all elements, shape `[]`.
    pub fn mean(&self) -> Result<Tensor> {
        self.sum()?.scale(1.0 / self.len().max(1) as f32)
    }

    /// Sum over dimension `dim`, which stays with size 1.
    pub fn sum_dim(&self, dim: usize) -> Result<Tensor> {
        if dim >= self.shape().len() {
            return shape_error("sum_dim", format!("a dimension of {:?}", self.shape()), dim.to_string());
        }
        let mut shape = self.shape().to_vec();
        shape[dim] = 1;
        self.sum_to(&shape)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{check_gradients, sample};

    #[test]
    fn sums_differentiate() {
        let x = sample(&[2, 3, 4], 5);
        for shape in [&[2, 3, 4][..], &[3, 4], &[4], &[1, 3, 1], &[2, 1, 1], &[]] {
            check_gradients(std::slice::from_ref(&x), |v| v[0].sum_to(shape)).unwrap();
        }
        assert!(x.sum_to(&[2]).is_err());
        let total: f32 = x.to_vec().unwrap().iter().sum();
        assert!((x.mean().unwrap().item().unwrap() - total / 24.0).abs() < 1e-6);
        let middle = x.sum_dim(1).unwrap();
        let (v, m) = (x.to_vec().unwrap(), middle.to_vec().unwrap());
        assert!((m[5] - (v[13] + v[17] + v[21])).abs() < 1e-6);
    }
}
