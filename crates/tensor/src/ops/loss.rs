//! Cross-entropy over rows.

use crate::device::{Buffer, device};
use crate::error::{Error, Result, shape_error};
use crate::tensor::{DType, Tensor};

/// The label of rows that have no loss.
pub const IGNORED: i64 = -100;

/// −log softmax of `logits[i]` at `labels[i]`, for every row; logits [rows, classes], labels `[rows]` → `[rows]`.
///
/// Rows labelled −100 give 0 and no gradient.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    logits.expect_f32("cross_entropy")?;
    if logits.shape().len() != 2 || labels.len() != logits.dim(0) {
        return shape_error(
            "cross_entropy",
            format!("[{}, classes]", labels.len()),
            format!("{:?}", logits.shape()),
        );
    }
    if labels.dtype() != DType::I64 {
        return Err(Error::DType { op: "cross_entropy", expected: "I64", found: labels.dtype() });
    }
    let classes = logits.dim(1);
    if let Some(bad) = labels.i64().iter().find(|&&l| l != IGNORED && (l < 0 || l as usize >= classes)) {
        let message =
            format!("label {bad} is outside 0..{classes} (and is not {IGNORED}, which marks no loss)");
        return Err(Error::Value { op: "cross_entropy", message });
    }
    let mut loss = Buffer::f32(labels.len());
    let mut lse = Buffer::f32(labels.len());
    device().cross_entropy(logits, labels, &mut loss, &mut lse);
    let lse = Tensor::new([labels.len()], lse);
    let (edge, mut kept, labels) = (logits.edge(), logits.detach(), labels.clone());
    Ok(Tensor::new([labels.len()], loss).on_tape("cross_entropy", &[logits], move |dy, sink| {
        // The gradient takes the place of the logits, the largest tensor of a step, where nobody else holds them.
        if kept.sole_buffer().is_none() {
            let mut copy = Buffer::f32(kept.len());
            device().copy_block(&kept, &mut copy, 0);
            kept = Tensor::new(kept.shape(), copy);
        }
        if let Some(x) = kept.sole_buffer() {
            device().cross_entropy_backward(x, &labels, &lse, &dy);
        }
        sink.add(&edge, kept)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Unary;
    use crate::testing::{check_gradients, sample};

    #[test]
    fn equals_its_composition() {
        let x = sample(&[4, 5], 1).scale(3.0).unwrap();
        let labels = Tensor::from_i64(vec![2, IGNORED, 0, 4], [4]).unwrap();
        let loss = cross_entropy(&x, &labels).unwrap().to_vec().unwrap();
        let logp = x.softmax().unwrap().unary(Unary::Log).unwrap().to_vec().unwrap();
        for (row, label) in [(0, 2), (2, 0), (3, 4)] {
            assert!((loss[row] + logp[row * 5 + label]).abs() < 1e-5);
        }
        assert_eq!(loss[1], 0.0);
        check_gradients(std::slice::from_ref(&x), |v| cross_entropy(&v[0], &labels)).unwrap();
        assert!(cross_entropy(&x, &Tensor::from_i64(vec![5, 0, 0, 0], [4]).unwrap()).is_err());
    }
}
