//! Run-time choice of the vector instructions: one body of plain Rust, compiled once for each level.
//!
//! A kernel is written as `#[inline(always)] fn body<const LANES: usize>(…)` in ordinary loops, and
//! `dispatch! { fn kernel(…) = body; }` makes the function that runs the copy compiled for the widest instructions of
//! this machine. `LANES` is the number of f32 in a vector of the level; `fma` rounds once where the level can.

use std::sync::OnceLock;

/// The vector instructions a kernel may use, narrowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every processor of the target has (SSE2 on x86-64, NEON on AArch64).
    Portable,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// 512-bit vectors.
    Avx512,
}

/// The level every kernel of this process runs at: the widest the processor has.
///
/// A test binary runs at a lower one when `ENGRAFT_CPU` is `portable` or `avx2`; packed products also know `avx512`,
/// `avx512-bf16` and `amx-bf16` (`gemm::isa`), which are one level here.
#[inline]
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        #[cfg(test)]
        match std::env::var("ENGRAFT_CPU").as_deref() {
            Ok("portable") => return Level::Portable,
            Ok("avx2") => return detect().min(Level::Avx2),
            _ => {}
        }
        detect()
    })
}

fn detect() -> Level {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        let wide = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq");
        return if wide { Level::Avx512 } else { Level::Avx2 };
    }
    Level::Portable
}

/// `a·b + c`, rounded once where `LANES` says the level has the instruction, twice elsewhere.
///
/// Without the instruction `f32::mul_add` would be a call into the C library for every element.
#[inline(always)]
pub(crate) fn fma<const LANES: usize>(a: f32, b: f32, c: f32) -> f32 {
    if LANES > 4 || cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
}

/// Makes a function that runs its body at [`level`]: `dispatch! { pub fn name(x: &[f32]) -> f32 = body; }`.
macro_rules! dispatch {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $kind:ty),* $(,)?) $(-> $out:ty)? = $body:ident;)+) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $kind),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $kind),*) $(-> $out)? {
                    $body::<8>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn avx512($($arg: $kind),*) $(-> $out)? {
                    $body::<16>($($arg),*)
                }
                match $crate::cpu::simd::level() {
                    // SAFETY: `level` found these instructions on this processor.
                    $crate::cpu::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::cpu::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::simd::Level::Portable => {}
                }
            }
            $body::<4>($($arg),*)
        }
    )+};
}
pub(crate) use dispatch;

/// Elements in one parallel part of an elementwise kernel: large enough to hide the hand-over, small enough for the cache.
pub(crate) const PART: usize = 16 * 1024;

/// The sum of sixteen partial sums, always paired the same way.
///
/// `black_box` hides the pairs from the loop that made the partial sums: for their sake the compiler would cut that loop
/// into vectors of two. The halves have fixed lengths because a loop over lengths would stay one of single additions.
#[inline(always)]
pub(crate) fn sum16(lanes: [f32; 16]) -> f32 {
    let lanes = std::hint::black_box(lanes);
    let eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// `Σ f(aᵢ, bᵢ)` in sixteen partial sums, which vectorise and lose less than one running sum.
#[inline(always)]
pub(crate) fn sum_pairs(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a, b) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(&x, &y)| f(x, y)).sum();
    for (a, b) in a.zip(b) {
        for i in 0..16 {
            lanes[i] += f(a[i], b[i]);
        }
    }
    sum16(lanes) + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(always)]
    fn dot_body<const LANES: usize>(a: &[f32], b: &[f32]) -> (usize, f32) {
        (LANES, sum_pairs(a, b, |x, y| x * y))
    }
    dispatch! { fn dot(a: &[f32], b: &[f32]) -> (usize, f32) = dot_body; }

    #[test]
    fn sixteen_are_summed_by_halves() {
        let lanes: [f32; 16] = std::array::from_fn(|i| (i as f32).exp());
        let mut halves = lanes;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                halves[i] += halves[i + half];
            }
        }
        assert_eq!(sum16(lanes), halves[0]);
    }

    #[test]
    fn dispatch_runs_the_copy_of_the_level() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        let lanes = match level() {
            Level::Portable => 4,
            Level::Avx2 => 8,
            Level::Avx512 => 16,
        };
        assert_eq!(dot(&a, &a), (lanes, (0..37).map(|i| (i * i) as f32).sum()));
    }
}
