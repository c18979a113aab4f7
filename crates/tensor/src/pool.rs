//! Many small operations on one thread of the pool: the others are asked for help without being woken from outside.

use crate::tape::Recording;
use crate::tensor::{host_reads_forbidden, with_host_reads_forbidden};

/// Runs `f` on a thread of the pool, as if it were on this one.
///
/// An operation that starts on a thread outside the pool hands its work over and sleeps until it is done, some microseconds
/// each time; a step has hundreds of them. What holds on the calling thread ([`crate::no_grad`],
/// [`crate::forbid_host_reads`]) holds for `f`: while it waits for help, a thread of the pool may begin to run another call
/// of this function, which must not see what holds for the first.
pub fn on_pool<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    let (recording, guards) = (Recording::here(), host_reads_forbidden());
    rayon::scope(|_| recording.apply(|| with_host_reads_forbidden(guards, f)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::sample;
    use crate::{Param, forbid_host_reads, no_grad};

    #[test]
    fn what_holds_outside_holds_inside_and_nothing_else() {
        let p = Param::new(sample(&[2, 2], 1));
        let recorded = || p.get().needs_grad();
        assert!(on_pool(recorded));
        assert!(!no_grad(|| on_pool(recorded)));
        let readable = || p.value().to_vec().is_ok();
        let guard = forbid_host_reads();
        assert!(!on_pool(readable));
        // A call from another thread that this thread of the pool may take up.
        assert!(std::thread::scope(|s| s.spawn(|| on_pool(readable)).join().unwrap()));
        drop(guard);
        assert!(on_pool(readable));
    }

    #[test]
    fn calls_from_many_threads_keep_to_themselves() {
        std::thread::scope(|s| {
            for number in 0..8 {
                s.spawn(move || {
                    for _ in 0..50 {
                        let a = sample(&[300, 64], 2);
                        let forbids = number % 2 == 0;
                        on_pool(move || {
                            let guard = forbids.then(forbid_host_reads);
                            let y = a.matmul_t(&a).unwrap();
                            assert_eq!(y.to_vec().is_err(), forbids);
                            drop(guard);
                        });
                    }
                });
            }
        });
    }
}
