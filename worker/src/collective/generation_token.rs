//! The end of a generation, as its threads see it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::CollectiveError;
use super::lock::lock;

/// How often a wait looks at the token.
pub(super) const TICK: Duration = Duration::from_millis(50);

/// Closed once, when the generation is over. The first failure closes it too and is kept.
#[derive(Default)]
pub struct GenerationToken {
    closed: AtomicBool,
    failure: Mutex<Option<CollectiveError>>,
}

impl GenerationToken {
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    pub fn check(&self) -> Result<(), CollectiveError> {
        match self.closed.load(Ordering::SeqCst) {
            true => Err(CollectiveError::Superseded),
            false => Ok(()),
        }
    }

    /// Closes the token because of `error`, unless it is closed already.
    pub(super) fn fail(&self, error: CollectiveError) {
        let mut failure = lock(&self.failure);
        if !self.closed.swap(true, Ordering::SeqCst) {
            *failure = Some(error);
        }
    }

    /// Why the token is closed.
    pub(super) fn reason(&self) -> CollectiveError {
        lock(&self.failure)
            .clone()
            .unwrap_or(CollectiveError::Superseded)
    }
}
