//! Elementwise functions of one tensor, and of two with broadcasting.

use crate::device::{Buffer, device};
use crate::error::{Error, Result, shape_error};
use crate::tensor::{DType, Shape, Tensor};

/// Functions of one number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unary {
    /// x·c.
    Scale(f32),
    /// x + c.
    Shift(f32),
    /// eˣ.
    Exp,
    /// sin x.
    Sin,
    /// cos x.
    Cos,
    /// ln x.
    Log,
    /// √x.
    Sqrt,
    /// 1/x.
    Recip,
    /// x².
    Square,
    /// |x|; derivative 0 at 0.
    Abs,
    /// max(x, 0).
    Relu,
    /// x/(1 + e⁻ˣ).
    Silu,
    /// x·Φ(x), exact.
    Gelu,
    /// The tanh approximation of GELU (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// x·σ(1.702 x).
    QuickGelu,
    /// 1/(1 + e⁻ˣ).
    Sigmoid,
    /// tanh x.
    Tanh,
    /// erf x.
    Erf,
    /// ln Γ(x), for x > 0.
    LnGamma,
    /// (ln Γ)′(x), for x > 0.
    Digamma,
}

/// Functions of two numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Binary {
    /// a + b.
    Add,
    /// a − b.
    Sub,
    /// a·b.
    Mul,
}

/// The shape both broadcast to (NumPy's rule), or an error.
pub(crate) fn broadcast(op: &'static str, a: &[usize], b: &[usize]) -> Result<Shape> {
    let rank = a.len().max(b.len());
    let at = |s: &[usize], i: usize| if i + s.len() >= rank { s[i + s.len() - rank] } else { 1 };
    let mut shape = Vec::with_capacity(rank);
    for i in 0..rank {
        match (at(a, i), at(b, i)) {
            (x, y) if x == y => shape.push(x),
            (1, y) => shape.push(y),
            (x, 1) => shape.push(x),
            _ => return shape_error(op, "shapes that broadcast", format!("{a:?} and {b:?}")),
        }
    }
    Ok(shape)
}

impl Tensor {
    /// f of every element.
    pub fn unary(&self, f: Unary) -> Result<Tensor> {
        self.expect_f32("unary")?;
        let mut y = Buffer::f32(self.len());
        device().unary(f, self, &mut y);
        let (edge, x) = (self.edge(), self.detach());
        Ok(Tensor::new(self.shape(), y).on_tape("unary", &[self], move |dy, sink| {
            let mut dx = Buffer::f32(x.len());
            device().unary_backward(f, &x, &dy, &mut dx);
            sink.add(&edge, Tensor::new(x.shape(), dx))
        }))
    }

    /// x·c.
    pub fn scale(&self, c: f32) -> Result<Tensor> {
        self.expect_f32("scale")?;
        let mut y = Buffer::f32(self.len());
        device().unary(Unary::Scale(c), self, &mut y);
        let edge = self.edge();
        // Nothing of x is needed, so nothing of it is kept.
        Ok(Tensor::new(self.shape(), y)
            .on_tape("scale", &[self], move |dy, sink| sink.add(&edge, dy.scale(c)?)))
    }

    /// a + b.
    pub fn add(&self, other: &Tensor) -> Result<Tensor> {
        let y = self.binary("add", Binary::Add, other)?;
        let (ea, eb) = (self.edge(), other.edge());
        let (sa, sb) = (self.shape().to_vec(), other.shape().to_vec());
        Ok(y.on_tape("add", &[self, other], move |dy, sink| {
            add_reduced(sink, &ea, &sa, &dy, None)?;
            add_reduced(sink, &eb, &sb, &dy, None)
        }))
    }

    /// a + b, in place where nobody else holds a and the sizes of b are the last ones of a.
    pub fn plus(mut self, other: &Tensor) -> Result<Tensor> {
        let repeats = self.shape().ends_with(other.shape()) && !other.is_empty();
        let in_place = repeats && other.dtype() == DType::F32 && self.dtype() == DType::F32;
        let Some(sum) = self.sole_buffer().filter(|_| in_place) else { return self.add(other) };
        device().accumulate(other, sum);
        let (ea, eb) = (self.edge(), other.edge());
        let (sa, sb) = (self.shape().to_vec(), other.shape().to_vec());
        let y = self.detach();
        Ok(y.on_tape("plus", &[&self, other], move |dy, sink| {
            add_reduced(sink, &ea, &sa, &dy, None)?;
            add_reduced(sink, &eb, &sb, &dy, None)
        }))
    }

    /// a − b.
    pub fn sub(&self, other: &Tensor) -> Result<Tensor> {
        let y = self.binary("sub", Binary::Sub, other)?;
        let (ea, eb) = (self.edge(), other.edge());
        let (sa, sb) = (self.shape().to_vec(), other.shape().to_vec());
        Ok(y.on_tape("sub", &[self, other], move |dy, sink| {
            add_reduced(sink, &ea, &sa, &dy, None)?;
            if eb.wanted() { add_reduced(sink, &eb, &sb, &dy.scale(-1.0)?, None) } else { Ok(()) }
        }))
    }

    /// a·b.
    pub fn mul(&self, other: &Tensor) -> Result<Tensor> {
        let y = self.binary("mul", Binary::Mul, other)?;
        let (ea, eb) = (self.edge(), other.edge());
        let (sa, sb) = (self.shape().to_vec(), other.shape().to_vec());
        // Each factor is kept only for the other's gradient.
        let a = eb.wanted().then(|| self.detach());
        let b = ea.wanted().then(|| other.detach());
        Ok(y.on_tape("mul", &[self, other], move |dy, sink| {
            if let Some(b) = b {
                add_reduced(sink, &ea, &sa, &dy, Some(&b))?;
            }
            if let Some(a) = a {
                add_reduced(sink, &eb, &sb, &dy, Some(&a))?;
            }
            Ok(())
        }))
    }

    /// a/b.
    pub fn div(&self, other: &Tensor) -> Result<Tensor> {
        self.mul(&other.unary(Unary::Recip)?)
    }

    fn binary(&self, op: &'static str, f: Binary, other: &Tensor) -> Result<Tensor> {
        self.expect_f32(op)?;
        other.expect_f32(op)?;
        let shape = broadcast(op, self.shape(), other.shape())?;
        let mut y = Buffer::f32(shape.iter().product());
        device().binary(f, self, other, &shape, &mut y);
        Ok(Tensor::new(shape, y))
    }

    /// An error unless `other` has this shape.
    pub fn expect_shape(&self, op: &'static str, shape: &[usize]) -> Result<()> {
        if self.shape() == shape {
            return Ok(());
        }
        Err(Error::Shape { op, expected: format!("{shape:?}"), found: format!("{:?}", self.shape()) })
    }
}

/// Sends dy (times `factor`), summed to `shape`, along `edge`.
fn add_reduced(
    sink: &mut crate::tape::Sink,
    edge: &crate::tape::Edge,
    shape: &[usize],
    dy: &Tensor,
    factor: Option<&Tensor>,
) -> Result<()> {
    if !edge.wanted() {
        return Ok(());
    }
    let full = match factor {
        Some(f) => dy.mul(f)?,
        None => dy.clone(),
    };
    sink.add(edge, full.sum_to(shape)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, sample};

    #[test]
    fn unary_gradients_are_finite_differences() {
        let x = sample(&[3, 5], 1).unary(Unary::Shift(0.03)).unwrap();
        let positive = x.unary(Unary::Square).unwrap().unary(Unary::Shift(0.5)).unwrap();
        use Unary::*;
        for f in [
            Scale(-1.5),
            Shift(2.0),
            Exp,
            Sin,
            Cos,
            Square,
            Relu,
            Silu,
            Gelu,
            GeluTanh,
            QuickGelu,
            Sigmoid,
            Tanh,
            Erf,
            Abs,
        ] {
            check_gradients(std::slice::from_ref(&x), |v| v[0].unary(f))
                .unwrap_or_else(|e| panic!("{f:?}: {e}"));
        }
        for f in [Log, Sqrt, Recip, LnGamma, Digamma] {
            check_gradients(std::slice::from_ref(&positive), |v| v[0].unary(f))
                .unwrap_or_else(|e| panic!("{f:?}: {e}"));
        }
    }

    #[test]
    fn in_place_or_not_a_sum_is_the_same() {
        for (a, b) in [(&[2, 3, 5][..], &[2, 3, 5][..]), (&[2, 3, 5], &[5]), (&[4, 1], &[3]), (&[3, 5], &[])]
        {
            let (a, b) = (sample(a, 1), sample(b, 2));
            let expected = a.add(&b).unwrap();
            let held = a.clone();
            let (first, second) = (a.clone().plus(&b).unwrap(), sample(a.shape(), 1).plus(&b).unwrap());
            for sum in [first, second] {
                assert_eq!(sum.shape(), expected.shape());
                assert_eq!(sum.to_vec().unwrap(), expected.to_vec().unwrap());
            }
            assert_eq!(held.to_vec().unwrap(), sample(a.shape(), 1).to_vec().unwrap());
            // The left side of `plus` is a result that nobody else holds, as in a residual stream.
            check_gradients(&[a, b], |v| v[0].scale(2.0)?.plus(&v[1])).unwrap();
        }
    }

    #[test]
    fn unary_values() {
        let x = Tensor::from_vec(vec![-2.0, -0.5, 0.0, 1.0, 3.0], [5]).unwrap();
        let expected = |f: Unary, v: [f32; 5]| {
            let y = x.unary(f).unwrap().to_vec().unwrap();
            for (a, b) in y.iter().zip(v) {
                assert!((a - b).abs() < 2e-6, "{f:?}: {y:?} instead of {v:?}");
            }
        };
        expected(Unary::Gelu, [-0.045_500_264, -0.154_268_77, 0.0, 0.841_344_7, 2.995_950_2]);
        expected(Unary::GeluTanh, [-0.045_402_31, -0.154_286, 0.0, 0.841_192, 2.996_362_7]);
        expected(Unary::Silu, [-0.238_405_85, -0.188_770_33, 0.0, 0.731_058_6, 2.857_722_3]);
        expected(Unary::Sigmoid, [0.119_202_92, 0.377_540_67, 0.5, 0.731_058_6, 0.952_574_1]);
    }

    #[test]
    fn binary_broadcasts_and_differentiates() {
        let shapes: [(&[usize], &[usize]); 6] = [
            (&[2, 3], &[2, 3]),
            (&[2, 3], &[3]),
            (&[2, 3], &[2, 1]),
            (&[4, 1, 3], &[2, 1]),
            (&[2, 3], &[]),
            (&[3], &[2, 3]),
        ];
        for (sa, sb) in shapes {
            let a = sample(sa, 2);
            let b = sample(sb, 3).unary(Unary::Square).unwrap().unary(Unary::Shift(0.4)).unwrap();
            let ops: [fn(&Tensor, &Tensor) -> Result<Tensor>; 4] =
                [Tensor::add, Tensor::sub, Tensor::mul, Tensor::div];
            for op in ops {
                check_gradients(&[a.clone(), b.clone()], |v| op(&v[0], &v[1])).unwrap();
            }
        }
        assert!(sample(&[2, 3], 1).add(&sample(&[2], 1)).is_err());
    }
}
