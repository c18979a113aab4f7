//! The fast Walsh–Hadamard transform.

use rayon::prelude::*;

/// Numbers that one task transforms while they lie in the cache.
const PART: usize = 4096;

/// Rows of `n` numbers, `n` a power of two, in place: `y[i] = Σⱼ (−1)^(bits that i and j share)·x[j]`.
pub fn hadamard(y: &mut [f32], n: usize) {
    let part = n.min(PART);
    y.par_chunks_mut(part).for_each(|part| {
        let mut half = 1;
        while half < part.len() {
            for pair in part.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                butterflies(a, b);
            }
            half *= 2;
        }
    });
    let mut half = part;
    while half < n {
        for pair in y.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            a.par_chunks_mut(PART).zip(b.par_chunks_mut(PART)).for_each(|(a, b)| butterflies(a, b));
        }
        half *= 2;
    }
}

/// (a, b) → (a + b, a − b).
fn butterflies(a: &mut [f32], b: &mut [f32]) {
    for (a, b) in a.iter_mut().zip(b) {
        (*a, *b) = (*a + *b, *a - *b);
    }
}
