//! What only a worker's engine can answer, and how long it may take. Heartbeats say that a process lives, not that its
//! engine does: one that hangs between two orders would hold everybody up for ever.
//!
//! In: who was asked for what, and who has answered. Out: whose time is up. The times are far beyond what a slow machine
//! needs, because the cost of being wrong is a worker.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use common::wire::PlanKind;

use super::command::Command;
use super::event::WorkerId;
use super::{Cluster, Stage};

/// For an answer that takes no computation.
const ANSWER: Duration = Duration::from_secs(60);
/// For a model to be fetched and loaded. What was fetched is kept, so whoever is sent away for it is further next time.
const LOADING: Duration = Duration::from_secs(3600);
/// For a slot, where nobody knows what one takes.
const UNMEASURED_SLOT: Duration = Duration::from_secs(1800);
/// For a slot, in times of what the worker took for others. In full training it is not given up half-way.
const SLOT_FACTOR: f64 = 8.0;
/// And in times of what the others take, where the worker has delivered none.
const UNKNOWN_SLOT_FACTOR: f64 = 64.0;
/// Of weights and moments.
const STATE_BYTES_PER_SCALAR: f64 = 12.0;
/// A state takes no longer than over such a line.
const SLOWEST_LINE_BYTES_PER_SECOND: f64 = 1024.0 * 1024.0;
/// Followers that share a line, and their source's.
const STATES_AT_A_TIME: u32 = 8;

/// What a worker is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// After it was welcomed.
    Ready,
    /// After it was told of a generation.
    Entered,
    /// After an exchange that another has finished, or that it makes alone.
    Report,
    /// While it follows a feed and is behind.
    Synced,
}

/// Answers that are awaited, or were: whether one is still owed is asked when its time is up.
#[derive(Debug, Default)]
pub struct Patience {
    due: BTreeMap<(WorkerId, Answer), Instant>,
    by_time: BTreeSet<(Instant, WorkerId, Answer)>,
}

impl Patience {
    /// The worker has until `due`. What was expected before is replaced.
    fn expect(&mut self, worker: WorkerId, answer: Answer, due: Instant) {
        self.answered(worker, answer);
        self.due.insert((worker, answer), due);
        self.by_time.insert((due, worker, answer));
    }

    fn expects(&self, worker: WorkerId, answer: Answer) -> bool {
        self.due.contains_key(&(worker, answer))
    }

    pub fn answered(&mut self, worker: WorkerId, answer: Answer) {
        if let Some(due) = self.due.remove(&(worker, answer)) {
            self.by_time.remove(&(due, worker, answer));
        }
    }

    pub fn forget(&mut self, worker: WorkerId) {
        for answer in [
            Answer::Ready,
            Answer::Entered,
            Answer::Report,
            Answer::Synced,
        ] {
            self.answered(worker, answer);
        }
    }

    /// Nobody listened for so long.
    pub fn postpone(&mut self, by: Duration) {
        for due in self.due.values_mut() {
            *due += by;
        }
        let due = self.due.iter();
        self.by_time = due
            .map(|((worker, answer), due)| (*due, *worker, *answer))
            .collect();
    }

    fn wakes_at(&self) -> Option<Instant> {
        self.by_time.first().map(|(due, ..)| *due)
    }

    fn take_expired(&mut self, now: Instant) -> Vec<(WorkerId, Answer)> {
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

impl Cluster {
    pub(super) fn patience_ends_at(&self) -> Option<Instant> {
        self.patience.wakes_at()
    }

    pub(super) fn await_ready(&mut self, now: Instant, id: WorkerId) {
        self.patience.expect(id, Answer::Ready, now + LOADING);
    }

    /// Whoever is in the new generation ends the slot in hand first, and may get a state.
    pub(super) fn await_entries(&mut self, now: Instant) {
        for id in self.members.ranks().to_vec() {
            let has_leases =
                |ledger: &super::Ledger| ledger.queue(id).is_some_and(|q| !q.is_empty());
            let is_busy = has_leases(&self.ledger) || self.ahead.as_ref().is_some_and(has_leases);
            let is_behind = self
                .members
                .get(id)
                .is_some_and(|w| w.seen < self.committed);
            let mut patience = ANSWER;
            if is_busy {
                patience += self.slot_patience(id, 0.0);
            }
            if is_behind {
                patience += STATES_AT_A_TIME * self.transfer();
            }
            self.patience.expect(id, Answer::Entered, now + patience);
        }
    }

    /// One has finished the exchange, so the others have what they need to finish it too; if a peer withholds it from
    /// them, they say so long before.
    pub(super) fn await_reports(&mut self, now: Instant) {
        let due = now + ANSWER + 2 * self.transfer();
        for id in self.members.ranks().to_vec() {
            if self.owes(id, Answer::Report) {
                self.patience.expect(id, Answer::Report, due);
            }
        }
    }

    /// From now on, where nothing is expected yet.
    pub(super) fn await_synced(&mut self, now: Instant, id: WorkerId) {
        if self.owes(id, Answer::Synced) && !self.patience.expects(id, Answer::Synced) {
            // Its source may have a slot in hand, and other followers before it.
            let patience = UNMEASURED_SLOT + STATES_AT_A_TIME * self.transfer();
            self.patience.expect(id, Answer::Synced, now + patience);
        }
    }

    /// How long a worker may go on with a slot that it has had in hand for so many seconds.
    pub(super) fn slot_patience(&self, id: WorkerId, elapsed: f64) -> Duration {
        let kinds = [PlanKind::Train, PlanKind::Eval];
        let slowest = |of: &dyn Fn(PlanKind) -> Option<f64>| {
            let seconds = kinds.iter().filter_map(|kind| of(*kind));
            seconds.max_by(f64::total_cmp)
        };
        let own = slowest(&|kind| self.speeds.of(id, kind));
        let typical = || slowest(&|kind| self.speeds.typical(kind));
        let seconds = match own {
            Some(seconds) => Some(SLOT_FACTOR * seconds.max(elapsed)),
            None => typical().map(|seconds| UNKNOWN_SLOT_FACTOR * seconds.max(elapsed)),
        };
        let slot = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        self.deadline() + slot.unwrap_or(UNMEASURED_SLOT)
    }

    /// Of a state, over the slowest line.
    fn transfer(&self) -> Duration {
        let bytes = self.trainable_scalars() as f64 * STATE_BYTES_PER_SCALAR;
        Duration::try_from_secs_f64(bytes / SLOWEST_LINE_BYTES_PER_SECOND).unwrap_or(LOADING)
    }

    /// Sends away whoever owes an answer for too long; those whose time is up together share a generation.
    pub(super) fn expel_the_stuck(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let mut expelled = false;
        for (worker, answer) in self.patience.take_expired(now) {
            if !self.owes(worker, answer) {
                continue;
            }
            let reason = match answer {
                Answer::Ready => "its engine has not loaded the model after an hour",
                Answer::Entered => "its engine does not answer: it did not enter the generation",
                Answer::Report => "its engine does not answer: it did not end the step",
                Answer::Synced => "its engine does not answer: it took nothing of its feed",
            };
            self.forget(worker, reason, commands);
            let reason = reason.to_owned();
            commands.push(Command::Expel { worker, reason });
            expelled = true;
        }
        if expelled {
            self.regroup(now, commands);
        }
    }

    fn owes(&self, id: WorkerId, answer: Answer) -> bool {
        let Some(worker) = self.members.get(id) else {
            return false;
        };
        let is_member = self.members.rank_of(id).is_some();
        match answer {
            Answer::Ready => worker.ready.is_none(),
            Answer::Entered => is_member && !worker.entered && self.stage == Stage::Running,
            Answer::Report => {
                let settling = self.settling.as_ref();
                is_member && settling.is_some_and(|settling| !settling.reports.contains_key(&id))
            }
            Answer::Synced => {
                !is_member && self.joining.follows(id) && worker.seen < self.committed
            }
        }
    }
}
