//! How long each worker takes for a slot, and what follows for who should compute which.
//!
//! In: measured slot times and what everybody has in hand. Out: whether a slot that is given to somebody now would be
//! finished before the others have done all the rest without it. Plain arithmetic in seconds from now.

use std::collections::BTreeMap;
use std::time::Instant;

use common::wire::PlanKind;

use crate::cluster::event::WorkerId;

/// Weight of the newest slot in a worker's mean.
const NEWEST_WEIGHT: f64 = 0.25;
/// Upper bound of a measured slot time.
const LONGEST_SLOT_SECONDS: f64 = 86_400.0;
/// Lower bound of a measured slot time.
const SHORTEST_SLOT_SECONDS: f64 = 1e-6;
/// A slot is late after this multiple of the worker's mean slot time.
const LATE_FACTOR: f64 = 1.5;
/// Seconds on top of [`LATE_FACTOR`]: messages have to travel, and a machine may do something else for a moment.
const LATE_SLACK_SECONDS: f64 = 0.05;
/// Finishing sooner by less than this share is no reason to let a worker wait.
const INDIFFERENCE: f64 = 0.02;
/// Factor on the mean slot time of a worker that got nothing to do in a whole step, so that it is tried again some day.
const FORGIVENESS: f64 = 0.8;

/// Mean seconds that each worker takes for a slot of a kind, and when the next slot in hand will have taken too long.
#[derive(Debug, Default)]
pub struct SlotTimes {
    means: BTreeMap<(WorkerId, PlanKind), f64>,
    /// Lower and upper bound of all means of a kind. They widen at once, and are drawn in by [`Self::measure`].
    bounds: BTreeMap<PlanKind, (f64, f64)>,
    /// When the next slot in hand will be late, or the answer of a worker that was asked to give one back.
    late_at: Option<Instant>,
}

impl SlotTimes {
    /// When the next slot in hand will be late, or the answer of a worker that was asked to give one back.
    pub fn late_at(&self) -> Option<Instant> {
        self.late_at
    }

    /// From here on nothing is late before `at`.
    pub fn restart(&mut self, at: Option<Instant>) {
        self.late_at = at;
    }

    /// Something more will be late at `at`.
    pub fn expect(&mut self, at: Option<Instant>) {
        self.late_at = [self.late_at, at].into_iter().flatten().min();
    }

    /// The worker took so many seconds for a slot.
    pub fn learn(&mut self, worker: WorkerId, kind: PlanKind, seconds: f64) {
        let seconds = seconds.clamp(SHORTEST_SLOT_SECONDS, LONGEST_SLOT_SECONDS);
        let mean = self.means.entry((worker, kind)).or_insert(seconds);
        // A late one may be the first of many; if not, the next ones say so.
        *mean = match seconds >= late_after(*mean) {
            true => seconds,
            false => *mean + NEWEST_WEIGHT * (seconds - *mean),
        };
        let mean = *mean;
        self.widen(kind, mean);
    }

    /// The worker gave a slot up after so many seconds, so it takes at least as long.
    pub fn at_least(&mut self, worker: WorkerId, kind: PlanKind, seconds: f64) {
        let seconds = seconds.clamp(SHORTEST_SLOT_SECONDS, LONGEST_SLOT_SECONDS);
        let mean = self.means.entry((worker, kind)).or_insert(seconds);
        *mean = mean.max(seconds);
        let mean = *mean;
        self.widen(kind, mean);
    }

    fn widen(&mut self, kind: PlanKind, mean: f64) {
        let (least, most) = self.bounds.entry(kind).or_insert((mean, mean));
        *least = least.min(mean);
        *most = most.max(mean);
    }

    /// Draws the bounds of a kind as close as they can be.
    pub fn measure(&mut self, kind: PlanKind) {
        self.bounds.remove(&kind);
        let means = self.means.iter().filter(|((_, of), _)| *of == kind);
        let means: Vec<f64> = means.map(|(_, mean)| *mean).collect();
        for mean in means {
            self.widen(kind, mean);
        }
    }

    /// Takes workers that had nothing to do in a whole step for faster: their slowness may be over.
    pub fn forgive(&mut self, workers: impl Iterator<Item = WorkerId>, kind: PlanKind) {
        let Some(typical) = self.typical(kind) else {
            return;
        };
        for worker in workers {
            if let Some(mean) = self.means.get_mut(&(worker, kind)) {
                *mean = mean.min((*mean * FORGIVENESS).max(typical));
            }
        }
    }

    pub fn forget(&mut self, worker: WorkerId) {
        self.means.retain(|(known, _), _| *known != worker);
    }

    /// Mean slot time of a worker, in seconds; None where it has delivered none of this kind.
    pub fn of(&self, worker: WorkerId, kind: PlanKind) -> Option<f64> {
        self.means.get(&(worker, kind)).copied()
    }

    /// Mean slot time of all workers that have delivered slots of this kind, in seconds: what one is taken for of whom nothing is
    /// known.
    pub fn typical(&self, kind: PlanKind) -> Option<f64> {
        let known = self.means.iter().filter(|((_, of), _)| *of == kind);
        let (sum, count) = known.fold((0.0, 0), |(sum, count), (_, mean)| (sum + mean, count + 1));
        (count > 0).then(|| sum / f64::from(count))
    }

    /// Upper bound of how many times longer the slowest worker takes than the fastest. 1 where nothing is known.
    pub fn spread(&self, kind: PlanKind) -> f64 {
        let bounds = self.bounds.get(&kind);
        bounds.map_or(1.0, |(least, most)| most / least)
    }
}

/// Seconds from one moment to a later one.
pub fn seconds_between(since: Instant, now: Instant) -> f64 {
    now.duration_since(since).as_secs_f64()
}

/// Seconds after which a slot is late that takes `mean` seconds on average.
pub fn late_after(mean: f64) -> f64 {
    LATE_FACTOR * mean + LATE_SLACK_SECONDS
}

/// Seconds until a slot is done that was begun `elapsed` seconds ago and takes `mean` on average; infinite where it is late.
pub fn remaining(mean: f64, elapsed: f64) -> f64 {
    match elapsed >= late_after(mean) {
        true => f64::INFINITY,
        false => (mean - elapsed).max(0.1 * mean),
    }
}

/// Estimate of when one worker delivers its next slots.
#[derive(Clone, Copy, Debug)]
pub struct WorkerEta {
    pub worker: WorkerId,
    /// Seconds that it takes for a slot.
    pub seconds: f64,
    /// Seconds until it has computed what is leased to it.
    pub free_in: f64,
}

impl WorkerEta {
    /// Seconds until it would deliver one more slot.
    pub fn next_in(&self) -> f64 {
        self.free_in + self.seconds
    }

    /// Counts one more slot as leased to it.
    pub fn take(&mut self) {
        self.free_in += self.seconds;
    }
}

/// Whether the worker at `own` would finish a slot before the others have done all `free` ones without it.
pub fn should_lease(prospects: &[WorkerEta], own: usize, free: usize) -> bool {
    let finish = prospects[own].next_in() * (1.0 - INDIFFERENCE);
    let mut sooner = 0.0;
    for (index, other) in prospects.iter().enumerate() {
        if index == own || other.free_in >= finish {
            continue;
        }
        sooner += ((finish - other.free_in) / other.seconds).floor();
        if sooner >= free as f64 {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAIN: PlanKind = PlanKind::Train;

    fn prospects(workers: &[(f64, f64)]) -> Vec<WorkerEta> {
        let prospect = |(index, (seconds, free_in)): (usize, &(f64, f64))| WorkerEta {
            worker: WorkerId(index as u64),
            seconds: *seconds,
            free_in: *free_in,
        };
        workers.iter().enumerate().map(prospect).collect()
    }

    #[test]
    fn the_last_slot_is_left_to_who_finishes_it_first() {
        let workers = prospects(&[(1.0, 0.5), (2.0, 0.0)]);
        assert!(should_lease(&workers, 0, 1));
        assert!(!should_lease(&workers, 1, 1), "1.5 s is sooner than 2 s");
        assert!(
            should_lease(&workers, 1, 2),
            "the fast one needs 2.5 s for two"
        );
    }

    #[test]
    fn equals_do_not_wait_for_each_other() {
        let workers = prospects(&[(1.0, 0.0), (1.0, 0.0), (1.01, 0.0)]);
        for own in 0..3 {
            assert!(should_lease(&workers, own, 1));
        }
    }

    #[test]
    fn nobody_waits_for_a_worker_whose_slot_is_late() {
        let late = remaining(1.0, 2.0);
        let workers = prospects(&[(1.0, late), (9.0, 0.0)]);
        assert!(should_lease(&workers, 1, 1));
        assert!(!should_lease(&workers, 0, 1));
    }

    #[test]
    fn a_slow_worker_is_tried_again_when_it_had_nothing_to_do() {
        let mut times = SlotTimes::default();
        let (fast, slow) = (WorkerId(1), WorkerId(2));
        times.learn(fast, TRAIN, 1.0);
        times.at_least(slow, TRAIN, 50.0);
        for _ in 0..100 {
            times.forgive([slow].into_iter(), TRAIN);
        }
        assert!(times.of(slow, TRAIN).is_some_and(|mean| mean < 2.0));
        assert_eq!(times.of(slow, PlanKind::Eval), None);
    }

    #[test]
    fn what_a_worker_says_of_its_time_is_bounded() {
        let mut times = SlotTimes::default();
        times.learn(WorkerId(1), TRAIN, 0.0);
        times.learn(WorkerId(2), TRAIN, u64::MAX as f64);
        let workers = [1, 2].map(|id| times.of(WorkerId(id), TRAIN).unwrap_or(0.0));
        assert!(workers[0] > 0.0 && workers[1] <= LONGEST_SLOT_SECONDS);
    }
}
