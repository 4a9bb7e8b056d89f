//! The cluster: everything about who takes part, who computes what, and when a step is committed, is decided here.
//!
//! Events go in, commands come out. It reads no clock, does no I/O and draws no random numbers: equal events at equal
//! times give equal commands. The driver ([`crate::driver`]) carries the commands out.
//!
//! A step goes: lease slots -> all held -> exchange -> first report commits it -> all reports agree, it is settled.
//! The next step's plan and leases go out with the exchange. Whoever joins enters when a step is settled; when a member
//! is lost, a new generation of those who are left begins at once, and only the lost one's slots are leased again.

pub mod command;
pub mod event;
mod ledger;
mod membership;
mod saving;
mod schedule;
mod settling;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use common::wire::PlanKind;
use proto::v1;

pub use self::command::{Command, Outcome};
pub use self::event::{Event, WorkerId};
use self::ledger::{Ledger, SlotResult};
use self::membership::Membership;
use self::saving::Saving;
pub use self::schedule::{BlockTokens, Course, Work};
use self::settling::{Pace, Settling};
use crate::events::{EvalRecord, RunEvent};

/// Slots that a worker has in hand at a time: it computes one while the other waits.
const LEASE_WINDOW: usize = 2;
/// Between two reminders that workers are missing.
const REMINDER: Duration = Duration::from_secs(30);
/// After a broken exchange, how long the peer's own connection may take to break too.
const PEER_LOST_GRACE: Duration = Duration::from_millis(500);
/// Broken exchanges without a committed step between them after which the accused peer is expelled.
const MAX_ACCUSATIONS: u32 = 3;

/// What a run is, apart from its course.
#[derive(Clone, Debug)]
pub struct Settings {
    pub version: String,
    pub job_digest: String,
    /// Updates in the state that the run starts from.
    pub start_step: u64,
    /// Of that state, where it is a checkpoint.
    pub start_weights_digest: Option<String>,
    /// Of the workers that computed it.
    pub start_numerics_class: Option<String>,
    pub min_workers: usize,
    pub max_workers: Option<usize>,
    pub max_skipped_steps: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Too few workers.
    Waiting,
    Running,
    Ended,
}

/// The state of a run.
#[derive(Debug)]
pub struct Cluster {
    settings: Settings,
    course: Course,
    members: Membership,
    stage: Stage,
    generation: u64,
    /// Of the first generation; later joiners must match.
    numerics_class: Option<String>,
    /// Updates that some worker reported.
    committed: u64,
    ledger: Ledger,
    /// Work after the ledger's that was leased under an earlier generation, while its workers have not entered this one.
    ahead: Option<Ledger>,
    settling: Option<Settling>,
    pace: Pace,
    saving: Saving,
    /// A member of this generation is gone and no new one has begun.
    member_lost: bool,
    /// Why the run shall end early.
    stopping: Option<String>,
    /// An exchange broke then, because of this worker.
    broken: Option<(Instant, WorkerId)>,
    last_reminder: Option<Instant>,
    /// When the evaluation began.
    eval_started: Option<Instant>,
    last_evaluated: Option<u64>,
}

impl Cluster {
    pub fn new(settings: Settings, course: Course) -> Self {
        let work = course.work_from(settings.start_step);
        Self {
            members: Membership::default(),
            stage: Stage::Waiting,
            generation: 0,
            numerics_class: None,
            committed: settings.start_step,
            ledger: Ledger::new(work, course.slots(work)),
            ahead: None,
            settling: None,
            pace: Pace::new(&course, settings.start_step),
            saving: Saving::new(settings.start_step),
            member_lost: false,
            stopping: None,
            broken: None,
            last_reminder: None,
            eval_started: None,
            last_evaluated: None,
            settings,
            course,
        }
    }

    /// Applies one event and appends the commands the driver must carry out.
    ///
    /// Reads no clock and does no I/O: equal inputs give equal commands.
    pub fn handle(&mut self, now: Instant, event: Event, commands: &mut Vec<Command>) {
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
            } => self.join(worker, join, address, commands),
            Event::WorkerReady { worker, ready } => self.ready(now, worker, ready, commands),
            Event::WorkerEntered { worker, entered } => self.enter(now, worker, &entered, commands),
            Event::SlotDone { worker, done } => self.slot_done(now, worker, &done, commands),
            Event::StepReported { worker, report } => {
                self.step_reported(now, worker, report, commands);
            }
            Event::PeerLost { worker, lost } => self.peer_lost(now, worker, &lost, commands),
            Event::WorkerLost { worker, reason } => self.lose(now, worker, reason, commands),
            Event::StateStored { step, path } => self.state_stored(now, step, path, commands),
            Event::StateFailed { step, reason } => self.state_failed(now, step, &reason, commands),
            Event::StopRequested { reason } => {
                self.stopping.get_or_insert(reason);
                self.proceed(now, commands);
            }
            Event::GaveUp { reason } => self.fail(reason, commands),
            Event::Ticked => self.tick(now, commands),
        }
    }

    /// The class that all workers of this run have, once it computed anything.
    pub fn numerics_class(&self) -> Option<&str> {
        self.numerics_class.as_deref()
    }

    /// Of the workers that are ready; 0 while there are none.
    pub fn trainable_scalars(&self) -> u64 {
        let ready = self.members.any_ready();
        ready.map_or(0, |ready| ready.trainable_scalars)
    }

    /// Of the workers that are ready; empty while there are none.
    pub fn layout_digest(&self) -> &str {
        let ready = self.members.any_ready();
        ready.map_or("", |ready| &ready.layout_digest)
    }

    // ---- who is here ----

    fn join(
        &mut self,
        worker: WorkerId,
        join: v1::Join,
        address: String,
        commands: &mut Vec<Command>,
    ) {
        let checked = self.members.check_join(
            &join,
            &self.settings.version,
            &self.settings.job_digest,
            self.numerics_class.as_deref(),
        );
        if let Err(reason) = checked {
            commands.push(Command::Emit(RunEvent::Notice(format!(
                "refused: {reason}"
            ))));
            commands.push(Command::Refuse { worker, reason });
            return;
        }
        let name = join.name.clone();
        self.members.add(worker, join, address);
        commands.push(Command::Welcome { worker });
        commands.push(Command::Emit(RunEvent::WorkerJoined {
            worker: worker.0,
            name,
            workers: self.members.count(),
        }));
    }

    fn ready(&mut self, now: Instant, id: WorkerId, ready: v1::Ready, commands: &mut Vec<Command>) {
        if self
            .members
            .get(id)
            .is_none_or(|worker| worker.ready.is_some())
        {
            return self.expel(now, id, "it said twice that it is ready".into(), commands);
        }
        let digest = &self.settings.job_digest;
        let reached = self.pace.recorded().max(self.saving.stored());
        let mut checked = self.members.check_ready(id, &ready, digest, reached);
        if checked.is_ok()
            && ready.step == self.settings.start_step
            && let Some(expected) = &self.settings.start_weights_digest
            && *expected != ready.weights_digest
        {
            checked = Err(format!(
                "worker {} loaded the weights {} from the checkpoint whose manifest says {}",
                self.members.name(id),
                membership::short(&ready.weights_digest),
                membership::short(expected)
            ));
        }
        if let Err(reason) = checked {
            self.forget(id, &reason, commands);
            commands.push(Command::Refuse { worker: id, reason });
            return self.regroup(now, commands);
        }
        let step = ready.step;
        if let Some(worker) = self.members.get_mut(id) {
            worker.seen = step;
            worker.ready = Some(ready);
        }
        if step > self.committed && step <= self.pace.recorded() {
            // It started from a checkpoint newer than what the others fell back to.
            return self.catch_up(now, id, step, commands);
        }
        if self.stage == Stage::Waiting {
            self.reform(now, commands);
        }
    }

    fn lose(&mut self, now: Instant, id: WorkerId, reason: String, commands: &mut Vec<Command>) {
        if self.members.get(id).is_none() {
            return;
        }
        self.forget(id, &reason, commands);
        self.regroup(now, commands);
    }

    /// Ends the session of a worker that broke the rules or computes wrongly.
    fn expel(&mut self, now: Instant, id: WorkerId, reason: String, commands: &mut Vec<Command>) {
        if self.members.get(id).is_none() {
            return;
        }
        self.forget(id, &reason, commands);
        commands.push(Command::Expel { worker: id, reason });
        self.regroup(now, commands);
    }

    /// Takes a worker out of everything but the generation's number.
    fn forget(&mut self, id: WorkerId, reason: &str, commands: &mut Vec<Command>) {
        let Some(worker) = self.members.get(id) else {
            return;
        };
        let name = worker.name.clone();
        let was_member = self.members.rank_of(id).is_some();
        self.members.remove(id);
        self.ledger.release(id);
        if let Some(ahead) = &mut self.ahead {
            ahead.release(id);
        }
        if let Some(settling) = &mut self.settling {
            settling.ledger.release(id);
            settling.reports.remove(&id);
        }
        self.saving.worker_lost(id);
        self.member_lost |= was_member;
        commands.push(Command::Emit(RunEvent::WorkerLost {
            worker: id.0,
            name,
            reason: reason.to_owned(),
            workers: self.members.count(),
        }));
    }

    fn peer_lost(
        &mut self,
        now: Instant,
        id: WorkerId,
        lost: &v1::PeerLost,
        commands: &mut Vec<Command>,
    ) {
        if self.stage != Stage::Running || lost.generation != self.generation {
            return;
        }
        let Some(&accused) = self.members.ranks().get(lost.rank as usize) else {
            return self.expel(
                now,
                id,
                "it blames a peer that does not exist".into(),
                commands,
            );
        };
        self.broken.get_or_insert((now, accused));
    }

    fn tick(&mut self, now: Instant, commands: &mut Vec<Command>) {
        if let Some((since, accused)) = self.broken
            && now.duration_since(since) >= PEER_LOST_GRACE
        {
            self.mend(now, accused, commands);
        }
        if self.stage == Stage::Waiting && self.stopping.is_none() {
            self.remind(now, commands);
        }
    }

    /// An exchange broke although both ends still talk to us: build it anew, but not for ever.
    fn mend(&mut self, now: Instant, accused: WorkerId, commands: &mut Vec<Command>) {
        self.broken = None;
        let Some(worker) = self.members.get_mut(accused) else {
            return;
        };
        worker.accusations += 1;
        if worker.accusations >= MAX_ACCUSATIONS {
            let reason = format!("its peers lost it {MAX_ACCUSATIONS} times in a row");
            return self.expel(now, accused, reason, commands);
        }
        self.reform(now, commands);
    }

    fn remind(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let due = |last: Instant| now.duration_since(last) >= REMINDER;
        let (have, need) = (self.members.count(), self.settings.min_workers);
        // Those who are here and load need no reminder.
        if have < need && self.last_reminder.is_none_or(due) {
            self.last_reminder = Some(now);
            commands.push(Command::Emit(RunEvent::WaitingForWorkers { have, need }));
        }
    }

    // ---- generations ----

    /// Begins a new generation if a member of this one was lost.
    fn regroup(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let lost = std::mem::take(&mut self.member_lost) && self.stage == Stage::Running;
        match self.stopping {
            None if lost => self.reform(now, commands),
            Some(_) if lost => {
                self.interrupt_settling(commands);
                self.proceed(now, commands);
            }
            _ => self.proceed(now, commands),
        }
    }

    /// Begins a new generation of everyone who is ready, or waits where they are too few.
    fn reform(&mut self, now: Instant, commands: &mut Vec<Command>) {
        self.broken = None;
        self.interrupt_settling(commands);
        self.member_lost = false;
        if self.stage == Stage::Ended {
            return;
        }
        self.jump_ahead(commands);
        self.members
            .elect(self.settings.max_workers, self.committed);
        if self.members.ranks().len() < self.settings.min_workers {
            if self.stage == Stage::Running {
                self.stage = Stage::Waiting;
                self.last_reminder = None;
                self.remind(now, commands);
            }
            return self.proceed(now, commands);
        }
        self.fall_back(commands);
        self.stage = Stage::Running;
        self.generation += 1;
        for (worker, generation) in self.members.generation(self.generation, self.committed) {
            commands.push(Command::SendGeneration { worker, generation });
        }
        let numerics_class = self.fix_numerics_class(commands);
        self.pace.restart(now);
        commands.push(Command::Emit(RunEvent::Started {
            step: self.committed,
            total_steps: self.course.total_steps(),
            workers: self.members.ranks().len(),
            generation: self.generation,
            numerics_class,
        }));
    }

    /// The first generation decides the class of the run.
    fn fix_numerics_class(&mut self, commands: &mut Vec<Command>) -> String {
        let first = self.members.ranks().first();
        let class = first.and_then(|id| self.members.get(*id));
        let class = class.map_or_else(String::new, |worker| worker.numerics_class.clone());
        if self.numerics_class.is_none()
            && let Some(earlier) = &self.settings.start_numerics_class
            && *earlier != class
        {
            commands.push(Command::Emit(RunEvent::Notice(format!(
                "the checkpoint was computed by workers of numerics class {earlier}, these are of {class}: the result will \
                 not have the bits of an uninterrupted run"
            ))));
        }
        self.numerics_class.get_or_insert(class).clone()
    }

    /// Goes on from a checkpoint whose step nobody reported, where only workers that started from it are left.
    fn jump_ahead(&mut self, commands: &mut Vec<Command>) {
        let Some(step) = self.members.all_beyond(self.committed) else {
            return;
        };
        let text = format!("the record of step {step} is lost with the workers that reported it");
        commands.push(Command::Emit(RunEvent::Notice(text)));
        self.pace.skip_to(&self.course, step);
        self.committed = step;
        let work = self.course.work_from(step);
        self.ledger = Ledger::new(work, self.course.slots(work));
        self.ahead = None;
    }

    /// Goes back to the newest state that a member still has, where the committed one was lost with its holders.
    fn fall_back(&mut self, commands: &mut Vec<Command>) {
        let newest = self.members.newest().unwrap_or(self.committed);
        if newest >= self.committed {
            return;
        }
        commands.push(Command::Emit(RunEvent::Notice(format!(
            "every worker that had step {} is lost; steps {} to {} are computed again, to the same weights",
            self.committed,
            newest + 1,
            self.committed
        ))));
        self.committed = newest;
        let work = self.course.work_from(newest);
        let next = Ledger::new(work, self.course.slots(work));
        self.ahead = Some(std::mem::replace(&mut self.ledger, next));
    }

    /// Goes forward again to a settled state that was thought to be lost: a member had it all the time.
    fn catch_up(&mut self, now: Instant, id: WorkerId, step: u64, commands: &mut Vec<Command>) {
        if let Some(worker) = self.members.get_mut(id) {
            worker.seen = step;
        }
        self.committed = step;
        self.ledger = match self.ahead.take() {
            Some(ahead) if ahead.work.step() == step => ahead,
            _ => {
                let work = self.course.work_from(step);
                Ledger::new(work, self.course.slots(work))
            }
        };
        self.reform(now, commands);
    }

    fn enter(
        &mut self,
        now: Instant,
        id: WorkerId,
        entered: &v1::Entered,
        commands: &mut Vec<Command>,
    ) {
        let is_member = self.members.rank_of(id).is_some();
        if self.stage != Stage::Running || entered.generation != self.generation || !is_member {
            return;
        }
        if entered.step > self.committed && entered.step <= self.pace.recorded() {
            return self.catch_up(now, id, entered.step, commands);
        }
        if entered.step != self.committed {
            let reason = format!(
                "it entered with the weights after {} steps where {} were expected",
                entered.step, self.committed
            );
            return self.expel(now, id, reason, commands);
        }
        if let Some(ahead) = &mut self.ahead {
            ahead.release(id);
        }
        if !self.ledger.reconcile(id, &entered.held) {
            let reason = "its accumulator holds slots that were not its own".to_owned();
            return self.expel(now, id, reason, commands);
        }
        if let Some(worker) = self.members.get_mut(id) {
            worker.seen = entered.step;
            worker.entered = true;
        }
        self.send_plan(id, commands);
        self.lease_to_all(commands);
        self.proceed(now, commands);
    }

    // ---- work ----

    fn slot_done(
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
        let current = self.ledger.work.is(kind, done.step);
        let ledger = if current {
            &mut self.ledger
        } else {
            match &mut self.ahead {
                Some(ahead) if ahead.work.is(kind, done.step) => ahead,
                // Of work that is over.
                _ => return,
            }
        };
        let planned = ledger.slots.get(done.slot as usize).copied();
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
        };
        if !ledger.complete(id, done.slot, result) {
            let reason = format!("it computed slot {}, which was not leased to it", done.slot);
            return self.expel(now, id, reason, commands);
        }
        if current {
            self.lease_to(id, commands);
            self.proceed(now, commands);
        }
    }

    fn send_plan(&self, worker: WorkerId, commands: &mut Vec<Command>) {
        let ledger = &self.ledger;
        let scalars = self.trainable_scalars();
        let plan = self.course.plan(ledger.work, &ledger.slots, scalars);
        if let Some(mut plan) = plan {
            plan.generation = self.generation;
            commands.push(Command::SendPlan { worker, plan });
        }
    }

    /// Free slots go round, so that everyone has one before anyone has two.
    fn lease_to_all(&mut self, commands: &mut Vec<Command>) {
        for window in 1..=LEASE_WINDOW {
            for id in self.members.ranks().to_vec() {
                self.lease_within(id, window, commands);
            }
        }
    }

    fn lease_to(&mut self, worker: WorkerId, commands: &mut Vec<Command>) {
        self.lease_within(worker, LEASE_WINDOW, commands);
    }

    fn lease_within(&mut self, worker: WorkerId, window: usize, commands: &mut Vec<Command>) {
        let entered = self
            .members
            .get(worker)
            .is_some_and(|worker| worker.entered);
        let is_member = self.members.rank_of(worker).is_some();
        let kind = match self.ledger.work {
            Work::Train(_) => PlanKind::Train,
            Work::Eval(_) => PlanKind::Eval,
            Work::Store(_) => return,
        };
        if self.stage != Stage::Running || self.stopping.is_some() || !entered || !is_member {
            return;
        }
        let slots = self.ledger.lease(worker, window);
        if !slots.is_empty() {
            let lease = v1::Lease {
                generation: self.generation,
                step: self.ledger.work.step(),
                kind: kind.to_wire(),
                slots,
            };
            commands.push(Command::SendLease { worker, lease });
        }
    }

    /// Does whatever is due now that something happened.
    fn proceed(&mut self, now: Instant, commands: &mut Vec<Command>) {
        if self.stage == Stage::Ended {
            return;
        }
        if self.stopping.is_some() {
            return self.proceed_to_stop(commands);
        }
        let settled = self.settling.is_none() && self.members.all_entered();
        if self.stage != Stage::Running || !settled || !self.ledger.is_complete() {
            return;
        }
        match self.ledger.work {
            Work::Train(step) => self.order_exchange(now, step, commands),
            Work::Eval(step) => self.finish_evaluation(now, step, commands),
            Work::Store(step) => self.request_last_state(step, commands),
        }
    }

    /// Plans and leases `work`. Returns the ledger of the work before it.
    fn begin(&mut self, now: Instant, work: Work, commands: &mut Vec<Command>) -> Ledger {
        let next = Ledger::new(work, self.course.slots(work));
        let ledger = std::mem::replace(&mut self.ledger, next);
        self.ahead = None;
        self.eval_started = matches!(work, Work::Eval(_)).then_some(now);
        for id in self.members.ranks().to_vec() {
            self.send_plan(id, commands);
        }
        self.lease_to_all(commands);
        ledger
    }

    fn finish_evaluation(&mut self, now: Instant, step: u64, commands: &mut Vec<Command>) {
        if let Some((eval_loss, eval_mean_token_accuracy)) = self.ledger.means()
            && self.last_evaluated.is_none_or(|last| last < step)
        {
            self.last_evaluated = Some(step);
            let started = self.eval_started.unwrap_or(now);
            commands.push(Command::Emit(RunEvent::Evaluated(EvalRecord {
                step,
                epoch: self.course.epoch_after(step),
                eval_loss,
                eval_mean_token_accuracy,
                eval_runtime_seconds: now.duration_since(started).as_secs_f64(),
            })));
        }
        let work = self.course.following(Work::Eval(step));
        self.begin(now, work, commands);
        self.proceed(now, commands);
    }

    /// Ends the run and tells everyone.
    fn end(&mut self, outcome: Outcome, commands: &mut Vec<Command>) {
        self.stage = Stage::Ended;
        let (failed, reason) = match &outcome {
            Outcome::Finished { .. } => (false, String::new()),
            Outcome::Stopped { reason, .. } => (false, reason.clone()),
            Outcome::Failed { reason } => (true, reason.clone()),
        };
        for worker in self.members.ids() {
            let reason = reason.clone();
            let finish = v1::Finish { failed, reason };
            commands.push(Command::SendFinish { worker, finish });
        }
        commands.push(Command::End(outcome));
    }

    fn fail(&mut self, reason: String, commands: &mut Vec<Command>) {
        self.end(Outcome::Failed { reason }, commands);
    }
}
