//! Checkpoints and the result: when a state is asked for, from whom, and what happens when it does not come.

use std::path::PathBuf;
use std::time::Instant;

use crate::cluster::Cluster;
use crate::cluster::command::{Command, Outcome};
use crate::cluster::event::WorkerId;
use crate::cluster::parts::reply_deadlines::OwedReply;
use crate::cluster::parts::saving::Failure;
use crate::cluster::parts::term::Stop;
use crate::cluster::run_event::RunEvent;

impl Cluster {
    /// Whether a checkpoint must be saved after `step` updates, whatever it costs.
    fn checkpoint_is_ordered(&self, step: u64) -> bool {
        let last = step >= self.schedule.total_steps();
        // By the clock any step does, so it is one whose weights can be proven to be right.
        let can_be_late = !self.schedule.saves_by_the_clock() || self.is_proven(step);
        !last && (self.schedule.saves_after(step) || self.saving.is_overdue() && can_be_late)
    }

    /// Whether it is time for a checkpoint, and the one after `step` updates can be proven to be right.
    fn checkpoint_is_timely(&mut self, now: Instant, step: u64) -> bool {
        let is_due = self.schedule.saves_by_the_clock() && self.saving.interval_is_over(now);
        let last = step >= self.schedule.total_steps();
        is_due && self.is_proven(step) && !last && !self.saving.has_pending()
    }

    /// Whether every member reports the digest of its weights after `step` updates.
    fn is_proven(&self, step: u64) -> bool {
        self.schedule.digests_after(step, self.trainable_scalars())
    }

    /// Whether the step may end: its checkpoint, if one is due, can be asked for.
    pub(super) fn may_end_step(&self, step: u64) -> bool {
        let has_room = self.saving.has_room() || !self.checkpoint_is_ordered(step);
        has_room && !self.is_best_unsaved_before(step)
    }

    /// Asks for the state after `step` updates if a checkpoint is due then. Comes before the plan of `step`, so that the
    /// worker still has that state when it reads this.
    pub(super) fn request_checkpoint(
        &mut self,
        now: Instant,
        step: u64,
        commands: &mut Vec<Command>,
    ) {
        let is_timely = self.checkpoint_is_timely(now, step);
        // Where the exchange is repeated, whoever was asked before the first one still knows.
        if (is_timely || self.checkpoint_is_ordered(step))
            && !self.saving.is_awaited(step)
            && let Some(worker) = self.first_who_stays()
        {
            self.saving.begin_checkpoint(now);
            self.request(now, worker, (step, false), commands);
        }
    }

    /// The first member, better one that was not asked to stop.
    pub(super) fn first_who_stays(&self) -> Option<WorkerId> {
        let ranks = self.members.ranks();
        let stays = |id: &&WorkerId| !self.members.is_draining(**id);
        ranks.iter().find(stays).or(ranks.first()).copied()
    }

    /// Asks a worker for the result of the run, unless a state is on its way or a pause between two attempts is not over.
    pub(super) fn request_last_state(
        &mut self,
        now: Instant,
        step: u64,
        commands: &mut Vec<Command>,
    ) {
        if !self.saving.has_pending()
            && self.saving.retries_at().is_none()
            && let Some(worker) = self.members.first_at(step)
        {
            self.request(now, worker, (step, true), commands);
        }
    }

    /// Asks a worker for the state after `step` updates; `last`: it is the result of the run.
    pub(super) fn request(
        &mut self,
        now: Instant,
        worker: WorkerId,
        (step, last): (u64, bool),
        commands: &mut Vec<Command>,
    ) {
        let digest = self.stats.digest_of(step).map(str::to_owned);
        self.saving.request(worker, (step, last), digest);
        self.await_state(now, worker);
        commands.push(Command::RequestState { worker, step, last });
    }

    /// Notes that a state has arrived: from here on it is the disk that may take its time.
    pub(super) fn state_arrived(&mut self, now: Instant, worker: WorkerId, step: u64) {
        self.saving.note_arrival(worker, step);
        self.reply_deadlines.answered(worker, OwedReply::State);
        self.await_state(now, worker);
    }

    /// The result is on disk: the run is finished.
    pub(super) fn result_stored(
        &mut self,
        step: u64,
        weights_digest: String,
        commands: &mut Vec<Command>,
    ) {
        let outcome = Outcome::Finished {
            step,
            weights_digest,
        };
        self.end(outcome, commands);
    }

    /// A checkpoint is on disk. Its worker may have been lost since it handed the state over.
    pub(super) fn checkpoint_stored(
        &mut self,
        now: Instant,
        step: u64,
        path: PathBuf,
        commands: &mut Vec<Command>,
    ) {
        self.saving.note_stored(now, step);
        self.best.note_stored(step);
        commands.push(Command::Emit(RunEvent::CheckpointSaved { step, path }));
        self.proceed(now, commands);
    }

    /// A state did not arrive or could not be stored: the next checkpoint, or a further attempt at the result, makes up for it.
    pub(super) fn state_failed(
        &mut self,
        now: Instant,
        (worker, step): (WorkerId, u64),
        failure: Failure,
        commands: &mut Vec<Command>,
    ) {
        // A late failure of a worker that is not asked any more changes nothing.
        let Some(last) = self.saving.take_failed(worker, step) else {
            return;
        };
        let Failure { reason, disk } = failure;
        let notice = format!("the state after step {step} was not saved: {reason}");
        let last = last || !self.term.is_stopping() && self.is_waited_for(step);
        if last && disk && !self.term.is_stopping() {
            return self.retry_last(now, &notice, commands);
        }
        if !self.saving.count_failure(last) {
            return self.fail(notice, commands);
        }
        commands.push(Command::Emit(RunEvent::Notice(notice)));
        if self.term.is_stopping() {
            return self.stop(commands);
        }
        self.proceed(now, commands);
    }

    /// Asks for the result again after a pause, because the disk has no room for it; gives up when that has lasted for long enough.
    pub(super) fn retry_last(&mut self, now: Instant, notice: &str, commands: &mut Vec<Command>) {
        let Some((pause, left)) = self.saving.wait_for_room(now) else {
            let outcome = Outcome::Stopped {
                step: self.progress.committed(),
                reason: format!(
                    "{notice}; the workers keep it for the next start: free space first"
                ),
                resumable: true,
            };
            return self.end(outcome, commands);
        };
        commands.push(Command::Emit(RunEvent::Notice(format!(
            "{notice}; the workers keep it: free space there, or remove old checkpoints; trying again in {} s, for {} min \
             at most",
            pause.as_secs(),
            left.as_secs().div_ceil(60)
        ))));
    }

    /// Updates in the state that has to be saved before the run can stop, if any has.
    pub fn unsaved_step(&self) -> Option<u64> {
        let is_unsaved = self.saving.stored() < self.progress.committed();
        let is_held = self.members.first_at(self.progress.committed()).is_some();
        (is_unsaved && is_held).then_some(self.progress.committed())
    }

    /// Stores the newest state, unless it is on disk already, and ends the run.
    pub(super) fn proceed_to_stop(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let pending = self.progress.pending_commit();
        let is_undecided = pending.is_some_and(|pending| !pending.is_committed());
        if self.saving.has_pending() || is_undecided || self.generation.is_over() {
            return;
        }
        let holder = self.members.first_at(self.progress.committed());
        match holder {
            Some(worker) if self.saving.stored() < self.progress.committed() => {
                self.request(now, worker, (self.progress.committed(), false), commands);
            }
            _ => self.stop(commands),
        }
    }

    fn stop(&mut self, commands: &mut Vec<Command>) {
        let Some(Stop { reason, resumable }) = self.term.stop().cloned() else {
            return;
        };
        // What workers hold counts only where they are told to keep it.
        let step = match resumable {
            true => self.progress.committed().max(self.saving.stored()),
            false => self.saving.stored(),
        };
        let outcome = Outcome::Stopped {
            step,
            reason,
            resumable,
        };
        self.end(outcome, commands);
    }
}
