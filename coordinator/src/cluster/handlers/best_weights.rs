//! The weights with the best evaluation: their checkpoint, the end of a run that improves no more, and the result made of them.
//!
//! The step after the best weights ends only once a checkpoint has them: so whatever dies, somebody still has them.

use std::time::Instant;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::run_event::RunEvent;
use crate::cluster::schedule::Work;

impl Cluster {
    /// Asks for a checkpoint of the best weights, where the job wants one and the members are at those weights.
    pub(super) fn save_best(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let Some(step) = self.best.unsaved() else {
            return;
        };
        let is_here = step == self.progress.committed() && self.progress.pending_commit().is_none();
        let may_ask = !self.saving.is_awaited(step)
            && self.saving.has_room()
            && self.saving.retries_at().is_none();
        if is_here
            && may_ask
            && let Some(worker) = self.first_who_stays()
        {
            self.saving.begin_checkpoint(now);
            self.request(now, worker, (step, false), commands);
        }
    }

    /// Whether the best weights are those before the update that leads to `step`, and no checkpoint has them yet.
    pub(super) fn is_best_unsaved_before(&self, step: u64) -> bool {
        self.best.unsaved().is_some_and(|best| best + 1 == step)
    }

    /// Whether the run does not go on before the state after `step` updates is saved.
    pub(super) fn is_waited_for(&self, step: u64) -> bool {
        self.best.unsaved() == Some(step) || self.progress.work() == Work::Store(step)
    }

    /// Tells that the run ends early, once the evaluation is on record that used patience up.
    pub(super) fn tell_early_end(&self, commands: &mut Vec<Command>) {
        let stopping = self.schedule.job().best_model;
        let stopping = stopping.and_then(|best| best.early_stopping);
        let (Some(step), Some(stopping)) = (self.best.stops_at(), stopping) else {
            return;
        };
        let best = self.best.best().map_or_else(String::new, |best| {
            format!("; the best is {:.4} after step {}", best.metric, best.step)
        });
        let text = format!(
            "stopping early after step {step} of {}: eval_loss has not improved for {} evaluations{best}",
            self.schedule.total_steps(),
            stopping.patience
        );
        commands.push(Command::Emit(RunEvent::Notice(text)));
    }

    /// Tells where the best weights are gone, because the run goes on after `step` updates.
    pub(super) fn pass_over_best(&mut self, step: u64, commands: &mut Vec<Command>) {
        if let Some(best) = self.best.pass_over(step) {
            let text = format!(
                "the weights after step {best}, the best so far, are gone, and no checkpoint has them"
            );
            commands.push(Command::Emit(RunEvent::Notice(text)));
        }
    }

    /// Has the result made: of the best weights' checkpoint where the job says so, else of a member's state.
    pub(super) fn store_result(&mut self, now: Instant, step: u64, commands: &mut Vec<Command>) {
        if self.saving.has_pending()
            || self.saving.retries_at().is_some()
            || self.best.unsaved() == Some(step)
        {
            return;
        }
        let Some(best) = self.best.result() else {
            return self.request_last_state(now, step, commands);
        };
        // The last weights are kept beside them, as any newest ones are.
        let is_kept = self.saving.stored() >= step || !self.schedule.saves_at_all();
        match self.members.first_at(step).filter(|_| !is_kept) {
            Some(worker) => self.request(now, worker, (step, false), commands),
            None if self.best.begin_result() => {
                let text =
                    format!("the result is the weights after step {best}, the best of the run");
                commands.push(Command::Emit(RunEvent::Notice(text)));
                commands.push(Command::StoreBest { best, step });
            }
            None => {}
        }
    }

    /// The result could not be made of the best weights' checkpoint.
    pub(super) fn result_failed(
        &mut self,
        now: Instant,
        reason: &str,
        is_damaged: bool,
        commands: &mut Vec<Command>,
    ) {
        self.best.fail_result(is_damaged);
        let notice = format!("the best weights were not made the result: {reason}");
        if is_damaged {
            let text = format!("{notice}; the last ones are the result");
            commands.push(Command::Emit(RunEvent::Notice(text)));
            return self.proceed(now, commands);
        }
        self.retry_last(now, &notice, commands);
    }
}
