//! Planning: what the next piece of work is, and the plans of it that members get.

use std::time::Instant;

use common::wire::PlanKind;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::ledger::Ledger;
use crate::cluster::schedule::Work;

impl Cluster {
    /// The slots of the work after `step` updates, all free: an evaluation if one is due and was not made, else a step.
    pub(super) fn ledger_from(&self, step: u64) -> Ledger {
        let is_evaluated = self.evaluation.is_on_record(step);
        let work = self.schedule.work_from(step, is_evaluated);
        Ledger::of(&self.schedule, self.best.or_end(work))
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
}
