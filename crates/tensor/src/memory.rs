//! The pool of f32 buffers: a step's buffers come from it and go back to it.
//!
//! Buffers are kept in size classes (eight to an octave), so that ragged batches find one of a similar size. The pool
//! never makes the process larger than a quarter above the largest amount that was ever live at once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{LazyLock, Mutex};

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static PEAK_BYTES: AtomicUsize = AtomicUsize::new(0);
static FREE: LazyLock<Mutex<Free>> = LazyLock::new(Default::default);

#[derive(Default)]
struct Free {
    by_class: HashMap<usize, Vec<Vec<f32>>>,
    bytes: usize,
}

/// Bytes of f32 buffers in use now.
pub fn live_bytes() -> usize {
    LIVE_BYTES.load(Relaxed)
}

/// Largest [`live_bytes`] since the last [`reset_peak`].
pub fn peak_bytes() -> usize {
    PEAK_BYTES.load(Relaxed)
}

/// Starts a new measurement of [`peak_bytes`].
pub fn reset_peak() {
    PEAK_BYTES.store(live_bytes(), Relaxed);
}

/// Gives every pooled buffer back to the system.
pub fn trim() {
    *lock() = Free::default();
}

fn lock() -> std::sync::MutexGuard<'static, Free> {
    FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The capacity that serves `len` elements: the next of eight steps within an octave.
fn class_of(len: usize) -> usize {
    let len = len.max(64);
    let step = (len.next_power_of_two() / 16).max(1);
    len.div_ceil(step) * step
}

/// A buffer of `len` elements whose contents are arbitrary (but initialised) numbers.
pub(crate) fn take(len: usize) -> Vec<f32> {
    let class = class_of(len);
    let bytes = class * 4;
    let live = LIVE_BYTES.fetch_add(bytes, Relaxed) + bytes;
    PEAK_BYTES.fetch_max(live, Relaxed);
    let pooled = {
        let mut free = lock();
        let found = free.by_class.get_mut(&class).and_then(Vec::pop);
        if found.is_some() {
            free.bytes -= bytes;
        }
        found
    };
    // A fresh buffer is zeroed memory from the system, which costs nothing until it is touched.
    let mut buffer = pooled.unwrap_or_else(|| vec![0.0; class]);
    buffer.truncate(len);
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    buffer
}

/// Takes a buffer back. Only for buffers that came from [`take`].
pub(crate) fn give(buffer: Vec<f32>) {
    let class = class_of(buffer.len());
    let bytes = class * 4;
    let live = LIVE_BYTES.fetch_sub(bytes, Relaxed) - bytes;
    let mut free = lock();
    if live + free.bytes + bytes <= PEAK_BYTES.load(Relaxed) / 4 * 5 {
        free.bytes += bytes;
        free.by_class.entry(class).or_default().push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_cover_their_lengths_with_little_waste() {
        for len in [1, 63, 64, 65, 1000, 4096, 4097, 1 << 20, (1 << 20) + 1] {
            let class = class_of(len);
            assert!(class >= len && (len < 64 || class <= len + len / 4), "{len} → {class}");
            assert_eq!(class_of(class), class, "a class must serve itself");
        }
    }
}
