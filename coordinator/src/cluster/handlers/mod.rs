//! What the cluster does when something happens: one file for each subject, and here the dispatch of events to them.
//!
//! The files hold nothing of their own: what is remembered stands in [`super::parts`]. Nobody imports from here.

mod admission;
mod best_weights;
mod departures;
mod draining;
mod evaluation;
mod feeds;
mod generations;
mod leasing;
mod planning;
mod probing;
mod recovery;
mod reply_deadlines;
mod saving;
mod slot_results;
mod step_commit;
mod timers;
mod transport;

use std::time::Instant;

use proto::v1;

use super::Cluster;
use super::command::{Command, Outcome};
use super::event::Event;
use super::parts::reply_deadlines::OwedReply;
use super::parts::saving::Failure;
use super::schedule::Work;

impl Cluster {
    /// Applies one event and appends the commands the driver must carry out.
    ///
    /// Reads no clock and does no I/O: equal inputs give equal commands.
    pub fn handle(&mut self, now: Instant, event: Event, commands: &mut Vec<Command>) {
        self.term.begin(now);
        let unheard = self.failure_detector.listen(now);
        if !unheard.is_zero() {
            self.reply_deadlines.postpone(unheard);
            self.progress.postpone(unheard);
        }
        if self.generation.is_waiting() {
            self.stats.wait(now);
        }
        let speaker = event.speaker();
        // Heartbeats and finished slots, which come often, leave everyone where they are.
        let is_usual = matches!(event, Event::Heard { .. } | Event::SlotDone { .. });
        self.apply(now, event, commands);
        self.release_drained(now, commands);
        if let Some(worker) = speaker.filter(|worker| self.members.get(*worker).is_some()) {
            self.failure_detector.hear(worker, now);
        }
        if self.wakes_at().is_some_and(|at| at <= now) {
            self.tick(now, commands);
        }
        self.regard_news(now, commands);
        if !is_usual {
            self.feed_newcomers(now, commands);
        }
    }

    fn apply(&mut self, now: Instant, event: Event, commands: &mut Vec<Command>) {
        if self.generation.is_over() {
            if let Event::WorkerJoined { worker, .. } = event {
                let reason = "the run is over".to_owned();
                commands.push(Command::Refuse { worker, reason });
            }
            return;
        }
        match event {
            Event::WorkerJoined {
                worker,
                join,
                address,
            } => self.join(now, worker, join, address, commands),
            Event::WorkerReady { worker, ready } => self.ready(now, worker, ready, commands),
            Event::WorkerEntered { worker, entered } => self.enter(now, worker, &entered, commands),
            Event::SlotDone { worker, done } => self.slot_done(now, worker, &done, commands),
            Event::SlotsWithdrawn { worker, withdrawn } => {
                self.slots_withdrawn(now, worker, &withdrawn, commands);
            }
            Event::StepReported { worker, report } => {
                self.step_reported(now, worker, report, commands);
                // From here on it is at the slots of the next step.
                self.balance(now, commands);
            }
            Event::WorkerSynced { worker, synced } => {
                self.reply_deadlines.answered(worker, OwedReply::Synced);
                self.synced(now, worker, synced, commands);
            }
            Event::FeedLost { worker, lost } => self.feed_lost(now, worker, &lost, commands),
            Event::WorkerDraining { worker, reason } => self.drain(now, worker, reason, commands),
            Event::PeerLost { worker, lost } => self.peer_lost(now, worker, &lost, commands),
            Event::Probed { worker, probed } => self.probed(now, worker, &probed, commands),
            Event::NcclIdentified { worker, nccl_id } => {
                self.nccl_identified(now, worker, &nccl_id, commands);
            }
            Event::NcclLost { worker, lost } => self.nccl_lost(now, worker, &lost),
            Event::WorkerLost { worker, reason } => self.lose(now, worker, reason, commands),
            Event::StateArrived { worker, step } => self.state_arrived(now, worker, step),
            Event::StateStored {
                step,
                path,
                weights_digest,
                is_result,
            } => match is_result {
                true => self.result_stored(step, weights_digest, commands),
                false => self.checkpoint_stored(now, step, path, commands),
            },
            Event::ResultFailed { reason, is_damaged } => {
                self.result_failed(now, &reason, is_damaged, commands);
            }
            Event::StateFailed {
                worker,
                step,
                reason,
                disk,
            } => {
                let failed = (worker, step);
                self.state_failed(now, failed, Failure { reason, disk }, commands);
            }
            Event::StopRequested { reason, resumable } => {
                self.term.request_stop(reason, resumable);
                self.take_newest(commands);
                self.proceed(now, commands);
            }
            Event::GaveUp { reason } => self.fail(reason, commands),
            Event::Heard { .. } => {}
            Event::Ticked => self.tick(now, commands),
        }
    }

    /// Ends the current piece of work if every slot of it is held, or moves towards the stop that was asked for.
    pub(super) fn proceed(&mut self, now: Instant, commands: &mut Vec<Command>) {
        if self.generation.is_over() {
            return;
        }
        if self.term.is_stopping() {
            return self.proceed_to_stop(now, commands);
        }
        // An exchange of a generation that lost a member could only break.
        let settled = self.progress.pending_commit().is_none()
            && !self.generation.has_lost_member()
            && self.members.all_entered();
        if !self.generation.is_running() || !settled {
            return;
        }
        self.save_best(now, commands);
        if !self.progress.ledger().is_complete() {
            return;
        }
        match self.progress.work() {
            Work::Train(step) if !self.may_end_step(step + 1) => {}
            Work::Train(step) => self.order_exchange(now, step, commands),
            Work::Eval(step) => self.finish_evaluation(now, step, commands),
            Work::Store(step) => self.store_result(now, step, commands),
        }
    }

    /// Ends the run and tells everyone.
    pub(super) fn end(&mut self, outcome: Outcome, commands: &mut Vec<Command>) {
        self.generation.end();
        let (failed, reason, resumable) = match &outcome {
            Outcome::Finished { .. } => (false, String::new(), false),
            Outcome::Stopped {
                reason, resumable, ..
            } => (false, reason.clone(), *resumable),
            Outcome::Failed { reason, .. } => (true, reason.clone(), false),
        };
        for worker in self.members.ids() {
            let reason = reason.clone();
            let finish = v1::Finish {
                failed,
                reason,
                resumable,
            };
            commands.push(Command::SendFinish { worker, finish });
        }
        commands.push(Command::End(outcome));
    }

    /// Ends the run as failed; no block of the data is at fault.
    pub(super) fn fail(&mut self, reason: String, commands: &mut Vec<Command>) {
        let blocks = Vec::new();
        self.end(Outcome::Failed { reason, blocks }, commands);
    }
}
