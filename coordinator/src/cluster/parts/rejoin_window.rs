//! The time in which the workers of an earlier term may come back before the run begins without them.

use std::time::{Duration, Instant};

use crate::cluster::settings::PreviousTerms;

/// How long a new term waits for those who hold more than the newest checkpoint, from its beginning and again from the
/// first of them: those that live try again within a second.
pub const ABSENT: Duration = Duration::from_secs(1);
/// [`ABSENT`] where one of those workers is back and has yet to say what it holds: it ends the slot in hand first.
const BUSY: Duration = Duration::from_secs(4);

/// Who is waited for, and since when.
#[derive(Debug)]
pub struct RejoinWindow {
    /// Number of workers that may come back.
    expected: usize,
    /// When the first one came back with more than the newest checkpoint.
    united: Option<Instant>,
    /// Whether the user was told of the waiting.
    was_told: bool,
}

/// How many workers of an earlier term are back.
#[derive(Clone, Copy, Debug)]
pub struct Returned {
    /// Number of workers that may come back.
    pub expected: usize,
    /// Whether all of them are back.
    pub is_complete: bool,
    /// Whether the user has yet to be told of the waiting. True once.
    pub is_untold: bool,
}

impl RejoinWindow {
    /// The time to wait for workers of earlier terms; None where nothing is to be gained by waiting.
    pub fn of(earlier: &PreviousTerms, start_step: u64) -> Option<Self> {
        (earlier.recorded > start_step && earlier.workers > 0).then_some(Self {
            expected: earlier.workers,
            united: None,
            was_told: false,
        })
    }

    /// When it ends in a term that began then. `is_one_busy`: one is back and has yet to say what it holds.
    pub fn ends_at(&self, began: Option<Instant>, is_one_busy: bool) -> Option<Instant> {
        let since = self.united.or(began)?;
        let wait = match is_one_busy {
            true => BUSY,
            false => ABSENT,
        };
        Some(since + wait)
    }

    /// Notes how many workers are back with more than the newest checkpoint.
    pub fn note_returned(&mut self, now: Instant, back: usize) -> Returned {
        if back > 0 {
            self.united.get_or_insert(now);
        }
        let is_complete = back >= self.expected;
        Returned {
            expected: self.expected,
            is_complete,
            is_untold: !is_complete && !std::mem::replace(&mut self.was_told, true),
        }
    }
}
