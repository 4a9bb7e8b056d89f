//! The record of a settled step: what `metrics.jsonl` and the journal get to know of it, and what is wrong with it.
//!
//! In: a step's reports and ledger. Out: [`RunEvent::StepCommitted`], a notice where the step has other weights than before,
//! the end of the run where too many steps in a row were skipped.

use std::collections::BTreeSet;

use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::{Command, Outcome};
use crate::cluster::parts::ledger::Ledger;
use crate::cluster::parts::membership::short;
use crate::cluster::parts::pending_commit::PendingCommit;
use crate::cluster::run_event::{RunEvent, StepRecord, WorkerShare};

impl Cluster {
    /// Records a settled step, unless it has a record already, and ends the run after too many skipped ones.
    pub(super) fn record(
        &mut self,
        pending: &PendingCommit,
        report: &v1::StepReport,
        commands: &mut Vec<Command>,
    ) {
        let before = pending.ledger().work().step();
        let step = before + 1;
        if !report.weights_digest.is_empty() {
            self.tell_other_bits(step, &report.weights_digest, commands);
            self.stats.note_digest(step, &report.weights_digest);
            self.saving.note_digest(step, &report.weights_digest);
        }
        // A step that was lost with its holders and computed again has its record already.
        if step <= self.stats.recorded() {
            return;
        }
        let tokens = self.schedule.tokens(before);
        self.stats.record(step, tokens);
        let (loss, mean_token_accuracy) = pending.ledger().means().unwrap_or((f64::NAN, 0.0));
        let remaining = self.schedule.total_steps().saturating_sub(step) as f64;
        let tokens_per_second = pending
            .seconds()
            .map_or(f64::NAN, |seconds| tokens as f64 / seconds.max(1e-9));
        let peaks = pending.reports().values();
        let peaks = peaks.map(|report| report.peak_memory_bytes);
        commands.push(Command::Emit(RunEvent::StepCommitted(StepRecord {
            step,
            epoch: self.schedule.epoch_after(step),
            loss,
            grad_norm: report.grad_norm,
            learning_rate: self.schedule.learning_rate(before),
            num_tokens: self.stats.num_tokens(),
            mean_token_accuracy,
            tokens_per_second,
            workers: self.members.ranks().len().max(pending.reports().len()),
            generation: self.generation.number(),
            weights_digest: Some(report.weights_digest.clone()).filter(|digest| !digest.is_empty()),
            skipped: report.skipped,
            eta_seconds: self.stats.mean_step_seconds().unwrap_or(0.0) * remaining,
            mfu: self.utilisation(tokens_per_second),
            peak_memory_bytes: peaks.max().filter(|peak| *peak > 0),
            seconds: pending.seconds().unwrap_or(f64::NAN),
            waiting_seconds: self.stats.take_waited_seconds(),
            shares: self.shares(pending.ledger()),
        })));
        self.count_skipped(pending, report.skipped, commands);
    }

    fn shares(&self, ledger: &Ledger) -> Vec<WorkerShare> {
        let shares = ledger.shares().into_iter();
        let shares = shares.map(|(worker, (slots, seconds))| WorkerShare {
            name: self.members.name(worker).to_owned(),
            slots,
            seconds,
        });
        shares.collect()
    }

    /// Tells the user where a step that was computed again came to other weights than before.
    fn tell_other_bits(&self, step: u64, digest: &str, commands: &mut Vec<Command>) {
        if let Some(before) = self
            .stats
            .digest_of(step)
            .filter(|before| *before != digest)
        {
            commands.push(Command::Emit(RunEvent::Notice(format!(
                "the weights after step {step} are {} now and were {} when it was computed before: one of the machines \
                 computes wrongly, or is of another numerics class; the result is not to be relied on: look for that \
                 machine, and begin the job anew",
                short(digest),
                short(before)
            ))));
        }
    }

    /// Model FLOPs utilisation (MFU): achieved FLOP/s over the summed bfloat16 peak of the members' GPUs, each counted once
    /// however many members share it. None where a peak or the operations per token are not known.
    fn utilisation(&self, tokens_per_second: f64) -> Option<f64> {
        let mut counted = BTreeSet::new();
        let mut peak = 0.0;
        for id in self.members.ranks() {
            let worker = self.members.get(*id)?;
            let of_worker = worker.peak_flops?;
            // A driver that does not tell its GPUs apart leaves the identifier empty.
            let gpu = worker.gpu.as_ref().map_or("", |gpu| gpu.uuid.as_str());
            if gpu.is_empty() || counted.insert(gpu) {
                peak += of_worker;
            }
        }
        let peak = Some(peak).filter(|peak| *peak > 0.0)?;
        let share = tokens_per_second * self.settings.flop_per_token? / peak;
        share.is_finite().then_some(share)
    }

    /// Counts skipped steps in a row, and fails the run where there are too many.
    fn count_skipped(
        &mut self,
        pending: &PendingCommit,
        skipped: bool,
        commands: &mut Vec<Command>,
    ) {
        let in_a_row = self.stats.count_skipped(skipped);
        if in_a_row == 0 {
            return;
        }
        // A run of few steps would end before they are too many, with nothing learned.
        let all = in_a_row >= self.schedule.total_steps();
        if all || in_a_row > self.settings.max_skipped_steps {
            let broken = pending.ledger().broken_slots();
            let slots = match broken.as_slice() {
                [] => format!(
                    "none of its {} slots alone is at fault",
                    pending.ledger().slots().len()
                ),
                broken => format!("the loss or gradient of its slots {broken:?} is at fault"),
            };
            let before = pending.ledger().work().step();
            let skipped = match in_a_row {
                all_of_them if all => format!("every step of the run ({all_of_them}) was skipped"),
                many => format!("{many} steps in a row were skipped"),
            };
            let reason = format!(
                "{skipped} because their gradients were not finite or out of range; the last was step {} ({slots}); lower \
                 learning_rate, or look at the data of these slots and at the base model",
                before + 1
            );
            let blocks = self.schedule.blocks_of(before, &broken);
            self.end(Outcome::Failed { reason, blocks }, commands);
        }
    }
}
