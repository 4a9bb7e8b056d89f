//! Recovery: workers that outlived a coordinator or a session, with the state they hold.
//!
//! A new term knows from its journal how far the run had come, but not what its workers hold. It begins with whoever is
//! there, after a moment for those of the last generation who are about to come back; a worker that comes later with a
//! newer state takes the others along to it. The records that the journal lost are completed from what the workers still
//! know, and the slots in their accumulators are taken over.

use std::collections::BTreeMap;
use std::time::Instant;

use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::ledger::{Ledger, SlotResult};
use crate::cluster::parts::membership;
use crate::cluster::parts::pending_commit::PendingCommit;
use crate::cluster::parts::rejoin_window::ABSENT;
use crate::cluster::run_event::RunEvent;
use crate::cluster::schedule::Work;

impl Cluster {
    /// When the run begins with whoever is there. None where the workers of an earlier term are not waited for, and
    /// where nobody else is there who could begin.
    pub(super) fn rejoin_window_ends_at(&self) -> Option<Instant> {
        let is_one_busy = self.members.is_one_returning();
        let at = self.term.rejoin_window_ends_at(is_one_busy);
        at.filter(|_| self.members.ready_count() > 0)
    }

    /// Tells the user that workers of an earlier term are waited for, and ends the waiting where it is over.
    pub(super) fn watch_rejoin_window(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let (start, newest) = (self.settings.start_step, self.stats.recorded());
        let back = self.members.veterans_beyond(start);
        let Some(returned) = self.term.note_returned(now, back) else {
            return;
        };
        if returned.is_untold {
            let text = format!(
                "the workers had come to step {newest} before the coordinator died, the newest state on disk is of step \
                 {start}: {back} of {} are back; in {} s the run goes on with whoever is there, and one who comes later \
                 takes it along",
                returned.expected,
                ABSENT.as_secs()
            );
            commands.push(Command::Emit(RunEvent::Notice(text)));
        }
        if returned.is_complete || self.rejoin_window_ends_at().is_some_and(|at| at <= now) {
            self.end_rejoin_window(now, commands);
        }
    }

    /// Ends the waiting and goes on with whoever is there.
    fn end_rejoin_window(&mut self, now: Instant, commands: &mut Vec<Command>) {
        self.take_newest(commands);
        if self.generation.is_waiting() {
            self.start_generation(now, commands);
        }
    }

    /// Ends the waiting: the newest state of those who are back is the run's.
    pub(super) fn take_newest(&mut self, commands: &mut Vec<Command>) {
        if !self.term.close_rejoin_window() {
            return;
        }
        if let Some(step) = self.members.newest_veteran()
            && step > self.progress.committed()
        {
            self.move_on_to(step, commands);
        }
    }

    /// Admits workers of any numerics class, if nobody of the class that computed so far came in time to begin.
    pub(super) fn open_class(&mut self, now: Instant) {
        let is_over = |until: Instant| now >= until;
        if self.generation.is_before_first() && self.term.class_kept_until().is_some_and(is_over) {
            self.generation.open_numerics_class();
        }
    }

    /// What to add to the refusal of a worker of the class `found`.
    pub(super) fn class_hint(&self, now: Instant, found: &str) -> Option<String> {
        let class = self.generation.numerics_class();
        let is_other = class.is_some_and(|class| class != found);
        let ends = self.term.class_kept_until();
        let ends = ends.filter(|_| self.generation.is_before_first())?;
        let left = ends.saturating_duration_since(now).as_secs_f64().ceil();
        (is_other && left > 0.0).then(|| {
            format!("; the workers of before may still come back: start this one again in {left} s")
        })
    }

    /// Whether a worker that is back has the state that the others are at, and may enter in mid-step with the slots it holds.
    pub(super) fn may_bring_slots(&self, id: WorkerId) -> bool {
        let is_there = |worker: &membership::Worker| {
            worker.rejoined_with_state
                && worker.held_slots_unknown
                && worker.seen == self.progress.committed()
        };
        let ranks = self.members.ranks().len();
        let has_room = self.settings.max_workers.is_none_or(|max| ranks < max);
        let is_open = self.progress.pending_commit().is_none()
            && self.progress.ledger().is_training()
            && !self.progress.ledger().is_exchanged()
            && !self.progress.ledger().is_complete();
        let may = self.generation.is_running() && !self.term.is_stopping();
        let is_back = self.members.get(id).is_some_and(is_there);
        may && is_open && has_room && is_back && self.entrants().contains(&id)
    }

    /// A worker came back with a state that is newer than what the others go on from.
    pub(super) fn welcome_back(
        &mut self,
        now: Instant,
        id: WorkerId,
        step: u64,
        commands: &mut Vec<Command>,
    ) {
        let report = self.members.update_of(id, step);
        let report = report.and_then(|update| update.report.clone());
        if let Some(report) = report
            && self.reports_for(step)
        {
            return self.step_reported(now, id, report, commands);
        }
        self.roll_forward_to_held_state(now, id, step, commands);
    }

    /// Whether a report of the update that led to `step` would be in time.
    fn reports_for(&self, step: u64) -> bool {
        match self.progress.pending_commit() {
            Some(pending) => pending.step() == step,
            None => self.progress.may_commit_late(step),
        }
    }

    /// Lets the run go on after `step` updates; what has no record gets one, where the workers know enough.
    pub(super) fn move_on_to(&mut self, step: u64, commands: &mut Vec<Command>) {
        self.complete_records(step, commands);
        if self.generation.is_over() {
            return;
        }
        self.tell_lost_evaluations(step, commands);
        self.pass_over_best(step, commands);
        self.saving.pass_over(self.progress.committed(), step);
        let anew = self.ledger_from(step);
        self.progress.move_on_to(step, anew);
    }

    /// Records the steps up to `last` from the updates that the workers remember.
    fn complete_records(&mut self, last: u64, commands: &mut Vec<Command>) {
        for step in self.stats.recorded() + 1..=last {
            let (reports, ledger) = self.remembered(step);
            if reports.is_empty() || ledger.means().is_none() {
                let text = format!("the record of step {step} is lost with those who knew it");
                commands.push(Command::Emit(RunEvent::Notice(text)));
                self.stats.skip_to(&self.schedule, step);
                continue;
            }
            self.settle(&PendingCommit::recalled(ledger, reports, None), commands);
            if self.generation.is_over() {
                return;
            }
        }
    }

    /// What the workers know of the update that led to `step`: their reports, and a ledger with the results of its slots.
    fn remembered(&self, step: u64) -> (BTreeMap<WorkerId, v1::StepReport>, Ledger) {
        let mut ledger = Ledger::of(&self.schedule, Work::Train(step - 1));
        let mut reports = BTreeMap::new();
        for id in self.members.ids() {
            let Some(update) = self.members.update_of(id, step) else {
                continue;
            };
            for slot in &update.slots {
                if ledger.trained_tokens_of(slot.slot) == Some(slot.trained_tokens) {
                    ledger.learn(slot.slot, result(slot));
                }
            }
            if let Some(report) = &update.report {
                reports.insert(id, report.clone());
            }
        }
        (reports, ledger)
    }

    /// Takes over what the accumulator of `id` holds, or has it emptied. An error says what is wrong with it.
    pub(super) fn adopt_slots(
        &mut self,
        id: WorkerId,
        entered: &v1::Entered,
    ) -> Result<(), String> {
        let held: BTreeMap<u32, SlotResult> = entered
            .held
            .iter()
            .map(|slot| (slot.slot, result(slot)))
            .collect();
        if held.len() != entered.held.len() {
            return Err("it holds a slot twice".to_owned());
        }
        let is_training = self.progress.ledger().is_training();
        for slot in entered.held.iter().filter(|_| is_training) {
            let planned = self.progress.ledger().trained_tokens_of(slot.slot);
            if planned != Some(slot.trained_tokens) {
                return Err(format!(
                    "it holds slot {} of step {} with {} trained tokens where the plan says {}",
                    slot.slot,
                    entered.step + 1,
                    slot.trained_tokens,
                    planned.unwrap_or(0)
                ));
            }
        }
        let counts = self.progress.ledger_mut().reconcile(id, &held);
        self.members.note_held_slots(id, counts);
        Ok(())
    }
}

fn result(slot: &v1::HeldSlot) -> SlotResult {
    SlotResult {
        loss_sum: slot.loss_sum,
        correct_tokens: slot.correct_tokens,
        is_invalid: slot.invalid_scalars > 0,
    }
}
