//! Learned positions of one grid for another: bicubic interpolation, as PyTorch's `interpolate(mode="bicubic")` with
//! `align_corners=False` and no antialiasing.
//!
//! Cell i of n′ lies at x = (i + ½)·n/n′ − ½ among n; its value is Σₖ w(x − k)·v[k] over the four nearest k, those outside
//! taken at the edge, with the kernel of Keys 1981 (10.1109/TASSP.1981.1163711), a = −¾. Rows and columns are
//! interpolated one after the other, each by a matrix [n′, n], so that gradients reach the positions.

use engraft_tensor::Tensor;

/// The kernel's parameter.
const A: f64 = -0.75;

/// v [down · across, width], row by row, of a grid `from` → the same of a grid `to`.
pub(crate) fn stretched(v: &Tensor, from: (usize, usize), to: (usize, usize)) -> engraft_nn::Result<Tensor> {
    let width = v.width();
    let high = weights(from.0, to.0)?.matmul(&v.reshape([from.0, from.1 * width])?)?;
    let turned = high.reshape([to.0, from.1, width])?.permute(&[1, 0, 2])?;
    let wide = weights(from.1, to.1)?.matmul(&turned.reshape([from.1, to.0 * width])?)?;
    Ok(wide.reshape([to.1, to.0, width])?.permute(&[1, 0, 2])?.reshape([to.0 * to.1, width])?)
}

/// The matrix [to, from] that interpolates along one side.
fn weights(from: usize, to: usize) -> engraft_nn::Result<Tensor> {
    let mut all = vec![0.0f32; to * from];
    for (i, row) in all.chunks_exact_mut(from.max(1)).enumerate() {
        let x = (i as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        for k in -1..=2 {
            let at = x.floor() + f64::from(k);
            row[at.clamp(0.0, (from - 1) as f64) as usize] += kernel((x - at).abs()) as f32;
        }
    }
    Ok(Tensor::from_vec(all, [to, from])?)
}

/// w at a distance from 0 to 2.
fn kernel(x: f64) -> f64 {
    if x <= 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else {
        ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_tensor::testing::{check_gradients, close, sample};

    #[test]
    fn the_same_grid_is_the_same_and_a_constant_stays() {
        let v = sample(&[12, 5], 1);
        close(&stretched(&v, (3, 4), (3, 4)).unwrap(), &v, 1e-6);
        let one = Tensor::full(1.0, [12, 2]);
        close(&stretched(&one, (3, 4), (7, 2)).unwrap(), &Tensor::full(1.0, [14, 2]), 1e-6);
        check_gradients(&[v], |v| {
            stretched(&v[0], (3, 4), (5, 3)).map_err(|e| engraft_tensor::Error::Backward(e.to_string()))
        })
        .unwrap();
    }

    #[test]
    fn numbers_of_pytorch() {
        // interpolate(tensor([[[[0., 1, 4, 9]]]]), size=(1, 7), mode="bicubic")
        let v = Tensor::from_vec(vec![0.0, 1.0, 4.0, 9.0], [4, 1]).unwrap();
        let expected = vec![-0.099216, 0.156249, 0.804208, 2.125, 4.424658, 7.480775, 9.496082];
        let expected = Tensor::from_vec(expected, [7, 1]).unwrap();
        close(&stretched(&v, (1, 4), (1, 7)).unwrap(), &expected, 1e-5);
    }
}
