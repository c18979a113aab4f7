//! Which vector instructions the machine has, and how a piece of work is compiled once for each set of them.
//!
//! A [`Task`] is generic over [`Lanes`]; [`dispatch`] calls it inside a function that enables the instructions of one
//! [`Isa`], so that everything inlined into it is compiled for that set.

use std::sync::OnceLock;

use super::lanes::{Lanes, Portable};
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512, Avx512Bf16};

/// A set of vector instructions that the products are compiled for, the fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// AVX-512 with the bf16 tiles of AMX; for f32 the same as `Avx512`.
    AmxBf16,
    /// AVX-512 with the bf16 dot product: bf16 at twice the f32 rate or more.
    Avx512Bf16,
    /// AVX-512; bf16 weights are widened to f32 in registers.
    Avx512,
    /// AVX2 with FMA; bf16 weights are widened to f32 in registers.
    Avx2,
    /// Plain Rust for every processor, and the reference that the others are tested against.
    Portable,
    /// The tile of `Avx512Bf16` on emulated lanes, so that its logic is tested on machines without it.
    #[cfg(test)]
    Emulated512,
}

impl Isa {
    /// All sets that this machine can run, the fastest first; `Portable` is always the last.
    pub fn available() -> Vec<Isa> {
        [Isa::AmxBf16, Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Portable]
            .into_iter()
            .filter(|isa| isa.is_available())
            .collect()
    }

    /// Whether this machine can run the set.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::AmxBf16 => Isa::Avx512Bf16.is_available() && super::amx::is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && Isa::Avx2.is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::AmxBf16 | Isa::Avx512Bf16 | Isa::Avx512 | Isa::Avx2 => false,
            Isa::Portable => true,
            #[cfg(test)]
            Isa::Emulated512 => true,
        }
    }

    /// The name in reports: `amx-bf16`, `avx512-bf16`, `avx512`, `avx2`, `portable`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::AmxBf16 => "amx-bf16",
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Portable => "portable",
            #[cfg(test)]
            Isa::Emulated512 => "emulated512",
        }
    }

    /// Columns of one panel of packed weights: what one row of a tile keeps in registers.
    pub(super) fn panel_width(self) -> usize {
        match self {
            Isa::AmxBf16 | Isa::Avx512Bf16 | Isa::Avx512 => 64,
            Isa::Avx2 => 16,
            Isa::Portable => 8,
            #[cfg(test)]
            Isa::Emulated512 => 64,
        }
    }
}

static CHOSEN: OnceLock<Isa> = OnceLock::new();

/// The set that the process uses: the fastest available one, unless [`choose_isa`] came first. A test binary uses the one that
/// `ENGRAFT_CPU` names.
pub fn isa() -> Isa {
    *CHOSEN.get_or_init(|| {
        #[cfg(test)]
        if let Ok(name) = std::env::var("ENGRAFT_CPU") {
            return Isa::available()
                .into_iter()
                .find(|isa| isa.name() == name)
                .expect("ENGRAFT_CPU names a set of this machine");
        }
        Isa::available()[0]
    })
}

/// Makes the whole process use `isa`; to be called before the first weight is packed. Returns whether `isa` is now in
/// use: false when the machine lacks it or when another one was in use already.
pub fn choose_isa(isa: Isa) -> bool {
    isa.is_available() && *CHOSEN.get_or_init(|| isa) == isa
}

/// Work that is compiled once for each set of instructions. `run` must be `#[inline(always)]`.
pub(super) trait Task {
    /// Does the work with lanes `L`, `NV` vectors of them to a panel.
    ///
    /// # Safety
    /// The processor has the instructions of `L`.
    unsafe fn run<L: Lanes, const NV: usize>(self);
}

/// Runs `task` with the instructions of `isa`.
pub(super) fn dispatch(isa: Isa, task: impl Task) {
    assert!(isa.is_available(), "this machine has no {}; choose one of {:?}", isa.name(), Isa::available());
    // SAFETY: the line above proves that the processor has the instructions of `isa`; the portable lanes need none.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::AmxBf16 | Isa::Avx512Bf16 => run_avx512_bf16(task),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => run_avx512(task),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => run_avx2(task),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::AmxBf16 | Isa::Avx512Bf16 | Isa::Avx512 | Isa::Avx2 => unreachable!("refused above"),
            Isa::Portable => task.run::<Portable<4>, 2>(),
            #[cfg(test)]
            Isa::Emulated512 => task.run::<super::lanes::Emulated512, 4>(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")]
fn run_avx512_bf16(task: impl Task) {
    // SAFETY: this function can only be entered with the instructions it enables.
    unsafe { task.run::<Avx512Bf16, 4>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
fn run_avx512(task: impl Task) {
    // SAFETY: this function can only be entered with the instructions it enables.
    unsafe { task.run::<Avx512, 4>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2(task: impl Task) {
    // SAFETY: this function can only be entered with the instructions it enables.
    unsafe { task.run::<Avx2, 2>() }
}
