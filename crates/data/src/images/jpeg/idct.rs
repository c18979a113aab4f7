//! Coefficients to samples: the accurate integer transform of libjpeg (`jidctint.c`), after Loeffler, Ligtenberg and
//! Moschytz, "Practical fast 1-D DCT algorithms with 11 multiplications", ICASSP 1989.

use super::Component;

/// Bits after the point of the constants, and of what lies between the two passes.
const CONSTANT_BITS: u32 = 13;
const PASS_BITS: u32 = 2;

/// Transforms all blocks of a component; its coefficients, scaled by `steps`, make room for its samples.
pub(super) fn transform(component: &mut Component, steps: &[u16; 64]) {
    let width = component.blocks_wide * 8;
    let coefficients = std::mem::take(&mut component.coefficients);
    let mut samples = vec![0u8; width * component.blocks_high * 8];
    for (index, coefficients) in coefficients.chunks_exact(64).enumerate() {
        let corner = index / component.blocks_wide * 8 * width + index % component.blocks_wide * 8;
        let block = block(coefficients, steps);
        for (row, levels) in block.chunks_exact(8).enumerate() {
            samples[corner + row * width..][..8].copy_from_slice(levels);
        }
    }
    component.samples = samples;
}

fn block(coefficients: &[i16], steps: &[u16; 64]) -> [u8; 64] {
    let mut middle = [0i32; 64];
    for column in 0..8 {
        let value = |row: usize| {
            i32::from(coefficients[row * 8 + column]).wrapping_mul(steps[row * 8 + column].into())
        };
        let out = line(std::array::from_fn(value), CONSTANT_BITS - PASS_BITS);
        (0..8).for_each(|row| middle[row * 8 + column] = out[row]);
    }
    let mut levels = [0; 64];
    for (levels, row) in levels.chunks_exact_mut(8).zip(middle.chunks_exact(8)) {
        let out = line(std::array::from_fn(|column| row[column]), CONSTANT_BITS + PASS_BITS + 3);
        for (level, value) in levels.iter_mut().zip(out) {
            *level = value.saturating_add(128).clamp(0, 255) as u8;
        }
    }
    levels
}

/// Eight values through the one-dimensional transform, rounded down by `shift` bits.
///
/// Arithmetic wraps: damaged coefficients may be of any size, and then give any level.
fn line(c: [i32; 8], shift: u32) -> [i32; 8] {
    let mul = |a: i32, b: i32| a.wrapping_mul(b);
    let add = |a: i32, b: i32| a.wrapping_add(b);
    let sub = |a: i32, b: i32| a.wrapping_sub(b);
    // Even part. The numbers are √2 times sums of cosines, times 2^13.
    let z = mul(add(c[2], c[6]), 4433);
    let (even2, even3) = (add(z, mul(c[6], -15137)), add(z, mul(c[2], 6270)));
    let even0 = add(c[0], c[4]).wrapping_shl(CONSTANT_BITS);
    let even1 = sub(c[0], c[4]).wrapping_shl(CONSTANT_BITS);
    let even = [add(even0, even3), add(even1, even2), sub(even1, even2), sub(even0, even3)];
    // Odd part.
    let (z1, z2) = (mul(add(c[7], c[1]), -7373), mul(add(c[5], c[3]), -20995));
    let (z3, z4) = (add(c[7], c[3]), add(c[5], c[1]));
    let z5 = mul(add(z3, z4), 9633);
    let (z3, z4) = (add(mul(z3, -16069), z5), add(mul(z4, -3196), z5));
    let odd = [
        add(mul(c[1], 12299), add(z1, z4)),
        add(mul(c[3], 25172), add(z2, z3)),
        add(mul(c[5], 16819), add(z2, z4)),
        add(mul(c[7], 2446), add(z1, z3)),
    ];
    let round = |value: i32| add(value, 1 << (shift - 1)) >> shift;
    let mut out = [0; 8];
    for index in 0..4 {
        out[index] = round(add(even[index], odd[index]));
        out[7 - index] = round(sub(even[index], odd[index]));
    }
    out
}
