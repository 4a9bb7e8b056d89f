//! What the journal shares with its thread: records that wait to be written, and what all of them amount to.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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
    /// Told when more records are durable.
    pub written: Condvar,
}

/// Records and their meaning.
pub(super) struct State {
    pub history: History,
    pub waiting: Vec<Record>,
    /// Whether the queue was full, so that the file lacks records that the history has and is to be written anew.
    pub overflowed: bool,
    pub closed: bool,
    /// Number of records so far, and how many of them are durable.
    pub remembered: u64,
    pub durable: u64,
}

impl State {
    pub fn remember(&mut self, record: Record) {
        self.remembered += 1;
        self.history.add(record.clone());
        if self.waiting.len() < MAX_WAITING {
            self.waiting.push(record);
        } else {
            self.overflowed = true;
        }
    }
}

impl Shared {
    /// Waits until all records up to the number `remembered` are durable, or for so long.
    pub fn wait_until_durable(&self, remembered: u64, timeout: Duration) {
        let is_missing = |state: &mut State| state.durable < remembered && !state.closed;
        let waited = self
            .written
            .wait_timeout_while(self.lock(), timeout, is_missing);
        drop(waited);
    }

    pub fn note_durable(&self, remembered: u64) {
        let mut state = self.lock();
        state.durable = state.durable.max(remembered);
        drop(state);
        self.written.notify_all();
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
