//! Reordering, cutting and joining.

use crate::device::{Buffer, device};
use crate::error::{Result, shape_error};
use crate::tensor::Tensor;

impl Tensor {
    /// Dimensions in the order `order`.
    pub fn permute(&self, order: &[usize]) -> Result<Tensor> {
        let mut seen = order.to_vec();
        seen.sort_unstable();
        if seen != (0..self.shape().len()).collect::<Vec<_>>() {
            return shape_error(
                "permute",
                format!("an order of {} dimensions", self.shape().len()),
                format!("{order:?}"),
            );
        }
        self.expect_f32("permute")?;
        let shape: Vec<usize> = order.iter().map(|&d| self.shape()[d]).collect();
        let mut y = Buffer::f32(self.len());
        device().permute(self, order, &mut y);
        let edge = self.edge();
        let mut inverse = vec![0; order.len()];
        for (to, &from) in order.iter().enumerate() {
            inverse[from] = to;
        }
        Ok(Tensor::new(shape, y)
            .on_tape("permute", &[self], move |dy, sink| sink.add(&edge, dy.permute(&inverse)?)))
    }

    /// The transpose of a matrix.
    pub fn t(&self) -> Result<Tensor> {
        self.permute(&[1, 0])
    }

    /// `len` slices of dimension `dim` from `start` on.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Tensor> {
        if dim >= self.shape().len() || start + len > self.shape()[dim] {
            return shape_error(
                "narrow",
                format!("inside {:?}", self.shape()),
                format!("{start}+{len} of dimension {dim}"),
            );
        }
        if dim == 0 {
            return self.rows_between(start, start + len);
        }
        self.expect_f32("narrow")?;
        let inner: usize = self.shape()[dim + 1..].iter().product();
        let total = self.shape()[dim] * inner;
        let mut shape = self.shape().to_vec();
        shape[dim] = len;
        let mut y = Buffer::f32(shape.iter().product());
        device().take_columns(self, total, start * inner, len * inner, &mut y);
        let (edge, before) = (self.edge(), self.shape().to_vec());
        Ok(Tensor::new(shape, y).on_tape("narrow", &[self], move |dy, sink| {
            let mut dx = Buffer::f32(before.iter().product());
            device().fill(0.0, &mut dx);
            device().put_columns(&dy, len * inner, &mut dx, total, start * inner);
            sink.add(&edge, Tensor::new(before, dx))
        }))
    }
}

impl Tensor {
    /// Overwrites rows from `at` on with `rows`, in place unless the storage is shared (caches).
    pub fn write_rows(&mut self, at: usize, rows: &Tensor) -> Result<()> {
        self.expect_f32("write_rows")?;
        rows.expect_f32("write_rows")?;
        let fits = self.shape().len() == rows.shape().len() && self.shape().get(1..) == rows.shape().get(1..);
        if !fits || at + rows.dim(0) > self.dim(0) {
            return shape_error(
                "write_rows",
                format!("rows inside {:?}", self.shape()),
                format!("{:?} at {at}", rows.shape()),
            );
        }
        let width: usize = self.shape()[1..].iter().product();
        device().copy_block(rows, self.own(), at * width);
        Ok(())
    }

    /// The buffer of this tensor, copied first if it is shared.
    pub(crate) fn own(&mut self) -> &mut Buffer {
        if self.sole_buffer().is_none() {
            let mut copy = Buffer::f32(self.len());
            device().copy_block(self, &mut copy, 0);
            *self = Tensor::new(self.shape(), copy);
        }
        self.sole_buffer().expect("just became the only holder")
    }
}

/// Joins tensors along dimension `dim`; the other dimensions must agree.
pub fn cat(parts: &[&Tensor], dim: usize) -> Result<Tensor> {
    let Some(first) = parts.first() else {
        return shape_error("cat", "at least one tensor", "none");
    };
    if parts.len() == 1 {
        return Ok((*first).clone());
    }
    let mut shape = first.shape().to_vec();
    if dim >= shape.len() {
        return shape_error("cat", format!("a dimension of {shape:?}"), dim.to_string());
    }
    shape[dim] = 0;
    for part in parts {
        part.expect_f32("cat")?;
        let agrees = part.shape().len() == shape.len()
            && part.shape().iter().zip(first.shape()).enumerate().all(|(d, (a, b))| d == dim || a == b);
        if !agrees {
            return shape_error(
                "cat",
                format!("{:?} but for dimension {dim}", first.shape()),
                format!("{:?}", part.shape()),
            );
        }
        shape[dim] += part.shape()[dim];
    }
    let inner: usize = shape[dim + 1..].iter().product();
    let total = shape[dim] * inner;
    let mut y = Buffer::f32(shape.iter().product());
    let mut at = 0;
    let mut pieces = Vec::with_capacity(parts.len());
    for part in parts {
        let size = part.shape()[dim];
        device().put_columns(part, size * inner, &mut y, total, at * inner);
        pieces.push((part.edge(), at, size));
        at += size;
    }
    Ok(Tensor::new(shape, y).on_tape("cat", parts, move |dy, sink| {
        for (edge, at, size) in pieces {
            if edge.wanted() {
                sink.add(&edge, dy.narrow(dim, at, size)?)?;
            }
        }
        Ok(())
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, sample};

    #[test]
    fn permute_narrow_cat() {
        let x = sample(&[2, 3, 4], 7);
        let y = x.permute(&[2, 0, 1]).unwrap();
        assert_eq!(y.shape(), [4, 2, 3]);
        let (v, w) = (x.to_vec().unwrap(), y.to_vec().unwrap());
        assert_eq!(w[(3 * 2 + 1) * 3 + 2], v[(3 + 2) * 4 + 3]);
        check_gradients(std::slice::from_ref(&x), |v| v[0].permute(&[1, 2, 0])).unwrap();
        for (dim, start, len) in [(0, 1, 1), (1, 1, 2), (2, 0, 3)] {
            check_gradients(std::slice::from_ref(&x), |v| v[0].narrow(dim, start, len)).unwrap();
            let rest = x.shape()[dim] - start - len;
            let (a, b, c) = (
                x.narrow(dim, 0, start).unwrap(),
                x.narrow(dim, start, len).unwrap(),
                x.narrow(dim, start + len, rest).unwrap(),
            );
            assert_eq!(cat(&[&a, &b, &c], dim).unwrap().to_vec().unwrap(), v);
        }
        check_gradients(&[sample(&[2, 3], 1), sample(&[2, 2], 2)], |v| cat(&[&v[0], &v[1]], 1)).unwrap();
        check_gradients(&[sample(&[2, 3], 1), sample(&[1, 3], 2)], |v| cat(&[&v[0], &v[1], &v[0]], 0))
            .unwrap();
        assert!(x.permute(&[0, 0, 1]).is_err() && x.narrow(2, 3, 2).is_err() && cat(&[&x, &y], 0).is_err());
    }
}
