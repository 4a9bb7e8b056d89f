//! Which weights of a run are the best by the loss of its evaluations, and whether the run stops early.
//!
//! Enters: the job's rule, and the recorded evaluations in order. Leaves: the step of the best weights, and the step at which
//! patience is used up. Pure: whoever has the same record comes to the same answer, in whatever term of the run.
//!
//! Source of the rule: Transformers 5, `EarlyStoppingCallback` (`trainer_callback.py`) and `Trainer._determine_best_metric`.

use crate::job::BestModel;

/// The best weights so far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Best {
    /// Updates that they have seen.
    pub step: u64,
    /// Their loss.
    pub metric: f64,
}

/// What the evaluations so far amount to.
#[derive(Clone, Debug, PartialEq)]
pub struct BestSoFar {
    rule: BestModel,
    best: Option<Best>,
    /// Step of the newest evaluation that counted.
    newest: u64,
    /// Evaluations in a row that improved too little.
    without_improvement: u64,
    stops_at: Option<u64>,
}

impl BestSoFar {
    /// Before any evaluation.
    pub fn new(rule: BestModel) -> Self {
        Self {
            rule,
            best: None,
            newest: 0,
            without_improvement: 0,
            stops_at: None,
        }
    }

    /// After these evaluations, steps and losses in order.
    pub fn after(rule: BestModel, evaluations: impl IntoIterator<Item = (u64, f64)>) -> Self {
        let mut so_far = Self::new(rule);
        for (step, loss) in evaluations {
            so_far.note(step, loss);
        }
        so_far
    }

    /// Counts the evaluation of the weights after `step` updates. True where they are the best so far.
    ///
    /// The weights that a run begins with are no candidates, as in Transformers, and what was counted or comes after the end is
    /// not counted again.
    pub fn note(&mut self, step: u64, loss: f64) -> bool {
        if step <= self.newest || self.stops_at.is_some() {
            return false;
        }
        let is_first = self.newest == 0;
        self.newest = step;
        // Worse than any number, so that one that is no number improves on nothing.
        let worst = match self.rule.greater_is_better {
            true => f64::NEG_INFINITY,
            false => f64::INFINITY,
        };
        let before = self.best.map_or(worst, |best| best.metric);
        let is_best = match self.rule.greater_is_better {
            true => loss > before,
            false => loss < before,
        };
        if let Some(stopping) = self.rule.early_stopping {
            let improves = is_best && (loss - before).abs() > stopping.threshold;
            self.without_improvement = match is_first || improves {
                true => 0,
                false => self.without_improvement + 1,
            };
            if self.without_improvement >= stopping.patience {
                self.stops_at = Some(step);
            }
        }
        if is_best {
            self.best = Some(Best { step, metric: loss });
        }
        is_best
    }

    /// The best weights so far. None before the first evaluation.
    pub fn best(&self) -> Option<Best> {
        self.best
    }

    /// Number of updates after which the run ends because patience is used up, if it is.
    pub fn stops_at(&self) -> Option<u64> {
        self.stops_at
    }

    /// Number of evaluations in a row that improved too little.
    pub fn without_improvement(&self) -> u64 {
        self.without_improvement
    }

    /// What follows from being the best.
    pub fn rule(&self) -> &BestModel {
        &self.rule
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::job::EarlyStopping;

    fn rule(patience: u64, threshold: f64) -> BestModel {
        BestModel {
            greater_is_better: false,
            load_at_end: true,
            save: false,
            early_stopping: Some(EarlyStopping {
                patience,
                threshold,
            }),
        }
    }

    /// Where a run of these losses, ten steps apart, stops, and which of its weights are the best.
    fn fate(rule: BestModel, losses: &[f64]) -> (Option<u64>, Option<u64>) {
        let steps = (1..).map(|number| 10 * number);
        let so_far = BestSoFar::after(rule, steps.zip(losses.iter().copied()));
        (so_far.stops_at(), so_far.best().map(|best| best.step))
    }

    #[test]
    fn transformers_callback_stops_at_the_same_evaluation_and_has_the_same_best() {
        let golden: Vec<Value> =
            serde_json::from_str(include_str!("best_model/golden.json")).unwrap();
        assert!(golden.len() > 100);
        for case in golden {
            let number = |name: &str| case[name].as_f64().unwrap();
            let losses = case["losses"].as_array().unwrap();
            let losses: Vec<f64> = losses
                .iter()
                .map(|loss| loss.as_f64().unwrap_or(f64::NAN))
                .collect();
            let rule = BestModel {
                greater_is_better: case["greater_is_better"].as_bool().unwrap(),
                ..rule(number("patience") as u64, number("threshold"))
            };
            let expected = (case["stops_at"].as_u64(), case["best_step"].as_u64());
            assert_eq!(fate(rule, &losses), expected, "{case}");
        }
    }

    #[test]
    fn without_patience_nothing_stops_and_the_first_of_equals_is_the_best() {
        let rule = BestModel {
            early_stopping: None,
            ..rule(1, 0.0)
        };
        assert_eq!(fate(rule, &[3.0, 2.0, 2.0, 2.5]), (None, Some(20)));
    }

    #[test]
    fn what_is_on_record_already_and_the_weights_of_the_beginning_do_not_count() {
        let mut so_far = BestSoFar::new(rule(2, 0.0));
        assert!(!so_far.note(0, 0.1), "the weights that it began with");
        assert!(so_far.note(10, 2.0));
        assert!(!so_far.note(10, 1.0), "evaluated again after a crash");
        assert_eq!(so_far.best().unwrap().metric, 2.0);
        assert!(!so_far.note(20, 2.0) && so_far.stops_at().is_none());
        assert!(!so_far.note(30, 2.0));
        assert_eq!(so_far.stops_at(), Some(30));
        assert!(!so_far.note(40, 0.5), "the run is over");
        assert_eq!(so_far.best().unwrap().step, 10);
    }
}
