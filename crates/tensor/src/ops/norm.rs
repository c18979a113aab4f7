//! Layer norm and RMS norm over the last dimension.

use crate::device::{Buffer, NormBackward, device};
use crate::error::Result;
use crate::tensor::Tensor;

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// (x − mean)/√(var + eps).
    Layer {
        /// Added to the variance.
        eps: f32,
    },
    /// x/√(mean x² + eps).
    Rms {
        /// Added to the mean square.
        eps: f32,
    },
}

/// gain·(x − mean)/√(var + eps) + bias; x [.., width], gain and bias `[width]`.
pub fn layer_norm(x: &Tensor, gain: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    norm(Norm::Layer { eps }, x, gain, Some(bias))
}

/// gain·x/√(mean x² + eps); x [.., width], gain `[width]`.
pub fn rms_norm(x: &Tensor, gain: &Tensor, eps: f32) -> Result<Tensor> {
    norm(Norm::Rms { eps }, x, gain, None)
}

fn norm(kind: Norm, x: &Tensor, gain: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    x.expect_f32("norm")?;
    gain.expect_shape("norm gain", &[x.width()])?;
    if let Some(b) = bias {
        b.expect_shape("norm bias", &[x.width()])?;
    }
    let per_row = if matches!(kind, Norm::Layer { .. }) { 2 } else { 1 };
    let mut y = Buffer::f32(x.len());
    let mut stats = Buffer::f32(x.rows() * per_row);
    device().norm(kind, x, gain, bias, &mut y, &mut stats);
    let y = Tensor::new(x.shape(), y);
    let stats = Tensor::new([x.rows() * per_row], stats);
    let (ex, eg, eb) = (x.edge(), gain.edge(), bias.map(Tensor::edge));
    let (kept, kept_gain) = (x.detach(), gain.detach());
    let inputs: Vec<&Tensor> = [x, gain].into_iter().chain(bias).collect();
    Ok(y.on_tape("norm", &inputs, move |dy, sink| {
        let width = kept.width();
        let mut dx = Buffer::f32(kept.len());
        let eb = eb.filter(|e| e.wanted());
        let mut dgain = eg.wanted().then(|| Buffer::f32(width));
        let mut dbias = eb.is_some().then(|| Buffer::f32(width));
        device().norm_backward(
            kind,
            NormBackward {
                x: &kept,
                gain: &kept_gain,
                stats: &stats,
                dy: &dy,
                dx: &mut dx,
                dgain: dgain.as_mut(),
                dbias: dbias.as_mut(),
            },
        );
        sink.add(&ex, Tensor::new(kept.shape(), dx))?;
        if let Some(d) = dgain {
            sink.add(&eg, Tensor::new([width], d))?;
        }
        if let (Some(e), Some(d)) = (eb, dbias) {
            sink.add(&e, Tensor::new([width], d))?;
        }
        Ok(())
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Unary;
    use crate::testing::{check_gradients, close, sample};

    #[test]
    fn norms_equal_their_composition() {
        let (x, g, b) = (sample(&[4, 6], 1), sample(&[6], 2), sample(&[6], 3));
        let over = |t: &Tensor| t.sum_dim(1).unwrap().scale(1.0 / 6.0).unwrap();
        let inverse_root = |t: &Tensor| {
            t.unary(Unary::Shift(1e-5)).unwrap().unary(Unary::Sqrt).unwrap().unary(Unary::Recip).unwrap()
        };
        let centred = x.sub(&over(&x)).unwrap();
        let scaled = centred.mul(&inverse_root(&over(&centred.unary(Unary::Square).unwrap()))).unwrap();
        let composed = scaled.mul(&g).unwrap().add(&b).unwrap();
        close(&layer_norm(&x, &g, &b, 1e-5).unwrap(), &composed, 1e-5);
        let composed =
            x.mul(&inverse_root(&over(&x.unary(Unary::Square).unwrap()))).unwrap().mul(&g).unwrap();
        close(&rms_norm(&x, &g, 1e-5).unwrap(), &composed, 1e-5);
    }

    #[test]
    fn norms_differentiate() {
        let inputs = [sample(&[2, 3, 6], 1), sample(&[6], 2), sample(&[6], 3)];
        check_gradients(&inputs, |v| layer_norm(&v[0], &v[1], &v[2], 1e-5)).unwrap();
        check_gradients(&inputs[..2], |v| rms_norm(&v[0], &v[1], 1e-5)).unwrap();
    }
}
