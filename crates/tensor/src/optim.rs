//! What an optimizer does on the device: AdamW's update and clipping by the global norm, without reading anything.

pub use crate::cpu::adamw::AdamW;
use crate::device::{AdamWState, Buffer, device};
use crate::error::Result;
use crate::param::Param;
use crate::tape::Gradients;
use crate::tensor::Tensor;

/// First and second moments of one parameter, f32.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Mean of gradients, shape of the parameter.
    pub m: Tensor,
    /// Mean of squared gradients, shape of the parameter.
    pub v: Tensor,
}

impl Moments {
    /// Zeros for `param`.
    pub fn zeros(param: &Param) -> Self {
        let shape = param.value().shape().to_vec();
        Moments { m: Tensor::zeros(shape.clone()), v: Tensor::zeros(shape) }
    }
}

impl AdamW {
    /// The `step`-th update (from 1) of `param` with `grad·scale`. Where `scale` (one element, on the device) is not
    /// finite nothing changes.
    pub fn update(
        &self,
        param: &Param,
        grad: &Tensor,
        scale: &Tensor,
        step: u64,
        moments: &mut Moments,
    ) -> Result<()> {
        grad.expect_shape("adamw", param.value().shape())?;
        moments.m.expect_shape("adamw", grad.shape())?;
        moments.v.expect_shape("adamw", grad.shape())?;
        let m = moments.m.own();
        let v = moments.v.own();
        param.update(|value| device().adamw(self, step, scale, grad, AdamWState { value, m, v }));
        Ok(())
    }
}

impl Param {
    /// Replaces the value by one of another shape (ranks cut after training). An optimizer's memory of it is void.
    pub fn replace(&self, value: Tensor) {
        self.with_value(|slot| *slot = value.detach());
    }

    /// Changes the value in place.
    pub(crate) fn update(&self, f: impl FnOnce(&mut Buffer)) {
        self.with_value(|value| f(value.own()));
    }
}

/// Global norm of the gradients of `params`, and the factor that brings it to `max_norm` (1 if it is below, or if
/// `max_norm` is 0). Both are scalars on the device; the factor is not finite where a gradient is not.
pub fn clip(params: &[Param], gradients: &Gradients, max_norm: f32) -> (Tensor, Tensor) {
    let mut squares = Buffer::f32(1);
    device().fill(0.0, &mut squares);
    for gradient in params.iter().filter_map(|p| gradients.get(p)) {
        device().add_sum_of_squares(gradient, &mut squares);
    }
    let squares = Tensor::new([], squares);
    let (mut norm, mut scale) = (Buffer::f32(1), Buffer::f32(1));
    device().clip_scale(&squares, max_norm, &mut norm, &mut scale);
    (Tensor::new([], norm), Tensor::new([], scale))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::sample;

    const RULE: AdamW = AdamW { learning_rate: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };

    #[test]
    fn first_update_moves_by_the_learning_rate() {
        let p = Param::new(sample(&[3, 4], 1));
        let before = p.value().to_vec().unwrap();
        let grad = sample(&[3, 4], 2);
        RULE.update(&p, &grad, &Tensor::scalar(1.0), 1, &mut Moments::zeros(&p)).unwrap();
        for ((a, b), g) in p.value().to_vec().unwrap().iter().zip(before).zip(grad.to_vec().unwrap()) {
            assert!((a - (b * (1.0 - 0.001) - 0.01 * g.signum())).abs() < 1e-5);
        }
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let p = Param::new(sample(&[4], 1));
        let loss = p.get().mul(&Tensor::full(f32::NAN, [4])).unwrap().sum().unwrap();
        let gradients = loss.backward().unwrap();
        let before = p.value().to_vec().unwrap();
        let mut moments = Moments::zeros(&p);
        for max_norm in [0.0, 1.0] {
            let (norm, scale) = clip(std::slice::from_ref(&p), &gradients, max_norm);
            assert!(!norm.item().unwrap().is_finite());
            RULE.update(&p, gradients.get(&p).unwrap(), &scale, 1, &mut moments).unwrap();
        }
        assert_eq!(p.value().to_vec().unwrap(), before);
        assert_eq!(moments.m.to_vec().unwrap(), [0.0; 4]);
    }

    #[test]
    fn a_parameter_takes_another_shape_only_when_asked_to() {
        let p = Param::new(sample(&[4, 3], 2));
        assert!(p.set(sample(&[2, 3], 1)).is_err());
        p.replace(sample(&[2, 3], 1));
        assert_eq!(p.value().shape(), [2, 3]);
    }

    #[test]
    fn clipping_brings_the_norm_down_and_never_up() {
        let p = Param::new(Tensor::zeros([2]));
        let mut gradients = Gradients::default();
        gradients.set(&p, Tensor::from_vec(vec![3.0, 4.0], [2]).unwrap());
        for (max_norm, expected) in [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)] {
            let (norm, scale) = clip(std::slice::from_ref(&p), &gradients, max_norm);
            assert_eq!(norm.item().unwrap(), 5.0);
            assert!((scale.item().unwrap() - expected).abs() < 1e-6);
        }
    }
}
