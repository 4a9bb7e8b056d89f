//! The cluster: everything about who takes part, who computes what, and when a step is committed, is decided here.
//!
//! Events go in, commands come out. It reads no clock, does no I/O and draws no random numbers: equal events at equal
//! times give equal commands. The driver ([`crate::driver::control_loop`]) carries the commands out.
//!
//! A step goes: lease slots -> all held -> exchange -> first report commits it -> all reports agree, it is settled.
//! The next step's plan and leases go out with the exchange. Whoever joins copies the state of a member meanwhile and
//! enters when a step is settled; when a member is lost, a new generation of those who are left begins at once, and only
//! the lost one's slots are leased again.

pub mod command;
pub mod event;
mod handlers;
mod parts;
pub mod run_event;
mod schedule;
mod settings;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Instant;

pub use self::command::{Command, Outcome};
pub use self::event::{Event, WorkerId};
use self::parts::draining::Draining;
use self::parts::failure_detector::FailureDetector;
use self::parts::feeds::Joining;
use self::parts::generation::Stage;
use self::parts::ledger::Ledger;
use self::parts::membership::Membership;
use self::parts::pending_commit::PendingCommit;
pub use self::parts::probing::MAX_PROBED;
use self::parts::probing::Probing;
use self::parts::rejoin_window::RejoinWindow;
use self::parts::reply_deadlines::ReplyDeadlines;
use self::parts::saving::Saving;
use self::parts::slot_eta::Speeds;
use self::parts::step_stats::StepStats;
use self::parts::transport::Transport;
pub use self::schedule::{BlockTokens, RunSchedule, Work};
pub use self::settings::{PreviousTerms, Settings};

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
}
