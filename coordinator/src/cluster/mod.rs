//! The cluster: everything about who takes part, who computes what, and when a step is committed, is decided here.
//!
//! Events go in, commands come out. It reads no clock, does no I/O and draws no random numbers: equal events at equal
//! times give equal commands. The driver ([`crate::driver::control_loop`]) carries the commands out.
//!
//! A step goes: lease slots -> all held -> exchange -> first report commits it -> all reports agree, it is settled.
//! The next step's plan and leases go out with the exchange. Whoever joins copies the state of a member meanwhile and
//! enters when a step is settled; when a member is lost, a new generation of those who are left begins at once, and only
//! the lost one's slots are leased again.
//!
//! What is remembered is in `parts`, each of which keeps its own fields; what is done when something happens is in `handlers`, which
//! tell the parts of it and say what follows between them. Read `handlers/mod.rs` first.

pub mod command;
pub mod event;
mod handlers;
mod parts;
pub mod run_event;
mod schedule;
mod settings;
#[cfg(test)]
mod tests;

pub use self::command::{Command, Outcome};
pub use self::event::{Event, WorkerId};
use self::parts::best_weights::BestWeights;
use self::parts::evaluation::Evaluation;
use self::parts::failure_detector::FailureDetector;
use self::parts::feeds::Feeds;
use self::parts::generation::Generation;
use self::parts::ledger::Ledger;
use self::parts::membership::Membership;
use self::parts::probing::Probing;
pub use self::parts::probing::probes::MAX_PROBED;
use self::parts::progress::Progress;
use self::parts::rejoin_window::RejoinWindow;
use self::parts::reply_deadlines::ReplyDeadlines;
use self::parts::saving::Saving;
use self::parts::slot_eta::SlotTimes;
use self::parts::step_stats::StepStats;
use self::parts::term::Term;
use self::parts::transport::Transport;
pub use self::schedule::{BlockTokens, RunSchedule, Work};
pub use self::settings::{PreviousTerms, Settings};

/// The state of a run: its workers, the slots of the current step, commits, checkpoints, and everything that is awaited.
#[derive(Debug)]
pub struct Cluster {
    settings: Settings,
    /// The work of the whole run, in order.
    schedule: RunSchedule,
    /// This life of the coordinator, and why it shall end early.
    term: Term,
    /// The connected workers.
    members: Membership,
    /// Whether anything is computed, and since when by the same members.
    generation: Generation,
    /// Committed updates, and the slots of the current work.
    progress: Progress,
    /// Step times, and what is on record.
    stats: StepStats,
    /// The current evaluation, and which weights have one.
    evaluation: Evaluation,
    /// The weights with the best evaluation, where the job asks for them.
    best: BestWeights,
    /// The states that workers were asked for.
    saving: Saving,
    /// Newcomers that copy the state of a member.
    feeds: Feeds,
    /// Who reaches whom, and who waits because of it.
    probing: Probing,
    /// What the generation exchanges over.
    transport: Transport,
    /// When each worker was heard last.
    failure_detector: FailureDetector,
    /// When each worker's engine must have answered.
    reply_deadlines: ReplyDeadlines,
    /// How long each worker takes for a slot.
    slot_times: SlotTimes,
}

impl Cluster {
    /// A run that has no workers yet and goes on after the newest recorded step, or from the state that it starts from.
    pub fn new(settings: Settings, schedule: RunSchedule) -> Self {
        let earlier = &settings.earlier;
        let committed = settings.start_step.max(earlier.recorded);
        let evaluation = Evaluation::after(settings.last_evaluated);
        let best = settings.best.clone();
        let best = BestWeights::new(best, settings.best_saved, settings.start_step);
        let work = schedule.work_from(committed, evaluation.is_on_record(committed));
        let work = best.or_end(work);
        let rejoin_window = RejoinWindow::of(earlier, settings.start_step);
        let class = earlier.numerics_class.clone();
        let class = class.filter(|_| rejoin_window.is_some());
        Self {
            term: Term::new(rejoin_window),
            members: Membership::default(),
            generation: Generation::after(earlier.generation, class),
            progress: Progress::at(Ledger::of(&schedule, work)),
            stats: StepStats::new(&schedule, committed, earlier),
            evaluation,
            best,
            saving: Saving::new(settings.start_step),
            feeds: Feeds::default(),
            probing: Probing::default(),
            transport: Transport::default(),
            failure_detector: FailureDetector::default(),
            reply_deadlines: ReplyDeadlines::default(),
            slot_times: SlotTimes::default(),
            settings,
            schedule,
        }
    }

    /// The class that all workers of this run have, once it computed anything.
    pub fn numerics_class(&self) -> Option<&str> {
        self.generation.numerics_class()
    }

    /// Step of the weights with the best evaluation so far, where the job asks for them.
    pub fn best_step(&self) -> Option<u64> {
        self.best.best().map(|best| best.step)
    }

    /// Whether what evaluations find decides how the run goes on, so that they must be on record before it does.
    pub fn goes_by_evaluations(&self) -> bool {
        let best = self.schedule.job().best_model;
        best.is_some_and(|best| best.decides() || best.saves())
    }

    /// Number of trainable scalars, as the ready workers report it; 0 while none is ready.
    pub fn trainable_scalars(&self) -> u64 {
        let ready = self.members.any_ready();
        ready.map_or(0, |ready| ready.trainable_scalars)
    }

    /// Bytes that a state has of weights that training leaves as they are.
    pub fn frozen_bytes(&self) -> u64 {
        self.settings.frozen_bytes
    }

    /// Digest of the names and shapes of the trainable tensors, as the ready workers report it; empty while none is ready.
    pub fn layout_digest(&self) -> &str {
        let ready = self.members.any_ready();
        ready.map_or("", |ready| &ready.layout_digest)
    }
}
