//! The cluster: everything about who takes part, who computes what, and when a step is committed, is decided here.
//!
//! Events go in, commands come out. It reads no clock, does no I/O and draws no random numbers: equal events at equal
//! times give equal commands. The driver ([`crate::driver::control_loop`]) carries the commands out.
//!
//! A step goes: lease slots -> all held -> exchange -> first report commits it -> all reports agree, it is settled.
//! The next step's plan and leases go out with the exchange. Whoever joins copies the state of a member meanwhile and
//! enters when a step is settled; when a member is lost, a new generation of those who are left begins at once, and only
//! the lost one's slots are leased again.

mod checkpoint_interval;
pub mod command;
mod draining;
pub mod event;
mod failure_detector;
mod generations;
mod join_leave;
mod joining;
mod leasing;
mod ledger;
mod membership;
mod probing;
mod queue;
mod reachability;
mod recovery;
mod reply_deadlines;
pub mod run_event;
mod saving;
mod schedule;
#[cfg(test)]
mod simulation;
mod slot_eta;
mod step_commit;
#[cfg(test)]
mod tests;
mod timers;
mod transport;
mod work;

use std::collections::BTreeMap;
use std::time::Instant;

use proto::v1;

pub use self::command::{Command, Outcome};
use self::draining::Draining;
pub use self::event::{Event, WorkerId};
use self::failure_detector::FailureDetector;
use self::joining::Joining;
use self::ledger::Ledger;
use self::membership::Membership;
pub use self::probing::MAX_PROBED;
use self::probing::Probing;
pub use self::recovery::PreviousTerms;
use self::recovery::RejoinWindow;
use self::reply_deadlines::{PendingReply, ReplyDeadlines};
use self::saving::{Failure, Saving};
pub use self::schedule::{BlockTokens, RunSchedule, Work};
use self::slot_eta::Speeds;
use self::step_commit::{PendingCommit, StepStats};
use self::transport::Transport;

/// What a run is, apart from its [`RunSchedule`]: version, identity, where it starts, how many workers it wants.
#[derive(Clone, Debug)]
pub struct Settings {
    pub version: String,
    pub job_digest: String,
    /// Random identifier of the run, drawn when it began; the same in every term of it.
    pub run: String,
    /// What the journal says of the terms before this one, if the run goes on from them.
    pub earlier: PreviousTerms,
    /// Number of optimizer updates in the state that the run starts from.
    pub start_step: u64,
    /// Digest of the weights in the checkpoint that the run starts from. None: it starts from no checkpoint.
    pub start_weights_digest: Option<String>,
    /// Numerics class of the workers that computed that checkpoint, if it is known.
    pub start_numerics_class: Option<String>,
    /// Step of the newest weights with an evaluation on record.
    pub last_evaluated: Option<u64>,
    pub min_workers: usize,
    pub max_workers: Option<usize>,
    /// The run fails after more consecutive skipped steps (gradients not finite or out of range) than this.
    pub max_skipped_steps: u64,
    /// Floating-point operations that training needs per token, for the MFU. None where the job does not compute in bfloat16, for
    /// which peaks are known.
    pub flop_per_token: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing can be computed: too few workers are ready.
    Waiting,
    Running,
    Ended,
}

/// The state of a run: its workers, the slots of the current step, commits, checkpoints, and everything that is awaited.
#[derive(Debug)]
pub struct Cluster {
    settings: Settings,
    schedule: RunSchedule,
    members: Membership,
    stage: Stage,
    /// When the first event of this term was handled.
    began: Option<Instant>,
    /// The time in which workers of an earlier term may come back; None once it is over.
    rejoin_window: Option<RejoinWindow>,
    generation: u64,
    /// Numerics class of the run's workers, fixed by the first generation; later joiners must match.
    numerics_class: Option<String>,
    /// Number of committed optimizer updates: some worker reported each of them.
    committed: u64,
    /// The slots of the current piece of work.
    ledger: Ledger,
    /// Ledger of the next step, kept when the exchange that it was sent along with was rolled back; members that have not yet
    /// entered this generation may still hold its slots.
    ahead: Option<Ledger>,
    /// The step between its exchange and the last report, if there is one.
    pending_commit: Option<PendingCommit>,
    stats: StepStats,
    saving: Saving,
    joining: Joining,
    /// A member of this generation is gone and no new one has begun.
    member_lost: bool,
    /// Why the run shall end early.
    stopping: Option<String>,
    /// With `stopping`: the run is to be started again, so its workers shall wait for the next term.
    resumable: bool,
    probing: Probing,
    transport: Transport,
    last_reminder: Option<Instant>,
    failure_detector: FailureDetector,
    reply_deadlines: ReplyDeadlines,
    speeds: Speeds,
    /// When the next slot in hand will be late, or the answer of a worker that was asked to give one back.
    recheck_at: Option<Instant>,
    /// Workers that were asked to stop.
    draining: BTreeMap<WorkerId, Draining>,
    /// When the newest generation began; None before the first one of this term.
    generation_began: Option<Instant>,
    /// When the current evaluation began; None while none is made.
    eval_started: Option<Instant>,
    /// Step of the newest weights that were evaluated.
    last_evaluated: Option<u64>,
}

impl Cluster {
    /// A run that has no workers yet and goes on after the newest recorded step, or from the state that it starts from.
    pub fn new(settings: Settings, course: RunSchedule) -> Self {
        let earlier = &settings.earlier;
        let committed = settings.start_step.max(earlier.recorded);
        let is_evaluated = settings
            .last_evaluated
            .is_some_and(|last| last >= committed);
        let work = course.work_from(committed, is_evaluated);
        let grace = RejoinWindow::of(earlier, settings.start_step);
        Self {
            members: Membership::default(),
            stage: Stage::Waiting,
            generation: earlier.generation,
            numerics_class: earlier.numerics_class.clone().filter(|_| grace.is_some()),
            began: None,
            rejoin_window: grace,
            committed,
            ledger: Ledger::new(work, course.slots(work)),
            ahead: None,
            pending_commit: None,
            stats: StepStats::new(&course, committed, earlier),
            saving: Saving::new(settings.start_step),
            joining: Joining::default(),
            member_lost: false,
            stopping: None,
            resumable: false,
            probing: Probing::default(),
            transport: Transport::default(),
            last_reminder: None,
            failure_detector: FailureDetector::default(),
            reply_deadlines: ReplyDeadlines::default(),
            speeds: Speeds::default(),
            recheck_at: None,
            draining: BTreeMap::new(),
            generation_began: None,
            eval_started: None,
            last_evaluated: settings.last_evaluated,
            settings,
            schedule: course,
        }
    }

    /// Applies one event and appends the commands the driver must carry out.
    ///
    /// Reads no clock and does no I/O: equal inputs give equal commands.
    pub fn handle(&mut self, now: Instant, event: Event, commands: &mut Vec<Command>) {
        self.began.get_or_insert(now);
        let unheard = self.failure_detector.listen(now);
        if !unheard.is_zero() {
            self.postpone(unheard);
            self.ledger.postpone(unheard);
        }
        if self.stage == Stage::Waiting {
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
        if self.stage == Stage::Ended {
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
                self.reply_deadlines.answered(worker, PendingReply::Synced);
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
            } => self.state_stored(now, step, path, weights_digest, commands),
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
                if self.stopping.is_none() {
                    self.stopping = Some(reason);
                    self.resumable = resumable;
                }
                self.take_newest(commands);
                self.proceed(now, commands);
            }
            Event::GaveUp { reason } => self.fail(reason, commands),
            Event::Heard { .. } => {}
            Event::Ticked => self.tick(now, commands),
        }
    }

    /// The class that all workers of this run have, once it computed anything.
    pub fn numerics_class(&self) -> Option<&str> {
        self.numerics_class.as_deref()
    }

    /// Number of trainable scalars, as the ready workers report it; 0 while none is ready.
    pub fn trainable_scalars(&self) -> u64 {
        let ready = self.members.any_ready();
        ready.map_or(0, |ready| ready.trainable_scalars)
    }

    /// Digest of the names and shapes of the trainable tensors, as the ready workers report it; empty while none is ready.
    pub fn layout_digest(&self) -> &str {
        let ready = self.members.any_ready();
        ready.map_or("", |ready| &ready.layout_digest)
    }

    /// Ends the current piece of work if every slot of it is held, or moves towards the stop that was asked for.
    pub(super) fn proceed(&mut self, now: Instant, commands: &mut Vec<Command>) {
        if self.stage == Stage::Ended {
            return;
        }
        if self.stopping.is_some() {
            return self.proceed_to_stop(now, commands);
        }
        // An exchange of a generation that lost a member could only break.
        let settled =
            self.pending_commit.is_none() && !self.member_lost && self.members.all_entered();
        if self.stage != Stage::Running || !settled || !self.ledger.is_complete() {
            return;
        }
        match self.ledger.work {
            Work::Train(step) if !self.may_end_step(step + 1) => {}
            Work::Train(step) => self.order_exchange(now, step, commands),
            Work::Eval(step) => self.finish_evaluation(now, step, commands),
            Work::Store(step) => self.request_last_state(now, step, commands),
        }
    }

    /// Ends the run and tells everyone.
    pub(super) fn end(&mut self, outcome: Outcome, commands: &mut Vec<Command>) {
        self.stage = Stage::Ended;
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
