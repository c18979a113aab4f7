//! What one core could do at best: steps of the tile on operands that never leave the first cache. Products are measured
//! against it, since a share of the peak says more than a rate.

use std::time::Instant;

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::isa::{Task, dispatch, isa};
use super::lanes::Lanes;
use super::pack::{Precision, Words};
use super::tile::{Kernel, MR, Plain, RUN_WORDS};

/// Steps in a measured run: some tens of microseconds.
const STEPS: usize = 1 << 14;

/// The best rate of the tile's instructions on one core, in floating-point operations a second: the best of `tries` short
/// runs.
pub fn peak_flops(precision: Precision, tries: usize) -> f64 {
    let words = Words::zeroed(MR * RUN_WORDS);
    let mut best = 0.0;
    for _ in 0..tries {
        #[cfg(target_arch = "x86_64")]
        if isa() == super::Isa::AmxBf16 && precision == Precision::Bf16 {
            // SAFETY: only a set that is available is in use.
            best = f64::max(best, unsafe { amx::measure() });
            continue;
        }
        dispatch(isa(), Measure { precision, words: words.as_slice(), best: &mut best });
    }
    best
}

struct Measure<'a> {
    precision: Precision,
    words: &'a [u32],
    best: &'a mut f64,
}

impl Task for Measure<'_> {
    #[inline(always)]
    unsafe fn run<L: Lanes, const NV: usize>(self) {
        // SAFETY: the caller's promise about the processor.
        let rate = unsafe {
            match self.precision {
                Precision::Bf16 if !L::Bf16::WIDENS => measure::<L::Bf16, NV>(self.words),
                _ => measure::<Plain<L>, NV>(self.words),
            }
        };
        *self.best = self.best.max(rate);
    }
}

/// # Safety
/// The processor has the kernel's instructions.
#[inline(always)]
unsafe fn measure<K: Kernel, const NV: usize>(words: &[u32]) -> f64 {
    assert!(words.len() >= MR * RUN_WORDS && NV * K::L::WIDTH <= RUN_WORDS);
    // SAFETY: the caller's promise; the line above proves that `words` hold one step of either side.
    unsafe {
        let mut acc = [[K::L::zero(); NV]; MR];
        let start = Instant::now();
        for _ in 0..STEPS {
            K::step::<MR, MR, NV>(&mut acc, words.as_ptr(), words.as_ptr());
        }
        std::hint::black_box(acc);
        let seconds = start.elapsed().as_secs_f64();
        (2 * STEPS * K::STEP_K * MR * NV * K::L::WIDTH) as f64 / seconds
    }
}
