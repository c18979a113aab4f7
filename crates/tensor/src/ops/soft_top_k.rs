//! The soft choice of some of many, whose shares have a gradient (CoDA, Lei et al. 2023, arXiv:2304.04947).

use crate::device::{Buffer, device};
use crate::error::{Result, shape_error};
use crate::tensor::Tensor;

/// How the temperature ε of the choice falls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Anneal {
    /// Number of iterations.
    pub iterations: usize,
    /// ε of the first.
    pub first: f32,
    /// Factor from one to the next.
    pub decay: f32,
    /// ε does not fall below this.
    pub least: f32,
}

impl Tensor {
    /// Scores `[n]`, cut into segments of (length, k) → shares in (0, 1] `[n]` that add up to about k in each segment, and the
    /// places of the k largest of each, ascending.
    ///
    /// The places are numbers on the host: on which rows a block runs is the shape of its work.
    pub fn soft_top_k(&self, segments: &[(usize, usize)], anneal: Anneal) -> Result<(Tensor, Vec<i64>)> {
        self.expect_f32("soft top k")?;
        let total: usize = segments.iter().map(|(n, _)| n).sum();
        if self.shape() != [total] || segments.iter().any(|&(n, k)| k == 0 || k > n) {
            return shape_error(
                "soft top k",
                format!("[{total}] in segments of at least k"),
                format!("{:?}", self.shape()),
            );
        }
        let mut y = Buffer::f32(total);
        device().soft_top_k(self, segments, &anneal, &mut y);
        let y = Tensor::new([total], y);
        let chosen = device().largest_places(self, segments);
        let (edge, scores, segments) = (self.edge(), self.detach(), segments.to_vec());
        let y = y.on_tape("soft top k", &[self], move |dy, sink| {
            let mut ds = Buffer::f32(scores.len());
            device().soft_top_k_backward(&scores, &segments, &anneal, &dy, &mut ds);
            sink.add(&edge, Tensor::new(scores.shape(), ds))
        });
        Ok((y, chosen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, sample};

    const SLOW: Anneal = Anneal { iterations: 20, first: 4.0, decay: 0.7, least: 0.5 };

    #[test]
    fn shares_add_up_and_the_largest_are_found() {
        let s = sample(&[12], 3).scale(2.0).unwrap();
        let (y, chosen) = s.soft_top_k(&[(7, 3), (5, 2)], SLOW).unwrap();
        let y = y.to_vec().unwrap();
        assert!(y.iter().all(|&v| v > 0.0 && v <= 1.0));
        for (part, k) in [(&y[..7], 3.0), (&y[7..], 2.0)] {
            assert!((part.iter().sum::<f32>() - k).abs() < 0.05 * k, "{part:?}");
        }
        let s = s.to_vec().unwrap();
        assert_eq!(chosen.len(), 5);
        let least = chosen[..3].iter().map(|&i| s[i as usize]).fold(f32::MAX, f32::min);
        assert!((0..7).filter(|i| !chosen.contains(i)).all(|i| s[i as usize] <= least));
        let whole = sample(&[4], 1).soft_top_k(&[(4, 4)], SLOW).unwrap().0.to_vec().unwrap();
        assert!(whole.iter().all(|&v| (v - 1.0).abs() < 1e-2), "{whole:?}");
        assert!(sample(&[4], 1).soft_top_k(&[(4, 5)], SLOW).is_err());
    }

    #[test]
    fn gradients_equal_differences() {
        for least in [0.3, 1.0] {
            let anneal = Anneal { least, ..SLOW };
            let f = |v: &[Tensor]| Ok(v[0].soft_top_k(&[(6, 2), (3, 1)], anneal)?.0);
            check_gradients(&[sample(&[9], 5)], f).unwrap();
        }
    }
}
