//! A product of two trained factors, added to what a layer gave.

use crate::device::{Buffer, device};
use crate::error::{Result, shape_error};
use crate::ops::Product;
use crate::tensor::Tensor;

/// As [`Product::new`]; like the frozen product that it goes along with, it may round.
fn product(m: usize, k: usize, n: usize) -> Product {
    Product { rounds: true, ..Product::new(m, k, n) }
}

impl Tensor {
    /// self + scale·(x·Aᵀ)·Bᵀ; self [.., out], x [.., in], A [rank, in], B [out, rank].
    ///
    /// Added in place where nobody else holds `self`. Kept for backward are x·Aᵀ [rows, rank] and, where A is trained, x; with
    /// s the scale, dB = s·dyᵀ·(x·Aᵀ), dA = s·(dy·B)ᵀ·x, dx += s·(dy·B)·A, and dy goes on to `self` as it is.
    pub fn add_low_rank(mut self, x: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
        [&self, x, a, b].iter().try_for_each(|t| t.expect_f32("low rank"))?;
        let (rows, inn, out) = (x.rows(), x.width(), self.width());
        let rank = a.dim(0);
        a.expect_shape("low rank A", &[rank, inn])?;
        b.expect_shape("low rank B", &[out, rank])?;
        if self.rows() != rows || self.shape().is_empty() || x.shape().is_empty() {
            return shape_error(
                "low rank",
                format!("[.., {out}] for {:?}", x.shape()),
                format!("{:?}", self.shape()),
            );
        }
        let mut h = Buffer::f32(rows * rank);
        device().matmul(Product { transpose_b: true, ..product(rows, inn, rank) }, x, a, &mut h);
        let h = Tensor::new([rows, rank], h);
        let base = self.edge();
        let up = Product { transpose_b: true, scale, accumulate: true, ..product(rows, rank, out) };
        if self.sole_buffer().is_none() {
            let mut copy = Buffer::f32(self.len());
            device().copy_block(&self, &mut copy, 0);
            self = Tensor::new(self.shape(), copy).with_node(base.0.clone());
        }
        if let Some(y) = self.sole_buffer() {
            device().matmul(up, &h, b, y);
        }
        let y = self.detach();
        let edges = (x.edge(), a.edge(), b.edge());
        let (ka, kb) = (a.detach(), b.detach());
        let kx = edges.1.wanted().then(|| x.detach());
        let x_shape = x.shape().to_vec();
        Ok(y.on_tape("low rank", &[&self, x, a, b], move |dy, sink| {
            let (ex, ea, eb) = edges;
            sink.grow(&eb, kb.shape(), |db, accumulate| {
                let p = Product { transpose_a: true, scale, accumulate, ..product(out, rows, rank) };
                device().matmul(p, &dy, &h, db);
            })?;
            if ea.wanted() || ex.wanted() {
                let mut dh = Buffer::f32(rows * rank);
                device().matmul(Product { scale, ..product(rows, out, rank) }, &dy, &kb, &mut dh);
                let dh = Tensor::new([rows, rank], dh);
                if let Some(kx) = kx {
                    sink.grow(&ea, ka.shape(), |da, accumulate| {
                        let p = Product { transpose_a: true, accumulate, ..product(rank, rows, inn) };
                        device().matmul(p, &dh, &kx, da);
                    })?;
                }
                sink.grow(&ex, &x_shape, |dx, accumulate| {
                    let p = Product { accumulate, ..product(rows, rank, inn) };
                    device().matmul(p, &dh, &ka, dx);
                })?;
            }
            sink.add(&base, dy)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, close, sample};

    #[test]
    fn equals_the_general_products() {
        let (y, x) = (sample(&[2, 3, 7], 1), sample(&[2, 3, 5], 2));
        let (a, b) = (sample(&[4, 5], 3), sample(&[7, 4], 4));
        let composed =
            |y: &Tensor, x: &Tensor, a: &Tensor, b: &Tensor| y.add(&x.matmul_t(a)?.scale(0.7)?.matmul_t(b)?);
        let fused = y.clone().add_low_rank(&x, &a, &b, 0.7).unwrap();
        close(&fused, &composed(&y, &x, &a, &b).unwrap(), 1e-6);
        close(&y, &sample(&[2, 3, 7], 1), 0.0); // held by this test, so not changed in place
        check_gradients(&[y, x, a, b], |v| v[0].clone().add_low_rank(&v[1], &v[2], &v[3], 0.7)).unwrap();
    }

    #[test]
    fn gradients_of_one_input_from_several_products_add_up() {
        // The input and the first factor serve twice, and the layer below has no other user.
        let (x, a) = (sample(&[6, 5], 1), sample(&[2, 5], 2));
        let (b, c) = (sample(&[7, 2], 3), sample(&[7, 2], 4));
        check_gradients(&[x, a, b, c], |v| {
            let h = v[0].scale(1.5)?;
            let first = h.matmul_t(&sample(&[7, 5], 5))?.add_low_rank(&h, &v[1], &v[2], 0.5)?;
            h.matmul_t(&sample(&[7, 5], 6))?.add_low_rank(&h, &v[1], &v[3], 2.0)?.mul(&first)
        })
        .unwrap();
    }

    #[test]
    fn the_input_is_kept_for_a_trained_a_alone() {
        use crate::param::Param;
        let (a, b) = (sample(&[4, 5], 3), Param::new(sample(&[7, 4], 4)));
        for trained in [false, true] {
            let a = if trained { Param::new(a.clone()) } else { Param::frozen(a.clone()) };
            let mut x = sample(&[6, 5], 2);
            let y = sample(&[6, 7], 1).add_low_rank(&x, &a.get(), &b.get(), 0.5).unwrap();
            assert_eq!(x.sole_buffer().is_none(), trained);
            let expected = sample(&[6, 5], 2).matmul_t(&a.value()).unwrap().scale(0.5).unwrap();
            let gradients = y.sum().unwrap().backward().unwrap();
            let found = gradients.get(&b).unwrap();
            close(found, &Tensor::full(1.0, [6, 7]).t_matmul(&expected).unwrap(), 1e-6);
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let (y, x) = (sample(&[3, 7], 1), sample(&[3, 5], 2));
        assert!(y.clone().add_low_rank(&x, &sample(&[2, 4], 3), &sample(&[7, 2], 4), 1.0).is_err());
        assert!(y.clone().add_low_rank(&x, &sample(&[2, 5], 3), &sample(&[7, 3], 4), 1.0).is_err());
        assert!(sample(&[4, 7], 1).add_low_rank(&x, &sample(&[2, 5], 3), &sample(&[7, 2], 4), 1.0).is_err());
    }
}
