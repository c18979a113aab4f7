//! Rotary position embedding in the "rotate halves" form of `transformers`.
//!
//! Of each head's `dim` numbers the first `2·half` turn and the rest stay (partial rotary). With the angle's cosine c
//! and sine s at the token's position, for i < half:
//! `y[i] = x[i]·cᵢ − x[i + half]·sᵢ`, `y[i + half] = x[i + half]·cᵢ + x[i]·sᵢ` (Su et al. 2021, arXiv 2104.09864).
//! A rotation's gradient is the inverse rotation.

use crate::cpu::simd::dispatch;
use rayon::prelude::*;

/// Cosines and sines of the angles, both `[positions, half]`; any scaling is already in them.
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a> {
    /// Cosines, `[positions, half]`.
    pub cos: &'a [f32],
    /// Sines, `[positions, half]`.
    pub sin: &'a [f32],
    /// Half the number of rotated dimensions of a head.
    pub half: usize,
}

/// Which way to turn: forward for the values, inverse for their gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The rotation by the position's angle.
    Forward,
    /// The rotation back.
    Inverse,
}

/// Rotates `x` `[tokens, heads, dim]` in place, token t by its row `positions[t]` of the tables.
///
/// Panics when the lengths do not fit, `2·half > dim`, or a position lies outside the tables.
pub fn rotate_in_place(x: &mut [f32], heads: usize, positions: &[i32], tables: Tables, turn: Turn) {
    let width = check(x.len(), heads, positions, tables);
    if x.is_empty() || tables.half == 0 {
        return;
    }
    let rows = block_rows(width);
    x.par_chunks_mut(rows * width).zip(positions.par_chunks(rows)).for_each(|(x, positions)| {
        rotate_rows(x, heads, positions, tables, turn);
    });
}

/// [`rotate_in_place`] from `x` to `y`, both `[tokens, heads, dim]`.
pub fn rotate(x: &[f32], heads: usize, positions: &[i32], tables: Tables, turn: Turn, y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "rope: x and y differ in length");
    let width = check(x.len(), heads, positions, tables);
    if x.is_empty() {
        return;
    }
    let rows = block_rows(width);
    let given = x.par_chunks(rows * width).zip(positions.par_chunks(rows));
    y.par_chunks_mut(rows * width).zip(given).for_each(|(y, (x, positions))| {
        y.copy_from_slice(x);
        rotate_rows(y, heads, positions, tables, turn);
    });
}

fn block_rows(width: usize) -> usize {
    (crate::cpu::simd::PART / width.max(1)).max(1)
}

/// The width of a token's row, after checking that the lengths and positions fit.
fn check(length: usize, heads: usize, positions: &[i32], tables: Tables) -> usize {
    let tokens = positions.len();
    assert!(
        heads > 0 && length.is_multiple_of((tokens * heads).max(1)),
        "rope: x is not [tokens, heads, dim]"
    );
    assert_eq!(tables.cos.len(), tables.sin.len(), "rope: the tables differ in length");
    if tokens == 0 {
        assert_eq!(length, 0, "rope: x has rows without positions");
        return 0;
    }
    let width = length / tokens;
    assert!(2 * tables.half <= width / heads, "rope: {} angles do not fit a head", tables.half);
    let known = tables.cos.len() / tables.half.max(1);
    let inside = |&p: &i32| usize::try_from(p).is_ok_and(|p| p < known);
    assert!(
        tables.half == 0 || positions.iter().all(inside),
        "rope: a position lies outside the {known} of the tables"
    );
    width
}

#[inline(always)]
fn rotate_body<const L: usize>(x: &mut [f32], heads: usize, positions: &[i32], tables: Tables, turn: Turn) {
    let half = tables.half;
    let width = x.len() / positions.len();
    let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
    for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
        let cos = &tables.cos[position as usize * half..][..half];
        let sin = &tables.sin[position as usize * half..][..half];
        for head in row.chunks_exact_mut(width / heads) {
            let (low, high) = head.split_at_mut(half);
            for (((a, b), &c), &s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let (x, y, s) = (*a, *b, sign * s);
                *a = x * c - y * s;
                *b = y * c + x * s;
            }
        }
    }
}

dispatch! {
    fn rotate_rows(x: &mut [f32], heads: usize, positions: &[i32], tables: Tables, turn: Turn) = rotate_body;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(positions: usize, half: usize) -> (Vec<f32>, Vec<f32>) {
        let angle = |i: usize| (i / half) as f32 * 10f32.powf(-((i % half) as f32) / half as f32);
        (0..positions * half).map(angle).map(|a| (a.cos(), a.sin())).unzip()
    }

    #[test]
    fn rotates_pairs_and_leaves_the_rest() {
        let (heads, dim) = (3, 10);
        let positions = [4, 0, 11, 2];
        for half in [0, 1, 3, 5] {
            let (cos, sin) = tables(12, half.max(1));
            let tables = Tables { cos: &cos, sin: &sin, half };
            let x: Vec<f32> = (0..4 * heads * dim).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut y = vec![0.0; x.len()];
            rotate(&x, heads, &positions, tables, Turn::Forward, &mut y);
            for (i, &y) in y.iter().enumerate() {
                let (token, d) = (i / (heads * dim), i % dim);
                let (first, row) = (i - d, positions[token] as usize * half);
                let expected = match d {
                    d if d < half => x[i] * cos[row + d] - x[first + d + half] * sin[row + d],
                    d if d < 2 * half => x[i] * cos[row + d - half] + x[i - half] * sin[row + d - half],
                    _ => x[i],
                };
                assert!((y - expected).abs() < 1e-6, "half {half}, element {i}: {y}, expected {expected}");
            }
            rotate_in_place(&mut y, heads, &positions, tables, Turn::Inverse);
            assert!(y.iter().zip(&x).all(|(y, x)| (y - x).abs() < 1e-6), "half {half}: no way back");
        }
    }

    #[test]
    fn the_inverse_is_the_gradient() {
        // ⟨R x, dy⟩ = ⟨x, R⁻¹ dy⟩ for every x and dy says that R⁻¹ is the transpose, which a linear map's gradient is.
        let (cos, sin) = tables(9, 4);
        let tables = Tables { cos: &cos, sin: &sin, half: 4 };
        let x: Vec<f32> = (0..5 * 16).map(|i| (i as f32 * 0.7).cos()).collect();
        let dy: Vec<f32> = (0..5 * 16).map(|i| (i as f32 * 1.3).sin()).collect();
        let (mut y, mut dx) = (x.clone(), dy.clone());
        rotate_in_place(&mut y, 2, &[8, 1, 5, 3, 3], tables, Turn::Forward);
        rotate_in_place(&mut dx, 2, &[8, 1, 5, 3, 3], tables, Turn::Inverse);
        let dot =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        assert!((dot(&y, &dy) - dot(&x, &dx)).abs() < 1e-5);
    }

    #[test]
    #[should_panic(expected = "outside the 3 of the tables")]
    fn a_position_beyond_the_tables_is_refused() {
        let (cos, sin) = tables(3, 2);
        rotate_in_place(&mut [0.0; 4], 1, &[3], Tables { cos: &cos, sin: &sin, half: 2 }, Turn::Forward);
    }
}
