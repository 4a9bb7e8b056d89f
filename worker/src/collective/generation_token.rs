//! The end of a generation, as its threads see it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::CollectiveError;
use super::lock::lock;

/// How often a waiting thread looks whether the generation is over.
pub(super) const GENERATION_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// Says to all threads of a generation that it is over: closed once, by its end or by the first failure, which is kept.
#[derive(Default)]
pub struct GenerationToken {
    closed: AtomicBool,
    failure: Mutex<Option<CollectiveError>>,
}

impl GenerationToken {
    /// Ends the generation: whatever waits for it stops.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Returns an error once the generation is over.
    pub fn check(&self) -> Result<(), CollectiveError> {
        match self.closed.load(Ordering::SeqCst) {
            true => Err(CollectiveError::Superseded),
            false => Ok(()),
        }
    }

    /// Ends the generation because of `error`, unless it is over already.
    pub(super) fn fail(&self, error: CollectiveError) {
        let mut failure = lock(&self.failure);
        if !self.closed.swap(true, Ordering::SeqCst) {
            *failure = Some(error);
        }
    }

    /// Why the generation is over.
    pub(super) fn reason(&self) -> CollectiveError {
        lock(&self.failure)
            .clone()
            .unwrap_or(CollectiveError::Superseded)
    }
}
