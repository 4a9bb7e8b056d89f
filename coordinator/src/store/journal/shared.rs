//! What the journal shares with its thread: records that wait to be written, and what all of them amount to.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::history::History;
use super::record::Record;

/// Largest journal: one that grew beyond this is written anew, with the history's newest lines only.
pub(super) const MAX_BYTES: u64 = 64 << 20;
/// Most records that may wait for the disk.
pub(super) const MAX_WAITING: usize = 1024;

/// The journal as both threads see it.
pub(super) struct Shared {
    pub state: Mutex<State>,
    pub changed: Condvar,
}

/// Records and their meaning.
pub(super) struct State {
    pub history: History,
    pub waiting: Vec<Record>,
    /// Whether the queue was full, so that the file lacks records that the history has and is to be written anew.
    pub overflowed: bool,
    pub closed: bool,
}

impl State {
    pub fn remember(&mut self, record: Record) {
        self.history.add(record.clone());
        if self.waiting.len() < MAX_WAITING {
            self.waiting.push(record);
        } else {
            self.overflowed = true;
        }
    }
}

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
