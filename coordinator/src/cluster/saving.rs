//! When state is asked for, from whom, and what happens when it does not come.

use std::path::PathBuf;

use super::command::{Command, Outcome};
use super::event::WorkerId;
use super::{Cluster, Stage};
use crate::events::RunEvent;

/// How often the result of the run is asked for before the run fails.
const MAX_LAST_ATTEMPTS: u32 = 3;

#[derive(Clone, Copy, Debug)]
struct Pending {
    worker: WorkerId,
    step: u64,
    last: bool,
}

/// States asked for and stored. One is on its way at a time.
#[derive(Debug)]
pub struct Saving {
    pending: Option<Pending>,
    /// A checkpoint could not be had when it was due: take the next one.
    overdue: bool,
    stored: u64,
    failed_attempts: u32,
}

impl Saving {
    pub fn new(start_step: u64) -> Self {
        Self {
            pending: None,
            overdue: false,
            stored: start_step,
            failed_attempts: 0,
        }
    }

    /// Updates in the newest state on disk, or in the one that the run started from.
    pub fn stored(&self) -> u64 {
        self.stored
    }

    /// Makes a checkpoint due after the next step.
    #[cfg(test)]
    pub fn overdue(&mut self) {
        self.overdue = true;
    }

    pub fn worker_lost(&mut self, worker: WorkerId) {
        if let Some(pending) = self.pending
            && pending.worker == worker
        {
            self.pending = None;
            self.overdue |= !pending.last;
        }
    }
}

impl Cluster {
    /// Asks for the state after `step` updates if a checkpoint is due then. Comes before the plan of `step`, so that the
    /// worker still has that state when it reads this.
    pub(super) fn request_checkpoint(&mut self, step: u64, commands: &mut Vec<Command>) {
        let last = step >= self.course.total_steps();
        if last || !(self.course.saves_after(step) || self.saving.overdue) {
            return;
        }
        if self.saving.pending.is_some() {
            self.saving.overdue = true;
            return;
        }
        if let Some(&worker) = self.members.ranks().first() {
            self.saving.overdue = false;
            self.request(worker, step, false, commands);
        }
    }

    pub(super) fn request_last_state(&mut self, step: u64, commands: &mut Vec<Command>) {
        if self.saving.pending.is_none()
            && let Some(worker) = self.members.first_at(step)
        {
            self.request(worker, step, true, commands);
        }
    }

    fn request(&mut self, worker: WorkerId, step: u64, last: bool, commands: &mut Vec<Command>) {
        self.saving.pending = Some(Pending { worker, step, last });
        commands.push(Command::RequestState { worker, step, last });
    }

    pub(super) fn state_stored(
        &mut self,
        now: std::time::Instant,
        step: u64,
        path: PathBuf,
        commands: &mut Vec<Command>,
    ) {
        let Some(pending) = self.saving.pending.take_if(|pending| pending.step == step) else {
            return;
        };
        self.saving.stored = step;
        self.saving.failed_attempts = 0;
        if pending.last {
            let weights_digest = self.weights_digest(step).unwrap_or_default().to_owned();
            let outcome = Outcome::Finished {
                step,
                weights_digest,
            };
            return self.end(outcome, commands);
        }
        commands.push(Command::Emit(RunEvent::CheckpointSaved { step, path }));
        self.proceed(now, commands);
    }

    pub(super) fn state_failed(
        &mut self,
        now: std::time::Instant,
        step: u64,
        reason: &str,
        commands: &mut Vec<Command>,
    ) {
        let Some(pending) = self.saving.pending.take_if(|pending| pending.step == step) else {
            return;
        };
        self.saving.failed_attempts += 1;
        let notice = format!("the state after step {step} was not saved: {reason}");
        if pending.last && self.saving.failed_attempts >= MAX_LAST_ATTEMPTS {
            return self.fail(notice, commands);
        }
        commands.push(Command::Emit(RunEvent::Notice(notice)));
        if self.stopping.is_some() {
            return self.stop(commands);
        }
        self.proceed(now, commands);
    }

    /// Stores the newest state, unless it is on disk already, and ends the run.
    pub(super) fn proceed_to_stop(&mut self, commands: &mut Vec<Command>) {
        let undecided = self
            .settling
            .as_ref()
            .is_some_and(|settling| settling.committed_after.is_none());
        if self.saving.pending.is_some() || undecided || self.stage == Stage::Ended {
            return;
        }
        let holder = self.members.first_at(self.committed);
        match holder {
            Some(worker) if self.saving.stored < self.committed => {
                self.request(worker, self.committed, false, commands);
            }
            _ => self.stop(commands),
        }
    }

    fn stop(&mut self, commands: &mut Vec<Command>) {
        let outcome = Outcome::Stopped {
            step: self.saving.stored,
            reason: self.stopping.clone().unwrap_or_default(),
        };
        self.end(outcome, commands);
    }
}
