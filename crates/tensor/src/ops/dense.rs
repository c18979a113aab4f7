//! Small dense algebra with gradients: inverses of matrices (Cayley's transform), orthonormal bases (QR).

use crate::device::{Buffer, device};
use crate::error::{Result, shape_error};
use crate::tensor::Tensor;

impl Tensor {
    /// The inverses of square matrices [.., n, n]; not finite where one is singular.
    pub fn inverse(&self) -> Result<Tensor> {
        self.expect_f32("inverse")?;
        let n = self.width();
        if self.shape().len() < 2 || self.dim(self.shape().len() - 2) != n {
            return shape_error("inverse", "square matrices", format!("{:?}", self.shape()));
        }
        let mut y = Buffer::f32(self.len());
        device().inverse(self, &mut y);
        let y = Tensor::new(self.shape(), y);
        let (edge, kept) = (self.edge(), y.detach());
        // dA = −A⁻ᵀ·dY·A⁻ᵀ.
        Ok(y.on_tape("inverse", &[self], move |dy, sink| {
            let matrices = [kept.len() / (n * n).max(1), n, n];
            let (y, dy) = (kept.reshape(matrices)?, dy.reshape(matrices)?);
            sink.add(&edge, y.t_matmul(&dy)?.matmul_t(&y)?.scale(-1.0)?.reshape(kept.shape())?)
        }))
    }

    /// An orthonormal basis of the columns of a matrix [m, n], m ≥ n: the first factor of its QR decomposition, with the
    /// signs that LAPACK gives it.
    pub fn orthonormal(&self) -> Result<Tensor> {
        self.expect_f32("orthonormal")?;
        let (m, n) = match *self.shape() {
            [m, n] if m >= n => (m, n),
            _ => {
                return shape_error(
                    "orthonormal",
                    "a matrix with at least as many rows as columns",
                    format!("{:?}", self.shape()),
                );
            }
        };
        let (mut q, mut r) = (Buffer::f32(m * n), Buffer::f32(n * n));
        device().qr(self, &mut q, &mut r);
        let (q, r) = (Tensor::new([m, n], q), Tensor::new([n, n], r));
        let (edge, kept) = (self.edge(), q.detach());
        Ok(q.on_tape("orthonormal", &[self], move |dy, sink| {
            let mut da = Buffer::f32(m * n);
            device().qr_backward(&kept, &r, &dy, &mut da);
            sink.add(&edge, Tensor::new([m, n], da))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, close, sample};

    fn identity(batch: usize, n: usize) -> Tensor {
        let one = (0..batch * n * n).map(|i| f32::from((i % (n * n)).is_multiple_of(n + 1))).collect();
        Tensor::from_vec(one, [batch, n, n]).unwrap()
    }

    #[test]
    fn inverses_are_inverses_and_differentiate() {
        for (batch, n) in [(1, 1), (3, 4), (2, 33)] {
            let a = sample(&[batch, n, n], 1);
            let y = a.inverse().unwrap();
            close(&a.matmul(&y).unwrap(), &identity(batch, n), 2e-4);
            close(&y.matmul(&a).unwrap(), &identity(batch, n), 2e-4);
        }
        // A pivot that is zero on the diagonal.
        let swapped = Tensor::from_vec(vec![0.0, 1.0, 2.0, 0.0], [2, 2]).unwrap();
        assert_eq!(swapped.inverse().unwrap().to_vec().unwrap(), [0.0, 0.5, 1.0, 0.0]);
        let tame = sample(&[2, 3, 3], 2).add(&identity(1, 3).scale(3.0).unwrap()).unwrap();
        check_gradients(&[tame], |v| v[0].inverse()).unwrap();
        check_gradients(&[identity(1, 4).add(&sample(&[4, 4], 3).scale(0.3).unwrap()).unwrap()], |v| {
            v[0].reshape([4, 4])?.inverse()
        })
        .unwrap();
        assert!(!Tensor::zeros([2, 2]).inverse().unwrap().to_vec().unwrap().iter().all(|v| v.is_finite()));
        assert!(sample(&[2, 3], 1).inverse().is_err() && sample(&[3], 1).inverse().is_err());
    }

    #[test]
    fn bases_are_orthonormal_span_the_same_and_differentiate() {
        for (m, n) in [(7, 3), (4, 4), (1, 1), (5, 1)] {
            let a = sample(&[m, n], 4);
            let q = a.orthonormal().unwrap();
            close(&q.t_matmul(&q).unwrap(), &identity(1, n).reshape([n, n]).unwrap(), 1e-5);
            // a = q·(qᵀa), and qᵀa is triangular.
            let r = q.t_matmul(&a).unwrap();
            close(&q.matmul(&r).unwrap(), &a, 1e-5);
            let lower = (0..n).flat_map(|i| (0..i).map(move |j| (i, j)));
            let r = r.to_vec().unwrap();
            assert!(lower.map(|(i, j)| r[i * n + j].abs()).fold(0.0, f32::max) < 1e-5);
        }
        for (m, n) in [(7, 3), (3, 3)] {
            check_gradients(&[sample(&[m, n], 6)], |v| v[0].orthonormal()).unwrap();
        }
        assert!(sample(&[2, 3], 1).orthonormal().is_err());
    }

    /// `numpy.linalg.qr` of the same numbers.
    #[test]
    fn signs_are_those_of_lapack() {
        let a = Tensor::from_vec(vec![1.0, 2.0, -3.0, 4.0, 5.0, -6.0], [3, 2]).unwrap();
        let expected =
            vec![-0.169_030_85, -0.979_957_9, 0.507_092_54, -0.178_174_17, -0.845_154_2, 0.089_087_084];
        close(&a.orthonormal().unwrap(), &Tensor::from_vec(expected, [3, 2]).unwrap(), 1e-6);
        // The last column of a square matrix is not reflected.
        let square = Tensor::from_vec(vec![2.0, 1.0, 1.0, -3.0], [2, 2]).unwrap();
        let expected = vec![-0.894_427_2, -0.447_213_6, -0.447_213_6, 0.894_427_2];
        close(&square.orthonormal().unwrap(), &Tensor::from_vec(expected, [2, 2]).unwrap(), 1e-6);
    }
}
