//! Dropout: `yᵢ = xᵢ·keepᵢ/(1 − p)`, where `keepᵢ` is a pure function of (seed, stream, i).
//!
//! Nothing is stored: the backward pass and a recomputed block make the same mask again. Since the map is linear and
//! diagonal, the gradient is the same function applied to dy.

use crate::cpu::random::Key;
use crate::cpu::simd::{PART, dispatch};
use rayon::prelude::*;

/// `y = x·mask/(1 − p)`, with the drop probability `0 ≤ p ≤ 1`; also the backward pass, from dy to dx.
///
/// Element `i` is kept when word `i` of the key's stream is at least `p·2³²`. Panics when the lengths differ or p is no
/// probability.
pub fn apply(x: &[f32], p: f32, key: Key, y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "dropout: x and y differ in length");
    let (threshold, scale) = rule(p);
    let parts = y.par_chunks_mut(PART).zip(x.par_chunks(PART)).enumerate();
    parts.for_each(|(part, (y, x))| {
        y.copy_from_slice(x);
        mask_part(y, (part * PART) as u64, threshold, scale, key);
    });
}

/// [`apply`] in place.
pub fn apply_in_place(x: &mut [f32], p: f32, key: Key) {
    let (threshold, scale) = rule(p);
    let parts = x.par_chunks_mut(PART).enumerate();
    parts.for_each(|(part, x)| mask_part(x, (part * PART) as u64, threshold, scale, key));
}

/// The smallest 32-bit word that keeps an element, as u64 since p = 1 keeps none; and `1/(1 − p)`.
fn rule(p: f32) -> (u64, f32) {
    assert!((0.0..=1.0).contains(&p), "dropout: the drop probability is {p}, expected 0 to 1");
    let threshold = (f64::from(p) * 4_294_967_296.0).round() as u64;
    (threshold, if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 })
}

#[inline(always)]
fn mask_body<const L: usize>(x: &mut [f32], first: u64, threshold: u64, scale: f32, key: Key) {
    let mut words = [0; 256];
    for (x, start) in x.chunks_mut(256).zip((first..).step_by(256)) {
        let words = &mut words[..x.len()];
        key.fill_bits(start, words);
        for (x, &word) in x.iter_mut().zip(&*words) {
            // A dropped NaN or infinity is dropped as well.
            *x = if u64::from(word) >= threshold { *x * scale } else { 0.0 };
        }
    }
}

dispatch! { fn mask_part(x: &mut [f32], first: u64, threshold: u64, scale: f32, key: Key) = mask_body; }

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key { seed: 9, stream: 4 };

    #[test]
    fn keeps_the_elements_that_the_words_say() {
        let x: Vec<f32> = (0..40_000).map(|i| i as f32 - 7.5).collect();
        let mut y = vec![0.0; x.len()];
        apply(&x, 0.25, KEY, &mut y);
        for i in 0..x.len() {
            let keep = f64::from(KEY.bits(i as u64)) / 4_294_967_296.0 >= 0.25;
            assert_eq!(y[i], if keep { x[i] * (1.0 / 0.75) } else { 0.0 }, "element {i}");
        }
        let kept = y.iter().filter(|&&y| y != 0.0).count();
        assert!(kept.abs_diff(30_000) < 400, "{kept} of 40000 kept, expected about 30000");
        let mut z = x;
        apply_in_place(&mut z, 0.25, KEY);
        assert_eq!(z, y);
    }

    #[test]
    fn the_ends_of_the_range() {
        let x = [1.0, f32::NAN, f32::INFINITY];
        let mut y = [0.0; 3];
        apply(&x, 0.0, KEY, &mut y);
        assert!(y[0] == 1.0 && y[1].is_nan() && y[2] == f32::INFINITY);
        apply(&x, 1.0, KEY, &mut y);
        assert_eq!(y, [0.0; 3]);
    }
}
