//! Rows times matrices on a diagonal.

use crate::device::{Buffer, device};
use crate::error::{Result, shape_error};
use crate::tensor::Tensor;

impl Tensor {
    /// x [.., count·n] → each piece of n numbers of a row times its matrix of `blocks` [count, n, n], or its transpose.
    pub fn matmul_blocks(&self, blocks: &Tensor, transposed: bool) -> Result<Tensor> {
        self.expect_f32("block product")?;
        blocks.expect_f32("block product")?;
        let fits = match *blocks.shape() {
            [count, rows, n] => rows == n && count * n == self.width(),
            _ => false,
        };
        if !fits {
            let found = format!("{:?}", blocks.shape());
            return shape_error("block product", format!("[count, n, n], count·n = {}", self.width()), found);
        }
        let n = blocks.width();
        let mut y = Buffer::f32(self.len());
        device().block_product(self, blocks, n, transposed, &mut y);
        let (edge_x, edge_r) = (self.edge(), blocks.edge());
        let x = edge_r.wanted().then(|| self.detach());
        let r = edge_x.wanted().then(|| blocks.detach());
        let shape = blocks.shape().to_vec();
        Ok(Tensor::new(self.shape(), y).on_tape("block product", &[self, blocks], move |dy, sink| {
            if let Some(r) = r {
                sink.add(&edge_x, dy.matmul_blocks(&r, !transposed)?)?;
            }
            if let Some(x) = x {
                let mut dr = Buffer::f32(shape.iter().product());
                let (left, right) = if transposed { (&dy, &x) } else { (&x, &dy) };
                device().block_gradient(left, right, n, &mut dr);
                sink.add(&edge_r, Tensor::new(shape, dr))?;
            }
            Ok(())
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, close, sample};

    /// By a batched product of pieces.
    fn composed(x: &Tensor, r: &Tensor, transposed: bool) -> Result<Tensor> {
        let pieces = x.reshape([x.rows(), r.dim(0), r.width()])?.permute(&[1, 0, 2])?;
        let turned = if transposed { pieces.matmul_t(r)? } else { pieces.matmul(r)? };
        turned.permute(&[1, 0, 2])?.reshape(x.shape())
    }

    #[test]
    fn equals_its_composition() {
        for (rows, count, n) in [(1, 1, 3), (5, 4, 3), (300, 3, 8), (2, 7, 1), (0, 2, 2)] {
            let (x, r) = (sample(&[rows, count * n], 1), sample(&[count, n, n], 2));
            for transposed in [false, true] {
                let y = x.matmul_blocks(&r, transposed).unwrap();
                close(&y, &composed(&x, &r, transposed).unwrap(), 1e-5);
            }
        }
        assert!(sample(&[2, 6], 1).matmul_blocks(&sample(&[2, 2, 2], 2), false).is_err());
        assert!(sample(&[2, 6], 1).matmul_blocks(&sample(&[6, 1], 2), false).is_err());
    }

    #[test]
    fn gradients_equal_differences() {
        for transposed in [false, true] {
            let values = [sample(&[4, 6], 3), sample(&[2, 3, 3], 4)];
            check_gradients(&values, |v| v[0].matmul_blocks(&v[1], transposed)).unwrap();
        }
    }
}
