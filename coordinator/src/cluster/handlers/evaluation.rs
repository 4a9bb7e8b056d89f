//! Evaluations: the record of one that is done, and a word on those that are left out.

use std::time::Instant;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::run_event::{EvalRecord, RunEvent};
use crate::cluster::schedule::Work;

impl Cluster {
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
            let was_over = self.best.stops_at().is_some();
            self.best.note(step, eval_loss);
            commands.push(Command::Emit(RunEvent::Evaluated(EvalRecord {
                step,
                epoch: self.schedule.epoch_after(step),
                eval_loss,
                eval_mean_token_accuracy,
                eval_runtime_seconds: runtime.as_secs_f64(),
                best: self.best.best(),
            })));
            if !was_over {
                self.tell_early_end(commands);
            }
        }
        // Before the next plan, so that it is known at once who hands it over.
        self.save_best(now, commands);
        let work = self.schedule.following(Work::Eval(step));
        let work = self.best.or_end(work);
        self.begin(now, work, commands);
        self.proceed(now, commands);
    }
}
