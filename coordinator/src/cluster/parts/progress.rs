//! How far the run has come: the committed updates, the work that slots are leased of, and the step that is being committed.
//!
//! The work is of the committed weights, or of those that the exchange under way leads to. Where the exchange is given up, its step
//! is the work again, and the ledger of the work after it is kept: members that have not yet entered the new generation may hold
//! slots of it.

use std::time::{Duration, Instant};

use common::wire::PlanKind;
use proto::v1;

use super::ledger::Ledger;
use super::pending_commit::PendingCommit;
use super::queue::Queue;
use crate::cluster::event::WorkerId;
use crate::cluster::schedule::{RunSchedule, Work};

/// Where the run is.
#[derive(Debug)]
pub struct Progress {
    /// Number of committed optimizer updates: some worker reported each of them.
    committed: u64,
    /// The slots of the current piece of work.
    ledger: Ledger,
    /// Ledger of the next step, kept when the exchange that it was sent along with was rolled back.
    ahead: Option<Ledger>,
    /// The step between its exchange and the last report, if there is one.
    pending_commit: Option<PendingCommit>,
}

impl Progress {
    /// A run that goes on with the work of this ledger, whose weights are committed.
    pub fn at(ledger: Ledger) -> Self {
        Self {
            committed: ledger.work().step(),
            ledger,
            ahead: None,
            pending_commit: None,
        }
    }

    /// Number of committed optimizer updates.
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// The current piece of work.
    pub fn work(&self) -> Work {
        self.ledger.work()
    }

    /// The slots of the current piece of work.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    pub fn ledger_mut(&mut self) -> &mut Ledger {
        &mut self.ledger
    }

    /// The slots of that plan, where it is the current work or was sent along with an exchange that was rolled back.
    pub fn ledger_of(&mut self, kind: PlanKind, step: u64) -> Option<&mut Ledger> {
        if self.ledger.work().is(kind, step) {
            return Some(&mut self.ledger);
        }
        let ahead = self.ahead.as_mut();
        ahead.filter(|ahead| ahead.work().is(kind, step))
    }

    /// The step between its exchange and the last report, if there is one.
    pub fn pending_commit(&self) -> Option<&PendingCommit> {
        self.pending_commit.as_ref()
    }

    /// Whether a report of the update that led to `step` would commit it, because its exchange was rolled back.
    pub fn may_commit_late(&self, step: u64) -> bool {
        step == self.committed + 1 && self.ledger.is_exchanged()
    }

    /// Whether a worker may have a slot in hand, also of work that was sent along with an exchange that was rolled back.
    pub fn may_be_busy(&self, worker: WorkerId) -> bool {
        let ledgers = [Some(&self.ledger), self.ahead.as_ref()];
        let mut queues = ledgers.into_iter().flatten().map(|one| one.queue(worker));
        queues.any(|queue| queue.is_some_and(|queue: &Queue| !queue.is_empty()))
    }

    /// Frees all slots of a worker that is lost.
    pub fn release(&mut self, worker: WorkerId) {
        self.ledger.release(worker);
        self.release_ahead(worker);
        if let Some(pending) = &mut self.pending_commit {
            pending.release(worker);
        }
    }

    /// Frees the slots that a worker held of work whose exchange was rolled back: it has entered, so it dropped them.
    pub fn release_ahead(&mut self, worker: WorkerId) {
        if let Some(ahead) = &mut self.ahead {
            ahead.release(worker);
        }
    }

    /// Moves what is awaited since some time: the driver did not listen for so long.
    pub fn postpone(&mut self, by: Duration) {
        self.ledger.postpone(by);
        if let Some(pending) = &mut self.pending_commit {
            pending.postpone(by);
        }
    }

    /// Goes on with the work of `next`. Returns the ledger of the work before it.
    pub fn begin(&mut self, next: Ledger) -> Ledger {
        self.ahead = None;
        std::mem::replace(&mut self.ledger, next)
    }

    /// Awaits the reports of the step of this ledger, whose members are told now to exchange.
    pub fn await_reports(&mut self, now: Instant, ledger: Ledger) {
        self.pending_commit = Some(PendingCommit::ordered(now, ledger));
    }

    /// Adds a report of the step that is being committed. The first one commits it: then `lap` says in how many seconds since its
    /// beginning. True where it did.
    pub fn report(
        &mut self,
        worker: WorkerId,
        report: v1::StepReport,
        lap: impl FnOnce() -> f64,
    ) -> bool {
        let Some(pending) = &mut self.pending_commit else {
            return false;
        };
        let is_first = pending.report(worker, report, lap);
        if is_first {
            self.committed = pending.step();
        }
        is_first
    }

    /// Commits the current step by a report that came when its exchange was thought to be broken, and goes on with the work after it.
    pub fn commit_late(
        &mut self,
        schedule: &RunSchedule,
        worker: WorkerId,
        report: v1::StepReport,
        seconds: Option<f64>,
    ) {
        let work = schedule.following(self.work());
        let ahead = self.ahead.take().filter(|ahead| ahead.work() == work);
        let next = ahead.unwrap_or_else(|| Ledger::of(schedule, work));
        let ledger = std::mem::replace(&mut self.ledger, next);
        self.committed = report.step;
        let reports = [(worker, report)].into_iter().collect();
        self.pending_commit = Some(PendingCommit::recalled(ledger, reports, seconds));
    }

    /// Takes out the step that is being committed, to settle it.
    pub fn take_pending_commit(&mut self) -> Option<PendingCommit> {
        self.pending_commit.take()
    }

    /// Goes back to before the exchange under way, of which no report came.
    pub fn roll_back_exchange(&mut self) {
        if let Some(pending) = self.pending_commit.take() {
            self.fall_back_to(pending.into_ledger());
        }
    }

    /// Goes back to the work of `ledger`, and keeps the slots of the work so far.
    pub fn fall_back_to(&mut self, ledger: Ledger) {
        self.committed = ledger.work().step();
        self.ahead = Some(std::mem::replace(&mut self.ledger, ledger));
    }

    /// Goes on with the work of `ledger`, whose weights nobody here made.
    pub fn skip_to(&mut self, ledger: Ledger) {
        self.committed = ledger.work().step();
        self.ledger = ledger;
        self.ahead = None;
    }

    /// Goes on after `step` updates: with the slots that were kept of the work there, else with those of `anew`.
    pub fn move_on_to(&mut self, step: u64, anew: Ledger) {
        let ahead = self
            .ahead
            .take()
            .filter(|ahead| ahead.work().step() == step);
        self.committed = step;
        self.ledger = ahead.unwrap_or(anew);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::tests::course;

    const WORKER: WorkerId = WorkerId(1);

    /// The first of six steps is being exchanged, and a slot of the second one is leased.
    fn exchanging() -> Progress {
        let course = course(6, 4);
        let mut progress = Progress::at(Ledger::of(&course, Work::Train(0)));
        let before = progress.begin(Ledger::of(&course, Work::Train(1)));
        progress.await_reports(Instant::now(), before);
        progress.ledger_mut().lease(WORKER);
        progress
    }

    fn report(step: u64) -> v1::StepReport {
        v1::StepReport {
            step,
            ..Default::default()
        }
    }

    #[test]
    fn the_first_report_commits_the_step() {
        let mut progress = exchanging();
        assert_eq!(progress.committed(), 0);
        assert!(progress.report(WORKER, report(1), || 1.0));
        assert_eq!(progress.committed(), 1);
    }

    #[test]
    fn an_exchange_that_was_rolled_back_is_committed_by_a_late_report_and_keeps_the_leases_after_it()
     {
        let mut progress = exchanging();
        progress.roll_back_exchange();
        assert_eq!(progress.work(), Work::Train(0));
        assert!(progress.may_be_busy(WORKER) && progress.may_commit_late(1));
        progress.commit_late(&course(6, 4), WORKER, report(1), None);
        assert_eq!((progress.committed(), progress.work()), (1, Work::Train(1)));
        assert!(progress.ledger().is_leased(WORKER, 0));
    }
}
