//! How often a checkpoint is saved where the job leaves it to the run: so that saving costs a hundredth of it, within bounds.
//!
//! In: when a state was there to be saved, and when it was on disk. Out: whether the next one is due. Nobody needs to
//! measure what saving costs: a state that is on its way for so long has delayed the run by no more than that.

use std::time::{Duration, Instant};

/// Time between two checkpoints, as a multiple of what the last one took: saving costs a hundredth of the run, within bounds.
const TIMES: u32 = 100;
/// Minimum time between two automatic checkpoints: losing less work is no loss.
const SHORTEST: Duration = Duration::from_secs(60);
/// Maximum time between two automatic checkpoints: as much work as may ever be lost...
const LONGEST: Duration = Duration::from_secs(600);
/// ...unless a state takes long to arrive: the time between two is at least so many times what the last one took.
const LEAST_TIMES: u32 = 10;

/// When checkpoints were saved, and what they took.
#[derive(Debug, Default)]
pub struct CheckpointInterval {
    /// When the newest checkpoint was taken, or first asked about: work since then may be lost.
    since: Option<Instant>,
    /// Time from the step that made the newest stored state until it was on disk.
    took: Duration,
}

impl CheckpointInterval {
    /// Starts the interval anew: what is done so far was saved, or is on its way.
    pub fn restart(&mut self, now: Instant) {
        self.since = Some(now);
    }

    /// A checkpoint did not arrive: the next one is due soon, however long the last one took.
    pub fn fail(&mut self) {
        self.took = Duration::ZERO;
    }

    /// A checkpoint took so long, from its step to the disk.
    pub fn learn(&mut self, took: Duration) {
        self.took = took;
    }

    /// Whether a checkpoint is due. The first interval begins when this is first asked.
    pub fn is_due(&mut self, now: Instant) -> bool {
        now.duration_since(*self.since.get_or_insert(now)) >= self.interval()
    }

    fn interval(&self) -> Duration {
        let longest = LONGEST.max(LEAST_TIMES * self.took);
        (TIMES * self.took).clamp(SHORTEST, longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interval_after(took: f64) -> u64 {
        let mut rhythm = CheckpointInterval::default();
        rhythm.learn(Duration::from_secs_f64(took));
        rhythm.interval().as_secs()
    }

    #[test]
    fn saving_costs_a_hundredth_within_a_minute_and_ten() {
        assert_eq!(interval_after(0.0), 60);
        assert_eq!(interval_after(0.5), 60);
        assert_eq!(interval_after(2.0), 200);
        assert_eq!(interval_after(6.0), 600);
        assert_eq!(interval_after(30.0), 600);
    }

    #[test]
    fn after_a_failure_the_next_one_is_due_within_a_minute() {
        let mut rhythm = CheckpointInterval::default();
        rhythm.learn(Duration::from_secs(6));
        rhythm.fail();
        assert_eq!(rhythm.interval(), SHORTEST);
    }

    #[test]
    fn a_state_that_needs_minutes_is_on_its_way_a_tenth_of_the_time() {
        assert_eq!(interval_after(1200.0), 12_000);
    }

    #[test]
    fn the_first_one_is_due_a_minute_after_the_first_question() {
        let (mut rhythm, began) = (CheckpointInterval::default(), Instant::now());
        assert!(!rhythm.is_due(began));
        assert!(!rhythm.is_due(began + SHORTEST / 2));
        assert!(rhythm.is_due(began + SHORTEST));
        rhythm.restart(began + SHORTEST);
        assert!(!rhythm.is_due(began + SHORTEST));
        assert!(rhythm.is_due(began + 2 * SHORTEST));
    }
}
