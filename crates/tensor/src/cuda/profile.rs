//! Where the time goes: every call timed by itself, each waited for before the next begins.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use super::driver::{Cuda, lock};

/// Calls by name: how many, and their seconds.
#[derive(Default)]
pub(crate) struct Profile {
    on: AtomicBool,
    calls: Mutex<HashMap<String, (usize, f64)>>,
}

impl Profile {
    /// Begins anew, or ends.
    pub(crate) fn switch(&self, on: bool) {
        lock(&self.calls).clear();
        self.on.store(on, Relaxed);
    }

    /// The calls so far, those that took longest first: name, number, seconds.
    pub(crate) fn calls(&self) -> Vec<(String, usize, f64)> {
        let mut all: Vec<_> = lock(&self.calls).iter().map(|(name, &(n, s))| (name.clone(), n, s)).collect();
        all.sort_by(|a, b| b.2.total_cmp(&a.2));
        all
    }

    /// The time before a call, where calls are timed.
    pub(super) fn start(&self, card: &Cuda) -> Option<Instant> {
        self.on.load(Relaxed).then(|| {
            card.wait();
            Instant::now()
        })
    }

    /// Counts a call that began at `started`.
    pub(super) fn stop(&self, card: &Cuda, started: Option<Instant>, name: impl FnOnce() -> String) {
        let Some(started) = started else { return };
        card.wait();
        let seconds = started.elapsed().as_secs_f64();
        let mut calls = lock(&self.calls);
        let call = calls.entry(name()).or_default();
        *call = (call.0 + 1, call.1 + seconds);
    }
}
