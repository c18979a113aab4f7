//! Calls into libraries that may panic on a malformed file: the panic becomes an error, and its message is not printed
//! besides.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Whether this thread is inside a call whose panic becomes an error: a panic hook need say nothing then.
pub fn is_fenced() -> bool {
    DEPTH.with(Cell::get) > 0
}

/// Runs `call`; a panic inside is given back.
pub(crate) fn fenced<T>(call: impl FnOnce() -> T) -> thread::Result<T> {
    DEPTH.with(|depth| depth.set(depth.get() + 1));
    let result = catch_unwind(AssertUnwindSafe(call));
    DEPTH.with(|depth| depth.set(depth.get() - 1));
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fence_stands_during_the_call_only() {
        assert!(!is_fenced());
        assert!(fenced(is_fenced).unwrap());
        assert!(fenced(|| std::panic::resume_unwind(Box::new("x"))).is_err());
        assert!(!is_fenced());
    }
}
