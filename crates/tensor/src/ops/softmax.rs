//! Softmax over the last dimension.

use crate::device::{Buffer, device};
use crate::error::Result;
use crate::tensor::Tensor;

impl Tensor {
    /// Softmax over the last dimension.
    pub fn softmax(&self) -> Result<Tensor> {
        self.expect_f32("softmax")?;
        let mut y = Buffer::f32(self.len());
        device().softmax(self, &mut y);
        let y = Tensor::new(self.shape(), y);
        let (edge, kept) = (self.edge(), y.clone());
        Ok(y.on_tape("softmax", &[self], move |dy, sink| {
            let mut dx = Buffer::f32(kept.len());
            device().softmax_backward(&kept, &dy, &mut dx);
            sink.add(&edge, Tensor::new(kept.shape(), dx))
        }))
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::Unary;
    use crate::testing::{check_gradients, sample};

    #[test]
    fn softmax_is_exp_over_sum() {
        let x = sample(&[3, 6], 4);
        let e = x.unary(Unary::Exp).unwrap();
        let composed = e.div(&e.sum_dim(1).unwrap()).unwrap().to_vec().unwrap();
        for (a, b) in x.softmax().unwrap().to_vec().unwrap().iter().zip(composed) {
            assert!((a - b).abs() < 1e-6);
        }
        check_gradients(&[x], |v| v[0].softmax()).unwrap();
    }
}
