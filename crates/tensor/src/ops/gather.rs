//! Picking rows, and adding rows where they came from.

use crate::device::{Buffer, device};
use crate::error::{Error, Result, shape_error};
use crate::frozen::FrozenTable;
use crate::tensor::{DType, Tensor};

/// An error unless every index lies in `0..rows`. Indices are made on the host, so this reads no device.
fn check_index(op: &'static str, index: &Tensor, rows: usize) -> Result<()> {
    if index.dtype() != DType::I64 {
        return Err(Error::DType { op, expected: "I64", found: index.dtype() });
    }
    match index.i64().iter().find(|&&i| i < 0 || i as usize >= rows) {
        Some(i) => Err(Error::Value { op, message: format!("index {i} is outside 0..{rows}") }),
        None => Ok(()),
    }
}

/// `y[index[i]] += x[i]`, on zeros unless it is to `accumulate`.
fn scatter(x: &Tensor, index: &Tensor, y: &mut Buffer, accumulate: bool) {
    if !accumulate {
        device().fill(0.0, y);
    }
    device().scatter_add_rows(x, index, y);
}

impl Tensor {
    /// `y[i] = x[index[i]]` along the first dimension; index `[n]` → y [n, …].
    pub fn gather(&self, index: &Tensor) -> Result<Tensor> {
        self.expect_f32("gather")?;
        if self.shape().is_empty() {
            return shape_error("gather", "at least one dimension", "a scalar");
        }
        check_index("gather", index, self.shape()[0])?;
        let mut shape = self.shape().to_vec();
        shape[0] = index.len();
        let mut y = Buffer::f32(shape.iter().product());
        device().gather_rows(self, index, &mut y);
        let (edge, rows, index) = (self.edge(), self.shape()[0], index.clone());
        Ok(Tensor::new(shape, y).on_tape("gather", &[self], move |dy, sink| {
            let mut shape = dy.shape().to_vec();
            shape[0] = rows;
            sink.grow(&edge, &shape, |dx, accumulate| scatter(&dy, &index, dx, accumulate))
        }))
    }

    /// `y[index[i]] += x[i]` on `rows` rows of zeros.
    pub fn scatter_add(&self, index: &Tensor, rows: usize) -> Result<Tensor> {
        self.expect_f32("scatter_add")?;
        check_index("scatter_add", index, rows)?;
        if self.shape().first() != Some(&index.len()) {
            return shape_error(
                "scatter_add",
                format!("{} rows", index.len()),
                format!("{:?}", self.shape()),
            );
        }
        let mut shape = self.shape().to_vec();
        shape[0] = rows;
        let mut y = Buffer::f32(shape.iter().product());
        scatter(self, index, &mut y, false);
        let (edge, index) = (self.edge(), index.clone());
        Ok(Tensor::new(shape, y)
            .on_tape("scatter_add", &[self], move |dy, sink| sink.add(&edge, dy.gather(&index)?)))
    }
}

/// Rows of a frozen table; ids `[n]` → [n, width]. No gradient goes to the table.
pub fn embed(table: &FrozenTable, ids: &Tensor) -> Result<Tensor> {
    check_index("embedding", ids, table.shape().0)?;
    let shape = [ids.len(), table.shape().1];
    let mut y = Buffer::f32(shape[0] * shape[1]);
    device().gather_frozen(table, ids, &mut y);
    Ok(Tensor::new(shape, y))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, sample};

    #[test]
    fn gather_and_scatter_are_each_others_gradient() {
        let index = Tensor::from_i64(vec![2, 0, 2, 1], [4]).unwrap();
        check_gradients(&[sample(&[3, 2], 1)], |v| v[0].gather(&index)).unwrap();
        check_gradients(&[sample(&[4, 2], 1)], |v| v[0].scatter_add(&index, 5)).unwrap();
        let x = sample(&[3, 2], 1);
        let (v, y) = (x.to_vec().unwrap(), x.gather(&index).unwrap().to_vec().unwrap());
        assert_eq!(y[..2], v[4..]);
        let message = x.gather(&Tensor::from_i64(vec![3], [1]).unwrap()).unwrap_err().to_string();
        assert!(message.contains("index 3 is outside 0..3"), "{message}");
    }
}
