//! Orthogonal matrices from free numbers, and rows turned by them: reflections, Cayley's transform, blocks.
//!
//! A method that multiplies W by an orthogonal matrix turns the rows x instead, which costs what the turn costs and never
//! forms W′.

use engraft_nn::{Pass, Result, Site};
use engraft_tensor::Tensor;

/// Identity matrices [1, n, n].
pub(crate) fn identity(n: usize) -> Result<Tensor> {
    let one = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
    Ok(Tensor::from_vec(one, [1, n, n])?)
}

/// Skew-symmetric matrices [blocks, n, n] from what is above their diagonals, row by row: v [blocks, n(n − 1)/2].
pub(crate) fn skew(v: &Tensor, n: usize) -> Result<Tensor> {
    let (mut index, mut signs) = (vec![0i64; n * n], vec![0.0f32; n * n]);
    let mut next = 0;
    for i in 0..n {
        for j in i + 1..n {
            (index[i * n + j], signs[i * n + j]) = (next, 1.0);
            (index[j * n + i], signs[j * n + i]) = (next, -1.0);
            next += 1;
        }
    }
    let (index, signs) = (Tensor::from_i64(index, [n * n])?, Tensor::from_vec(signs, [n * n, 1])?);
    Ok(v.t()?.gather(&index)?.mul(&signs)?.t()?.reshape([v.dim(0), n, n])?)
}

/// (I − Q)(I + Q)⁻¹ of skew-symmetric Q [blocks, n, n]: orthogonal to rounding.
pub(crate) fn cayley(q: &Tensor) -> Result<Tensor> {
    // I − Q = 2·I − (I + Q), so one inverse is all there is to do.
    let one = identity(q.width())?;
    Ok(one.add(q)?.inverse()?.scale(2.0)?.sub(&one)?)
}

/// I + 2Q + 2Q² + … + Qⁿ with `terms` = n + 1 terms: what the series of (I + Q)(I − Q)⁻¹ begins with, its last term halved
/// as `peft` does. The sign of Q is the other one than in [`cayley`].
pub(crate) fn cayley_neumann(q: &Tensor, terms: usize) -> Result<Tensor> {
    let mut sum = identity(q.width())?.add(&Tensor::zeros(q.shape()))?;
    if terms > 1 {
        sum = sum.add(&q.scale(2.0)?)?;
    }
    if terms > 2 {
        let mut power = q.matmul(q)?;
        sum = sum.add(&power.scale(2.0)?)?;
        for _ in 3..terms.saturating_sub(1) {
            power = power.matmul(q)?;
            sum = sum.add(&power.scale(2.0)?)?;
        }
        sum = sum.add(&power.matmul(q)?)?;
    }
    Ok(sum)
}

/// Thin factors A [r, n] and B [n, r] of H = (I − 2u₁u₁ᵀ)…(I − 2u_ru_rᵀ), where the rows of `units` [r, n] are unit vectors:
/// x·Hᵀ = x + (x·Aᵀ)·Bᵀ.
///
/// H = I − Uᵀ·T·U with an upper triangular T whose inverse has ½ on the diagonal and the products of the rows above it
/// (the compact form of Schreiber and Van Loan).
pub(crate) fn reflections(units: &Tensor) -> Result<(Tensor, Tensor)> {
    let r = units.dim(0);
    let above = (0..r * r).map(|i| if i / r < i % r { 1.0 } else { 0.0 }).collect();
    let above = Tensor::from_vec(above, [r, r])?;
    let half = identity(r)?.reshape([r, r])?.scale(0.5)?;
    let t = units.matmul_t(units)?.mul(&above)?.add(&half)?.inverse()?;
    Ok((units.clone(), units.t_matmul(&t)?.scale(-1.0)?))
}

/// Which side of a block the rows are multiplied by.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Side {
    /// x·R.
    Plain,
    /// x·Rᵀ.
    Transposed,
}

/// Rows x [rows, blocks·n], each piece of n numbers times its block of R [blocks, n, n], or all times one [1, n, n].
pub(crate) fn turn_blocks(x: &Tensor, r: &Tensor, side: Side) -> Result<Tensor> {
    let (rows, n) = (x.rows(), r.width());
    let product = |x: &Tensor, r: &Tensor| match side {
        Side::Plain => x.matmul(r),
        Side::Transposed => x.matmul_t(r),
    };
    if r.dim(0) == 1 {
        let pieces = x.reshape([rows * x.width() / n, n])?;
        return Ok(product(&pieces, &r.reshape([n, n])?)?.reshape(x.shape())?);
    }
    Ok(x.matmul_blocks(r, side == Side::Transposed)?)
}

/// R with each block left as it is or, while training, with probability `p`, replaced by the identity.
pub(crate) fn drop_blocks(r: &Tensor, p: f32, site: &Site, cx: &Pass, salt: u8) -> Result<Tensor> {
    let blocks = r.dim(0);
    if p == 0.0 || cx.mode() == engraft_nn::Mode::Eval || blocks == 1 {
        return Ok(r.clone());
    }
    let kept = cx.dropout(&Tensor::full(1.0 - p, [blocks, 1, 1]), p, site.id, salt)?;
    let one = identity(r.width())?;
    Ok(r.sub(&one)?.mul(&kept)?.add(&one)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_tensor::testing::{check_gradients, close, sample};

    fn is_orthogonal(r: &Tensor, tolerance: f32) {
        let one = identity(r.width()).unwrap().add(&Tensor::zeros(r.shape())).unwrap();
        close(&r.matmul_t(r).unwrap(), &one, tolerance);
    }

    #[test]
    fn skew_matrices_and_their_transforms() {
        let v = Tensor::from_vec(vec![1.0, 2.0, 3.0], [1, 3]).unwrap();
        let q = skew(&v, 3).unwrap();
        assert_eq!(q.to_vec().unwrap(), [0.0, 1.0, 2.0, -1.0, 0.0, 3.0, -2.0, -3.0, 0.0]);
        let v = sample(&[4, 10], 1);
        is_orthogonal(&cayley(&skew(&v, 5).unwrap()).unwrap(), 1e-5);
        check_gradients(&[sample(&[2, 3], 2)], |v| cayley(&skew(&v[0], 3).map_err(inner)?).map_err(inner))
            .unwrap();
        // The series goes to the transform of −Q, the more terms the closer.
        let small = skew(&v.scale(0.1).unwrap(), 5).unwrap();
        let exact = cayley(&small.scale(-1.0).unwrap()).unwrap();
        let off = |terms: usize| {
            let difference = cayley_neumann(&small, terms).unwrap().sub(&exact).unwrap();
            difference.to_vec().unwrap().iter().fold(0.0f32, |m, v| m.max(v.abs()))
        };
        assert!(off(12) < 1e-5 && off(5) < off(3) && off(3) < off(2), "{} {} {}", off(2), off(3), off(12));
        close(&cayley_neumann(&small, 1).unwrap().rows_between(0, 1).unwrap(), &identity(5).unwrap(), 0.0);
    }

    fn inner(e: engraft_nn::Error) -> engraft_tensor::Error {
        match e {
            engraft_nn::Error::Tensor(e) => e,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn reflections_are_the_product_one_by_one() {
        let free = sample(&[4, 6], 3);
        let norms = crate::shared::matrices::norms(&free, 1).unwrap();
        let units = free.div(&norms).unwrap();
        let (a, b) = reflections(&units).unwrap();
        let x = sample(&[5, 6], 4);
        let found = x.clone().add_low_rank(&x, &a, &b, 1.0).unwrap();
        // x·Hᵀ meets the last reflection first.
        let mut expected = x;
        for i in (0..4).rev() {
            let u = units.rows_between(i, i + 1).unwrap();
            let along = expected.matmul_t(&u).unwrap().scale(-2.0).unwrap();
            expected = expected.add(&along.matmul(&u).unwrap()).unwrap();
        }
        close(&found, &expected, 1e-5);
    }

    #[test]
    fn blocks_turn_their_pieces() {
        let (x, r) = (sample(&[3, 6], 5), sample(&[2, 3, 3], 6));
        let y = turn_blocks(&x, &r, Side::Plain).unwrap();
        for block in 0..2 {
            let piece = x.narrow(1, 3 * block, 3).unwrap();
            let one = r.rows_between(block, block + 1).unwrap().reshape([3, 3]).unwrap();
            close(&y.narrow(1, 3 * block, 3).unwrap(), &piece.matmul(&one).unwrap(), 1e-6);
        }
        let shared = r.rows_between(0, 1).unwrap();
        let twice = engraft_tensor::ops::cat(&[&shared, &shared], 0).unwrap();
        for side in [Side::Plain, Side::Transposed] {
            close(&turn_blocks(&x, &shared, side).unwrap(), &turn_blocks(&x, &twice, side).unwrap(), 1e-6);
        }
    }
}
