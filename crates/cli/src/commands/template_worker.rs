//! `engraft template-worker`, which no help lists: renders a chat template for the process that started it.
//!
//! A template is foreign code, so this process takes memory away from itself first. On Linux that is a limit on its
//! address space; elsewhere what it uses already is not known, and only the time limit of the other side holds.

use std::ffi::OsString;

use engraft_data::{TEMPLATE_MEMORY, Worker};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::failure::{BeforeWork, Failure, Outcome};

/// The command's name.
pub const NAME: &str = "template-worker";

/// How this program starts itself as a worker.
pub fn worker() -> Outcome<Worker> {
    let program = std::env::current_exe().map_err(|error| {
        let message = format!("cannot find this program's own file, which renders chat templates: {error}");
        Failure::before_work(message)
    })?;
    Ok(Worker { program, arguments: vec![OsString::from(NAME)] })
}

/// Serves until standard input ends.
pub fn run() -> Outcome {
    end_with_input()?;
    limit_memory()?;
    let served = engraft_data::serve_template(&mut std::io::stdin().lock(), &mut std::io::stdout().lock());
    served.before_work()
}

/// Ends the process as soon as nobody can write to its standard input, even in the middle of a rendering.
fn end_with_input() -> std::io::Result<()> {
    let wait = || {
        let input = std::io::stdin();
        // No event is asked for: that the other end is closed is reported always.
        let mut watched = [PollFd::new(&input, PollFlags::empty())];
        while poll(&mut watched, None) == Err(rustix::io::Errno::INTR) {}
        std::process::exit(0);
    };
    std::thread::Builder::new().name("input-watch".into()).stack_size(64 << 10).spawn(wait).map(drop)
}

/// Takes all memory away beyond what is used now and what a template may have; nothing is dumped when it dies of that.
fn limit_memory() -> Outcome {
    let limit = |bytes: u64| Rlimit { current: Some(bytes), maximum: Some(bytes) };
    setrlimit(Resource::Core, limit(0))?;
    // A program that collects dumps is not bound by the limit.
    #[cfg(target_os = "linux")]
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    if let Some(used) = address_space() {
        setrlimit(Resource::As, limit(used.saturating_add(TEMPLATE_MEMORY)))?;
    }
    Ok(())
}

/// The address space that this process uses, in bytes, where the system tells.
fn address_space() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmSize:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_space_is_known_on_linux() {
        assert_eq!(address_space().is_some(), cfg!(target_os = "linux"));
    }
}
