//! Exchanges that broke although both ends still talk to the coordinator.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::probes::MAX_PROBED;
use crate::cluster::event::WorkerId;

/// Time after a broken exchange in which the blamed peer's connection to the coordinator may break too, before it is judged.
pub const PEER_LOST_GRACE: Duration = Duration::from_millis(500);
/// Broken exchanges of one pair without a settled step between them, after which the two count as unable to exchange.
const MAX_BREAKS: u32 = 3;

/// Who blames whom for a broken exchange, and why.
#[derive(Clone, Debug)]
pub struct Accusation {
    pub by: WorkerId,
    pub of: WorkerId,
    pub reason: String,
}

/// An exchange that broke, while it is found out why.
#[derive(Debug)]
struct Broken {
    since: Instant,
    accusations: Vec<Accusation>,
    /// Workers that were asked to try each other.
    tried: BTreeSet<WorkerId>,
}

/// The broken exchange of the current generation, and how often exchanges broke before.
#[derive(Debug, Default)]
pub struct BrokenExchanges {
    broken: Option<Broken>,
    /// By pair (lower number first), how many exchanges broke between the two since the last settled step.
    breaks: BTreeMap<(WorkerId, WorkerId), u32>,
}

impl BrokenExchanges {
    /// Notes an accusation; one counts of each accuser. True where the two have yet to try each other, and there is room for them.
    pub fn accuse(&mut self, now: Instant, accusation: Accusation) -> bool {
        let broken = self.broken.get_or_insert_with(|| Broken {
            since: now,
            accusations: Vec::new(),
            tried: BTreeSet::new(),
        });
        let Accusation { by, of, .. } = accusation;
        if of == by || broken.accusations.iter().any(|one| one.by == by) {
            return false;
        }
        broken.accusations.push(accusation);
        let are_tried = broken.tried.is_superset(&BTreeSet::from([by, of]));
        !are_tried && broken.tried.len() < 2 * MAX_PROBED
    }

    /// Notes that these workers are asked to try each other.
    pub fn note_tried(&mut self, workers: &BTreeSet<WorkerId>) {
        if let Some(broken) = &mut self.broken {
            broken.tried.extend(workers.iter().copied());
        }
    }

    /// Whether it is being found out why an exchange broke.
    pub fn is_open(&self) -> bool {
        self.broken.is_some()
    }

    /// When the exchange is made again whose last probe is answered by `last_due`: by then both ends had time to lose the coordinator
    /// too, and to try each other.
    pub fn mends_at(&self, last_due: Option<Instant>) -> Option<Instant> {
        let since = self.broken.as_ref()?.since;
        Some((since + PEER_LOST_GRACE).max(last_due.unwrap_or(since)))
    }

    /// Takes out the broken exchange, to make it again. Returns who blames whom for it.
    pub fn take(&mut self) -> Option<Vec<Accusation>> {
        Some(self.broken.take()?.accusations)
    }

    /// Counts a broken exchange of a pair. Returns how many broke in a row, where those are so many that the two count as unable to
    /// exchange.
    pub fn count(&mut self, pair: (WorkerId, WorkerId)) -> Option<u32> {
        let breaks = self.breaks.entry(pair).or_default();
        *breaks += 1;
        (*breaks >= MAX_BREAKS).then_some(*breaks)
    }

    /// A step was settled: what broke before counts no more.
    pub fn forgive(&mut self) {
        self.breaks.clear();
    }

    /// Forgets the pairs of a worker that is gone.
    pub fn forget(&mut self, worker: WorkerId) {
        self.breaks.retain(|(a, b), _| *a != worker && *b != worker);
    }

    /// Drops the broken exchange of a generation that is over.
    pub fn drop_broken(&mut self) {
        self.broken = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accusation(by: u64, of: u64) -> Accusation {
        Accusation {
            by: WorkerId(by),
            of: WorkerId(of),
            reason: "it says nothing".to_owned(),
        }
    }

    #[test]
    fn each_accuser_counts_once_and_who_was_tried_is_not_tried_again() {
        let (mut exchanges, now) = (BrokenExchanges::default(), Instant::now());
        assert!(exchanges.accuse(now, accusation(1, 2)));
        exchanges.note_tried(&BTreeSet::from([WorkerId(1), WorkerId(2)]));
        assert!(!exchanges.accuse(now, accusation(1, 3)), "a second one");
        assert!(!exchanges.accuse(now, accusation(2, 1)), "tried already");
        assert!(exchanges.accuse(now, accusation(3, 2)));
        assert_eq!(exchanges.take().map_or(0, |all| all.len()), 3);
        assert!(!exchanges.is_open());
    }

    #[test]
    fn only_breaks_in_a_row_are_held_against_a_pair() {
        let (mut exchanges, pair) = (BrokenExchanges::default(), (WorkerId(1), WorkerId(2)));
        let mut breaks = |count: u32| {
            let counted: Vec<Option<u32>> = (0..count).map(|_| exchanges.count(pair)).collect();
            exchanges.forgive();
            counted
        };
        assert_eq!(breaks(2), [None, None]);
        assert_eq!(breaks(3), [None, None, Some(3)]);
    }
}
