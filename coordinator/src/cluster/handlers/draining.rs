//! Workers that were asked to stop, and when they are let go.
//!
//! Such a worker gets no more slots and gives back what it has not begun. What is in its accumulator counts in the step's
//! exchange, so it stays until then, if there is anybody to end the step with. The last one that holds the committed state
//! hands it over as a checkpoint first.

use std::time::Instant;

use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::membership::Worker;
use crate::cluster::parts::queue::Queue;
use crate::cluster::parts::saving::only_saved;

impl Cluster {
    /// Begins to drain a worker: it gets no more slots and gives back those that it has not begun.
    pub(super) fn drain(
        &mut self,
        now: Instant,
        id: WorkerId,
        reason: String,
        commands: &mut Vec<Command>,
    ) {
        if !self.members.drain(id, reason) {
            return;
        }
        let queue = self.progress.ledger().queue(id);
        let in_hand = queue.and_then(Queue::in_hand).map(|(slot, _)| slot);
        let waiting = queue.into_iter().flat_map(Queue::kept);
        let waiting = waiting.map(|(_, slot)| slot);
        let waiting: Vec<u32> = waiting.filter(|slot| Some(*slot) != in_hand).collect();
        if !waiting.is_empty() {
            self.recall(id, &waiting, now, commands);
        }
    }

    /// Begins to drain a worker that others cannot reach; it is refused when it has handed over what it holds.
    pub(super) fn drain_at_fault(
        &mut self,
        now: Instant,
        id: WorkerId,
        reason: String,
        commands: &mut Vec<Command>,
    ) {
        self.drain(now, id, reason, commands);
        self.members.blame_draining(id);
    }

    /// Lets go of those who were asked to stop and have nothing left that counts.
    pub(super) fn release_drained(&mut self, now: Instant, commands: &mut Vec<Command>) {
        if self.term.is_stopping() || self.term.is_rejoin_window_open() {
            return;
        }
        let mut released = false;
        for worker in self.members.draining() {
            let Some(handed_over) = self.has_handed_over(now, worker, commands) else {
                continue;
            };
            let Some(draining) = self.members.end_draining(worker) else {
                continue;
            };
            let reason = draining.reason.clone();
            let finish = v1::Finish {
                failed: false,
                reason: handed_over,
                resumable: false,
            };
            commands.push(match draining.is_at_fault {
                true => Command::Refuse { worker, reason },
                false => Command::SendFinish { worker, finish },
            });
            self.forget(worker, &draining.reason, commands);
            released = true;
        }
        if released && !self.generation.is_over() {
            self.send_back_to_disk(commands);
            self.reconfigure_if_member_lost(now, commands);
        }
    }

    /// Expels workers that are behind a state which only the disk has: they come back and load it.
    fn send_back_to_disk(&mut self, commands: &mut Vec<Command>) {
        let step = self.progress.committed();
        if !self.is_only_saved(step) {
            return;
        }
        for worker in self.members.ids() {
            let behind = |worker: &Worker| worker.ready.is_some() && worker.seen < step;
            if self.members.get(worker).is_some_and(behind) {
                let reason = only_saved(step);
                self.forget(worker, &reason, commands);
                commands.push(Command::Expel { worker, reason });
            }
        }
    }

    /// Whether nobody who is here has the state after `step` updates, but it is on disk.
    pub(super) fn is_only_saved(&self, step: u64) -> bool {
        self.members.first_at(step).is_none() && self.saving.stored() == step
    }

    /// What became of the worker's work, in words for it, if it may go; else None.
    fn has_handed_over(
        &mut self,
        now: Instant,
        id: WorkerId,
        commands: &mut Vec<Command>,
    ) -> Option<String> {
        let worker = self.members.get(id)?;
        if worker.ready.is_none() {
            return Some("it had no state yet".to_owned());
        }
        if self.feeds.follows(id) && self.members.rank_of(id).is_none() {
            return Some("it was still copying the others' state".to_owned());
        }
        let (seen, is_member) = (worker.seen, self.members.rank_of(id).is_some());
        let has_leases = self
            .progress
            .ledger()
            .queue(id)
            .is_some_and(|queue| !queue.is_empty());
        let is_exchanging = is_member && self.progress.pending_commit().is_some();
        if has_leases || is_exchanging || self.saving.is_asked(id) {
            return None;
        }
        let counts = self.progress.ledger().is_training() && self.progress.ledger().is_holder(id);
        if counts && self.others_go_on() {
            return None;
        }
        let step = self.progress.committed();
        if seen < step || self.is_held_by_another(step) {
            return Some("its work is counted and the others go on".to_owned());
        }
        if self.saving.stored() >= step {
            let text = "nobody else is here, and the state after step";
            return Some(format!("{text} {step} is saved"));
        }
        self.ask_for_state(now, id, step, commands);
        None
    }

    /// Asks a draining worker for the committed state, once: where it cannot be saved, the worker goes when it has waited enough.
    fn ask_for_state(
        &mut self,
        now: Instant,
        id: WorkerId,
        step: u64,
        commands: &mut Vec<Command>,
    ) {
        if !self.saving.is_awaited(step) && self.members.asks_for_state(id) {
            self.request(now, id, (step, false), commands);
        }
    }

    /// Whether some member stays to end the step.
    fn others_go_on(&self) -> bool {
        let stays = |id: &WorkerId| !self.members.is_draining(*id);
        self.generation.is_running() && self.members.ranks().iter().any(stays)
    }

    /// Whether a worker that stays has the state after `step` updates.
    fn is_held_by_another(&self, step: u64) -> bool {
        let holds = |id: &WorkerId| {
            let worker = self.members.get(*id);
            !self.members.is_draining(*id)
                && worker.is_some_and(|worker| worker.ready.is_some() && worker.seen == step)
        };
        self.members.ids().iter().any(holds)
    }
}
