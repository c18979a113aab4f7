//! Elementary functions and activations in f32, written so that loops over them vectorise.
//!
//! `exp x = 2ⁿ·exp r`, `n = round(x/ln 2)`, `|r| ≤ ½ ln 2`; `tanh x = m/(m + 2)`, `m = exp(2x) − 1`;
//! `erf x = x·P(x²)` for `|x| < 1` and `1 − exp Q(|x|)` above. P, Q and the polynomial of exp are weighted minimax fits
//! made for this file. The errors named below were measured against f64 over a dense grid of arguments.

use crate::cpu::simd::{PART, dispatch, fma};
use rayon::prelude::*;

/// 1.5·2²³: adding it to a small f32 rounds that to an integer, found in the low bits.
const ROUND: f32 = 12_582_912.0;
const LN2_HIGH: f32 = 0.693_145_75;
const LN2_LOW: f32 = 1.428_606_8e-6;

/// The powers-of-two part and the remainder's `exp(r) − 1`: `exp x = 2ⁿ·(1 + q)`, given as `(2^⌊n/2⌋, 2^⌈n/2⌉, q)`.
///
/// Two factors, since 2ⁿ alone leaves the range of f32 where the result is subnormal or infinite.
#[inline(always)]
fn exp_parts<const L: usize>(x: f32) -> (f32, f32, f32) {
    // Comparisons written so that NaN passes through.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.5 { -104.5 } else { x };
    let shifted = fma::<L>(x, std::f32::consts::LOG2_E, ROUND);
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let whole = shifted - ROUND;
    let r = fma::<L>(whole, -LN2_LOW, fma::<L>(whole, -LN2_HIGH, x));
    let mut p = 0.001_395_06;
    for c in [0.008_368_954, 0.041_666_206, 0.166_665_18, 0.5] {
        p = fma::<L>(p, r, c);
    }
    let low = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    (power(low), power(n.wrapping_sub(low)), fma::<L>(r * r, p, r))
}

/// `exp x`; within 1.1 units in the last place, subnormal results included.
#[inline(always)]
pub(crate) fn exp<const L: usize>(x: f32) -> f32 {
    let (a, b, q) = exp_parts::<L>(x);
    (1.0 + q) * a * b
}

/// `tanh x`; within 2.2 units in the last place.
#[inline(always)]
pub(crate) fn tanh<const L: usize>(x: f32) -> f32 {
    let t = x.abs();
    // 1 − tanh(9.1) is below half a unit in the last place.
    let t = if t > 9.1 { 9.1 } else { t };
    let (a, b, q) = exp_parts::<L>(2.0 * t);
    let power = a * b;
    let m = fma::<L>(power, q, power - 1.0); // exp(2t) − 1
    (m / (m + 2.0)).copysign(x)
}

/// `erf x`; within 1.3 units in the last place.
#[inline(always)]
pub(crate) fn erf<const L: usize>(x: f32) -> f32 {
    let t = x.abs();
    let s = x * x;
    let mut small = 7.889_119e-5;
    for c in [-0.000_802_084_1, 0.005_189_535, -0.026_854_444, 0.112_836, -0.376_126_26, 0.128_379_17] {
        small = fma::<L>(small, s, c);
    }
    let small = fma::<L>(x, small, x);
    let u = if t > 4.0 { 4.0 } else { t };
    let mut large = 0.000_185_574_22;
    for c in [-0.002_939_609_3, 0.021_805_326, -0.103_037_39, -0.638_225_7, -1.127_04, -0.000_353_717] {
        large = fma::<L>(large, u, c);
    }
    let large = (1.0 - exp::<L>(large)).copysign(x);
    if t < 1.0 { small } else { large }
}

/// `1/(1 + exp(−x))`.
#[inline(always)]
pub(crate) fn sigmoid<const L: usize>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<L>(-x))
}

const SQRT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const INV_SQRT_2PI: f32 = 0.398_942_3;
const CUBIC: f32 = 0.044_715;
const QUICK: f32 = 1.702;

#[inline(always)]
fn gelu<const L: usize>(x: f32) -> f32 {
    0.5 * x * (1.0 + erf::<L>(x * SQRT_HALF))
}

#[inline(always)]
fn gelu_slope<const L: usize>(x: f32) -> f32 {
    let below = 0.5 * (1.0 + erf::<L>(x * SQRT_HALF)); // Φ(x)
    fma::<L>(x * INV_SQRT_2PI, exp::<L>(-0.5 * x * x), below)
}

/// `½(1 + tanh u) = sigmoid(2u)`, `u = √(2/π)(x + 0.044715x³)`: no cancellation where the tanh is near −1.
#[inline(always)]
fn gelu_tanh_gate<const L: usize>(x: f32) -> f32 {
    sigmoid::<L>(2.0 * SQRT_2_OVER_PI * x * (1.0 + CUBIC * x * x))
}

#[inline(always)]
fn gelu_tanh<const L: usize>(x: f32) -> f32 {
    x * gelu_tanh_gate::<L>(x)
}

#[inline(always)]
fn gelu_tanh_slope<const L: usize>(x: f32) -> f32 {
    let s = gelu_tanh_gate::<L>(x);
    let inner = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
    let bend = s * (1.0 - s);
    // The gate is flat long before x² overflows; the comparison keeps 0·∞ out.
    if bend == 0.0 { s } else { fma::<L>(x * inner, bend, s) }
}

#[inline(always)]
fn quick_gelu<const L: usize>(x: f32) -> f32 {
    x * sigmoid::<L>(QUICK * x)
}

#[inline(always)]
fn quick_gelu_slope<const L: usize>(x: f32) -> f32 {
    let s = sigmoid::<L>(QUICK * x);
    s * (1.0 + QUICK * x * (1.0 - s))
}

#[inline(always)]
fn silu<const L: usize>(x: f32) -> f32 {
    x * sigmoid::<L>(x)
}

#[inline(always)]
fn silu_slope<const L: usize>(x: f32) -> f32 {
    let s = sigmoid::<L>(x);
    s * (1.0 + x * (1.0 - s))
}

#[inline(always)]
fn relu(x: f32) -> f32 {
    // `max` would turn NaN into 0.
    if x < 0.0 { 0.0 } else { x }
}

#[inline(always)]
fn relu_slope(x: f32) -> f32 {
    if x > 0.0 { 1.0 } else { 0.0 }
}

/// An elementwise function with its derivative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unary {
    /// `exp x`.
    Exp,
    /// `erf x`.
    Erf,
    /// `tanh x`.
    Tanh,
    /// `1/(1 + exp(−x))`.
    Sigmoid,
    /// `max(x, 0)`.
    Relu,
    /// `x·sigmoid(x)`, also called swish.
    Silu,
    /// `x·Φ(x)`, by erf: `gelu` in transformers.
    Gelu,
    /// `½x(1 + tanh(√(2/π)(x + 0.044715x³)))`: `gelu_new`, `gelu_pytorch_tanh`.
    GeluTanh,
    /// `x·sigmoid(1.702x)`: `quick_gelu`.
    QuickGelu,
}

#[inline(always)]
fn map(x: &[f32], y: &mut [f32], f: impl Fn(f32) -> f32) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = f(x);
    }
}

#[inline(always)]
fn map_slope(x: &[f32], dy: &[f32], dx: &mut [f32], f: impl Fn(f32) -> f32) {
    for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
        *dx = dy * f(x);
    }
}

#[inline(always)]
fn forward_body<const L: usize>(kind: Unary, x: &[f32], y: &mut [f32]) {
    match kind {
        Unary::Exp => map(x, y, exp::<L>),
        Unary::Erf => map(x, y, erf::<L>),
        Unary::Tanh => map(x, y, tanh::<L>),
        Unary::Sigmoid => map(x, y, sigmoid::<L>),
        Unary::Relu => map(x, y, relu),
        Unary::Silu => map(x, y, silu::<L>),
        Unary::Gelu => map(x, y, gelu::<L>),
        Unary::GeluTanh => map(x, y, gelu_tanh::<L>),
        Unary::QuickGelu => map(x, y, quick_gelu::<L>),
    }
}

#[inline(always)]
fn backward_body<const L: usize>(kind: Unary, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    match kind {
        Unary::Exp => map_slope(x, dy, dx, exp::<L>),
        Unary::Erf => {
            map_slope(x, dy, dx, |x| std::f32::consts::FRAC_2_SQRT_PI * exp::<L>(-x * x));
        }
        Unary::Tanh => map_slope(x, dy, dx, |x| {
            let t = tanh::<L>(x);
            1.0 - t * t
        }),
        Unary::Sigmoid => map_slope(x, dy, dx, |x| {
            let s = sigmoid::<L>(x);
            s * (1.0 - s)
        }),
        Unary::Relu => map_slope(x, dy, dx, relu_slope),
        Unary::Silu => map_slope(x, dy, dx, silu_slope::<L>),
        Unary::Gelu => map_slope(x, dy, dx, gelu_slope::<L>),
        Unary::GeluTanh => map_slope(x, dy, dx, gelu_tanh_slope::<L>),
        Unary::QuickGelu => map_slope(x, dy, dx, quick_gelu_slope::<L>),
    }
}

#[inline(always)]
fn silu_mul_body<const L: usize>(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
        *y = silu::<L>(g) * u;
    }
}

#[inline(always)]
fn silu_mul_backward_body<const L: usize>(
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    let given = gate.iter().zip(up).zip(dy);
    for ((dg, du), ((&g, &u), &dy)) in dgate.iter_mut().zip(dup).zip(given) {
        let s = sigmoid::<L>(g);
        *dg = dy * u * (s * (1.0 + g * (1.0 - s)));
        *du = dy * (g * s);
    }
}

dispatch! {
    fn forward_part(kind: Unary, x: &[f32], y: &mut [f32]) = forward_body;
    fn backward_part(kind: Unary, x: &[f32], dy: &[f32], dx: &mut [f32]) = backward_body;
    fn silu_mul_part(gate: &[f32], up: &[f32], y: &mut [f32]) = silu_mul_body;
    fn silu_mul_backward_part(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32])
        = silu_mul_backward_body;
}

/// `y = f(x)`, element by element. Panics when the lengths differ.
pub fn forward(kind: Unary, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "{kind:?}: x and y differ in length");
    y.par_chunks_mut(PART).zip(x.par_chunks(PART)).for_each(|(y, x)| forward_part(kind, x, y));
}

/// `dx = dy·f′(x)`, element by element. Panics when the lengths differ.
pub fn backward(kind: Unary, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    assert!(x.len() == dx.len() && dy.len() == dx.len(), "{kind:?}: x, dy and dx differ in length");
    let given = x.par_chunks(PART).zip(dy.par_chunks(PART));
    dx.par_chunks_mut(PART).zip(given).for_each(|(dx, (x, dy))| backward_part(kind, x, dy, dx));
}

/// `y = silu(gate)·up`, the gated MLP's product. Panics when the lengths differ.
pub fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == y.len() && up.len() == y.len(), "silu_mul: gate, up and y differ in length");
    let given = gate.par_chunks(PART).zip(up.par_chunks(PART));
    y.par_chunks_mut(PART).zip(given).for_each(|(y, (gate, up))| silu_mul_part(gate, up, y));
}

/// `dgate = dy·up·silu′(gate)`, `dup = dy·silu(gate)`. Panics when the lengths differ.
pub fn silu_mul_backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    let length = dy.len();
    assert!(
        [gate.len(), up.len(), dgate.len(), dup.len()] == [length; 4],
        "silu_mul_backward: the slices differ in length"
    );
    let given = gate.par_chunks(PART).zip(up.par_chunks(PART)).zip(dy.par_chunks(PART));
    let made = dgate.par_chunks_mut(PART).zip(dup.par_chunks_mut(PART));
    made.zip(given).for_each(|((dg, du), ((g, u), dy))| silu_mul_backward_part(g, u, dy, dg, du));
}

#[cfg(test)]
mod tests;
