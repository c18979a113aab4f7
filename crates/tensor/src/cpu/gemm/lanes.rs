//! One vector register seen as lanes of f32, the few operations a tile needs on it, and the portable lanes.
//!
//! A weight panel is made of 32-bit words: an f32, or two bf16 of neighbouring k, the earlier one in the low half. A
//! bf16 is the upper half of an f32, hence widening the odd one is a mask and the even one a shift.

use super::tile::{Kernel, Widened};
use crate::cpu::simd::fma;

/// A vector register of f32 lanes.
///
/// # Safety of its functions
/// The processor has the instructions of the implementing type, and pointers are good for `WIDTH` words (`splat`: one).
pub(in crate::cpu) trait Lanes: 'static {
    /// The register.
    type V: Copy;
    /// The kernel that multiplies bf16 weights on these lanes.
    type Bf16: Kernel<L = Self>;
    /// Lanes in a register.
    const WIDTH: usize;

    /// All lanes zero.
    unsafe fn zero() -> Self::V;
    /// Reads `WIDTH` words, unaligned.
    unsafe fn load(from: *const u32) -> Self::V;
    /// Writes `WIDTH` words, unaligned.
    unsafe fn store(to: *mut u32, v: Self::V);
    /// One word in all lanes.
    unsafe fn splat(from: *const u32) -> Self::V;
    /// `a · b + acc` in each lane.
    unsafe fn fma(acc: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// The low (even k) bf16 of each word, as f32.
    unsafe fn widen_even(from: *const u32) -> Self::V;
    /// The high (odd k) bf16 of each word, as f32.
    unsafe fn widen_odd(from: *const u32) -> Self::V;
    /// `a0 b0 a1 b1 …` as two registers.
    unsafe fn zip(a: Self::V, b: Self::V) -> (Self::V, Self::V);
    /// Asks for the cache line at `at`, which need not exist, to be brought into the second-level cache.
    #[inline(always)]
    unsafe fn prefetch(_at: *const u32) {}
}

/// Lanes with a product of bf16 pairs.
pub(super) trait DotLanes: Lanes {
    /// `acc + a.low · b.low + a.high · b.high` in each lane, the words being pairs of bf16.
    unsafe fn dot(acc: Self::V, a: Self::V, b: Self::V) -> Self::V;
}

/// Lanes as an array, which the compiler maps to whatever the target has.
pub(in crate::cpu) struct Portable<const W: usize>;

impl<const W: usize> Lanes for Portable<W> {
    type V = [f32; W];
    type Bf16 = Widened<Self>;
    const WIDTH: usize = W;

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; W]
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> Self::V {
        // SAFETY: `from` is good for W words.
        unsafe { from.cast::<[f32; W]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u32, v: Self::V) {
        // SAFETY: `to` is good for W words.
        unsafe { to.cast::<[f32; W]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> Self::V {
        // SAFETY: `from` is good for one word.
        [f32::from_bits(unsafe { *from }); W]
    }
    #[inline(always)]
    unsafe fn fma(acc: Self::V, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| fma::<4>(a[i], b[i], acc[i]))
    }
    #[inline(always)]
    unsafe fn widen_even(from: *const u32) -> Self::V {
        // SAFETY: `from` is good for W words.
        let words = unsafe { from.cast::<[u32; W]>().read_unaligned() };
        words.map(|w| f32::from_bits(w << 16))
    }
    #[inline(always)]
    unsafe fn widen_odd(from: *const u32) -> Self::V {
        // SAFETY: `from` is good for W words.
        let words = unsafe { from.cast::<[u32; W]>().read_unaligned() };
        words.map(|w| f32::from_bits(w & 0xffff_0000))
    }
    #[inline(always)]
    unsafe fn zip(a: Self::V, b: Self::V) -> (Self::V, Self::V) {
        let pick = |i: usize| if i.is_multiple_of(2) { a[i / 2] } else { b[i / 2] };
        (std::array::from_fn(pick), std::array::from_fn(|i| pick(W + i)))
    }
}

/// Sixteen portable lanes with the bf16 dot product: the shape of AVX-512-BF16 for tests on any machine.
#[cfg(test)]
pub(super) struct Emulated512;

// SAFETY (every block): the caller's promise is passed on.
#[cfg(test)]
#[rustfmt::skip]
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Emulated512 {
    type V = [f32; 16];
    type Bf16 = super::tile::Dot<Self>;
    const WIDTH: usize = 16;
    unsafe fn zero() -> Self::V { unsafe { Portable::<16>::zero() } }
    unsafe fn load(from: *const u32) -> Self::V { unsafe { Portable::<16>::load(from) } }
    unsafe fn store(to: *mut u32, v: Self::V) { unsafe { Portable::<16>::store(to, v) } }
    unsafe fn splat(from: *const u32) -> Self::V { unsafe { Portable::<16>::splat(from) } }
    unsafe fn fma(acc: Self::V, a: Self::V, b: Self::V) -> Self::V { unsafe { Portable::<16>::fma(acc, a, b) } }
    unsafe fn widen_even(from: *const u32) -> Self::V { unsafe { Portable::<16>::widen_even(from) } }
    unsafe fn widen_odd(from: *const u32) -> Self::V { unsafe { Portable::<16>::widen_odd(from) } }
    unsafe fn zip(a: Self::V, b: Self::V) -> (Self::V, Self::V) { unsafe { Portable::<16>::zip(a, b) } }
}

#[cfg(test)]
impl DotLanes for Emulated512 {
    unsafe fn dot(acc: Self::V, a: Self::V, b: Self::V) -> Self::V {
        let low = |v: f32| f32::from_bits(v.to_bits() << 16);
        let high = |v: f32| f32::from_bits(v.to_bits() & 0xffff_0000);
        std::array::from_fn(|i| acc[i] + low(a[i]) * low(b[i]) + high(a[i]) * high(b[i]))
    }
}
