//! `--device`: what the process computes on.

use std::path::PathBuf;
use std::str::FromStr;

use engraft_store::write_atomic;
use engraft_tensor::device::{self, Device, KernelCache};

use crate::environment::Environment;
use crate::failure::{Failure, Outcome};

/// `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice(Device);

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Choice, String> {
        let number = match text {
            "cpu" => return Ok(Choice(Device::Cpu)),
            "cuda" => Some(0),
            _ => text.strip_prefix("cuda:").and_then(|number| number.parse().ok()),
        };
        number.map(|n| Choice(Device::Cuda(n))).ok_or_else(|| "expected cpu, cuda or cuda:N".into())
    }
}

/// Machine code of kernels beside other programs' caches.
struct Kernels(PathBuf);

impl KernelCache for Kernels {
    fn read(&self, name: &str) -> Option<Vec<u8>> {
        std::fs::read(self.0.join(name)).ok().filter(|bytes| bytes.starts_with(b"\x7fELF"))
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        // A cache that cannot be written costs a second at the next start.
        let _ = std::fs::create_dir_all(&self.0);
        let _ = write_atomic(&self.0.join(name), bytes);
    }
}

/// Makes the process compute on `given`, or on what `ENGRAFT_DEVICE` names.
///
/// # Errors
/// A device that is not there, with what is missing.
pub fn choose(given: Option<Choice>, environment: &Environment) -> Outcome<()> {
    let choice = match (given, &environment.device) {
        (Some(choice), _) => choice,
        (None, Some(text)) => {
            text.parse().map_err(|e| Failure::before_work(format!("ENGRAFT_DEVICE: {e}, found `{text}`")))?
        }
        (None, None) => Choice(Device::Cpu),
    };
    let cache = environment.kernels.clone().map(|path| Box::new(Kernels(path)) as Box<dyn KernelCache>);
    device::choose(choice.0, cache)
        .map_err(|e| Failure::before_work(format!("--device: {e}; `engraft doctor` tells what is there")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        let device = |text: &str| text.parse::<Choice>().map(|choice| choice.0);
        assert_eq!(device("cpu"), Ok(Device::Cpu));
        assert_eq!(device("cuda"), Ok(Device::Cuda(0)));
        assert_eq!(device("cuda:3"), Ok(Device::Cuda(3)));
        for bad in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            assert!(device(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn kernels_that_are_not_whole_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Kernels(dir.path().join("kernels"));
        assert_eq!(cache.read("rows.cubin"), None);
        cache.write("rows.cubin", b"\x7fELF and more");
        assert_eq!(cache.read("rows.cubin").as_deref(), Some(&b"\x7fELF and more"[..]));
        cache.write("rows.cubin", b"something else");
        assert_eq!(cache.read("rows.cubin"), None);
    }
}
