//! The evaluation under way, and which weights have one on record.

use std::time::{Duration, Instant};

use crate::cluster::schedule::Work;

/// When the current evaluation began, and the newest one on record.
#[derive(Debug)]
pub struct Evaluation {
    /// When the current evaluation began; None while none is made.
    started: Option<Instant>,
    /// Step of the newest weights that were evaluated.
    last_evaluated: Option<u64>,
}

impl Evaluation {
    /// No evaluation is made; the newest one on record is of the weights after `last_evaluated` updates.
    pub fn after(last_evaluated: Option<u64>) -> Self {
        Self {
            started: None,
            last_evaluated,
        }
    }

    /// Notes that a piece of work begins, which may be an evaluation.
    pub fn begin(&mut self, now: Instant, work: Work) {
        self.started = matches!(work, Work::Eval(_)).then_some(now);
    }

    /// Notes that a piece of work goes on in a new generation: where it is an evaluation that had begun, it has its time.
    pub fn go_on(&mut self, now: Instant, work: Work) {
        if matches!(work, Work::Eval(_)) {
            self.started.get_or_insert(now);
        }
    }

    /// Whether the weights after `step` updates, or newer ones, have an evaluation on record.
    pub fn is_on_record(&self, step: u64) -> bool {
        self.last_evaluated.is_some_and(|last| last >= step)
    }

    /// Notes that the weights after `step` updates were evaluated. Returns how long that took; None where it is on record already.
    pub fn finish(&mut self, now: Instant, step: u64) -> Option<Duration> {
        if self.is_on_record(step) {
            return None;
        }
        self.last_evaluated = Some(step);
        Some(now.duration_since(self.started.unwrap_or(now)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_evaluation_that_a_new_generation_goes_on_with_is_recorded_once_with_its_whole_time() {
        let (mut evaluation, began) = (Evaluation::after(Some(2)), Instant::now());
        let [later, end] = [1, 3].map(|seconds| began + Duration::from_secs(seconds));
        evaluation.begin(began, Work::Eval(4));
        evaluation.go_on(later, Work::Eval(4));
        assert_eq!(evaluation.finish(end, 4), Some(Duration::from_secs(3)));
        assert_eq!(evaluation.finish(end, 4), None);
        assert!(evaluation.is_on_record(2) && !evaluation.is_on_record(5));
    }
}
