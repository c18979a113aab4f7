//! Products with Kronecker products, which are never formed: (P⊗Q)·x is P·X·Qᵀ with x read as a matrix X [a₂, b₂].
//!
//! P [a₁, a₂], Q [b₁, b₂], P⊗Q [a₁·b₁, a₂·b₂]; rows x [rows, a₂·b₂] → [rows, a₁·b₁].

use engraft_nn::Result;
use engraft_tensor::Tensor;

/// P⊗Q, formed.
pub(crate) fn kron(p: &Tensor, q: &Tensor) -> Result<Tensor> {
    let (a1, a2, b1, b2) = (p.dim(0), p.dim(1), q.dim(0), q.dim(1));
    Ok(p.reshape([a1, 1, a2, 1])?.mul(&q.reshape([1, b1, 1, b2])?)?.reshape([a1 * b1, a2 * b2])?)
}

/// x·(P⊗Q)ᵀ.
pub(crate) fn multiply(x: &Tensor, p: &Tensor, q: &Tensor) -> Result<Tensor> {
    let (a1, a2, b1, b2) = (p.dim(0), p.dim(1), q.dim(0), q.dim(1));
    let x = x.reshape([x.rows(), a2, b2])?;
    let right_first = a2 * b2 * b1 + a1 * a2 * b1 <= a1 * a2 * b2 + a1 * b2 * b1;
    let y = if right_first { left(&x.matmul_t(q)?, p)? } else { left(&x, p)?.matmul_t(q)? };
    Ok(y.reshape([x.dim(0), a1 * b1])?)
}

/// x·(P⊗(U·V))ᵀ with U [b₁, r], V [r, b₂]: P works between the two thin factors.
pub(crate) fn multiply_thin(x: &Tensor, p: &Tensor, u: &Tensor, v: &Tensor) -> Result<Tensor> {
    let rows = x.rows();
    let x = x.reshape([rows, p.dim(1), v.dim(1)])?;
    Ok(left(&x.matmul_t(v)?, p)?.matmul_t(u)?.reshape([rows, p.dim(0) * u.dim(0)])?)
}

/// P times the middle dimension: [rows, a₂, b] → [rows, a₁, b].
fn left(x: &Tensor, p: &Tensor) -> Result<Tensor> {
    Ok(x.permute(&[0, 2, 1])?.matmul_t(p)?.permute(&[0, 2, 1])?)
}

/// Σᵢ Aᵢ⊗(Uᵢ·Vᵢ), formed; A [k, a₁, a₂], U [k, b₁, r], V [k, r, b₂].
pub(crate) fn sum(a: &Tensor, u: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (k, a1, a2, b1, b2) = (a.dim(0), a.dim(1), a.dim(2), u.dim(1), v.dim(2));
    let products = u.matmul(v)?.reshape([k, b1 * b2])?;
    let all = a.reshape([k, a1 * a2])?.t_matmul(&products)?;
    Ok(all.reshape([a1, a2, b1, b2])?.permute(&[0, 2, 1, 3])?.reshape([a1 * b1, a2 * b2])?)
}

/// x·(Σᵢ Aᵢ⊗(Uᵢ·Vᵢ))ᵀ.
pub(crate) fn multiply_sum(x: &Tensor, a: &Tensor, u: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (k, a1, a2, b1) = (a.dim(0), a.dim(1), a.dim(2), u.dim(1));
    let (rows, r, b2) = (x.rows(), v.dim(1), v.dim(2));
    let h = x.reshape([rows * a2, b2])?.matmul_t(&v.reshape([k * r, b2])?)?;
    let h = h.reshape([rows, a2, k, r])?.permute(&[2, 0, 3, 1])?.reshape([k, rows * r, a2])?;
    let h = h.matmul_t(a)?.reshape([k, rows, r, a1])?.permute(&[1, 3, 0, 2])?.reshape([rows * a1, k * r])?;
    let y = h.matmul(&u.permute(&[0, 2, 1])?.reshape([k * r, b1])?)?;
    Ok(y.reshape([rows, a1 * b1])?)
}

/// x·(Σᵢ Aᵢ⊗Qᵢ)ᵀ; A [k, a₁, a₂], Q [k, b₁, b₂].
pub(crate) fn multiply_full(x: &Tensor, a: &Tensor, q: &Tensor) -> Result<Tensor> {
    let (k, a1, a2, b1, b2) = (a.dim(0), a.dim(1), a.dim(2), q.dim(1), q.dim(2));
    let rows = x.rows();
    let h = x.reshape([rows * a2, b2])?.matmul_t(&q.reshape([k * b1, b2])?)?;
    let h = h.reshape([rows, a2, k, b1])?.permute(&[0, 3, 2, 1])?.reshape([rows * b1, k * a2])?;
    let y = h.matmul_t(&a.permute(&[1, 0, 2])?.reshape([a1, k * a2])?)?.reshape([rows, b1, a1])?;
    Ok(y.permute(&[0, 2, 1])?.reshape([rows, a1 * b1])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_tensor::testing::{check_gradients, close, sample};

    fn at(t: &Tensor, index: &[usize]) -> f32 {
        let flat = index.iter().zip(t.shape()).fold(0, |sum, (i, size)| sum * size + i);
        t.to_vec().unwrap()[flat]
    }

    #[test]
    fn products_are_those_with_the_formed_matrix() {
        for (a1, a2, b1, b2) in [(2, 3, 4, 5), (5, 1, 2, 7), (1, 1, 6, 5), (4, 6, 2, 1)] {
            let (p, q) = (sample(&[a1, a2], 1), sample(&[b1, b2], 2));
            let formed = kron(&p, &q).unwrap();
            let last = [a1 - 1, b1 - 1, a2 - 1, b2 - 1];
            let expected = at(&p, &[last[0], last[2]]) * at(&q, &[last[1], last[3]]);
            assert_eq!(*formed.to_vec().unwrap().last().unwrap(), expected);
            let x = sample(&[3, a2 * b2], 3);
            let wanted = x.matmul_t(&formed).unwrap();
            close(&multiply(&x, &p, &q).unwrap(), &wanted, 1e-5);
            let (u, v) = (sample(&[b1, 2], 4), sample(&[2, b2], 5));
            let wanted = x.matmul_t(&kron(&p, &u.matmul(&v).unwrap()).unwrap()).unwrap();
            close(&multiply_thin(&x, &p, &u, &v).unwrap(), &wanted, 1e-5);
        }
    }

    #[test]
    fn sums_are_sums() {
        let (a, u, v) = (sample(&[3, 2, 4], 1), sample(&[3, 5, 2], 2), sample(&[3, 2, 3], 3));
        let part = |t: &Tensor, i: usize| {
            let shape = t.shape()[1..].to_vec();
            t.rows_between(i, i + 1).unwrap().reshape(shape).unwrap()
        };
        let mut wanted = Tensor::zeros([10, 12]);
        for i in 0..3 {
            let one = kron(&part(&a, i), &part(&u, i).matmul(&part(&v, i)).unwrap()).unwrap();
            wanted = wanted.add(&one).unwrap();
        }
        close(&sum(&a, &u, &v).unwrap(), &wanted, 1e-5);
        let x = sample(&[6, 12], 4);
        close(&multiply_sum(&x, &a, &u, &v).unwrap(), &x.matmul_t(&wanted).unwrap(), 1e-5);
    }

    #[test]
    fn products_differentiate() {
        let (x, p, q) = (sample(&[3, 6], 1), sample(&[2, 3], 2), sample(&[4, 2], 3));
        let lift = |r: Result<Tensor>| r.map_err(|e| panic!("{e}"));
        check_gradients(&[x.clone(), p, q], |v| lift(multiply(&v[0], &v[1], &v[2]))).unwrap();
        let (a, u, w) = (sample(&[2, 2, 3], 4), sample(&[2, 4, 1], 5), sample(&[2, 1, 2], 6));
        check_gradients(&[x, a, u, w], |v| lift(multiply_sum(&v[0], &v[1], &v[2], &v[3]))).unwrap();
    }

    #[test]
    fn a_sum_of_full_products() {
        let (x, a, q) = (sample(&[3, 6], 1), sample(&[2, 4, 2], 2), sample(&[2, 5, 3], 3));
        let one = |t: &Tensor, i: usize| t.rows_between(i, i + 1).unwrap().reshape(&t.shape()[1..]).unwrap();
        let formed = |i: usize| kron(&one(&a, i), &one(&q, i)).unwrap();
        let whole = formed(0).add(&formed(1)).unwrap();
        close(&multiply_full(&x, &a, &q).unwrap(), &x.matmul_t(&whole).unwrap(), 1e-5);
        check_gradients(&[x, a, q], |v| {
            multiply_full(&v[0], &v[1], &v[2]).map_err(|e| engraft_tensor::Error::Backward(e.to_string()))
        })
        .unwrap();
    }
}
