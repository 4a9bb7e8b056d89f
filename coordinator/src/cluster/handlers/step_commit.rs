//! From the exchange to the settled step: the first report commits it, and when all have reported and agree it is
//! settled. A replica can be behind but never different, so one report is enough to go on from.

mod record;

use std::time::Instant;

use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::membership::short;
use crate::cluster::parts::pending_commit::PendingCommit;
use crate::cluster::parts::step_stats::disagreement;
use crate::cluster::schedule::Work;

impl Cluster {
    /// Number of updates that have a record.
    pub fn recorded(&self) -> u64 {
        self.stats.recorded()
    }

    /// The digest of the weights after `step` updates will be known: its step is not settled yet.
    pub fn awaits_digest(&self, step: u64) -> bool {
        step > self.stats.recorded() && !self.term.is_stopping()
    }

    /// The digest of the weights after `step` updates, where it is known.
    pub fn weights_digest(&self, step: u64) -> Option<&str> {
        let of_ready = || {
            let ready = self.members.any_ready()?;
            (ready.step == step).then_some(ready.weights_digest.as_str())
        };
        let of_report = || self.progress.pending_commit()?.digest_of(step);
        let asked_for = self.saving.digest_of(step);
        let settled = asked_for.or_else(|| self.stats.digest_of(step));
        settled.or_else(of_report).or_else(of_ready)
    }

    /// Orders the exchange of a step of which every slot is held. The work after it goes out at once.
    pub(super) fn order_exchange(&mut self, now: Instant, step: u64, commands: &mut Vec<Command>) {
        for &worker in self.members.ranks() {
            let exchange = v1::Exchange {
                generation: self.generation.number(),
                step,
            };
            commands.push(Command::SendExchange { worker, exchange });
        }
        self.request_checkpoint(now, step + 1, commands);
        let work = self.schedule.following(Work::Train(step));
        let ledger = self.begin(now, work, commands);
        self.progress.await_reports(now, ledger);
        if self.members.ranks().len() == 1 {
            // Else its peers would say that it does not answer.
            self.await_reports(now);
        }
    }

    /// Handles a worker's report: it commits the step, counts towards its end, or is compared with what is on record.
    pub(super) fn step_reported(
        &mut self,
        now: Instant,
        id: WorkerId,
        report: v1::StepReport,
        commands: &mut Vec<Command>,
    ) {
        let Some(worker) = self.members.get(id) else {
            return;
        };
        let (seen, step) = (worker.seen, report.step);
        let pending = self.progress.pending_commit();
        if pending.is_some_and(|pending| pending.step() == step) {
            self.members.note_seen(id, step);
            self.collect(now, id, report, commands);
        } else if step <= self.progress.committed() {
            self.members.note_seen(id, seen.max(step));
            self.compare_late(now, id, &report, commands);
        } else if step <= self.stats.recorded() {
            self.roll_forward_to_held_state(now, id, step, commands);
        } else if self.progress.may_commit_late(step) {
            self.members.note_seen(id, step);
            self.commit_late(now, id, report, commands);
        } else {
            let reason = format!("it reported step {step}, which was not due");
            self.expel(now, id, reason, commands);
        }
    }

    /// Adds a report of the step that is being settled. The first one commits the step, the last one settles it.
    fn collect(
        &mut self,
        now: Instant,
        id: WorkerId,
        report: v1::StepReport,
        commands: &mut Vec<Command>,
    ) {
        if self.progress.report(id, report, || self.stats.lap(now)) {
            self.saving.note_commit(self.progress.committed(), now);
            self.await_reports(now);
        }
        if self.all_reported() {
            let agreed = self.settle_pending(commands);
            let may_grow =
                !self.term.is_stopping() && self.generation.is_running() && self.may_grow();
            if self.generation.is_over() {
                return;
            }
            match agreed && !may_grow {
                true => self.proceed(now, commands),
                false => self.start_generation(now, commands),
            }
        } else {
            self.proceed(now, commands);
        }
    }

    fn all_reported(&self) -> bool {
        let pending = self.progress.pending_commit();
        let reported = |id: &WorkerId| pending.is_some_and(|pending| pending.has_reported(*id));
        self.members.ranks().iter().all(reported)
    }

    /// Compares a late report, of a step that is settled: its worker finished an exchange that broke for others.
    fn compare_late(
        &mut self,
        now: Instant,
        id: WorkerId,
        report: &v1::StepReport,
        commands: &mut Vec<Command>,
    ) {
        if let Some(digest) = self.stats.digest_of(report.step)
            && !report.weights_digest.is_empty()
            && digest != report.weights_digest
        {
            let reason = disagreement(report.step, &report.weights_digest, digest);
            self.expel(now, id, reason, commands);
        }
    }

    /// Commits a step whose exchange was thought to be broken: this worker had finished it.
    fn commit_late(
        &mut self,
        now: Instant,
        id: WorkerId,
        report: v1::StepReport,
        commands: &mut Vec<Command>,
    ) {
        self.take_late(Some(now), id, report);
        self.start_generation(now, commands);
    }

    /// Marks a step as committed by a report that came when its exchange was thought to be broken. `now` ends the step's time;
    /// None where that is not known.
    pub(super) fn take_late(&mut self, now: Option<Instant>, id: WorkerId, report: v1::StepReport) {
        let seconds = now.map(|now| self.stats.lap(now));
        self.progress
            .commit_late(&self.schedule, id, report, seconds);
    }

    /// Ends the settling because the generation ends: with the reports that came, or back to before the exchange where
    /// nobody who is left has finished it.
    pub(super) fn interrupt_settling(&mut self, commands: &mut Vec<Command>) {
        let pending = self.progress.pending_commit();
        if pending.is_some_and(PendingCommit::has_reports) {
            self.settle_pending(commands);
        } else {
            self.progress.roll_back_exchange();
        }
    }

    /// Settles the step that is being committed. False where somebody disagreed.
    pub(super) fn settle_pending(&mut self, commands: &mut Vec<Command>) -> bool {
        let pending = self.progress.take_pending_commit();
        pending.is_none_or(|pending| self.settle(&pending, commands))
    }

    /// Records a step and takes out whoever disagrees. False where somebody did.
    pub(super) fn settle(&mut self, pending: &PendingCommit, commands: &mut Vec<Command>) -> bool {
        let step = pending.step();
        let Some(agreed) = pending.agreed() else {
            let said = pending.reports().iter().map(|(id, report)| {
                let name = self.members.name(*id);
                format!("{name} has {}", short(&report.weights_digest))
            });
            let said: Vec<String> = said.collect();
            let reason = format!(
                "the workers disagree on the weights after step {step} and none is outvoted: {}; one of these machines \
                 computes wrongly",
                said.join(", ")
            );
            self.fail(reason, commands);
            return false;
        };
        let mut unanimous = true;
        for (worker, report) in pending.outvoted(agreed) {
            let reason = disagreement(step, &report.weights_digest, &agreed.weights_digest);
            self.forget(worker, &reason, commands);
            commands.push(Command::Expel { worker, reason });
            unanimous = false;
        }
        let members = self.members.ranks().iter();
        let names = members.map(|id| self.members.name(*id));
        self.probing.note_commit(names);
        self.record(pending, agreed, commands);
        unanimous
    }
}
