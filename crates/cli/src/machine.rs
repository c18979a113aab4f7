//! What the machine has: cores, vector instructions, memory, free space.

use std::path::Path;

#[cfg(target_arch = "x86_64")]
use engraft_tensor::cpu::gemm::Isa;

/// Threads that can run at once.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The vector instructions that matter here, as the processor names them.
pub fn features() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let known = [
            ("AVX2", is_x86_feature_detected!("avx2")),
            ("FMA", is_x86_feature_detected!("fma")),
            ("F16C", is_x86_feature_detected!("f16c")),
            ("AVX-512", is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")),
            ("AVX-512-BF16", is_x86_feature_detected!("avx512bf16")),
            ("AMX-BF16", Isa::AmxBf16.is_available()),
        ];
        found.extend(known.iter().filter(|(_, has)| *has).map(|(name, _)| *name));
    }
    found
}

/// Memory in bytes, total and available: of the machine, or of the control group where that is less.
pub fn memory() -> Option<(u64, u64)> {
    let (total, available) = parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    match (number("/sys/fs/cgroup/memory.max"), number("/sys/fs/cgroup/memory.current")) {
        (Some(limit), current) if limit < total => {
            Some((limit, available.min(limit.saturating_sub(current.unwrap_or(0)))))
        }
        _ => Some((total, available)),
    }
}

/// Memory in bytes that this process may hold in all: what is available, and what it holds already.
pub fn room() -> Option<u64> {
    Some(memory()?.1 + engraft_store::process::own_memory_bytes().unwrap_or(0))
}

/// `MemTotal` and `MemAvailable` in bytes.
fn parse_meminfo(text: &str) -> Option<(u64, u64)> {
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
    };
    Some((field("MemTotal:")?, field("MemAvailable:")?))
}

/// Bytes that this user may still write where `path` is.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

/// Whether this user may write into the directory `path`.
pub fn writable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       8000000 kB\nMemFree: 5 kB\nMemAvailable:   6000000 kB\n";
        assert_eq!(parse_meminfo(text), Some((8_192_000_000, 6_144_000_000)));
        assert_eq!(parse_meminfo("MemTotal: x kB\n"), None);
    }
}
