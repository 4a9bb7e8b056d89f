//! Leasing: which free slot goes to which worker, and which leased one is asked back.
//!
//! Slots are leased ahead, so that nobody waits for the next one. Near the end of a step a slot goes only to a worker
//! that finishes it before the others have done the rest without it, and a worker with nothing left to do gets what
//! another has not begun, or has in hand for too long. That one gives the slot back first ([`Event::SlotsWithdrawn`]):
//! so no slot is ever in two accumulators. What was in hand in vain is given more time by the next one: where the slot
//! is what is slow, or everybody, it is not passed around.
//!
//! [`Event::SlotsWithdrawn`]: crate::cluster::Event::SlotsWithdrawn

use std::time::{Duration, Instant};

use common::wire::PlanKind;
use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::queue::Queue;
use crate::cluster::parts::slot_eta::{
    WorkerEta, late_after, remaining, seconds_between, should_lease,
};
use crate::cluster::schedule::Work;

/// Slots that a worker has in hand at a time: it computes one while the other waits.
const LEASE_WINDOW: usize = 2;
/// Seconds that it takes to ask a slot back and lease it anew.
const RECALL_SECONDS: f64 = 0.02;
/// Factor by which another worker must be sooner for a slot that was not begun to change hands.
const RECALL_MARGIN: f64 = 1.1;
/// Factor by which another worker must be sooner for a slot that was begun to change hands: what was done of it is lost.
const RESTART_MARGIN: f64 = 2.0;

/// Added to wake-up times, so that rounding cannot wake us just before a slot counts as late.
const RECHECK_SLACK: Duration = Duration::from_millis(1);

/// A leased slot that might be finished sooner by another.
struct Candidate {
    worker: WorkerId,
    slot: u32,
    /// Seconds until it is to be expected from its worker.
    due_in: f64,
    has_begun: bool,
    /// Seconds for which it was in hand in vain, here or elsewhere.
    tried: f64,
}

impl Candidate {
    /// Whether a worker that takes so many seconds for a slot should have it.
    fn is_sooner_in(&self, seconds: f64) -> bool {
        let margin = match self.has_begun {
            true => RESTART_MARGIN,
            false => RECALL_MARGIN,
        };
        margin * seconds.max(self.tried) + RECALL_SECONDS < self.due_in
    }
}

impl Cluster {
    /// Leases what is free and asks back what others would finish sooner.
    pub(super) fn balance(&mut self, now: Instant, commands: &mut Vec<Command>) {
        self.slot_times.restart(self.unanswered_at());
        let Some(kind) = self.leased_kind() else {
            return;
        };
        let workers = self.workers_at_work();
        self.slot_times.measure(kind);
        self.note_beginnings(&workers, now);
        let mut prospects = self.prospects(&workers, kind, now);
        // Everyone has one before anyone has two.
        for window in 1..=LEASE_WINDOW {
            for index in 0..prospects.len() {
                self.lease_within(&mut prospects, index, window, kind, commands);
            }
        }
        self.note_beginnings(&workers, now);
        self.ask_back(&prospects, kind, now, commands);
    }

    /// Gives a worker that delivered a slot the next one; near the end of a step all leases are balanced instead.
    pub(super) fn replenish(
        &mut self,
        worker: WorkerId,
        now: Instant,
        commands: &mut Vec<Command>,
    ) {
        let Some(kind) = self.leased_kind() else {
            return;
        };
        if self.progress.ledger().free_count() <= self.plenty(kind) {
            return self.balance(now, commands);
        }
        if !self.is_at_work(worker) {
            return;
        }
        self.note_beginnings(&[worker], now);
        let outstanding = self.progress.ledger().queue(worker).map_or(0, Queue::len);
        for _ in outstanding..LEASE_WINDOW {
            self.lease(worker, kind, commands);
        }
    }

    /// The kind of the slots that are leased now. None where none are.
    fn leased_kind(&self) -> Option<PlanKind> {
        // What an unheard one holds need not be computed again, and it answers at once.
        let leases = self.generation.is_running()
            && !self.term.is_stopping()
            && !self.members.is_one_unheard(self.progress.committed());
        match self.progress.work() {
            Work::Train(_) if leases => Some(PlanKind::Train),
            Work::Eval(_) if leases => Some(PlanKind::Eval),
            _ => None,
        }
    }

    fn is_at_work(&self, id: WorkerId) -> bool {
        let is_member = self.members.rank_of(id).is_some();
        is_member && self.takes_leases(id)
    }

    /// Members that take leases, by rank.
    fn workers_at_work(&self) -> Vec<WorkerId> {
        let takes = |id: &WorkerId| self.takes_leases(*id);
        self.members.ranks().iter().copied().filter(takes).collect()
    }

    fn takes_leases(&self, id: WorkerId) -> bool {
        let worker = self.members.get(id);
        worker.is_some_and(|worker| worker.entered) && !self.members.is_draining(id)
    }

    /// Number of free slots at which even the slowest worker finishes its next ones before the others have done all of them.
    fn plenty(&self, kind: PlanKind) -> usize {
        let rounds = (LEASE_WINDOW as f64 + 1.0) * self.slot_times.spread(kind);
        (self.members.ranks().len() as f64 * rounds).ceil() as usize
    }

    /// Notes that each worker which has leases, and the weights that they are for, is at its first slot.
    fn note_beginnings(&mut self, workers: &[WorkerId], now: Instant) {
        let step = self.progress.work().step();
        for id in workers {
            if self
                .members
                .get(*id)
                .is_some_and(|worker| worker.seen == step)
            {
                self.progress.ledger_mut().begin_next(*id, now);
                let in_hand = self.progress.ledger().queue(*id).and_then(Queue::in_hand);
                if in_hand.is_some_and(|(_, since)| since == now) {
                    self.await_slot(now, *id);
                }
            }
        }
    }

    /// What each worker takes for a slot and when it will be free, in seconds.
    fn prospects(&self, workers: &[WorkerId], kind: PlanKind, now: Instant) -> Vec<WorkerEta> {
        let typical = self.slot_times.typical(kind).unwrap_or(1.0);
        let prospect = |id: &WorkerId| {
            let seconds = self.slot_times.of(*id, kind).unwrap_or(typical);
            let queue = self.progress.ledger().queue(*id);
            WorkerEta {
                worker: *id,
                seconds,
                free_in: queue.map_or(0.0, |queue| self.busy_for(queue, seconds, now)),
            }
        };
        workers.iter().map(prospect).collect()
    }

    /// Leases slots to one worker until it has `window` of them, as far as it should get any.
    fn lease_within(
        &mut self,
        prospects: &mut [WorkerEta],
        index: usize,
        window: usize,
        kind: PlanKind,
        commands: &mut Vec<Command>,
    ) {
        let worker = prospects[index].worker;
        let outstanding = self.progress.ledger().queue(worker).map_or(0, Queue::len);
        for _ in outstanding..window {
            let free = self.progress.ledger().free_count();
            if free == 0 || !should_lease(prospects, index, free) {
                return;
            }
            self.lease(worker, kind, commands);
            prospects[index].take();
        }
    }

    fn lease(&mut self, worker: WorkerId, kind: PlanKind, commands: &mut Vec<Command>) {
        let Some(slot) = self.progress.ledger_mut().lease(worker) else {
            return;
        };
        let lease = v1::Lease {
            generation: self.generation.number(),
            step: self.progress.work().step(),
            kind: kind.to_wire(),
            slots: vec![slot],
        };
        commands.push(Command::SendLease { worker, lease });
    }

    /// For each worker that has nothing to do, asks back the slot that would come last from where it is, if the idle one
    /// would be sooner.
    fn ask_back(
        &mut self,
        prospects: &[WorkerEta],
        kind: PlanKind,
        now: Instant,
        commands: &mut Vec<Command>,
    ) {
        let is_idle = |prospect: &&WorkerEta| {
            let queue = self.progress.ledger().queue(prospect.worker);
            queue.is_none_or(Queue::is_empty)
        };
        let mut idle: Vec<f64> = prospects
            .iter()
            .filter(is_idle)
            .map(|p| p.seconds)
            .collect();
        let recalled = self
            .progress
            .ledger()
            .queues()
            .map(|(_, queue)| queue.recalled_count());
        let recalled: usize = recalled.sum();
        idle.sort_by(f64::total_cmp);
        if let Some(soonest) = idle.first() {
            let late = self.next_late(prospects, *soonest, now);
            self.slot_times.expect(late);
        }
        if idle.len() <= recalled
            || self.progress.ledger().free_count() > 0
            || self.slot_times.typical(kind).is_none()
        {
            return;
        }
        let mut candidates = self.candidates(prospects, now);
        candidates.sort_by(|one, other| other.due_in.total_cmp(&one.due_in));
        for (seconds, candidate) in idle.into_iter().skip(recalled).zip(candidates) {
            if candidate.is_sooner_in(seconds) {
                self.recall(candidate.worker, &[candidate.slot], now, commands);
            }
        }
    }

    /// Leased slots that might be asked back: those that have not begun, and those in hand that are late.
    fn candidates(&self, prospects: &[WorkerEta], now: Instant) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        for WorkerEta {
            worker, seconds, ..
        } in prospects
        {
            let Some(queue) = self.progress.ledger().queue(*worker) else {
                continue;
            };
            let in_hand = queue.in_hand();
            let elapsed = in_hand.map_or(0.0, |(_, since)| seconds_between(since, now));
            let expected = in_hand.map_or(0.0, |(slot, _)| self.expected(slot, *seconds));
            let is_late = in_hand.is_some() && elapsed >= late_after(expected);
            // What is late may well take as long again.
            let first = match is_late {
                true => elapsed,
                false => (expected - elapsed).max(0.0),
            };
            for (before, slot) in queue.kept() {
                let has_begun = before == 0 && in_hand.is_some();
                if !has_begun || is_late {
                    candidates.push(Candidate {
                        worker: *worker,
                        slot,
                        due_in: first + before as f64 * seconds,
                        has_begun,
                        tried: self.progress.ledger().tried(slot),
                    });
                }
            }
        }
        candidates
    }

    /// Seconds that a slot in hand is likely to take, of a worker that takes `seconds` as a rule.
    fn expected(&self, slot: u32, seconds: f64) -> f64 {
        seconds.max(self.progress.ledger().tried(slot))
    }

    /// Seconds until a worker has computed what it has.
    fn busy_for(&self, queue: &Queue, seconds: f64, now: Instant) -> f64 {
        let kept = queue.kept().count() as f64;
        match queue.in_hand() {
            // Who is asked for the slot in hand has taken too long.
            Some((slot, _)) if queue.is_recalled(slot) => f64::INFINITY,
            Some((slot, since)) => {
                let elapsed = seconds_between(since, now);
                remaining(self.expected(slot, seconds), elapsed) + (kept - 1.0) * seconds
            }
            None => kept * seconds,
        }
    }

    /// When the next slot in hand will be so late that a worker that takes `soonest` seconds for one should have it.
    fn next_late(&self, prospects: &[WorkerEta], soonest: f64, now: Instant) -> Option<Instant> {
        let late_at = |prospect: &WorkerEta| {
            let (slot, since) = self.progress.ledger().queue(prospect.worker)?.in_hand()?;
            let late = late_after(self.expected(slot, prospect.seconds));
            let restart = RESTART_MARGIN * self.expected(slot, soonest) + RECALL_SECONDS;
            let after = Duration::try_from_secs_f64(late.max(restart)).ok()?;
            Some(since + after + RECHECK_SLACK)
        };
        let late = prospects.iter().filter_map(late_at);
        late.filter(|at| *at > now).min()
    }

    /// Asks a worker to give slots back.
    pub(super) fn recall(
        &mut self,
        worker: WorkerId,
        slots: &[u32],
        now: Instant,
        commands: &mut Vec<Command>,
    ) {
        let kind = match self.progress.work() {
            Work::Eval(_) => PlanKind::Eval,
            Work::Train(_) | Work::Store(_) => PlanKind::Train,
        };
        for slot in slots {
            self.progress.ledger_mut().recall(worker, *slot, now);
        }
        let withdraw = v1::Withdraw {
            generation: self.generation.number(),
            step: self.progress.work().step(),
            kind: kind.to_wire(),
            slots: slots.to_vec(),
        };
        commands.push(Command::SendWithdraw { worker, withdraw });
        self.slot_times.expect(self.unanswered_at());
    }

    /// When the first worker is expelled that does not answer for a slot which it was asked back.
    fn unanswered_at(&self) -> Option<Instant> {
        let queues = self.progress.ledger().queues();
        let due = queues.filter_map(|(worker, queue)| Some(self.answer_due(worker, queue)?.0));
        due.min()
    }

    /// When the worker must have answered for what was asked back, and how long it may take from then on that it was
    /// asked. The answer may be that the slot is done.
    fn answer_due(&self, worker: WorkerId, queue: &Queue) -> Option<(Instant, Duration)> {
        let asked = queue.recalled_since()?;
        let begun = queue.in_hand().map_or(asked, |(_, since)| since);
        let timeout = self.slot_timeout(worker, seconds_between(begun, asked));
        Some((asked + timeout, timeout))
    }

    /// Expels a worker that does not answer for a slot, else balances the leases: a slot in hand may be late by now.
    pub(super) fn rebalance(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let stuck = self.progress.ledger().queues().find_map(|(worker, queue)| {
            let (due, timeout) = self.answer_due(worker, queue)?;
            (due <= now).then_some((worker, timeout))
        });
        if let Some((worker, timeout)) = stuck {
            let reason = format!(
                "its engine did not answer for {:.1} s",
                timeout.as_secs_f64()
            );
            return self.expel(now, worker, reason, commands);
        }
        self.balance(now, commands);
    }
}
