//! Small dense algebra: inverses and orthonormal bases. Computed in f64, since one rounding costs more than these sizes do.

use rayon::prelude::*;

/// Inverses of matrices a [.., n, n], one after another; not finite where a matrix is singular.
pub fn inverse(a: &[f32], n: usize, y: &mut [f32]) {
    if n == 0 {
        return;
    }
    y.par_chunks_exact_mut(n * n).zip(a.par_chunks_exact(n * n)).for_each(|(y, a)| invert(a, n, y));
}

/// Gauss–Jordan with partial pivoting.
fn invert(a: &[f32], n: usize, y: &mut [f32]) {
    // Each row of `left` is followed by its row of `right`, so that a swap or a sum is one pass.
    let width = 2 * n;
    let mut rows = vec![0.0f64; n * width];
    for (i, row) in rows.chunks_exact_mut(width).enumerate() {
        row[..n].iter_mut().zip(&a[i * n..]).for_each(|(w, &v)| *w = f64::from(v));
        row[n + i] = 1.0;
    }
    for k in 0..n {
        let size = |i: usize| rows[i * width + k].abs();
        let pivot = (k..n).max_by(|&i, &j| size(i).total_cmp(&size(j))).unwrap_or(k);
        if pivot != k {
            let (above, below) = rows.split_at_mut(pivot * width);
            above[k * width..(k + 1) * width].swap_with_slice(&mut below[..width]);
        }
        let factor = 1.0 / rows[k * width + k];
        rows[k * width + k..(k + 1) * width].iter_mut().for_each(|v| *v *= factor);
        let kept = rows[k * width..(k + 1) * width].to_vec();
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            let factor = row[k];
            if i != k && factor != 0.0 {
                row[k..].iter_mut().zip(&kept[k..]).for_each(|(v, &p)| *v -= factor * p);
            }
        }
    }
    for (y, row) in y.chunks_exact_mut(n).zip(rows.chunks_exact(width)) {
        y.iter_mut().zip(&row[n..]).for_each(|(y, &v)| *y = v as f32);
    }
}

/// q [m, n] and r [n, n] with a [m, n] = q·r, m ≥ n, columns of q orthonormal and r upper triangular, by Householder
/// reflections; signs are those of LAPACK, and so of PyTorch and NumPy.
pub fn qr(a: &[f32], m: usize, n: usize, q: &mut [f32], r: &mut [f32]) {
    // Columns one after another.
    let mut w: Vec<Vec<f64>> = (0..n).map(|j| (0..m).map(|i| f64::from(a[i * n + j])).collect()).collect();
    let mut taus = vec![0.0f64; n];
    for k in 0..n {
        let (done, rest) = w.split_at_mut(k + 1);
        let column = &mut done[k];
        let (alpha, below) = (column[k], column[k + 1..].iter().map(|v| v * v).sum::<f64>());
        // A column that is zero below needs no reflection and keeps its sign.
        if below > 0.0 {
            let beta = -(alpha * alpha + below).sqrt().copysign(alpha);
            taus[k] = (beta - alpha) / beta;
            column[k + 1..].iter_mut().for_each(|v| *v /= alpha - beta);
            column[k] = beta;
        }
        for other in rest {
            reflect(&column[k + 1..], taus[k], &mut other[k..]);
        }
    }
    for i in 0..n {
        (0..n).for_each(|j| r[i * n + j] = if i <= j { w[j][i] as f32 } else { 0.0 });
    }
    for j in 0..n {
        let mut column = vec![0.0f64; m];
        column[j] = 1.0;
        for k in (0..=j).rev() {
            reflect(&w[k][k + 1..], taus[k], &mut column[k..]);
        }
        (0..m).for_each(|i| q[i * n + j] = column[i] as f32);
    }
}

/// x − tau·v·(vᵀx) with v = (1, tail).
fn reflect(tail: &[f64], tau: f64, x: &mut [f64]) {
    let dot = tau * (x[0] + tail.iter().zip(&x[1..]).map(|(v, x)| v * x).sum::<f64>());
    x[0] -= dot;
    x[1..].iter_mut().zip(tail).for_each(|(x, v)| *x -= dot * v);
}

/// The gradient of a from that of q: da = (dq + q·S)·r⁻ᵀ, S the symmetric matrix with the lower triangle of −dqᵀ·q.
pub fn qr_backward(q: &[f32], r: &[f32], dq: &[f32], m: usize, n: usize, da: &mut [f32]) {
    let mut s = vec![0.0f64; n * n];
    for row in 0..m {
        let (q, dq) = (&q[row * n..(row + 1) * n], &dq[row * n..(row + 1) * n]);
        for i in 0..n {
            (0..=i).for_each(|j| s[i * n + j] -= f64::from(dq[i]) * f64::from(q[j]));
        }
    }
    for i in 0..n {
        (0..i).for_each(|j| s[j * n + i] = s[i * n + j]);
    }
    for row in 0..m {
        let (q, dq) = (&q[row * n..(row + 1) * n], &dq[row * n..(row + 1) * n]);
        let mut x: Vec<f64> = (0..n)
            .map(|j| f64::from(dq[j]) + (0..n).map(|i| f64::from(q[i]) * s[i * n + j]).sum::<f64>())
            .collect();
        // x·r⁻ᵀ: from the last column back.
        for j in (0..n).rev() {
            let later: f64 = (j + 1..n).map(|k| f64::from(r[j * n + k]) * x[k]).sum();
            x[j] = (x[j] - later) / f64::from(r[j * n + j]);
        }
        da[row * n..(row + 1) * n].iter_mut().zip(x).for_each(|(d, v)| *d = v as f32);
    }
}
