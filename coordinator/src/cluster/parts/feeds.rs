//! The feeds: which newcomer copies the state of which member, and whose copy failed how often.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proto::v1;

use crate::cluster::event::WorkerId;

/// Most followers of one member at a time; further newcomers wait.
pub const MAX_FEEDS_PER_SOURCE: usize = 4;
/// Feeds that a newcomer may lose before it is sent away.
pub const MAX_FAILURES: u32 = 5;
/// Pause from the second failure of a newcomer's feed to the next attempt; twice that after the third, and so on.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// The feeds: which newcomer follows which member.
#[derive(Debug, Default)]
pub struct Feeds {
    /// Feeds by follower: newcomers, and members that have yet to enter.
    feeds: BTreeMap<WorkerId, Feed>,
    /// Workers whose state came, or comes, over a feed: they may have seen an update that nobody else knows of.
    arriving: BTreeSet<WorkerId>,
    /// By follower, its report of the newest update that it has repeated.
    reports: BTreeMap<WorkerId, v1::StepReport>,
    failures: BTreeMap<WorkerId, Failures>,
    /// Number of feeds so far: each has a number of its own.
    attempts: u64,
}

#[derive(Clone, Copy, Debug)]
struct Feed {
    source: WorkerId,
    attempt: u64,
    /// Whether the follower has copied a whole state.
    has_state: bool,
    /// Whether the follower was told of a generation that it enters without the feed: it may have given the feed up.
    is_over: bool,
}

#[derive(Clone, Copy, Debug)]
struct Failures {
    count: u32,
    last_source: WorkerId,
    /// Time before which there is no other attempt.
    wait_until: Option<Instant>,
}

impl Feeds {
    /// Number of followers of this source.
    pub fn count_of(&self, source: WorkerId) -> usize {
        let feeds = self.feeds.values();
        feeds.filter(|feed| feed.source == source).count()
    }

    /// All workers that follow a feed.
    pub fn followers(&self) -> impl Iterator<Item = WorkerId> {
        self.feeds.keys().copied()
    }

    /// Begins a feed, and returns its number.
    pub fn begin(&mut self, follower: WorkerId, source: WorkerId) -> u64 {
        self.attempts += 1;
        self.arriving.insert(follower);
        let feed = Feed {
            source,
            attempt: self.attempts,
            has_state: false,
            is_over: false,
        };
        self.feeds.insert(follower, feed);
        self.attempts
    }

    /// Notes that a follower has taken a whole state from its feed of this number. False where it is an older feed.
    pub fn note_state(&mut self, follower: WorkerId, attempt: u64) -> bool {
        match self.feeds.get_mut(&follower) {
            Some(feed) if feed.attempt == attempt => feed.has_state = true,
            _ => return false,
        }
        true
    }

    /// Notes a follower's report of the newest update that it has repeated.
    pub fn note_report(&mut self, follower: WorkerId, report: v1::StepReport) {
        self.reports.insert(follower, report);
    }

    /// The source of a feed that has brought a whole state and goes on.
    pub fn live_source(&self, follower: WorkerId) -> Option<WorkerId> {
        let feed = self.feeds.get(&follower)?;
        (feed.has_state && !feed.is_over).then_some(feed.source)
    }

    /// Notes that the follower was told of a generation that it enters without its feed.
    pub fn note_over(&mut self, follower: WorkerId) {
        if let Some(feed) = self.feeds.get_mut(&follower) {
            feed.is_over = true;
        }
    }

    /// Ends the worker's feed, whatever it has brought.
    pub fn drop_feed(&mut self, follower: WorkerId) {
        self.feeds.remove(&follower);
    }

    /// Ends all feeds of this source, and returns their followers.
    pub fn drop_feeds_of(&mut self, source: WorkerId) -> Vec<WorkerId> {
        let all = self.feeds.iter();
        let orphans = all.filter(|(_, feed)| feed.source == source);
        let orphans: Vec<WorkerId> = orphans.map(|(follower, _)| *follower).collect();
        self.feeds.retain(|_, feed| feed.source != source);
        orphans
    }

    /// The source with which the worker's copy failed last.
    pub fn last_failed_source(&self, follower: WorkerId) -> Option<WorkerId> {
        let failures = self.failures.get(&follower);
        failures.map(|failures| failures.last_source)
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
    pub fn end_feed(&mut self, worker: WorkerId, attempt: u64) {
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

    /// Ends the pauses that are over.
    pub fn end_pauses(&mut self, now: Instant) {
        for failures in self.failures.values_mut() {
            failures.wait_until.take_if(|until| *until <= now);
        }
    }

    /// Whether this worker waits after a failure.
    pub fn pauses(&self, worker: WorkerId) -> bool {
        let failures = self.failures.get(&worker);
        failures.is_some_and(|failures| failures.wait_until.is_some())
    }

    /// Ends the worker's feed of this number, which is lost. Returns its source and the number of the worker's
    /// failures; None where it is an older one.
    pub fn fail(
        &mut self,
        now: Instant,
        worker: WorkerId,
        attempt: u64,
    ) -> Option<(WorkerId, u32)> {
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
        Some((feed.source, failures.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOLLOWER: WorkerId = WorkerId(1);
    const SOURCE: WorkerId = WorkerId(2);

    #[test]
    fn what_is_said_of_an_older_feed_changes_nothing() {
        let (mut feeds, now) = (Feeds::default(), Instant::now());
        let first = feeds.begin(FOLLOWER, SOURCE);
        assert_eq!(feeds.fail(now, FOLLOWER, first), Some((SOURCE, 1)));
        let second = feeds.begin(FOLLOWER, SOURCE);
        assert!(!feeds.note_state(FOLLOWER, first));
        assert_eq!(feeds.fail(now, FOLLOWER, first), None);
        assert!(feeds.note_state(FOLLOWER, second));
        assert_eq!(feeds.live_source(FOLLOWER), Some(SOURCE));
    }

    #[test]
    fn the_first_failure_needs_no_pause_and_the_next_one_does() {
        let (mut feeds, now) = (Feeds::default(), Instant::now());
        for pause in [None, Some(RETRY_PAUSE), Some(2 * RETRY_PAUSE)] {
            let attempt = feeds.begin(FOLLOWER, SOURCE);
            feeds.fail(now, FOLLOWER, attempt);
            assert_eq!(feeds.wakes_at(), pause.map(|pause| now + pause));
        }
    }

    #[test]
    fn a_source_that_is_gone_leaves_its_followers_without_a_feed() {
        let mut feeds = Feeds::default();
        feeds.begin(FOLLOWER, SOURCE);
        feeds.begin(WorkerId(3), WorkerId(4));
        assert_eq!(feeds.drop_feeds_of(SOURCE), [FOLLOWER]);
        assert!(!feeds.follows(FOLLOWER) && feeds.is_arriving(FOLLOWER));
        assert_eq!(feeds.followers().count(), 1);
    }
}
