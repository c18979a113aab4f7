//! What the system says of this process.

use std::fs;

/// The most memory that this process has held at once, in bytes; `None` where the system does not say.
pub fn peak_memory_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// The memory that this process holds now beside mapped files, in bytes; `None` where the system does not say.
pub fn own_memory_bytes() -> Option<u64> {
    status("RssAnon:")
}

fn status(name: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_holds_some_memory() {
        let own = super::own_memory_bytes().unwrap();
        assert!(own > 100_000 && super::peak_memory_bytes().unwrap() >= own);
    }
}
