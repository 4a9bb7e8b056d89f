//! Slots that come back from the workers: computed, or given back before that.

use std::time::{Duration, Instant};

use common::wire::PlanKind;
use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::ledger::SlotResult;
use crate::cluster::parts::queue::Queue;
use crate::cluster::parts::slot_eta::seconds_between;

impl Cluster {
    /// A worker has computed a slot: its result counts if the slot was leased to it, and it gets the next one.
    pub(super) fn slot_done(
        &mut self,
        now: Instant,
        id: WorkerId,
        done: &v1::SlotDone,
        commands: &mut Vec<Command>,
    ) {
        let Ok(kind) = PlanKind::from_wire(done.kind) else {
            return self.expel(
                now,
                id,
                "it computed an unknown kind of plan".into(),
                commands,
            );
        };
        if self.members.get(id).is_none() {
            return;
        }
        let current = self.progress.work().is(kind, done.step);
        let Some(ledger) = self.progress.ledger_of(kind, done.step) else {
            // Of work that is over.
            return;
        };
        let planned = ledger.trained_tokens_of(done.slot);
        if planned != Some(done.trained_tokens) {
            let reason = format!(
                "it counted {} trained tokens in slot {} of step {} where the plan says {}",
                done.trained_tokens,
                done.slot,
                done.step + 1,
                planned.unwrap_or(0)
            );
            return self.expel(now, id, reason, commands);
        }
        let result = SlotResult {
            loss_sum: done.loss_sum,
            correct_tokens: done.correct_tokens,
            is_invalid: done.invalid_scalars > 0,
        };
        if !ledger.complete(id, done.slot, result) {
            // What was leased in a generation before may belong to another by now; Entered settles it.
            if done.generation < self.generation.number() {
                return;
            }
            let reason = format!("it computed slot {}, which was not leased to it", done.slot);
            return self.expel(now, id, reason, commands);
        }
        if done.compute_us > 0 {
            let seconds = Duration::from_micros(done.compute_us).as_secs_f64();
            ledger.note_seconds(id, done.slot, seconds);
            self.slot_times.learn(id, kind, seconds);
        }
        if current {
            self.replenish(id, now, commands);
            self.proceed(now, commands);
        }
    }

    /// Slots that a worker did not add to its accumulator are free again.
    pub(super) fn slots_withdrawn(
        &mut self,
        now: Instant,
        id: WorkerId,
        withdrawn: &v1::Withdrawn,
        commands: &mut Vec<Command>,
    ) {
        let kind = PlanKind::from_wire(withdrawn.kind);
        let kind = kind
            .ok()
            .filter(|kind| self.progress.work().is(*kind, withdrawn.step));
        // Of an earlier generation or step: Entered says, or has said, what the worker holds.
        let (Some(kind), true) = (kind, withdrawn.generation == self.generation.number()) else {
            return;
        };
        for slot in &withdrawn.slots {
            let in_hand = self.progress.ledger().queue(id).and_then(Queue::in_hand);
            if !self.progress.ledger_mut().give_back(id, *slot) {
                let reason = format!("it gave slot {slot} back, which was not leased to it");
                return self.expel(now, id, reason, commands);
            }
            if let Some((_, since)) = in_hand.filter(|(in_hand, _)| in_hand == slot) {
                let elapsed = seconds_between(since, now);
                self.slot_times.at_least(id, kind, elapsed);
                self.progress.ledger_mut().note_tried(*slot, elapsed);
            }
        }
        self.balance(now, commands);
    }
}
