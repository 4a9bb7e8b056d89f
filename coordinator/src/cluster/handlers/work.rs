//! Work in and out: plans to members, results of slots from them, and the end of an evaluation.

use std::time::{Duration, Instant};

use common::wire::PlanKind;
use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::ledger::{Ledger, SlotResult};
use crate::cluster::run_event::{EvalRecord, RunEvent};
use crate::cluster::schedule::Work;

impl Cluster {
    /// A worker has computed a slot: its result counts if the slot was leased to it, and it gets the next one.
    pub(super) fn slot_done(
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
        let current = self.progress.work().is(kind, done.step);
        let Some(ledger) = self.progress.ledger_of(kind, done.step) else {
            // Of work that is over.
            return;
        };
        let planned = ledger.trained_tokens_of(done.slot);
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
            is_invalid: done.invalid_scalars > 0,
        };
        if !ledger.complete(id, done.slot, result) {
            // What was leased in a generation before may belong to another by now; Entered settles it.
            if done.generation < self.generation.number() {
                return;
            }
            let reason = format!("it computed slot {}, which was not leased to it", done.slot);
            return self.expel(now, id, reason, commands);
        }
        if done.compute_us > 0 {
            let seconds = Duration::from_micros(done.compute_us).as_secs_f64();
            ledger.note_seconds(id, done.slot, seconds);
            self.slot_times.learn(id, kind, seconds);
        }
        if current {
            self.replenish(id, now, commands);
            self.proceed(now, commands);
        }
    }

    /// Sends a worker the plan of the current piece of work.
    pub(super) fn send_plan(&mut self, worker: WorkerId, commands: &mut Vec<Command>) {
        let ledger = self.progress.ledger();
        let scalars = self.trainable_scalars();
        let plan = self.schedule.plan(ledger.work(), ledger.slots(), scalars);
        if let Some(mut plan) = plan {
            plan.generation = self.generation.number();
            if ledger.is_training() {
                plan.clear = self.members.take_must_clear(worker);
            }
            commands.push(Command::SendPlan { worker, plan });
        }
    }

    /// Plans and leases `work`. Returns the ledger of the work before it.
    pub(super) fn begin(
        &mut self,
        now: Instant,
        work: Work,
        commands: &mut Vec<Command>,
    ) -> Ledger {
        let ledger = self.progress.begin(Ledger::of(&self.schedule, work));
        self.forgive_the_idle(&ledger);
        self.evaluation.begin(now, work);
        for id in self.members.ranks().to_vec() {
            self.send_plan(id, commands);
        }
        self.balance(now, commands);
        ledger
    }

    /// Takes workers that were too slow to get a slot of the whole step for a little faster: they are tried again some day.
    fn forgive_the_idle(&mut self, ledger: &Ledger) {
        let kind = match ledger.work() {
            Work::Train(_) => PlanKind::Train,
            Work::Eval(_) => PlanKind::Eval,
            Work::Store(_) => return,
        };
        let ranks = self.members.ranks().iter().copied();
        let idle = ranks.filter(|id| !ledger.is_holder(*id));
        self.slot_times.forgive(idle, kind);
    }

    /// Tells the user which evaluations are left out because the run goes on after `step` updates and nobody has their weights
    /// any more. They change no weights, so nothing is computed again for them.
    pub(super) fn tell_lost_evaluations(&self, step: u64, commands: &mut Vec<Command>) {
        let is_missing =
            |at: &u64| self.schedule.evaluates_after(*at) && !self.evaluation.is_on_record(*at);
        for at in (self.progress.committed()..step).filter(is_missing) {
            let text = format!("the evaluation after step {at} is lost, and its weights are gone");
            commands.push(Command::Emit(RunEvent::Notice(text)));
        }
    }

    /// Records the evaluation of the weights after `step` updates, and begins the work after it.
    pub(super) fn finish_evaluation(
        &mut self,
        now: Instant,
        step: u64,
        commands: &mut Vec<Command>,
    ) {
        if let Some((eval_loss, eval_mean_token_accuracy)) = self.progress.ledger().means()
            && let Some(runtime) = self.evaluation.finish(now, step)
        {
            commands.push(Command::Emit(RunEvent::Evaluated(EvalRecord {
                step,
                epoch: self.schedule.epoch_after(step),
                eval_loss,
                eval_mean_token_accuracy,
                eval_runtime_seconds: runtime.as_secs_f64(),
            })));
        }
        let work = self.schedule.following(Work::Eval(step));
        self.begin(now, work, commands);
        self.proceed(now, commands);
    }
}
