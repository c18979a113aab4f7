//! The product with a frozen weight, which never gets a gradient.

use std::sync::Arc;

use crate::device::{Buffer, device};
use crate::error::{Result, shape_error};
use crate::frozen::FrozenMatrix;
use crate::tensor::Tensor;

/// y = x·Wᵀ + bias; x [.., in], W [out, in], bias `[out]` → y [.., out].
///
/// The gradient of x is dy·W; a bias on the tape (BitFit) gets the column sums of dy. Neither x nor y is kept.
pub fn frozen_linear(x: &Tensor, w: &Arc<FrozenMatrix>, bias: Option<&Tensor>) -> Result<Tensor> {
    x.expect_f32("linear")?;
    let (out, inn) = w.shape();
    if x.width() != inn || x.shape().is_empty() {
        return shape_error("linear", format!("[.., {inn}]"), format!("{:?}", x.shape()));
    }
    if let Some(b) = bias {
        b.expect_shape("linear bias", &[out])?;
    }
    let mut shape = x.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = out;
    }
    let mut y = Buffer::f32(x.rows() * out);
    device().frozen_forward(w, x, bias, &mut y);
    let y = Tensor::new(shape, y);
    let (ex, eb) = (x.edge(), bias.map(Tensor::edge));
    let (before, w) = (x.shape().to_vec(), w.clone());
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(bias).collect();
    Ok(y.on_tape("linear", &inputs, move |dy, sink| {
        if let Some(eb) = eb.filter(|e| e.wanted()) {
            sink.add(&eb, dy.sum_to(&[out])?)?;
        }
        sink.grow(&ex, &before, |dx, accumulate| device().frozen_backward(&w, &dy, accumulate, dx))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::gemm::Precision;
    use crate::testing::{check_gradients, sample};

    #[test]
    fn equals_the_general_product() {
        let (w, x, b) = (sample(&[7, 5], 1), sample(&[2, 3, 5], 2), sample(&[7], 3));
        let frozen = Arc::new(FrozenMatrix::from_dense(&w, Precision::F32).unwrap());
        let fused = frozen_linear(&x, &frozen, Some(&b)).unwrap();
        let composed = x.matmul_t(&w).unwrap().add(&b).unwrap();
        assert_eq!(fused.shape(), composed.shape());
        for (a, c) in fused.to_vec().unwrap().iter().zip(composed.to_vec().unwrap()) {
            assert!((a - c).abs() < 1e-5);
        }
        check_gradients(&[x, b], |v| frozen_linear(&v[0], &frozen, Some(&v[1]))).unwrap();
    }

    #[test]
    fn bf16_is_close() {
        let (w, x) = (sample(&[33, 65], 1), sample(&[9, 65], 2));
        let frozen = Arc::new(FrozenMatrix::from_dense(&w, Precision::Bf16).unwrap());
        let y = frozen_linear(&x, &frozen, None).unwrap().to_vec().unwrap();
        let exact = x.matmul_t(&w).unwrap().to_vec().unwrap();
        let largest = exact.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(y.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 0.02 * largest));
        assert!(y != exact, "bf16 must round");
    }
}
