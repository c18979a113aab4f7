//! The table of a race.

use anyhow::Result;
use engraft_tensor::cpu::gemm::{Precision, peak_flops};
use rayon::ThreadPoolBuilder;
use rayon::prelude::*;
use serde::Serialize;

use super::On;

/// One work.
#[derive(Serialize)]
pub struct Line {
    pub work: &'static str,
    pub what: &'static str,
    /// Floating-point operations that a useful token needs at least.
    pub operations_per_token: f64,
    pub rates: Vec<Rate>,
}

/// One process on a work.
#[derive(Serialize)]
pub struct Rate {
    pub name: String,
    /// Useful tokens: padding does not count.
    pub tokens_per_second: f64,
    pub rounds: Vec<f64>,
    /// Needed operations a second over the measured peak.
    pub share_of_peak: f64,
    pub peak_bytes: f64,
    /// From the start of the process to the first step.
    pub load_seconds: f64,
}

/// GFLOP/s of the product's tile on `threads` threads at once, f32 and bf16: two threads of one core share it.
pub fn peak(threads: usize) -> Result<(f64, f64)> {
    let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
    let of = |precision| {
        pool.install(|| (0..threads).into_par_iter().map(|_| peak_flops(precision, 3000)).sum::<f64>())
    };
    Ok((of(Precision::F32) / 1e9, of(Precision::Bf16) / 1e9))
}

/// The lines above the table.
pub fn head(on: On, threads: usize, (f32_peak, bf16_peak): (f64, f64)) {
    let kernels = engraft_tensor::device::name();
    let peaks = format!("peak f32 {f32_peak:.0}, bf16 {bf16_peak:.0} GFLOP/s");
    match on {
        On::Cpu => println!("instructions {kernels}, {threads} threads, {peaks}"),
        On::Cuda => println!("{kernels}, {peaks}"),
    }
    println!("ratio: the engine's best type over this one, median of pairs\n");
    println!(
        "{:<13} {:<16} {:>9} {:>7} {:>9} {:>7} {:>7} {:>8}",
        "work", "", "tokens/s", "peak", "memory", "start", "ratio", "memory"
    );
}

impl Rate {
    /// How many times as fast as `other`: the median of the rounds' ratios.
    pub fn over(&self, other: &Rate) -> f64 {
        crate::median(&mut self.rounds.iter().zip(&other.rounds).map(|(a, b)| a / b).collect::<Vec<_>>())
    }
}

impl Line {
    /// The engine in its faster type.
    pub fn best(&self) -> Option<&Rate> {
        let engines = self.rates.iter().filter(|rate| rate.name.starts_with("engraft"));
        engines.max_by(|a, b| a.tokens_per_second.total_cmp(&b.tokens_per_second))
    }

    pub fn print(&self) {
        let best = self.best();
        for (number, rate) in self.rates.iter().enumerate() {
            let (ratio, memory) = match best {
                Some(best) if best.name != rate.name => {
                    (format!("{:.2}", best.over(rate)), format!("{:.2}", best.peak_bytes / rate.peak_bytes))
                }
                _ => ("".into(), "".into()),
            };
            println!(
                "{:<13} {:<16} {:>9.0} {:>6.0}% {:>5.0} MiB {:>6.1}s {:>7} {:>8}",
                if number == 0 { self.work } else { "" },
                rate.name,
                rate.tokens_per_second,
                100.0 * rate.share_of_peak,
                rate.peak_bytes / f64::from(1 << 20),
                rate.load_seconds,
                ratio,
                memory,
            );
        }
    }
}
