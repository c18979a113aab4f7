//! An NVIDIA card as a device. NVIDIA's libraries are loaded when a card is asked for; nothing of them is needed to build
//! or to run without one.
//!
//! `driver` holds the card, `compile` turns `kernels/*.cu` into its machine code, `gemm` asks cuBLASLt for products, and the
//! other files launch the kernels of the source of the same name.

mod attention;
mod attention_mma;
mod choice;
mod compile;
mod dense;
mod driver;
mod elementwise;
mod frozen;
mod gemm;
mod kernels;
mod probe;
mod profile;
mod rows;
mod sparse;
mod transforms;

use std::sync::OnceLock;

pub(crate) use driver::{Arg, Cuda, DeviceMemory};
pub(crate) use frozen::Matrix;

use crate::error::{Error, Result};

/// Where compiled kernels are kept between runs.
pub trait KernelCache: Send + Sync {
    /// What was written under `name`, whole, if anything was.
    fn read(&self, name: &str) -> Option<Vec<u8>>;
    /// Keeps `bytes` under `name`; a failure is no one's loss but time's.
    fn write(&self, name: &str, bytes: &[u8]);
}

static CARD: OnceLock<Cuda> = OnceLock::new();

/// Opens card `ordinal` for the whole process.
pub(crate) fn open(ordinal: usize, cache: Option<Box<dyn KernelCache>>) -> Result<()> {
    let failed = |message: String| Error::Device(message);
    let opened = Cuda::open(ordinal, cache).map_err(failed)?;
    CARD.set(opened).map_err(|_| failed("a card is in use already".into()))
}

/// The cards of this machine, or what is missing to use one.
pub(crate) fn describe() -> std::result::Result<Vec<String>, String> {
    probe::cards()
}

/// The card in use, if one is.
pub(crate) fn card() -> Option<&'static Cuda> {
    CARD.get()
}
