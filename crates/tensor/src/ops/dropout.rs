//! Dropout drawn from counters: backward and a recomputed block see the same mask without storing it.

use crate::device::{Buffer, device};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

impl Tensor {
    /// x·keep/(1 − p), each element kept with probability 1 − p; the draw is a function of (seed, stream, element). Where p is 1
    /// nothing is kept, and everything is zero.
    pub fn dropout(&self, p: f32, seed: u64, stream: u64) -> Result<Tensor> {
        self.expect_f32("dropout")?;
        if !(0.0..=1.0).contains(&p) {
            return Err(Error::Value { op: "dropout", message: format!("probability {p} is outside 0..1") });
        }
        if p == 0.0 {
            return Ok(self.clone());
        }
        let mut y = Buffer::f32(self.len());
        device().dropout(p, seed, stream, self, &mut y);
        let edge = self.edge();
        Ok(Tensor::new(self.shape(), y)
            .on_tape("dropout", &[self], move |dy, sink| sink.add(&edge, dy.dropout(p, seed, stream)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, sample};

    #[test]
    fn keeps_the_share_and_the_mean() {
        let x = Tensor::full(1.0, [20_000]);
        let y = x.dropout(0.25, 7, 3).unwrap().to_vec().unwrap();
        let kept = y.iter().filter(|&&v| v != 0.0).count() as f32 / y.len() as f32;
        assert!((kept - 0.75).abs() < 0.01, "{kept}");
        assert!(y.iter().all(|&v| v == 0.0 || (v - 1.0 / 0.75).abs() < 1e-6));
        assert_eq!(y, x.dropout(0.25, 7, 3).unwrap().to_vec().unwrap());
        assert_ne!(y, x.dropout(0.25, 7, 4).unwrap().to_vec().unwrap());
        check_gradients(&[sample(&[4, 9], 1)], |v| v[0].dropout(0.5, 1, 2)).unwrap();
        assert!(x.dropout(1.1, 0, 0).is_err());
    }

    #[test]
    fn nothing_is_kept_where_everything_is_dropped() {
        let x = Tensor::from_vec(vec![1.0, f32::INFINITY, f32::NAN], [3]).unwrap();
        assert_eq!(x.dropout(1.0, 7, 3).unwrap().to_vec().unwrap(), [0.0; 3]);
        check_gradients(&[sample(&[4, 9], 1)], |v| v[0].dropout(1.0, 1, 2)).unwrap();
    }
}
