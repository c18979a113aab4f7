//! Terms of the loss that arise inside a model.

use crate::error::{Result, shape_error};
use crate::tensor::Tensor;

impl Tensor {
    /// The same values; where backward comes by, it goes on from the scalar `loss` too, as if `loss` had been added to what
    /// it started from. So a part of a model brings a term of the loss along, inside a checkpoint as well.
    pub fn carrying(&self, loss: &Tensor) -> Result<Tensor> {
        if loss.len() != 1 {
            return shape_error("carrying", "a scalar", format!("{:?}", loss.shape()));
        }
        let (edge, extra, shape) = (self.edge(), loss.edge(), loss.shape().to_vec());
        Ok(self.detach().on_tape("carrying", &[self, loss], move |dy, sink| {
            sink.add(&extra, Tensor::full(1.0, shape))?;
            sink.add(&edge, dy)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Unary;
    use crate::testing::sample;
    use crate::{Param, checkpoint};

    #[test]
    fn a_carried_loss_is_part_of_what_is_differentiated() {
        let (p, x) = (Param::new(sample(&[4, 3], 2)), sample(&[2, 3], 1));
        let extra = |p: &Param| p.get().unary(Unary::Square)?.sum()?.scale(0.3);
        let loss = x.matmul_t(&p.get()).unwrap().unary(Unary::Tanh).unwrap().sum().unwrap();
        let sum = loss.add(&extra(&p).unwrap()).unwrap();
        let expected = sum.backward().unwrap().get(&p).unwrap().to_vec().unwrap();
        for checkpointed in [false, true] {
            let inner = p.clone();
            let f = move |v: &[Tensor]| {
                v[0].matmul_t(&inner.get())?.carrying(&extra(&inner)?)?.unary(Unary::Tanh)
            };
            let y = if checkpointed { checkpoint(&[&x], f) } else { f(std::slice::from_ref(&x)) }.unwrap();
            let gradients = y.sum().unwrap().backward().unwrap();
            for (a, b) in gradients.get(&p).unwrap().to_vec().unwrap().iter().zip(&expected) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
        assert!(x.carrying(&x).is_err());
    }
}
