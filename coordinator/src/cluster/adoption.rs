//! Workers that outlived a coordinator or a session, with the state they hold.
//!
//! A new term knows from its journal how far the run had come, but not what its workers hold: it waits a moment for
//! those of the last generation, goes on from the newest state among them, completes the records that the journal lost
//! from what they still know, and takes over the slots in their accumulators.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proto::v1;

use super::command::Command;
use super::event::WorkerId;
use super::ledger::{Ledger, SlotResult};
use super::schedule::Work;
use super::settling::Settling;
use super::{Cluster, Stage, membership};
use crate::events::RunEvent;

/// How long a new term waits for workers that hold more than the newest checkpoint does.
const GRACE: Duration = Duration::from_secs(15);
/// Once one of them is back with the newest state, how long the others may still take: a little longer than a worker
/// pauses between two attempts.
const REUNION: Duration = Duration::from_secs(4);
/// Between two words on how long it will be.
const COUNTDOWN: Duration = Duration::from_secs(5);

/// What the journal says of the terms before this one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Earlier {
    /// Updates after the last step on record.
    pub recorded: u64,
    /// Of the weights after them, where it was asked for.
    pub weights_digest: Option<String>,
    /// Up to `recorded`.
    pub skipped_in_a_row: u64,
    /// Number of the last generation.
    pub generation: u64,
    /// Its members, without those that died with the coordinator because they lived in its process.
    pub workers: usize,
    pub numerics_class: Option<String>,
}

/// The time in which the workers of an earlier term may come back.
#[derive(Debug)]
pub struct Grace {
    expected: usize,
    /// The first event of this term.
    began: Option<Instant>,
    /// Since when one is back with the newest state on record.
    united: Option<Instant>,
    last_told: Option<Instant>,
}

impl Grace {
    /// None where nothing is to be gained by waiting.
    pub fn of(earlier: &Earlier, start_step: u64) -> Option<Self> {
        (earlier.recorded > start_step && earlier.workers > 0).then_some(Self {
            expected: earlier.workers,
            began: None,
            united: None,
            last_told: None,
        })
    }

    /// When it is over at the latest.
    fn end(&self, now: Instant) -> Instant {
        let end = self.began.unwrap_or(now) + GRACE;
        self.united.map_or(end, |united| end.min(united + REUNION))
    }
}

impl Cluster {
    /// Begins to wait, tells how it goes, and ends it where it is over.
    pub(super) fn watch_grace(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let start = self.settings.start_step;
        let newest = self.pace.recorded();
        let back = self.members.veterans_beyond(start);
        let has_newest = self.members.veterans_beyond(newest.saturating_sub(1)) > 0;
        let Some(grace) = &mut self.grace else {
            return;
        };
        grace.began.get_or_insert(now);
        if has_newest {
            grace.united.get_or_insert(now);
        }
        let end = grace.end(now);
        if back >= grace.expected || now >= end {
            return self.end_grace(now, commands);
        }
        let due = |last: Instant| now.duration_since(last) >= COUNTDOWN;
        if grace.last_told.is_none_or(due) {
            grace.last_told = Some(now);
            let text = format!(
                "the workers had come to step {newest} before the coordinator died, the newest state on disk is of step \
                 {start}: waiting {} s for them ({back} of {} are back)",
                end.duration_since(now).as_secs_f64().ceil(),
                grace.expected
            );
            commands.push(Command::Emit(RunEvent::Notice(text)));
        }
    }

    /// Goes on with whoever is there.
    fn end_grace(&mut self, now: Instant, commands: &mut Vec<Command>) {
        self.take_newest(commands);
        if self.stage == Stage::Waiting {
            self.reform(now, commands);
        }
    }

    /// Ends the waiting: the newest state of those who are back is the run's.
    pub(super) fn take_newest(&mut self, commands: &mut Vec<Command>) {
        if self.grace.take().is_none() {
            return;
        }
        if self.members.veterans_beyond(self.settings.start_step) == 0 {
            // Nobody is left whose bits others would have to match.
            self.numerics_class = None;
        }
        if let Some(step) = self.members.newest_veteran()
            && step > self.committed
        {
            self.move_on_to(step, commands);
        }
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
        self.catch_up(now, id, step, commands);
    }

    /// A report of the update that led to `step` would be in time.
    fn reports_for(&self, step: u64) -> bool {
        match &self.settling {
            Some(settling) => settling.ledger.work.step() + 1 == step,
            None => step == self.committed + 1 && self.ledger.exchanged,
        }
    }

    /// The run goes on after `step` updates; what has no record gets one, where the workers know enough.
    pub(super) fn move_on_to(&mut self, step: u64, commands: &mut Vec<Command>) {
        self.complete_records(step, commands);
        if self.stage == Stage::Ended {
            return;
        }
        self.tell_lost_evaluations(step, commands);
        self.committed = step;
        self.ledger = match self.ahead.take() {
            Some(ahead) if ahead.work.step() == step => ahead,
            _ => {
                let work = self.work_from(step);
                Ledger::new(work, self.course.slots(work))
            }
        };
    }

    /// Records the steps up to `last` from the updates that the workers remember.
    fn complete_records(&mut self, last: u64, commands: &mut Vec<Command>) {
        for step in self.pace.recorded() + 1..=last {
            let (reports, ledger) = self.remembered(step);
            if reports.is_empty() || ledger.means().is_none() {
                let text = format!("the record of step {step} is lost with those who knew it");
                commands.push(Command::Emit(RunEvent::Notice(text)));
                self.pace.skip_to(&self.course, step);
                continue;
            }
            self.settling = Some(Settling {
                ledger,
                reports,
                ordered: None,
                committed_after: None,
            });
            self.settle(commands);
            if self.stage == Stage::Ended {
                return;
            }
        }
    }

    /// What the workers know of the update that led to `step`.
    fn remembered(&self, step: u64) -> (BTreeMap<WorkerId, v1::StepReport>, Ledger) {
        let work = Work::Train(step - 1);
        let mut ledger = Ledger::new(work, self.course.slots(work));
        let mut reports = BTreeMap::new();
        for id in self.members.ids() {
            let Some(update) = self.members.update_of(id, step) else {
                continue;
            };
            for slot in &update.slots {
                if ledger.slots.get(slot.slot as usize) == Some(&slot.trained_tokens) {
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
        let is_training = matches!(self.ledger.work, Work::Train(_));
        for slot in entered.held.iter().filter(|_| is_training) {
            let planned = self.ledger.slots.get(slot.slot as usize).copied();
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
        let counts = self.ledger.reconcile(id, &held);
        if let Some(worker) = self.members.get_mut(id) {
            worker.must_clear = !counts;
            worker.is_unheard = false;
        }
        Ok(())
    }

    /// Why a worker with this state cannot go on with it here. It may come back as a newcomer.
    pub(super) fn foreign_state(&self, join: &v1::Join) -> Option<String> {
        let is_foreign = !join.job_digest.is_empty() && join.run != self.settings.run;
        is_foreign.then(|| {
            format!(
                "it holds the state of another run of this job ({} there, {} here)",
                membership::short(&join.run),
                membership::short(&self.settings.run)
            )
        })
    }
}

fn result(slot: &v1::HeldSlot) -> SlotResult {
    SlotResult {
        loss_sum: slot.loss_sum,
        correct_tokens: slot.correct_tokens,
        is_invalid: slot.invalid_scalars > 0,
    }
}
