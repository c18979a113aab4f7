//! `engraft doctor`: what this machine can do, each line checked and not assumed.

use std::path::Path;

use engraft_report::human;
use engraft_tensor::Tensor;
use engraft_tensor::cpu::gemm::{Isa, isa};
use engraft_tensor::device;
use engraft_tensor::frozen::{FrozenMatrix, Precision};
use engraft_tensor::ops::frozen_linear;
use serde_json::json;

use crate::context::Context;
use crate::failure::{Failure, Outcome, code};
use crate::machine;

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft doctor
  engraft doctor --json | jq .ok

Exit code 1 says that something would not work.")]
pub struct Args {
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// One line of the answer.
struct Check {
    name: &'static str,
    found: String,
    verdict: String,
    ok: bool,
}

impl Check {
    fn ok(name: &'static str, found: String, verdict: &str) -> Check {
        Check { name, found, verdict: verdict.into(), ok: true }
    }

    fn bad(name: &'static str, found: String, verdict: String) -> Check {
        Check { name, found, verdict, ok: false }
    }
}

/// Prints what was found; fails when something is not well.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    let checks = [processor(cx), kernels(), gpu(), memory(), cache(cx)];
    let ok = checks.iter().all(|check| check.ok);
    let form = if cfg!(target_env = "musl") { "static" } else { "dynamically linked" };
    let version = env!("CARGO_PKG_VERSION");
    let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
    if args.json {
        let list: Vec<_> = checks
            .iter()
            .map(|c| json!({ "name": c.name, "found": c.found, "verdict": c.verdict, "ok": c.ok }))
            .collect();
        cx.ui.json(
            json!({ "version": version, "os": os, "arch": arch, "linking": form, "ok": ok, "checks": list }),
        );
    } else {
        let width = checks.iter().map(|c| c.found.chars().count()).max().unwrap_or(0);
        let mut text = format!("engraft {version}   {os} {arch}, {form}\n");
        for c in &checks {
            text.push_str(&format!("{:8} {:width$}  {}\n", c.name, c.found, c.verdict));
        }
        cx.ui.print(&text);
    }
    if ok { Ok(()) } else { Err(Failure::said(code::RUNNING)) }
}

fn processor(cx: &Context) -> Check {
    let cores = machine::cores();
    let features = machine::features();
    let listed =
        if features.is_empty() { "no vector instructions known here".into() } else { features.join(", ") };
    let verdict = match cx.environment.threads {
        Some(threads) => format!("ok, ENGRAFT_THREADS takes {threads}"),
        None => "ok".into(),
    };
    Check { name: "cpu", found: format!("{cores} {}, {listed}", plural(cores, "core")), verdict, ok: true }
}

/// Multiplies in both precisions with the chosen kernels and compares with plain loops.
fn kernels() -> Check {
    let found = format!(
        "{} of {}",
        isa().name(),
        Isa::available().iter().map(|i| i.name()).collect::<Vec<_>>().join(", ")
    );
    match worst_errors() {
        Ok((f32_error, bf16_error)) if f32_error < 1e-5 && bf16_error < 2e-2 => {
            Check::ok("kernels", found, "ok, f32 and bf16 products agree with plain loops")
        }
        Ok((f32_error, bf16_error)) => {
            let verdict = format!(
                "wrong products: error {f32_error:.1e} in f32, {bf16_error:.1e} in bf16; please report it"
            );
            Check::bad("kernels", found, verdict)
        }
        Err(error) => Check::bad("kernels", found, error.to_string()),
    }
}

/// Largest error of a product, relative to the largest entry, in f32 and bf16.
fn worst_errors() -> engraft_tensor::Result<(f32, f32)> {
    let (rows, out, inn) = (5, 70, 33);
    let values =
        |n: usize, step: usize| (0..n).map(|i| ((i * step) % 101) as f32 / 50.5 - 1.0).collect::<Vec<_>>();
    let (x, w) = (values(rows * inn, 37), values(out * inn, 53));
    let mut plain = vec![0.0f32; rows * out];
    for (i, y) in plain.iter_mut().enumerate() {
        let (row, column) = (i / out, i % out);
        *y = (0..inn).map(|k| x[row * inn + k] * w[column * inn + k]).sum();
    }
    let size = plain.iter().fold(0.0f32, |m, y| m.max(y.abs()));
    let (x, w) = (Tensor::from_vec(x, [rows, inn])?, Tensor::from_vec(w, [out, inn])?);
    let error = |precision| -> engraft_tensor::Result<f32> {
        let matrix = std::sync::Arc::new(FrozenMatrix::from_dense(&w, precision)?);
        let y = frozen_linear(&x, &matrix, None)?.to_vec()?;
        Ok(y.iter().zip(&plain).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / size)
    };
    Ok((error(Precision::F32)?, error(Precision::Bf16)?))
}

fn gpu() -> Check {
    let driver = Path::new("/proc/driver/nvidia/version").exists();
    match device::describe_cards() {
        Ok(cards) if cards.is_empty() => Check::ok("gpu", "none".into(), "ok, trains on the processor"),
        Ok(cards) => Check::ok("gpu", cards.join("; "), "ok, used with --device cuda"),
        Err(_) if !driver => Check::ok("gpu", "none".into(), "ok, trains on the processor"),
        Err(missing) => {
            let verdict = format!("not used, trains on the processor: {missing}");
            Check { name: "gpu", found: "NVIDIA driver found".into(), verdict, ok: true }
        }
    }
}

fn memory() -> Check {
    let Some((total, available)) = machine::memory() else {
        return Check::ok("memory", "unknown".into(), "ok, `engraft plan` cannot say whether a run fits");
    };
    let found = format!("{}, {} free", human::bytes(total), human::bytes(available));
    if available < 256 << 20 {
        return Check::bad("memory", found, "too little to load a model; end other programs".into());
    }
    Check::ok("memory", found, "ok")
}

fn cache(cx: &Context) -> Check {
    let Some(cache) = &cx.environment.cache else {
        return Check::bad(
            "cache",
            "no HOME".into(),
            "set HF_HOME to a directory for downloaded models".into(),
        );
    };
    // Before the first download the directory is not there: what counts is where it would be made.
    let existing = cache.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
    let free = machine::free_bytes(existing);
    let models = std::fs::read_dir(cache).map_or(0, |entries| {
        entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with("models--")).count()
    });
    let mut found = format!("{models} {}", plural(models, "model"));
    if let Some(free) = free {
        found.push_str(&format!(", {} free", human::bytes(free)));
    }
    if !machine::writable(existing) {
        let verdict =
            format!("{} cannot be written: set HF_HOME to a directory that can", existing.display());
        return Check::bad("cache", found, verdict);
    }
    let offline = if cx.environment.offline { "ok, offline: nothing is downloaded" } else { "ok" };
    Check::ok("cache", found, offline)
}

fn plural(count: usize, word: &str) -> String {
    if count == 1 { word.to_owned() } else { format!("{word}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_kernels_agree_with_plain_loops() {
        assert!(kernels().ok, "{}", kernels().verdict);
    }
}
