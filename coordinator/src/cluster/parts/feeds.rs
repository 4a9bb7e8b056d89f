//! The feeds: which newcomer copies the state of which member, and whose copy failed how often.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proto::v1;

use crate::cluster::event::WorkerId;

/// Most followers of one member at a time; further newcomers wait.
pub const MAX_FEEDS_PER_SOURCE: usize = 4;
/// Feeds that a newcomer may lose before it is sent away.
pub(in crate::cluster) const MAX_FAILURES: u32 = 5;
/// Pause from the second failure of a newcomer's feed to the next attempt; twice that after the third, and so on.
pub(in crate::cluster) const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// The feeds: which newcomer follows which member.
#[derive(Debug, Default)]
pub struct Joining {
    /// Feeds by follower: newcomers, and members that have yet to enter.
    pub(in crate::cluster) feeds: BTreeMap<WorkerId, Feed>,
    /// Workers whose state came, or comes, over a feed: they may have seen an update that nobody else knows of.
    pub(in crate::cluster) arriving: BTreeSet<WorkerId>,
    /// By follower, its report of the newest update that it has repeated.
    pub(in crate::cluster) reports: BTreeMap<WorkerId, v1::StepReport>,
    pub(in crate::cluster) failures: BTreeMap<WorkerId, Failures>,
    /// Number of feeds so far: each has a number of its own.
    pub(in crate::cluster) attempts: u64,
}

#[derive(Clone, Copy, Debug)]
pub(in crate::cluster) struct Feed {
    pub(in crate::cluster) source: WorkerId,
    pub(in crate::cluster) attempt: u64,
    /// Whether the follower has copied a whole state.
    pub(in crate::cluster) has_state: bool,
    /// Whether the follower was told of a generation that it enters without the feed: it may have given the feed up.
    pub(in crate::cluster) is_over: bool,
}

#[derive(Clone, Copy, Debug)]
pub(in crate::cluster) struct Failures {
    pub(in crate::cluster) count: u32,
    pub(in crate::cluster) last_source: WorkerId,
    /// Time before which there is no other attempt.
    pub(in crate::cluster) wait_until: Option<Instant>,
}

impl Joining {
    pub(in crate::cluster) fn feeds_of(&self, source: WorkerId) -> usize {
        let feeds = self.feeds.values();
        feeds.filter(|feed| feed.source == source).count()
    }

    /// Whether this worker follows a feed.
    pub fn follows(&self, worker: WorkerId) -> bool {
        self.feeds.contains_key(&worker)
    }

    /// A follower's report of the update that led to `step`.
    pub fn report_of(&self, step: u64) -> Option<(WorkerId, v1::StepReport)> {
        let mut reports = self.reports.iter();
        let (id, report) = reports.find(|(_, report)| report.step == step)?;
        Some((*id, report.clone()))
    }

    /// Whether this worker's state came, or comes, over a feed, and it has not entered yet.
    pub fn is_arriving(&self, worker: WorkerId) -> bool {
        self.arriving.contains(&worker)
    }

    /// Forgets a worker's feed: it has entered or is gone, or its generation gives it the state.
    pub fn end(&mut self, worker: WorkerId) {
        self.feeds.remove(&worker);
        self.arriving.remove(&worker);
        self.reports.remove(&worker);
        self.failures.remove(&worker);
    }

    /// Ends the worker's feed of this number, which has brought all that it was to bring.
    pub(in crate::cluster) fn end_feed(&mut self, worker: WorkerId, attempt: u64) {
        if self
            .feeds
            .get(&worker)
            .is_some_and(|feed| feed.attempt == attempt)
        {
            self.feeds.remove(&worker);
        }
    }

    /// When the next newcomer that waits after a failure may try again.
    pub fn wakes_at(&self) -> Option<Instant> {
        let waiting = self.failures.values();
        waiting.filter_map(|failures| failures.wait_until).min()
    }

    pub(in crate::cluster) fn end_pauses(&mut self, now: Instant) {
        for failures in self.failures.values_mut() {
            failures.wait_until.take_if(|until| *until <= now);
        }
    }

    pub(in crate::cluster) fn pauses(&self, worker: WorkerId) -> bool {
        let failures = self.failures.get(&worker);
        failures.is_some_and(|failures| failures.wait_until.is_some())
    }

    /// Ends the worker's feed of this number, which is lost. Returns it and the worker's failures; None where it is an older one.
    pub(in crate::cluster) fn fail(
        &mut self,
        now: Instant,
        worker: WorkerId,
        attempt: u64,
    ) -> Option<(Feed, u32)> {
        let feed = *self.feeds.get(&worker)?;
        if feed.attempt != attempt {
            return None;
        }
        self.feeds.remove(&worker);
        let failures = self.failures.entry(worker).or_insert(Failures {
            count: 0,
            last_source: feed.source,
            wait_until: None,
        });
        failures.count += 1;
        // The first time another source may do at once.
        let doublings = failures.count.checked_sub(2);
        failures.wait_until =
            doublings.map(|doublings| now + RETRY_PAUSE * 2u32.pow(doublings.min(MAX_FAILURES)));
        failures.last_source = feed.source;
        Some((feed, failures.count))
    }
}
