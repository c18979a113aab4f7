//! The gated MLP's product: silu(gate)·up.

use crate::device::{Buffer, device};
use crate::error::Result;
use crate::tensor::Tensor;

/// silu(gate)·up, elementwise; both [.., width].
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.expect_f32("silu_mul")?;
    up.expect_shape("silu_mul", gate.shape())?;
    let mut y = Buffer::f32(gate.len());
    device().silu_mul(gate, up, &mut y);
    let (eg, eu) = (gate.edge(), up.edge());
    let (g, u) = (gate.detach(), up.detach());
    Ok(Tensor::new(gate.shape(), y).on_tape("silu_mul", &[gate, up], move |dy, sink| {
        let (mut dg, mut du) = (Buffer::f32(g.len()), Buffer::f32(g.len()));
        device().silu_mul_backward(&g, &u, &dy, &mut dg, &mut du);
        sink.add(&eg, Tensor::new(g.shape(), dg))?;
        sink.add(&eu, Tensor::new(g.shape(), du))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Unary;
    use crate::testing::{check_gradients, close, sample};

    #[test]
    fn equals_its_composition() {
        let (g, u) = (sample(&[3, 7], 1), sample(&[3, 7], 2));
        close(&silu_mul(&g, &u).unwrap(), &g.unary(Unary::Silu).unwrap().mul(&u).unwrap(), 1e-6);
        check_gradients(&[g, u], |v| silu_mul(&v[0], &v[1])).unwrap();
    }
}
