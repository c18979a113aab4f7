//! A product that keeps a few numbers of each row of its input for backward (VeLoRA, arXiv:2405.17991).

use crate::device::device;
use crate::error::{Result, shape_error};
use crate::ops::{Product, cat};
use crate::tensor::Tensor;

impl Tensor {
    /// x·Wᵀ; x [rows, in], W [out, in]. The gradient of x is exact, dy·W; that of W takes `scale`·x̂ for x, where x̂ puts the
    /// `groups` pieces of each row, the last filled up with zeros, onto the `direction` `[⌈in/groups⌉]`: of a row one number
    /// a piece is kept. dW = `scale`·(dyᵀ·c) ⊗ direction, c [rows, groups], so x̂ is never made.
    pub fn matmul_t_compressed(
        &self,
        weight: &Tensor,
        direction: &Tensor,
        groups: usize,
        scale: f32,
    ) -> Result<Tensor> {
        let [rows, inn] = *self.shape() else {
            return shape_error("compressed", "[rows, in]", format!("{:?}", self.shape()));
        };
        weight.expect_shape("compressed", &[weight.dim(0), inn])?;
        let (out, piece) = (weight.dim(0), inn.div_ceil(groups.max(1)));
        direction.expect_shape("compressed direction", &[piece])?;
        let y = self.detach().matmul_t(&weight.detach())?;
        let (ex, ew) = (self.edge(), weight.edge());
        let (weight_kept, direction) = (weight.detach(), direction.detach());
        let kept = match ew.wanted() {
            false => None,
            true => {
                let filled = match groups * piece - inn {
                    0 => self.detach(),
                    more => cat(&[&self.detach(), &Tensor::zeros([rows, more])], 1)?,
                };
                let pieces = filled.reshape([rows * groups, piece])?;
                Some(pieces.matmul(&direction.reshape([piece, 1])?)?.reshape([rows, groups])?)
            }
        };
        Ok(y.on_tape("compressed", &[self, weight], move |dy, sink| {
            if let Some(kept) = kept {
                let met = dy.t_matmul(&kept)?.reshape([out * groups, 1])?;
                let spread = met.matmul(&direction.reshape([1, piece])?)?.reshape([out, groups * piece])?;
                sink.add(&ew, spread.narrow(1, 0, inn)?.scale(scale)?)?;
            }
            sink.grow(&ex, &[rows, inn], |dx, accumulate| {
                device().matmul(
                    Product { accumulate, ..Product::new(rows, out, inn) },
                    &dy,
                    &weight_kept,
                    dx,
                );
            })
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Param;
    use crate::testing::{check_gradients, close, sample};

    /// The gradients of Σ (x·Wᵀ)·g by the compressed product: of x and of W.
    fn gradients(x: &Tensor, w: &Tensor, e: &Tensor, groups: usize, scale: f32) -> (Tensor, Tensor) {
        let (x, w) = (Param::new(x.clone()), Param::new(w.clone()));
        let y = x.get().matmul_t_compressed(&w.get(), e, groups, scale).unwrap();
        let g = sample(y.shape(), 9);
        let all = y.mul(&g).unwrap().sum().unwrap().backward().unwrap();
        (all.get(&x).unwrap().clone(), all.get(&w).unwrap().clone())
    }

    #[test]
    fn the_gradient_of_the_weight_sees_the_pieces_on_the_direction() {
        // Seven inputs in three pieces of three, two numbers filled up.
        for (inn, groups, piece) in [(6, 3, 2), (7, 3, 3), (4, 9, 1), (5, 1, 5)] {
            let (x, w, e) = (sample(&[4, inn], 1), sample(&[2, inn], 2), sample(&[piece], 3));
            close(&x.matmul_t_compressed(&w, &e, groups, 0.5).unwrap(), &x.matmul_t(&w).unwrap(), 0.0);
            let (dx, dw) = gradients(&x, &w, &e, groups, 0.5);
            let g = sample(&[4, 2], 9);
            close(&dx, &g.matmul(&w).unwrap(), 1e-6);
            let (x, e) = (x.to_vec().unwrap(), e.to_vec().unwrap());
            let seen = (0..4 * inn).map(|i| {
                let (row, column) = (i / inn, i % inn);
                let first = column / piece * piece;
                let piece = (first..(first + piece).min(inn)).map(|j| x[row * inn + j] * e[j - first]);
                0.5 * piece.sum::<f32>() * e[column - first]
            });
            let seen = Tensor::from_vec(seen.collect(), [4, inn]).unwrap();
            close(&dw, &g.t_matmul(&seen).unwrap(), 1e-5);
        }
    }

    #[test]
    fn with_pieces_of_one_number_it_is_the_product() {
        let (x, w) = (sample(&[4, 5], 1), sample(&[3, 5], 2));
        let e = Tensor::full(1.0, [1]);
        check_gradients(&[x, w], |v| v[0].matmul_t_compressed(&v[1], &e, 5, 1.0)).unwrap();
    }

    #[test]
    fn the_input_is_not_kept_and_shapes_are_checked() {
        let (w, e) = (Param::new(sample(&[3, 6], 2)), sample(&[3], 3));
        let mut x = sample(&[4, 6], 1);
        let y = x.matmul_t_compressed(&w.get(), &e, 2, 1.0).unwrap();
        assert!(x.sole_buffer().is_some());
        assert!(y.needs_grad());
        assert!(x.matmul_t_compressed(&w.get(), &e, 3, 1.0).is_err());
        assert!(x.matmul_t_compressed(&sample(&[3, 5], 1), &e, 2, 1.0).is_err());
    }
}
