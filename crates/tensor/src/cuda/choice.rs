//! Launches of `kernels/choice.cu`: the soft choice of some of many.

use super::compile::Source;
use super::driver::{Arg, Cuda};
use crate::cpu::soft_top_k;
use crate::device::Buffer;
use crate::ops::Anneal;
use crate::tensor::Tensor;

/// Bytes that an iteration leaves.
const ITERATION: usize = 4 * size_of::<f64>();

impl Cuda {
    pub(super) fn soft_top_k(
        &self,
        s: &Tensor,
        segments: &[(usize, usize)],
        anneal: &Anneal,
        y: &mut Buffer,
    ) {
        let kept = self.upload(&places(segments));
        let [iterations, first, decay, least] = rule(anneal);
        let args = [s.arg(), kept.arg(), iterations, first, decay, least, y.arg()];
        let (grid, shared) = ([segments.len(), 1, 1], ITERATION * anneal.iterations);
        self.launch(Source::Choice, "soft_top_k", grid, [512, 1, 1], shared, &args);
    }

    pub(super) fn soft_top_k_backward(
        &self,
        s: &Tensor,
        segments: &[(usize, usize)],
        anneal: &Anneal,
        dy: &Tensor,
        ds: &mut Buffer,
    ) {
        let kept = self.upload(&places(segments));
        // Room for f64.
        let [db, sums] = [(); 2].map(|()| Buffer::f32(2 * s.len()));
        let [iterations, first, decay, least] = rule(anneal);
        let args =
            [s.arg(), kept.arg(), iterations, first, decay, least, dy.arg(), db.arg(), sums.arg(), ds.arg()];
        let (grid, shared) = ([segments.len(), 1, 1], ITERATION * anneal.iterations);
        self.launch(Source::Choice, "soft_top_k_backward", grid, [512, 1, 1], shared, &args);
    }

    /// Waits for the scores: the places are the shape of what comes next.
    pub(super) fn largest_places(&self, s: &Tensor, segments: &[(usize, usize)]) -> Vec<i64> {
        soft_top_k::largest(&s.host_f32(), segments)
    }
}

/// Iterations, first ε, decay and least ε.
fn rule(anneal: &Anneal) -> [Arg; 4] {
    let numbers = [anneal.first, anneal.decay, anneal.least].map(Arg::F32);
    [Arg::I32(anneal.iterations as i32), numbers[0], numbers[1], numbers[2]]
}

/// First place, length and k of each segment.
fn places(segments: &[(usize, usize)]) -> Vec<i64> {
    let mut first = 0;
    let place = |&(n, k): &(usize, usize)| {
        first += n;
        [first - n, n, k].map(|number| number as i64)
    };
    segments.iter().flat_map(place).collect()
}
