//! What the race runs on, and what a card multiplies at best.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use engraft_tensor::device::{self, Device};
use engraft_tensor::frozen::{FrozenMatrix, Precision};
use engraft_tensor::{Tensor, no_grad, ops};

use super::work::{CARD_WORKS, WORKS, Work};

/// The processor or an NVIDIA card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum On {
    Cpu,
    Cuda,
}

impl On {
    pub fn name(self) -> &'static str {
        match self {
            On::Cpu => "cpu",
            On::Cuda => "cuda",
        }
    }

    pub fn works(self) -> &'static [Work] {
        match self {
            On::Cpu => WORKS,
            On::Cuda => CARD_WORKS,
        }
    }

    /// Makes this process compute there.
    pub fn choose(self) -> Result<()> {
        let device = match self {
            On::Cpu => Device::Cpu,
            On::Cuda => Device::Cuda(0),
        };
        Ok(device::choose(device, None)?)
    }

    /// The most memory that this process has held: its own, or the card's.
    pub fn peak_bytes(self) -> usize {
        match self {
            On::Cpu => engraft_store::process::peak_memory_bytes().unwrap_or(0) as usize,
            On::Cuda => engraft_tensor::memory::peak_bytes(),
        }
    }
}

/// GFLOP/s of a product of matrices of 8,192 rows and columns, f32 and bf16, in this process: the best of several.
pub fn peak() -> Result<(f64, f64)> {
    On::Cuda.choose()?;
    let best = |precision, n: usize| -> Result<f64> {
        let values = |seed: usize| (0..n * n).map(move |i| ((i * 7919 + seed) % 2039) as f32 / 1019.5 - 1.0);
        let x = Tensor::from_vec(values(1).collect(), [n, n])?;
        let w = Tensor::from_vec(values(2).collect(), [n, n])?;
        let w = Arc::new(FrozenMatrix::from_dense(&w, precision)?);
        let mut seconds = f64::INFINITY;
        for _ in 0..5 {
            let started = Instant::now();
            for _ in 0..10 {
                no_grad(|| ops::frozen_linear(&x, &w, None))?;
            }
            device::wait()?;
            seconds = seconds.min(started.elapsed().as_secs_f64() / 10.0);
        }
        Ok(2.0 * (n as f64).powi(3) / seconds / 1e9)
    };
    let peaks = (best(Precision::F32, 4096)?, best(Precision::Bf16, 8192)?);
    ensure!(peaks.1.is_finite(), "the card gave no time");
    Ok(peaks)
}
