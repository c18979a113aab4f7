//! The lanes of AVX2 and AVX-512: each function is one or two instructions.
//!
//! Every function is inlined into a function of `isa.rs` that enables the instructions. That, and pointers good for
//! a whole register, is what the callers promise; the one `SAFETY` note of each `impl` holds for all its blocks.
#![allow(clippy::undocumented_unsafe_blocks)]

use std::arch::x86_64::*;

use super::lanes::{DotLanes, Lanes};
use super::tile::{Dot, Widened};

/// Eight lanes: AVX2 with FMA.
pub(in crate::cpu) struct Avx2;

// SAFETY: the processor has AVX2 and FMA, and pointers are good for 8 words (see `Lanes`).
impl Lanes for Avx2 {
    type V = __m256;
    type Bf16 = Widened<Self>;
    const WIDTH: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> __m256 {
        unsafe { _mm256_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u32, v: __m256) {
        unsafe { _mm256_storeu_ps(to.cast(), v) }
    }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> __m256 {
        unsafe { _mm256_broadcast_ss(&*from.cast()) }
    }
    #[inline(always)]
    unsafe fn fma(acc: __m256, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, acc) }
    }
    #[inline(always)]
    unsafe fn widen_even(from: *const u32) -> __m256 {
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn widen_odd(from: *const u32) -> __m256 {
        unsafe {
            _mm256_and_ps(_mm256_loadu_ps(from.cast()), _mm256_castsi256_ps(_mm256_set1_epi32(!0xffff)))
        }
    }
    #[inline(always)]
    unsafe fn zip(a: __m256, b: __m256) -> (__m256, __m256) {
        unsafe {
            let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            (_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high))
        }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u32) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}

/// Sixteen lanes: AVX-512 without the bf16 dot product.
pub(in crate::cpu) struct Avx512;

// SAFETY: the processor has AVX-512F, and pointers are good for 16 words (see `Lanes`).
impl Lanes for Avx512 {
    type V = __m512;
    type Bf16 = Widened<Self>;
    const WIDTH: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> __m512 {
        unsafe { _mm512_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u32, v: __m512) {
        unsafe { _mm512_storeu_ps(to.cast(), v) }
    }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> __m512 {
        unsafe { _mm512_set1_ps(from.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn fma(acc: __m512, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, acc) }
    }
    #[inline(always)]
    unsafe fn widen_even(from: *const u32) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn widen_odd(from: *const u32) -> __m512 {
        unsafe {
            let words = _mm512_loadu_si512(from.cast());
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(!0xffff)))
        }
    }
    #[inline(always)]
    unsafe fn zip(a: __m512, b: __m512) -> (__m512, __m512) {
        unsafe {
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            (_mm512_permutex2var_ps(a, low, b), _mm512_permutex2var_ps(a, high, b))
        }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u32) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}

/// Sixteen lanes: AVX-512 with the bf16 dot product; for f32 the same as [`Avx512`].
pub(super) struct Avx512Bf16;

// SAFETY: as for `Avx512`, to which everything but the dot product is passed on.
#[rustfmt::skip]
impl Lanes for Avx512Bf16 {
    type V = __m512;
    type Bf16 = Dot<Self>;
    const WIDTH: usize = 16;
    #[inline(always)]
    unsafe fn zero() -> __m512 { unsafe { Avx512::zero() } }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> __m512 { unsafe { Avx512::load(from) } }
    #[inline(always)]
    unsafe fn store(to: *mut u32, v: __m512) { unsafe { Avx512::store(to, v) } }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> __m512 { unsafe { Avx512::splat(from) } }
    #[inline(always)]
    unsafe fn fma(acc: __m512, a: __m512, b: __m512) -> __m512 { unsafe { Avx512::fma(acc, a, b) } }
    #[inline(always)]
    unsafe fn widen_even(from: *const u32) -> __m512 { unsafe { Avx512::widen_even(from) } }
    #[inline(always)]
    unsafe fn widen_odd(from: *const u32) -> __m512 { unsafe { Avx512::widen_odd(from) } }
    #[inline(always)]
    unsafe fn zip(a: __m512, b: __m512) -> (__m512, __m512) { unsafe { Avx512::zip(a, b) } }
    #[inline(always)]
    unsafe fn prefetch(at: *const u32) { unsafe { Avx512::prefetch(at) } }
}

// SAFETY: the processor has AVX512-BF16; a register of 16 words and one of 32 bf16 have the same 64 bytes.
impl DotLanes for Avx512Bf16 {
    #[inline(always)]
    unsafe fn dot(acc: __m512, a: __m512, b: __m512) -> __m512 {
        unsafe {
            let a = std::mem::transmute::<__m512, __m512bh>(a);
            let b = std::mem::transmute::<__m512, __m512bh>(b);
            _mm512_dpbf16_ps(acc, a, b)
        }
    }
}
