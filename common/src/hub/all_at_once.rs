//! Several files on their way at once, in a bounded number.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

const MAX_FILES_AT_ONCE: usize = 4;

/// Does the work for every item, some at once; after a failure nothing else is begun, and the first failure is told.
pub fn all_at_once<T: Sync, E: Send>(
    items: &[T],
    is_stopped: &AtomicBool,
    work: impl Fn(&T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    let do_some = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            if is_stopped.load(Ordering::Relaxed) {
                break;
            }
            if let Err(error) = work(item) {
                let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                // Those that stop because of it say less.
                if failure.is_none() {
                    *failure = Some(error);
                }
                is_stopped.store(true, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..items.len().min(MAX_FILES_AT_ONCE) {
            scope.spawn(do_some);
        }
        do_some();
    });
    let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
    failure.map_or(Ok(()), Err)
}
