//! The deadline of each answer that only a worker's engine can give.
//!
//! In: who was asked for what, and who has answered. Out: whose time is up.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::cluster::event::WorkerId;

/// An answer that a worker owes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OwedReply {
    /// The word that model and state are loaded, after it was welcomed.
    Ready,
    /// The word that it has entered a generation, after it was told of that.
    Entered,
    /// The report of a step, after an exchange that another member has finished, or that it makes alone.
    Report,
    /// A sign that it takes something of its feed, while it follows one and is behind.
    Synced,
    /// The slot that it has in hand, whether or not that is wanted back.
    Slot,
    /// The state that it was asked to hand over.
    State,
}

impl OwedReply {
    const ALL: [Self; 6] = [
        Self::Ready,
        Self::Entered,
        Self::Report,
        Self::Synced,
        Self::Slot,
        Self::State,
    ];
}

/// The deadline of each awaited answer. An entry may outlive its answer: whether one is still owed is asked when its time is up.
#[derive(Debug, Default)]
pub struct ReplyDeadlines {
    due: BTreeMap<(WorkerId, OwedReply), Instant>,
    /// The entries of `due` by time, the earliest first.
    by_time: BTreeSet<(Instant, WorkerId, OwedReply)>,
}

impl ReplyDeadlines {
    /// The worker has until `due`. What was expected before is replaced.
    pub fn expect(&mut self, worker: WorkerId, answer: OwedReply, due: Instant) {
        self.answered(worker, answer);
        self.due.insert((worker, answer), due);
        self.by_time.insert((due, worker, answer));
    }

    /// Whether this answer is awaited.
    pub fn expects(&self, worker: WorkerId, answer: OwedReply) -> bool {
        self.due.contains_key(&(worker, answer))
    }

    /// The worker gave this answer: it is awaited no more.
    pub fn answered(&mut self, worker: WorkerId, answer: OwedReply) {
        if let Some(due) = self.due.remove(&(worker, answer)) {
            self.by_time.remove(&(due, worker, answer));
        }
    }

    /// The worker is gone: nothing is awaited of it.
    pub fn forget(&mut self, worker: WorkerId) {
        for answer in OwedReply::ALL {
            self.answered(worker, answer);
        }
    }

    /// Moves all deadlines: the driver did not listen for so long.
    pub fn postpone(&mut self, by: Duration) {
        for due in self.due.values_mut() {
            *due += by;
        }
        let due = self.due.iter();
        self.by_time = due
            .map(|((worker, answer), due)| (*due, *worker, *answer))
            .collect();
    }

    /// When the next answer is due.
    pub fn wakes_at(&self) -> Option<Instant> {
        self.by_time.first().map(|(due, ..)| *due)
    }

    /// Takes out the answers that were due by now.
    pub fn take_expired(&mut self, now: Instant) -> Vec<(WorkerId, OwedReply)> {
        let mut expired = Vec::new();
        while let Some(&(due, worker, answer)) = self.by_time.first()
            && due <= now
        {
            self.answered(worker, answer);
            expired.push((worker, answer));
        }
        expired
    }
}
