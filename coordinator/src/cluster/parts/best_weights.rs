//! The weights with the best evaluation: which they are, whether a checkpoint has them, and whether the run ends early.
//!
//! Nobody goes on from the best weights before a checkpoint has them, so that no crash can lose them.

use common::plan::{Best, BestSoFar};

use crate::cluster::schedule::Work;

/// The best weights of a run whose job asks for them; of another run, nothing.
#[derive(Debug)]
pub struct BestWeights {
    so_far: Option<BestSoFar>,
    /// Step of the newest checkpoint on disk, and of the best weights' one.
    stored: Option<u64>,
    saved: Option<u64>,
    /// Step of best weights that nobody has any more.
    lost: Option<u64>,
    /// Whether the result is being made of their checkpoint.
    is_becoming_result: bool,
}

impl BestWeights {
    /// After the evaluations on record. `saved`: the step of the best weights, where a checkpoint has them. The run goes on from
    /// `start_step`, so older ones that no checkpoint has are gone.
    pub fn new(so_far: Option<BestSoFar>, saved: Option<u64>, start_step: u64) -> Self {
        let mut weights = Self {
            so_far,
            stored: saved,
            saved,
            lost: None,
            is_becoming_result: false,
        };
        weights.pass_over(start_step);
        weights
    }

    /// Counts an evaluation that is on record now.
    pub fn note(&mut self, step: u64, loss: f64) {
        let Some(so_far) = &mut self.so_far else {
            return;
        };
        if so_far.note(step, loss) {
            self.saved = self.stored.filter(|stored| *stored == step);
        }
    }

    /// The best weights so far, where the job asks for them.
    pub fn best(&self) -> Option<Best> {
        self.so_far.as_ref()?.best()
    }

    /// Number of updates after which the run ends because evaluations have not improved for too long, if they have not.
    pub fn stops_at(&self) -> Option<u64> {
        self.so_far.as_ref()?.stops_at()
    }

    /// The work that takes the place of `work` where the run ends before its last step.
    pub fn or_end(&self, work: Work) -> Work {
        match (work, self.stops_at()) {
            (Work::Train(step), Some(end)) if step >= end => Work::Store(step),
            (work, _) => work,
        }
    }

    /// Notes that a checkpoint is on disk.
    pub fn note_stored(&mut self, step: u64) {
        self.stored = Some(step);
        if self.best().is_some_and(|best| best.step == step) {
            self.saved = Some(step);
        }
    }

    /// Step of the best weights, where a checkpoint has yet to have them.
    pub fn unsaved(&self) -> Option<u64> {
        let so_far = self.so_far.as_ref()?;
        let best = so_far.best().filter(|_| so_far.rule().saves())?.step;
        let is_open = self.saved != Some(best) && self.lost != Some(best);
        is_open.then_some(best)
    }

    /// Notes that the run goes on from `step`. Returns the step of the best weights where they are older and no checkpoint has them,
    /// so that nobody has them any more.
    pub fn pass_over(&mut self, step: u64) -> Option<u64> {
        let gone = self.unsaved().filter(|best| *best < step)?;
        self.lost = Some(gone);
        Some(gone)
    }

    /// Step of the checkpoint that the result is to be made of. None: the last weights are the result.
    pub fn result(&self) -> Option<u64> {
        let so_far = self.so_far.as_ref()?;
        let best = so_far.best().filter(|_| so_far.rule().load_at_end)?.step;
        (self.lost != Some(best)).then_some(best)
    }

    /// Notes that the result is to be made of the best weights' checkpoint now. False where it is being made already.
    pub fn begin_result(&mut self) -> bool {
        !std::mem::replace(&mut self.is_becoming_result, true)
    }

    /// Notes that the result could not be made. `is_damaged`: the checkpoint is at fault, and its weights are gone.
    pub fn fail_result(&mut self, is_damaged: bool) {
        self.is_becoming_result = false;
        if is_damaged {
            self.lost = self.best().map(|best| best.step);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use common::job::{BestModel, EarlyStopping};

    use super::*;

    fn weights(saved: Option<u64>, start_step: u64, losses: &[(u64, f64)]) -> BestWeights {
        let rule = BestModel {
            greater_is_better: false,
            load_at_end: true,
            save: false,
            early_stopping: Some(EarlyStopping {
                patience: 2,
                threshold: 0.0,
            }),
        };
        let so_far = BestSoFar::after(rule, losses.iter().copied());
        BestWeights::new(Some(so_far), saved, start_step)
    }

    #[test]
    fn a_checkpoint_that_came_before_the_evaluation_counts() {
        let mut best = weights(None, 0, &[]);
        best.note_stored(2);
        best.note(2, 1.0);
        assert_eq!((best.unsaved(), best.result()), (None, Some(2)));
        best.note(4, 0.5);
        assert_eq!(best.unsaved(), Some(4));
        best.note_stored(3);
        assert_eq!(best.unsaved(), Some(4));
        best.note_stored(4);
        assert_eq!(best.unsaved(), None);
    }

    #[test]
    fn best_weights_that_nobody_has_are_waited_for_no_longer() {
        let again = weights(None, 2, &[(4, 1.0)]);
        assert_eq!(again.unsaved(), Some(4), "they are computed again");
        let mut gone = weights(None, 5, &[(4, 1.0)]);
        assert_eq!((gone.unsaved(), gone.result()), (None, None));
        gone.note(6, 0.5);
        assert_eq!(gone.result(), Some(6));
        let kept = weights(Some(4), 5, &[(4, 1.0)]);
        assert_eq!((kept.unsaved(), kept.result()), (None, Some(4)));
    }

    #[test]
    fn the_run_ends_where_patience_is_used_up() {
        let best = weights(Some(2), 2, &[(2, 1.0), (4, 1.5), (6, 1.25)]);
        assert_eq!(best.or_end(Work::Train(5)), Work::Train(5));
        assert_eq!(best.or_end(Work::Train(6)), Work::Store(6));
        assert_eq!(best.or_end(Work::Eval(6)), Work::Eval(6));
    }
}
