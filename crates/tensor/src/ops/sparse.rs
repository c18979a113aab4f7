//! Products with sparse matrices: trained numbers at fixed places.

use std::sync::Arc;

use crate::device::{Buffer, Kernels, cpu};
use crate::error::{Error, Result, shape_error};
use crate::tensor::Tensor;

/// Places of a sparse matrix [out, in].
#[derive(Debug)]
pub struct Places {
    pub(crate) out: usize,
    pub(crate) inn: usize,
    pub(crate) rows: Vec<u32>,
    pub(crate) columns: Vec<u32>,
}

impl Places {
    /// Those at `places`, (row, column) each.
    pub fn new(out: usize, inn: usize, places: &[(usize, usize)]) -> Result<Arc<Places>> {
        if let Some((row, column)) = places.iter().find(|(row, column)| *row >= out || *column >= inn) {
            let message = format!("place {row}, {column} is outside [{out}, {inn}]");
            return Err(Error::Value { op: "places", message });
        }
        let (rows, columns) = places.iter().map(|&(row, column)| (row as u32, column as u32)).unzip();
        Ok(Arc::new(Places { out, inn, rows, columns }))
    }
}

impl Tensor {
    /// x·Mᵀ with M [out, in] holding `values` at the places, x [.., in] → [.., out]; places that occur twice add up. M is
    /// never formed, and nothing but x and the values is kept.
    pub fn sparse_product(&self, values: &Tensor, places: &Arc<Places>) -> Result<Tensor> {
        self.expect_f32("sparse product")?;
        values.expect_f32("sparse product")?;
        values.expect_shape("sparse product", &[places.rows.len()])?;
        if self.shape().is_empty() || self.width() != places.inn {
            return shape_error(
                "sparse product",
                format!("[.., {}]", places.inn),
                format!("{:?}", self.shape()),
            );
        }
        let mut shape = self.shape().to_vec();
        *shape.last_mut().expect("has a width") = places.out;
        let mut y = Buffer::f32(shape.iter().product());
        cpu().sparse_product(places, false, values, self, &mut y);
        let (ex, ev) = (self.edge(), values.edge());
        let (x, kept, places) = (self.detach(), values.detach(), places.clone());
        Ok(Tensor::new(shape, y).on_tape("sparse product", &[self, values], move |dy, sink| {
            if ev.wanted() {
                let mut dv = Buffer::f32(kept.len());
                cpu().sparse_product_backward(&places, &x, &dy, &mut dv);
                sink.add(&ev, Tensor::new(kept.shape(), dv))?;
            }
            if ex.wanted() {
                let mut dx = Buffer::f32(x.len());
                cpu().sparse_product(&places, true, &kept, &dy, &mut dx);
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

    #[test]
    fn is_the_product_with_the_full_matrix() {
        let at = [(0, 4), (2, 1), (2, 1), (1, 0), (3, 4)];
        let places = Places::new(4, 5, &at).unwrap();
        let (x, v) = (sample(&[2, 40, 5], 1), sample(&[5], 2));
        let mut full = vec![0.0; 20];
        at.iter().zip(v.to_vec().unwrap()).for_each(|((row, column), v)| full[row * 5 + column] += v);
        let full = Tensor::from_vec(full, [4, 5]).unwrap();
        close(&x.sparse_product(&v, &places).unwrap(), &x.matmul_t(&full).unwrap(), 1e-6);
        check_gradients(&[sample(&[3, 5], 3), v], |v| v[0].sparse_product(&v[1], &places)).unwrap();
        assert!(
            Places::new(4, 5, &[(0, 5)]).is_err() && x.sparse_product(&sample(&[4], 1), &places).is_err()
        );
    }
}
