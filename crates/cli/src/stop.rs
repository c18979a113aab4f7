//! Interrupts: the first asks the run to stop after its step, the second ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::failure::code;

/// The signal of a file that grows beyond `ulimit -f`, on Linux and macOS.
const SIGXFSZ: i32 = 25;

/// Lets a write beyond `ulimit -f` fail with an error that can be told, rather than end the process without a word.
pub fn survive_file_limit() {
    // Without the handler the signal keeps its way of ending the process: nothing else depends on it.
    let _ = flag::register(SIGXFSZ, Arc::default());
}

/// Whether and by what the process was asked to stop.
pub struct Stop {
    asked: Arc<AtomicBool>,
    by: Arc<AtomicUsize>,
}

impl Stop {
    /// Listens from now on.
    pub fn listen() -> std::io::Result<Stop> {
        let stop =
            Stop { asked: Arc::default(), by: Arc::new(AtomicUsize::new(usize::from(code::INTERRUPTED))) };
        for (signal, exit) in [(SIGINT, code::INTERRUPTED), (SIGTERM, code::TERMINATED)] {
            // In this order: what is set by the first signal makes the second one end the process.
            flag::register_conditional_shutdown(signal, i32::from(exit), stop.asked.clone())?;
            flag::register_usize(signal, stop.by.clone(), usize::from(exit))?;
            flag::register(signal, stop.asked.clone())?;
        }
        Ok(stop)
    }

    /// The flag that the run watches.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.asked.clone()
    }

    /// The exit code of the signal that asked.
    pub fn code(&self) -> u8 {
        u8::try_from(self.by.load(Ordering::Relaxed)).unwrap_or(code::INTERRUPTED)
    }
}
