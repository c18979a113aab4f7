//! Fourier transforms along the last dimension, and products with matrices that have few frequencies.

use std::sync::Arc;

use crate::device::{Buffer, device};
use crate::error::{Error, Result, shape_error};
use crate::tensor::Tensor;

/// The frequencies of a matrix [out, in]: the entry (o, i) is Σₖ cₖ·cos(2π(rowsₖ·o/out + columnsₖ·i/in)).
#[derive(Debug)]
pub struct Frequencies {
    pub(crate) out: usize,
    pub(crate) inn: usize,
    pub(crate) rows: Vec<u32>,
    pub(crate) columns: Vec<u32>,
}

impl Frequencies {
    /// Those at `places`, (row, column) of the transform [out, in].
    pub fn new(out: usize, inn: usize, places: &[(usize, usize)]) -> Result<Arc<Frequencies>> {
        if let Some((u, v)) = places.iter().find(|(u, v)| *u >= out || *v >= inn) {
            let message = format!("place {u}, {v} is outside [{out}, {inn}]");
            return Err(Error::Value { op: "frequencies", message });
        }
        let (rows, columns) = places.iter().map(|&(u, v)| (u as u32, v as u32)).unzip();
        Ok(Arc::new(Frequencies { out, inn, rows, columns }))
    }
}

impl Tensor {
    /// The lower half of the transform of each row of n real numbers: x [.., n] → [.., n/2 + 1, 2], real and imaginary
    /// parts; frequency k is Σₚ xₚ·e^(−2πi·k·p/n).
    pub fn rfft(&self) -> Result<Tensor> {
        self.expect_f32("rfft")?;
        if self.width() == 0 || self.shape().is_empty() {
            return shape_error("rfft", "rows of at least one number", format!("{:?}", self.shape()));
        }
        let n = self.width();
        let mut shape = self.shape().to_vec();
        shape.pop();
        shape.extend([n / 2 + 1, 2]);
        let mut y = Buffer::f32(shape.iter().product());
        device().half_spectrum(self, n, 1.0, 1.0, &mut y);
        let (edge, before) = (self.edge(), self.shape().to_vec());
        Ok(Tensor::new(shape, y).on_tape("rfft", &[self], move |dy, sink| {
            // The sum of all frequencies counts those inside twice, and the gradient has them once.
            let mut dx = Buffer::f32(before.iter().product());
            device().spectrum_sum(&dy, n, 0.5, 1.0, &mut dx);
            sink.add(&edge, Tensor::new(before, dx))
        }))
    }

    /// The rows of n real numbers that have these transforms: the inverse of [`Tensor::rfft`]. Imaginary parts of
    /// frequencies that are their own mirror images are not read.
    pub fn irfft(&self, n: usize) -> Result<Tensor> {
        self.expect_f32("irfft")?;
        let [outer @ .., half, 2] = self.shape() else {
            return shape_error("irfft", format!("[.., {}, 2]", n / 2 + 1), format!("{:?}", self.shape()));
        };
        if n == 0 || *half != n / 2 + 1 {
            return shape_error("irfft", format!("[.., {}, 2]", n / 2 + 1), format!("{:?}", self.shape()));
        }
        let mut shape = outer.to_vec();
        shape.push(n);
        let scale = 1.0 / n as f32;
        let mut y = Buffer::f32(shape.iter().product());
        device().spectrum_sum(self, n, 1.0, scale, &mut y);
        let (edge, before) = (self.edge(), self.shape().to_vec());
        Ok(Tensor::new(shape, y).on_tape("irfft", &[self], move |dy, sink| {
            let mut dx = Buffer::f32(before.iter().product());
            device().half_spectrum(&dy, n, 2.0, scale, &mut dx);
            sink.add(&edge, Tensor::new(before, dx))
        }))
    }

    /// x·Mᵀ with M [out, in] the matrix of these frequencies with the coefficients c; x [.., in] → [.., out].
    ///
    /// M is never formed: each row is transformed, its frequencies `columns` times c are put at `rows`, and transformed
    /// back. The gradient of x is the same with the two places exchanged. Nothing but x and c is kept.
    pub fn few_frequencies(&self, c: &Tensor, f: &Arc<Frequencies>) -> Result<Tensor> {
        self.expect_f32("few frequencies")?;
        c.expect_f32("few frequencies")?;
        c.expect_shape("few frequencies", &[f.rows.len()])?;
        if self.shape().is_empty() || self.width() != f.inn {
            return shape_error("few frequencies", format!("[.., {}]", f.inn), format!("{:?}", self.shape()));
        }
        let mut shape = self.shape().to_vec();
        *shape.last_mut().expect("has a width") = f.out;
        let mut y = Buffer::f32(shape.iter().product());
        device().few_frequencies(f, false, c, self, &mut y);
        let (ex, ec) = (self.edge(), c.edge());
        let (x, kept, f) = (self.detach(), c.detach(), f.clone());
        Ok(Tensor::new(shape, y).on_tape("few frequencies", &[self, c], move |dy, sink| {
            if ec.wanted() {
                let mut dc = Buffer::f32(kept.len());
                device().few_frequencies_backward(&f, &x, &dy, &mut dc);
                sink.add(&ec, Tensor::new(kept.shape(), dc))?;
            }
            if ex.wanted() {
                let mut dx = Buffer::f32(x.len());
                device().few_frequencies(&f, true, &kept, &dy, &mut dx);
                sink.add(&ex, Tensor::new(x.shape(), dx))?;
            }
            Ok(())
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, close, sample};
    use std::f64::consts::TAU;

    #[test]
    fn transforms_are_the_sums_they_stand_for_and_differentiate() {
        for n in [1, 2, 3, 6, 7, 16] {
            let x = sample(&[2, 3, n], n as u64);
            let (v, y) = (x.to_vec().unwrap(), x.rfft().unwrap());
            assert_eq!(y.shape(), [2, 3, n / 2 + 1, 2]);
            for (row, half) in v.chunks(n).zip(y.to_vec().unwrap().chunks(2 * (n / 2 + 1))) {
                for (k, found) in half.chunks(2).enumerate() {
                    let sum = |f: fn(f64) -> f64| -> f64 {
                        let angle = |p: usize| -TAU * (k * p) as f64 / n as f64;
                        row.iter().enumerate().map(|(p, &x)| f64::from(x) * f(angle(p))).sum()
                    };
                    assert!((f64::from(found[0]) - sum(f64::cos)).abs() < 1e-5);
                    assert!((f64::from(found[1]) - sum(f64::sin)).abs() < 1e-5);
                }
            }
            close(&y.irfft(n).unwrap(), &x, 1e-6);
            check_gradients(&[x], |v| v[0].rfft()).unwrap();
            check_gradients(&[sample(&[2, n / 2 + 1, 2], 9)], |v| v[0].irfft(n)).unwrap();
        }
        assert!(sample(&[2, 4, 2], 1).irfft(5).is_err() && sample(&[4], 1).irfft(6).is_err());
    }

    #[test]
    fn few_frequencies_are_the_product_with_the_matrix() {
        let places = [(0, 0), (3, 2), (1, 4), (5, 0), (5, 4), (2, 3), (0, 1), (3, 0)];
        for (out, inn) in [(6, 5), (7, 8), (6, 6)] {
            let f = Frequencies::new(out, inn, &places).unwrap();
            let (x, c) = (sample(&[2, 3, inn], 1), sample(&[places.len()], 2));
            let coefficients = c.to_vec().unwrap();
            let mut m = Vec::new();
            for o in 0..out {
                for i in 0..inn {
                    let angle = |(u, v): (usize, usize)| {
                        TAU * ((u * o) as f64 / out as f64 + (v * i) as f64 / inn as f64)
                    };
                    let parts = places.iter().zip(&coefficients);
                    m.push(parts.map(|(&p, &c)| f64::from(c) * angle(p).cos()).sum::<f64>() as f32);
                }
            }
            let m = Tensor::from_vec(m, [out, inn]).unwrap();
            close(&x.few_frequencies(&c, &f).unwrap(), &x.matmul_t(&m).unwrap(), 1e-5);
            check_gradients(&[x, c], |v| v[0].few_frequencies(&v[1], &f)).unwrap();
        }
        assert!(Frequencies::new(3, 3, &[(3, 0)]).is_err());
    }
}
