//! T5's relative positions (Raffel et al. 2020, arXiv:1910.10683, section 2.1): distances fall into buckets, one each for the
//! small ones and ever wider ones, by the logarithm, up to the farthest; a table gives each bucket a number a head.

use engraft_nn::{Embedding, Pass, SiteId, Sites};
use engraft_tensor::Tensor;
use engraft_tensor::ops::RelativeBias;

/// How distances fall into buckets.
#[derive(Clone, Copy)]
pub(crate) struct Buckets {
    /// Number of buckets.
    pub count: usize,
    /// Distances from here on share the last bucket.
    pub farthest: usize,
    /// Whether what comes later has buckets of its own; else it shares that of distance 0.
    pub both_ways: bool,
}

impl Buckets {
    /// The bucket of key position − query position. In f32, as the reference computes it.
    fn of(self, distance: i32) -> usize {
        let (count, first) = match self.both_ways {
            true => (self.count / 2, if distance > 0 { self.count / 2 } else { 0 }),
            false => (self.count, 0),
        };
        let away =
            if self.both_ways { distance.unsigned_abs() } else { distance.min(0).unsigned_abs() } as usize;
        let exact = count / 2;
        if away < exact {
            return first + away;
        }
        let reach = (self.farthest as f64 / exact as f64).ln() as f32;
        let steps = (away as f32 / exact as f32).ln() / reach * (count - exact) as f32;
        first + (exact + steps as usize).min(count - 1)
    }

    /// The bias of every distance between the rows of `cx` and those before them, at the keys and values `attended`: `table`
    /// [buckets, heads].
    pub fn bias(
        self,
        table: &Embedding,
        attended: SiteId,
        sites: &Sites,
        cx: &Pass,
    ) -> engraft_nn::Result<RelativeBias> {
        let last = cx.layout().positions().iter().copied().max().unwrap_or(0);
        let first = -last - cx.still_rows(attended) as i32;
        let widened = cx.widened(attended) as i32;
        let buckets: Vec<i64> = (first..=last).map(|distance| self.of(distance + widened) as i64).collect();
        let distances = buckets.len();
        let values = table.forward(&Tensor::from_i64(buckets, [distances])?, sites, cx)?;
        Ok(RelativeBias { values: values.t()?, first })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_distances_have_buckets_of_their_own_and_far_ones_share() {
        let both = Buckets { count: 32, farthest: 128, both_ways: true };
        let found: Vec<usize> =
            [0, -1, 1, -7, -8, 8, 11, 12, -127, -128, -4000, 4000].map(|d| both.of(d)).into();
        assert_eq!(found, [0, 1, 17, 7, 8, 24, 24, 25, 15, 15, 15, 31]);
        let back = Buckets { both_ways: false, ..both };
        let found: Vec<usize> = [0, 5, -1, -15, -16, -20, -127, -128].map(|d| back.of(d)).into();
        assert_eq!(found, [0, 0, 1, 15, 16, 17, 31, 31]);
    }
}
