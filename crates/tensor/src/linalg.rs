//! Decompositions of small and middling matrices, on the host in f64 and off the tape: what starts are made of.
//!
//! They run on one thread, so the same matrix gives the same bits whatever the number of threads.

use faer::prelude::Solve;
use faer::{Mat, MatRef, Side};

use crate::cpu::random::Key;
use crate::error::{Error, Result, shape_error};
use crate::tensor::Tensor;

/// A = U·diag(s)·Vᵀ, singular values falling. Of the two signs that a pair of vectors may have, that is chosen which makes
/// the largest number of the row of Vᵀ positive.
pub struct Svd {
    /// U [rows, k].
    pub u: Tensor,
    /// s, k of them.
    pub s: Vec<f32>,
    /// Vᵀ [k, columns].
    pub vt: Tensor,
}

/// All min(rows, columns) singular values of a matrix and their vectors.
///
/// # Errors
/// A tensor that is no matrix, or that holds numbers that are not finite.
pub fn svd(a: &Tensor) -> Result<Svd> {
    decompose(host(a, "svd")?.as_ref())
}

/// About the first `count` singular values and vectors, from products with `count` random vectors and `iterations` rounds of
/// subspace iteration (Halko, Martinsson and Tropp 2009, arXiv:0909.4061, algorithms 4.4 and 5.1), as `torch.svd_lowrank`.
///
/// # Errors
/// As [`svd`].
pub fn svd_lowrank(a: &Tensor, count: usize, iterations: usize, key: Key) -> Result<Svd> {
    let a = host(a, "svd")?;
    let (rows, columns) = (a.nrows(), a.ncols());
    if count >= rows.min(columns) {
        return decompose(a.as_ref());
    }
    let noise = Mat::from_fn(columns, count, |i, j| f64::from(key.normal((i * count + j) as u64)));
    iterated(a, noise, iterations)
}

/// The same from random vectors that are given, [min(rows, columns), count], as `torch.svd_lowrank` uses them: of a matrix
/// with more columns than rows, the transpose is taken apart, and the signs are then chosen by the columns of U.
///
/// # Errors
/// As [`svd`]; vectors that do not fit.
pub fn svd_lowrank_from(a: &Tensor, vectors: &Tensor, iterations: usize) -> Result<Svd> {
    let (a, noise) = (host(a, "svd")?, host(vectors, "svd")?);
    let (rows, columns, count) = (a.nrows(), a.ncols(), noise.ncols());
    let least = rows.min(columns);
    if noise.nrows() != least || count > least {
        return shape_error("svd", format!("[{least}, up to {least}]"), format!("{:?}", vectors.shape()));
    }
    if rows >= columns {
        return iterated(a, noise, iterations);
    }
    let Svd { u, s, vt } = iterated(a.transpose().to_owned(), noise, iterations)?;
    Ok(Svd { u: vt.t()?, s, vt: u.t()? })
}

fn iterated(a: Mat<f64>, noise: Mat<f64>, iterations: usize) -> Result<Svd> {
    let range = |m: Mat<f64>| m.qr().compute_thin_Q();
    let mut q = range(&a * noise);
    for _ in 0..iterations {
        q = range(&a * range(a.transpose() * q));
    }
    decompose_wide((q.transpose() * &a).as_ref(), Some(q.as_ref()))
}

/// A = Q·R with Q [rows, k] orthonormal and R [k, columns] upper triangular, k = min(rows, columns).
///
/// # Errors
/// As [`svd`].
pub fn qr(a: &Tensor) -> Result<(Tensor, Tensor)> {
    let qr = host(a, "qr")?.qr();
    Ok((tensor(qr.compute_thin_Q().as_ref())?, tensor(qr.thin_R())?))
}

/// X with C·X = B, C symmetric and positive.
///
/// # Errors
/// Shapes that do not fit, a C that is not positive.
pub fn solve_positive(c: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (c, b) = (host(c, "solve")?, host(b, "solve")?);
    if c.nrows() != c.ncols() || c.nrows() != b.nrows() {
        let (n, found) = (b.nrows(), format!("[{}, {}]", c.nrows(), c.ncols()));
        return shape_error("solve", format!("[{n}, {n}]"), found);
    }
    let factor = c.llt(Side::Lower).map_err(|_| Error::Value {
        op: "solve",
        message: "expected a positive matrix, found one that is not".into(),
    })?;
    tensor(factor.solve(b).as_ref())
}

/// X with A·X = B, A square.
///
/// # Errors
/// Shapes that do not fit, an A without an inverse.
pub fn solve(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (host(a, "solve")?, host(b, "solve")?);
    if a.nrows() != a.ncols() || a.nrows() != b.nrows() {
        let (n, found) = (b.nrows(), format!("[{}, {}]", a.nrows(), a.ncols()));
        return shape_error("solve", format!("[{n}, {n}]"), found);
    }
    let x = a.partial_piv_lu().solve(b);
    if !x.is_all_finite() {
        let message = "expected a matrix with an inverse, found one without".into();
        return Err(Error::Value { op: "solve", message });
    }
    tensor(x.as_ref())
}

/// Eigenvalues of a symmetric matrix, rising, and the eigenvectors [n, n], its columns. Their signs are chosen as in [`Svd`]:
/// the largest number of each is positive.
///
/// # Errors
/// As [`svd`]; a matrix that is not square.
pub fn symmetric_eigen(a: &Tensor) -> Result<(Vec<f32>, Tensor)> {
    let a = host(a, "eigen")?;
    if a.nrows() != a.ncols() {
        let found = format!("[{}, {}]", a.nrows(), a.ncols());
        return shape_error("eigen", "a square matrix", found);
    }
    let eigen = a.self_adjoint_eigen(Side::Lower);
    let eigen = eigen.map_err(|e| Error::Value { op: "eigen", message: format!("{e:?}") })?;
    let mut vectors = eigen.U().to_owned();
    for k in 0..vectors.ncols() {
        if largest(vectors.as_ref(), k) < 0.0 {
            (0..vectors.nrows()).for_each(|i| vectors[(i, k)] = -vectors[(i, k)]);
        }
    }
    let values = eigen.S().column_vector().iter().map(|&s| s as f32).collect();
    Ok((values, tensor(vectors.as_ref())?))
}

/// An orthonormal basis [n, n] whose first columns are the orthonormal ones of v [n, k].
///
/// # Errors
/// As [`svd`].
pub fn completed(v: &Tensor) -> Result<Tensor> {
    let v = host(v, "basis")?;
    let (n, k) = (v.nrows(), v.ncols());
    let spanning = Mat::from_fn(n, k + n, |i, j| if j < k { v[(i, j)] } else { f64::from(i == j - k) });
    let q = spanning.qr().compute_thin_Q();
    tensor(Mat::from_fn(n, n, |i, j| if j < k { v[(i, j)] } else { q[(i, j)] }).as_ref())
}

/// The largest number of column `k`, with its sign.
fn largest(m: MatRef<'_, f64>, k: usize) -> f64 {
    (0..m.nrows()).fold(0.0, |most: f64, i| if m[(i, k)].abs() > most.abs() { m[(i, k)] } else { most })
}

fn decompose(a: MatRef<'_, f64>) -> Result<Svd> {
    decompose_wide(a, None)
}

/// Of left·a where `left` is orthonormal.
fn decompose_wide(a: MatRef<'_, f64>, left: Option<MatRef<'_, f64>>) -> Result<Svd> {
    let svd = a.thin_svd().map_err(|e| Error::Value { op: "svd", message: format!("{e:?}") })?;
    let (mut u, mut v) = (svd.U().to_owned(), svd.V().to_owned());
    for k in 0..v.ncols() {
        if largest(v.as_ref(), k) < 0.0 {
            (0..v.nrows()).for_each(|i| v[(i, k)] = -v[(i, k)]);
            (0..u.nrows()).for_each(|i| u[(i, k)] = -u[(i, k)]);
        }
    }
    let s = svd.S().column_vector().iter().map(|&s| s as f32).collect();
    let u = left.map_or(u.clone(), |left| left * &u);
    Ok(Svd { u: tensor(u.as_ref())?, s, vt: tensor(v.transpose())? })
}

fn host(a: &Tensor, op: &'static str) -> Result<Mat<f64>> {
    let &[rows, columns] = a.shape() else {
        return shape_error(op, "a matrix", format!("{:?}", a.shape()));
    };
    let values = a.to_vec()?;
    if values.iter().any(|v| !v.is_finite()) {
        let message = "expected finite numbers, found some that are not".into();
        return Err(Error::Value { op, message });
    }
    Ok(Mat::from_fn(rows, columns, |i, j| f64::from(values[i * columns + j])))
}

fn tensor(m: MatRef<'_, f64>) -> Result<Tensor> {
    let (rows, columns) = (m.nrows(), m.ncols());
    let values = (0..rows).flat_map(|i| (0..columns).map(move |j| m[(i, j)] as f32)).collect();
    Tensor::from_vec(values, [rows, columns])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, sample};

    const KEY: Key = Key { seed: 3, stream: 5 };

    fn product(svd: &Svd) -> Tensor {
        let s = Tensor::from_vec(svd.s.clone(), [1, svd.s.len()]).unwrap();
        svd.u.mul(&s).unwrap().matmul(&svd.vt).unwrap()
    }

    fn identity(n: usize) -> Tensor {
        let values = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
        Tensor::from_vec(values, [n, n]).unwrap()
    }

    #[test]
    fn a_matrix_is_the_product_of_its_parts() {
        for (rows, columns) in [(7, 7), (9, 4), (4, 9), (1, 5)] {
            let a = sample(&[rows, columns], 1);
            let svd = svd(&a).unwrap();
            close(&product(&svd), &a, 1e-6);
            let k = rows.min(columns);
            close(&svd.u.t_matmul(&svd.u).unwrap(), &identity(k), 1e-6);
            close(&svd.vt.matmul_t(&svd.vt).unwrap(), &identity(k), 1e-6);
            assert!(svd.s.windows(2).all(|w| w[0] >= w[1]), "{:?}", svd.s);
            for row in svd.vt.to_vec().unwrap().chunks(columns) {
                assert!(row.iter().fold(0.0f32, |m, v| if v.abs() > m.abs() { *v } else { m }) > 0.0);
            }
            let (q, r) = qr(&a).unwrap();
            close(&q.matmul(&r).unwrap(), &a, 1e-6);
            close(&q.t_matmul(&q).unwrap(), &identity(k), 1e-6);
            assert!(
                r.to_vec()
                    .unwrap()
                    .chunks(columns)
                    .enumerate()
                    .all(|(i, row)| { row[..i.min(columns)].iter().all(|v| *v == 0.0) })
            );
        }
    }

    #[test]
    fn random_projections_find_the_largest() {
        // Values that fall quickly, as those of weights and activations do.
        let scale: Vec<f32> = (0..20).map(|i| 0.5f32.powi(i)).collect();
        let scale = Tensor::from_vec(scale, [1, 20]).unwrap();
        let a = sample(&[30, 20], 1).mul(&scale).unwrap().matmul(&sample(&[20, 40], 2)).unwrap();
        let (whole, part) = (svd(&a).unwrap(), svd_lowrank(&a, 8, 4, KEY).unwrap());
        assert_eq!((part.u.shape(), part.vt.shape()), (&[30, 8][..], &[8, 40][..]));
        for i in 0..4 {
            assert!((whole.s[i] - part.s[i]).abs() < 1e-4 * whole.s[i], "{:?} {:?}", whole.s, part.s);
        }
        close(&part.vt.rows_between(0, 3).unwrap(), &whole.vt.rows_between(0, 3).unwrap(), 1e-3);
        close(&product(&svd_lowrank(&a, 50, 0, KEY).unwrap()), &a, 1e-5);
        let (wide, vectors) = (svd_lowrank_from(&a, &sample(&[30, 8], 4), 4).unwrap(), sample(&[30, 8], 4));
        assert_eq!((wide.u.shape(), wide.vt.shape()), (&[30, 8][..], &[8, 40][..]));
        let tall = svd_lowrank_from(&a.t().unwrap(), &vectors, 4).unwrap();
        close(&tall.u.t().unwrap(), &wide.vt, 1e-6);
        close(&wide.u.t_matmul(&wide.u).unwrap(), &identity(8), 1e-5);
        assert!((whole.s[0] - wide.s[0]).abs() < 1e-4 * whole.s[0]);
        assert!(svd_lowrank_from(&a, &sample(&[40, 8], 4), 4).is_err());
    }

    #[test]
    fn symmetric_matrices_have_eigenvectors_and_bases_are_completed() {
        let x = sample(&[9, 6], 1);
        let c = x.t_matmul(&x).unwrap().sub(&identity(6)).unwrap();
        let (values, vectors) = symmetric_eigen(&c).unwrap();
        assert!(values.windows(2).all(|w| w[0] <= w[1]), "{values:?}");
        let scaled = vectors.mul(&Tensor::from_vec(values, [6]).unwrap()).unwrap();
        close(&c.matmul(&vectors).unwrap(), &scaled, 1e-5);
        close(&vectors.t_matmul(&vectors).unwrap(), &identity(6), 1e-6);
        let thin = vectors.narrow(1, 0, 2).unwrap();
        let whole = completed(&thin).unwrap();
        close(&whole.narrow(1, 0, 2).unwrap(), &thin, 1e-6);
        close(&whole.t_matmul(&whole).unwrap(), &identity(6), 1e-6);
        assert!(symmetric_eigen(&x).is_err());
    }

    #[test]
    fn square_systems_are_solved_and_singular_ones_refused() {
        let (a, b) = (sample(&[5, 5], 1), sample(&[5, 3], 2));
        close(&a.matmul(&solve(&a, &b).unwrap()).unwrap(), &b, 1e-5);
        assert!(solve(&Tensor::zeros([5, 5]), &b).is_err());
        assert!(solve(&a, &sample(&[4, 3], 2)).is_err());
    }

    #[test]
    fn positive_systems_are_solved_and_others_refused() {
        let x = sample(&[6, 4], 1);
        let c = x.t_matmul(&x).unwrap();
        let b = sample(&[4, 3], 2);
        close(&c.matmul(&solve_positive(&c, &b).unwrap()).unwrap(), &b, 1e-4);
        assert!(solve_positive(&c.scale(-1.0).unwrap(), &b).is_err());
        assert!(solve_positive(&c, &x).is_err());
        assert!(svd(&sample(&[3], 1)).is_err());
        assert!(svd(&Tensor::full(f32::NAN, [2, 2])).is_err());
    }
}
