//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated as in `transformers`.

use crate::device::{Buffer, device};
use crate::error::{Error, Result, shape_error};
use crate::tensor::{DType, Tensor};

/// Rotates x [tokens, heads, dim] by the angle rows `cos`, `sin` [positions, rotary/2] of each token's position.
///
/// Element i and i + rotary/2 of a head form a pair; elements from `rotary` on stay as they are.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, positions: &Tensor) -> Result<Tensor> {
    x.expect_f32("rope")?;
    if x.shape().len() != 3 || positions.len() != x.dim(0) || 2 * cos.width() > x.dim(2) {
        let expected = format!("[{}, heads, at least {}]", positions.len(), 2 * cos.width());
        return shape_error("rope", expected, format!("{:?}", x.shape()));
    }
    sin.expect_shape("rope", cos.shape())?;
    if positions.dtype() != DType::I32 {
        return Err(Error::DType { op: "rope", expected: "I32", found: positions.dtype() });
    }
    if let Some(p) = positions.i32().iter().find(|&&p| p < 0 || p as usize >= cos.dim(0)) {
        return Err(Error::Value {
            op: "rope",
            message: format!("position {p} is outside 0..{}", cos.dim(0)),
        });
    }
    rotate(x, cos, sin, positions, false)
}

fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, positions: &Tensor, inverse: bool) -> Result<Tensor> {
    let mut y = Buffer::f32(x.len());
    device().rope(x, cos, sin, positions, inverse, &mut y);
    let (edge, cos, sin, positions) = (x.edge(), cos.clone(), sin.clone(), positions.clone());
    Ok(Tensor::new(x.shape(), y).on_tape("rope", &[x], move |dy, sink| {
        sink.add(&edge, rotate(&dy, &cos, &sin, &positions, !inverse)?)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, close, sample};

    #[test]
    fn rotates_pairs() {
        let angles: Vec<f32> = (0..5 * 2).map(|i| (i / 2) as f32 * [1.0, 0.1][i % 2]).collect();
        let table =
            |f: fn(f32) -> f32| Tensor::from_vec(angles.iter().map(|&a| f(a)).collect(), [5, 2]).unwrap();
        let (cos, sin) = (table(f32::cos), table(f32::sin));
        let positions = Tensor::from_i32(vec![3, 0, 4], [3]).unwrap();
        let x = sample(&[3, 2, 6], 1);
        let y = rope(&x, &cos, &sin, &positions).unwrap();
        let (v, w) = (x.to_vec().unwrap(), y.to_vec().unwrap());
        let (a, b) = (3.0f32, 0.3f32);
        assert!((w[0] - (v[0] * a.cos() - v[2] * a.sin())).abs() < 1e-6);
        assert!((w[3] - (v[3] * b.cos() + v[1] * b.sin())).abs() < 1e-6);
        assert_eq!(w[4..6], v[4..6], "beyond the rotary part nothing changes");
        close(&rotate(&y, &cos, &sin, &positions, true).unwrap(), &x, 1e-6);
        check_gradients(&[x], |v| rope(&v[0], &cos, &sin, &positions)).unwrap();
        let far = Tensor::from_i32(vec![5, 0, 0], [3]).unwrap();
        assert!(rope(&sample(&[3, 2, 6], 1), &cos, &sin, &far).is_err());
    }
}
