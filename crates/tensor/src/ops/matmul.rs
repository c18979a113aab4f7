//! General products, both sides differentiable: low-rank factors, generated weights, attention over prompts.

use crate::device::{Buffer, device};
use crate::error::{Result, shape_error};
use crate::tensor::Tensor;

/// y`[b]` = scale · op(a`[b]`) · op(b`[b]`) for `batch` matrices, or added to y; `m`, `k`, `n` after transposition.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Number of independent products.
    pub batch: usize,
    /// Rows of the result.
    pub m: usize,
    /// Inner dimension.
    pub k: usize,
    /// Columns of the result.
    pub n: usize,
    /// a is stored [k, m].
    pub transpose_a: bool,
    /// b is stored [n, k].
    pub transpose_b: bool,
    /// Factor on the product.
    pub scale: f32,
    /// y is added to.
    pub accumulate: bool,
    /// A card may round the factors as it does those of frozen products.
    pub rounds: bool,
}

impl Product {
    /// a [m, k] · b [k, n], neither transposed.
    pub(crate) fn new(m: usize, k: usize, n: usize) -> Product {
        let (transpose_a, transpose_b) = (false, false);
        Product { batch: 1, m, k, n, transpose_a, transpose_b, scale: 1.0, accumulate: false, rounds: false }
    }
}

impl Tensor {
    /// a [.., m, k] · b [.., k, n]. With b a matrix, the leading dimensions of a are rows.
    pub fn matmul(&self, other: &Tensor) -> Result<Tensor> {
        product(self, other, false, false)
    }

    /// a [.., m, k] · bᵀ, b [.., n, k]: the product of a linear layer.
    pub fn matmul_t(&self, other: &Tensor) -> Result<Tensor> {
        product(self, other, false, true)
    }

    /// aᵀ · b, a [.., k, m], b [.., k, n].
    pub fn t_matmul(&self, other: &Tensor) -> Result<Tensor> {
        product(self, other, true, false)
    }
}

/// Shapes of the product; `None` if they do not fit.
fn plan(a: &[usize], b: &[usize], ta: bool, tb: bool) -> Option<(Product, Vec<usize>)> {
    let ((&b1, b_outer), (&a1, a_outer)) = (b.split_last()?, a.split_last()?);
    let (&b0, b_batch) = b_outer.split_last()?;
    let (bk, n) = if tb { (b1, b0) } else { (b0, b1) };
    // A matrix b serves all leading dimensions of a at once, as more rows (or, for aᵀb, as more inner terms).
    if b_batch.is_empty() && !ta {
        let m = a_outer.iter().product();
        let mut shape = a_outer.to_vec();
        shape.push(n);
        let p = Product { transpose_b: tb, ..Product::new(m, a1, n) };
        return (a1 == bk).then_some((p, shape));
    }
    let (&a0, a_batch) = a_outer.split_last()?;
    let (m, ak) = if ta { (a1, a0) } else { (a0, a1) };
    let mut shape = a_batch.to_vec();
    shape.extend([m, n]);
    let batch = a_batch.iter().product();
    let p = Product { batch, transpose_a: ta, transpose_b: tb, ..Product::new(m, ak, n) };
    (ak == bk && a_batch == b_batch).then_some((p, shape))
}

fn product(a: &Tensor, b: &Tensor, ta: bool, tb: bool) -> Result<Tensor> {
    a.expect_f32("matmul")?;
    b.expect_f32("matmul")?;
    let Some((p, shape)) = plan(a.shape(), b.shape(), ta, tb) else {
        let mark = |t: bool| if t { "ᵀ" } else { "" };
        let found = format!("{:?}{} · {:?}{}", a.shape(), mark(ta), b.shape(), mark(tb));
        return shape_error("matmul", "inner dimensions that agree", found);
    };
    let mut y = Buffer::f32(shape.iter().product());
    device().matmul(p, a, b, &mut y);
    let (ea, eb) = (a.edge(), b.edge());
    let keep_a = eb.wanted().then(|| a.detach());
    let keep_b = ea.wanted().then(|| b.detach());
    let (sa, sb) = (a.shape().to_vec(), b.shape().to_vec());
    Ok(Tensor::new(shape, y).on_tape("matmul", &[a, b], move |dy, sink| {
        // One matrix b for all rows: fold the rows so that its gradient sums over them.
        let fold = |t: &Tensor| if p.batch == 1 { t.reshape([t.rows(), t.width()]) } else { Ok(t.clone()) };
        let dy = fold(&dy)?;
        if let Some(b) = keep_b {
            let b = fold(&b)?;
            let da = match (ta, tb) {
                (false, false) => product(&dy, &b, false, true)?,
                (false, true) => product(&dy, &b, false, false)?,
                (true, tb) => product(&b, &dy, tb, true)?,
            };
            sink.add(&ea, da.reshape(sa)?)?;
        }
        if let Some(a) = keep_a {
            let a = fold(&a)?;
            let db = match (ta, tb) {
                (ta, false) => product(&a, &dy, !ta, false)?,
                (ta, true) => product(&dy, &a, true, ta)?,
            };
            sink.add(&eb, db.reshape(sb)?)?;
        }
        Ok(())
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, sample};

    type Operation = fn(&Tensor, &Tensor) -> Result<Tensor>;

    #[test]
    fn products_match_a_plain_loop() {
        let (m, k, n) = (3, 5, 4);
        let (a, b) = (sample(&[m, k], 1), sample(&[k, n], 2));
        let (av, bv) = (a.to_vec().unwrap(), b.to_vec().unwrap());
        let mut expected = vec![0.0f32; m * n];
        for i in 0..m {
            for j in 0..n {
                expected[i * n + j] = (0..k).map(|q| av[i * k + q] * bv[q * n + j]).sum();
            }
        }
        let variants = [a.matmul(&b), a.matmul_t(&b.t().unwrap()), a.t().unwrap().t_matmul(&b)];
        for y in variants {
            for (x, e) in y.unwrap().to_vec().unwrap().iter().zip(&expected) {
                assert!((x - e).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn products_differentiate() {
        let cases: [(Operation, &[usize], &[usize]); 6] = [
            (Tensor::matmul, &[3, 5], &[5, 2]),
            (Tensor::matmul, &[2, 3, 5], &[5, 2]),
            (Tensor::matmul, &[2, 3, 5], &[2, 5, 2]),
            (Tensor::matmul_t, &[2, 3, 5], &[4, 5]),
            (Tensor::matmul_t, &[2, 3, 5], &[2, 4, 5]),
            (Tensor::t_matmul, &[2, 5, 3], &[2, 5, 4]),
        ];
        for (f, sa, sb) in cases {
            check_gradients(&[sample(sa, 1), sample(sb, 2)], |v| f(&v[0], &v[1])).unwrap();
        }
        check_gradients(&[sample(&[5, 3], 1), sample(&[5, 4], 2)], |v| v[0].t_matmul(&v[1])).unwrap();
        assert!(sample(&[2, 3], 1).matmul(&sample(&[2, 3], 1)).is_err());
    }
}
