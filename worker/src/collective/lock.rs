//! Locks whose values are valid at every moment.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex, even a poisoned one: that another thread panicked changes nothing, as the values guarded here are valid at
/// every moment.
pub(in crate::collective) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
