//! Deadlines for answers that only a worker's engine can give. Heartbeats say that a process lives, not that its engine does:
//! one that hangs between two orders would hold everybody up for ever.
//!
//! In: who was asked for what, and who has answered. Out: whose time is up. The times are far beyond what a slow machine
//! needs, because the cost of being wrong is a worker.

use std::time::{Duration, Instant};

use common::files::snapshot::MAX_STATE_BYTES_PER_SCALAR;
use common::wire::PlanKind;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::queue::Queue;
use crate::cluster::parts::reply_deadlines::OwedReply;
use crate::cluster::run_event::RunEvent;

/// Deadline of an answer that takes no computation.
const ANSWER: Duration = Duration::from_secs(60);
/// Deadline for a model to be fetched and loaded. What was fetched is kept, so whoever is sent away for it is further next time.
const LOADING: Duration = Duration::from_secs(3600);
/// Slot timeout while no worker's slot time is known.
const UNMEASURED_SLOT: Duration = Duration::from_secs(1800);
/// Slot timeout as a multiple of the worker's own mean slot time. In full training a slot is not given up half-way.
const SLOT_FACTOR: f64 = 8.0;
/// Slot timeout of a worker without own measurements, as a multiple of the other workers' mean slot time.
const UNKNOWN_SLOT_FACTOR: f64 = 64.0;
/// Slot timeout where nobody else waits for the slot, because all have slots in hand or nobody else is here, so that nothing is
/// gained by haste: as a multiple of the worker's own mean slot time.
const LONE_SLOT_FACTOR: f64 = 64.0;
/// [`LONE_SLOT_FACTOR`] of a worker without own measurements, as a multiple of the other workers' mean slot time.
const UNKNOWN_LONE_SLOT_FACTOR: f64 = 512.0;
/// Least slot timeout where nobody else waits for the slot.
const LONE_SLOT_FLOOR: Duration = Duration::from_secs(600);
/// Slot timeout where nobody else waits for the slot and no worker's slot time is known.
const UNMEASURED_LONE_SLOT: Duration = Duration::from_secs(6 * 3600);
/// Time for a worker to get a state ready for its upload, besides the slot in hand and the transfer.
const UPLOAD: Duration = Duration::from_secs(300);
/// Time of an upload in transfers of a state over the slowest line: it is a little larger than what newcomers get, may come
/// behind another one, and the exchange before it takes its time too.
const UPLOAD_TRANSFERS: u32 = 4;
/// Timeout of an exchange that no member has finished or blamed a peer for, besides two transfers of a state.
const EXCHANGE: Duration = Duration::from_secs(600);
/// Slowest line that is allowed for: a state may take as long as over this one, and no longer.
const SLOWEST_LINE_BYTES_PER_SECOND: f64 = 1024.0 * 1024.0;
/// States that may share one line at a time: the followers of one source share its line, and may share theirs.
const STATES_AT_A_TIME: u32 = 8;

impl Cluster {
    /// Awaits that the worker has loaded model and state.
    pub(super) fn await_ready(&mut self, now: Instant, id: WorkerId) {
        self.reply_deadlines
            .expect(id, OwedReply::Ready, now + LOADING);
    }

    /// Awaits that each member enters the new generation. It ends the slot in hand first, and may get a state.
    pub(super) fn await_entries(&mut self, now: Instant) {
        for id in self.members.ranks().to_vec() {
            let is_behind = self
                .members
                .get(id)
                .is_some_and(|w| w.seen < self.progress.committed());
            let mut timeout = ANSWER;
            if self.progress.may_be_busy(id) {
                timeout += self.slot_timeout(id, 0.0);
            }
            if is_behind {
                timeout += STATES_AT_A_TIME * self.transfer();
            }
            self.reply_deadlines
                .expect(id, OwedReply::Entered, now + timeout);
        }
    }

    /// Awaits the other members' reports. One has finished the exchange, so the others have what they need to finish it too; if a
    /// peer withholds it from them, they say so long before.
    pub(super) fn await_reports(&mut self, now: Instant) {
        let due = now + ANSWER + 2 * self.transfer();
        for id in self.members.ranks().to_vec() {
            if self.owes(id, OwedReply::Report) {
                self.reply_deadlines.expect(id, OwedReply::Report, due);
            }
        }
    }

    /// When an exchange is given up that nobody has ended or blamed a peer for: every engine may hang in it.
    pub(super) fn exchange_ends_at(&self) -> Option<Instant> {
        let pending = self.progress.pending_commit();
        let pending = pending.filter(|_| self.generation.is_running())?;
        Some(pending.unanswered_since()? + EXCHANGE + 2 * self.transfer())
    }

    /// Gives up the exchange: a new generation repeats it, and whoever does not even enter that is sent away.
    pub(super) fn give_up_exchange(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let step = self.progress.committed() + 1;
        let text = format!("nobody has ended the exchange of step {step}: it is made again");
        commands.push(Command::Emit(RunEvent::Notice(text)));
        self.start_generation(now, commands);
    }

    /// Awaits, from now on, that a follower takes something of its feed, unless that is awaited already.
    pub(super) fn await_synced(&mut self, now: Instant, id: WorkerId) {
        if self.owes(id, OwedReply::Synced) && !self.reply_deadlines.expects(id, OwedReply::Synced)
        {
            // Its source may have a slot in hand, and other followers before it.
            let timeout = UNMEASURED_SLOT + STATES_AT_A_TIME * self.transfer();
            self.reply_deadlines
                .expect(id, OwedReply::Synced, now + timeout);
        }
    }

    /// Slot timeout of a worker that has had a slot in hand for `elapsed` seconds and has to answer for it.
    pub(super) fn slot_timeout(&self, id: WorkerId, elapsed: f64) -> Duration {
        let own = self.slowest_slot(|kind| self.slot_times.of(id, kind));
        let typical = || self.slowest_slot(|kind| self.slot_times.typical(kind));
        let seconds = match own {
            Some(seconds) => Some(SLOT_FACTOR * seconds.max(elapsed)),
            None => typical().map(|seconds| UNKNOWN_SLOT_FACTOR * seconds.max(elapsed)),
        };
        let slot = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        self.deadline() + slot.unwrap_or(UNMEASURED_SLOT)
    }

    /// Awaits a slot with which the worker has begun.
    pub(super) fn await_slot(&mut self, now: Instant, id: WorkerId) {
        let own = self.slowest_slot(|kind| self.slot_times.of(id, kind));
        let typical = || self.slowest_slot(|kind| self.slot_times.typical(kind));
        let seconds = match own {
            Some(seconds) => Some(LONE_SLOT_FACTOR * seconds),
            None => typical().map(|seconds| UNKNOWN_LONE_SLOT_FACTOR * seconds),
        };
        let slot = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let timeout = slot.map_or(UNMEASURED_LONE_SLOT, |slot| slot.max(LONE_SLOT_FLOOR));
        self.reply_deadlines
            .expect(id, OwedReply::Slot, now + timeout);
    }

    /// Awaits a state that the worker was asked for; also when one of several has arrived.
    pub(super) fn await_state(&mut self, now: Instant, id: WorkerId) {
        if self.owes(id, OwedReply::State) {
            // It may have a slot in hand.
            let timeout = UPLOAD + self.slot_timeout(id, 0.0) + UPLOAD_TRANSFERS * self.transfer();
            self.reply_deadlines
                .expect(id, OwedReply::State, now + timeout);
        }
    }

    /// The greater of `seconds` of training and evaluation, as far as they are known.
    fn slowest_slot(&self, seconds: impl Fn(PlanKind) -> Option<f64>) -> Option<f64> {
        let kinds = [PlanKind::Train, PlanKind::Eval];
        kinds.into_iter().filter_map(seconds).max_by(f64::total_cmp)
    }

    /// How long a state takes over the slowest line that is allowed for.
    fn transfer(&self) -> Duration {
        let trained = self.trainable_scalars() as f64 * MAX_STATE_BYTES_PER_SCALAR as f64;
        let bytes = trained + self.frozen_bytes() as f64;
        Duration::try_from_secs_f64(bytes / SLOWEST_LINE_BYTES_PER_SECOND).unwrap_or(LOADING)
    }

    /// Expels every worker that owes an answer for too long; the losses of one call share a generation.
    pub(super) fn expel_the_stuck(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let mut expelled = false;
        for (worker, answer) in self.reply_deadlines.take_expired(now) {
            if !self.owes(worker, answer) {
                continue;
            }
            let reason = self.unanswered(now, worker, answer);
            self.forget(worker, &reason, commands);
            commands.push(Command::Expel { worker, reason });
            expelled = true;
        }
        if expelled {
            self.reconfigure_if_member_lost(now, commands);
        }
    }

    /// Why the worker is sent away, for people.
    fn unanswered(&self, now: Instant, id: WorkerId, answer: OwedReply) -> String {
        let what = match answer {
            OwedReply::Ready => {
                return "its engine has not loaded the model after an hour".to_owned();
            }
            OwedReply::Entered => "it did not enter the generation".to_owned(),
            OwedReply::Report => "it did not end the step".to_owned(),
            OwedReply::Synced => "it took nothing of its feed".to_owned(),
            OwedReply::State => "the state that it was asked for did not come".to_owned(),
            OwedReply::Slot => {
                let in_hand = self.progress.ledger().queue(id).and_then(Queue::in_hand);
                let (slot, since) = in_hand.unwrap_or((0, now));
                let minutes = now.duration_since(since).as_secs() / 60;
                let usual = self.slowest_slot(|kind| self.slot_times.of(id, kind));
                let usual = usual.map_or_else(String::new, |seconds| {
                    format!(" and takes {seconds:.1} s as a rule")
                });
                let step = self.progress.work().step() + 1;
                format!("it has been at slot {slot} of step {step} for {minutes} min{usual}")
            }
        };
        format!("its engine does not answer: {what}")
    }

    /// Whether the worker still owes that answer.
    fn owes(&self, id: WorkerId, answer: OwedReply) -> bool {
        let Some(worker) = self.members.get(id) else {
            return false;
        };
        let is_member = self.members.rank_of(id).is_some();
        match answer {
            OwedReply::Ready => worker.ready.is_none(),
            OwedReply::Entered => is_member && !worker.entered && self.generation.is_running(),
            OwedReply::Report => {
                let pending = self.progress.pending_commit();
                is_member && pending.is_some_and(|pending| !pending.has_reported(id))
            }
            OwedReply::Slot => {
                let queue = self.progress.ledger().queue(id);
                queue.is_some_and(|queue| queue.in_hand().is_some())
            }
            OwedReply::State => self.saving.is_owed_by(id),
            OwedReply::Synced => {
                !is_member && self.feeds.follows(id) && worker.seen < self.progress.committed()
            }
        }
    }
}
