//! How far a long piece of work is, for whoever waits for it, and whether it is still wanted.
//!
//! The work says what it is at and how much of it is done; any thread may look, or ask it to stop. Nothing here waits.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// Shared by the work and those who wait for it.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    task: Mutex<&'static str>,
    done: AtomicU64,
    total: AtomicU64,
    is_cancelled: AtomicBool,
}

/// The work was asked to stop before it was done.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("stopped before it was done")]
pub struct Cancelled;

impl From<Cancelled> for io::Error {
    fn from(cancelled: Cancelled) -> Self {
        Self::other(cancelled)
    }
}

/// What the work is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// `tokenising the data`; empty before the first task.
    pub task: &'static str,
    /// Whole percent of the task. None where nobody knows.
    pub percent: Option<u64>,
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.task)?;
        match self.percent {
            Some(percent) => write!(f, ", {percent}%"),
            None => Ok(()),
        }
    }
}

impl Progress {
    /// A task of `total` units begins, whatever a unit is; 0 where nobody knows how many.
    pub fn begin(&self, task: &'static str, total: u64) {
        let mut current = self.0.task.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.done.store(0, Ordering::Relaxed);
        self.0.total.store(total, Ordering::Relaxed);
        *current = task;
    }

    pub fn advance(&self, units: u64) {
        self.0.done.fetch_add(units, Ordering::Relaxed);
    }

    pub fn now(&self) -> Moment {
        let task = *self.0.task.lock().unwrap_or_else(PoisonError::into_inner);
        let done = u128::from(self.0.done.load(Ordering::Relaxed));
        let total = u128::from(self.0.total.load(Ordering::Relaxed));
        let percent = (done * 100).checked_div(total);
        Moment {
            task,
            percent: percent.map(|percent| percent.min(100) as u64),
        }
    }

    /// Asks the work to stop at the next place where it can.
    pub fn cancel(&self) {
        self.0.is_cancelled.store(true, Ordering::Relaxed);
    }

    pub fn is_cancelled(&self) -> bool {
        self.0.is_cancelled.load(Ordering::Relaxed)
    }

    /// For the work, every so often.
    pub fn check(&self) -> Result<(), Cancelled> {
        match self.is_cancelled() {
            true => Err(Cancelled),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_is_told_in_whole_percent_of_the_task() {
        let progress = Progress::default();
        assert_eq!(progress.now().to_string(), "");
        progress.begin("tokenising the data", 1000);
        progress.advance(419);
        assert_eq!(progress.now().to_string(), "tokenising the data, 41%");
        progress.advance(u64::from(u32::MAX));
        assert_eq!(progress.now().percent, Some(100));
        progress.begin("packing the data", 0);
        assert_eq!(progress.now().to_string(), "packing the data");
    }
}
