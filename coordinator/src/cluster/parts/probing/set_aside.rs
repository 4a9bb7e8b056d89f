//! Workers that do not fit and are no members: since when they wait, and how often they were tried again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::pause::doubled;
use super::probes::MAX_PROBED;
use crate::cluster::event::WorkerId;

/// Pause before a worker that does not fit is tried again; each time twice that, up to the longest.
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// Longest such pause while nothing is computed, because too few workers are left.
const LONGEST_RETRY_IDLE: Duration = Duration::from_secs(5);
/// Tries after which a worker whose own address is at fault is refused.
const MAX_TRIES: u32 = 5;
/// Shortest time before a worker is refused, however often it was tried.
const REFUSED_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Waiting {
    since: Instant,
    /// How often all workers with whom it fails were tried.
    tries: u32,
    /// Workers with whom it fails that were tried in the current turn.
    tried: BTreeSet<WorkerId>,
    retry_at: Instant,
}

/// The workers that were set aside.
#[derive(Debug, Default)]
pub struct SetAside {
    waiting: BTreeMap<WorkerId, Waiting>,
}

impl SetAside {
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub fn contains(&self, worker: WorkerId) -> bool {
        self.waiting.contains_key(&worker)
    }

    /// Sets a worker aside. False where it is already.
    pub fn add(&mut self, now: Instant, worker: WorkerId) -> bool {
        if self.contains(worker) {
            return false;
        }
        let waiting = Waiting {
            since: now,
            tries: 1,
            tried: BTreeSet::new(),
            retry_at: now + FIRST_RETRY,
        };
        self.waiting.insert(worker, waiting);
        true
    }

    /// How often a worker was tried, where that is often and long enough to refuse it.
    pub fn tried_enough(&self, now: Instant, worker: WorkerId) -> Option<u32> {
        let waiting = self.waiting.get(&worker)?;
        let is_late = now.duration_since(waiting.since) >= REFUSED_AFTER;
        (is_late && waiting.tries > MAX_TRIES).then_some(waiting.tries)
    }

    /// Workers that are to be tried again by now.
    pub fn due(&self, now: Instant) -> Vec<WorkerId> {
        let due = |(id, waiting): (&WorkerId, &Waiting)| (waiting.retry_at <= now).then_some(*id);
        self.waiting.iter().filter_map(due).collect()
    }

    /// When the first worker is to be tried again.
    pub fn first_retry(&self) -> Option<Instant> {
        self.waiting.values().map(|waiting| waiting.retry_at).min()
    }

    /// Puts the next try of a worker off, because one is under way.
    pub fn put_off(&mut self, now: Instant, worker: WorkerId) {
        if let Some(waiting) = self.waiting.get_mut(&worker) {
            waiting.retry_at = now + FIRST_RETRY;
        }
    }

    /// Tries a worker again with some of those with whom it fails (`partners`): so many at a time, in turn, until all were tried.
    pub fn try_again(
        &mut self,
        now: Instant,
        worker: WorkerId,
        partners: &BTreeSet<WorkerId>,
        is_idle: bool,
    ) -> Vec<WorkerId> {
        self.put_off(now, worker);
        let Some(waiting) = self.waiting.get_mut(&worker) else {
            return Vec::new();
        };
        waiting.tried.retain(|one| partners.contains(one));
        let untried = partners.difference(&waiting.tried).copied();
        let untried: Vec<WorkerId> = untried.take(MAX_PROBED).collect();
        waiting.tried.extend(&untried);
        if waiting.tried == *partners {
            waiting.tried.clear();
            let longest = match is_idle {
                true => LONGEST_RETRY_IDLE,
                false => LONGEST_RETRY,
            };
            waiting.retry_at = now + doubled(FIRST_RETRY, waiting.tries, longest);
            waiting.tries += 1;
        }
        untried
    }

    /// Ends the waiting of all but these workers.
    pub fn keep_only(&mut self, workers: &BTreeSet<WorkerId>) {
        self.waiting.retain(|id, _| workers.contains(id));
    }

    pub fn forget(&mut self, worker: WorkerId) {
        self.waiting.remove(&worker);
    }
}
