//! Toy feeds: a newcomer copies a member's state and repeats its updates, each at a moment of chance, and either end may
//! die in between. A copy or an update that is not the one due fails the test.

use std::collections::BTreeMap;

use proto::v1;

use super::super::{Event, WorkerId};
use super::World;

/// A feed breaks off in one of so many moments.
const BREAKS: u64 = 60;
/// Moments in which a newcomer does nothing about its feed.
const PAUSES: u64 = 3;

/// Both sides of one toy.
#[derive(Default)]
pub struct Feeds {
    followed: Option<v1::Follow>,
    has_state: bool,
    /// Generation and step that it enters with the next updates.
    entering: Option<(u64, u64)>,
    /// By follower.
    fed: BTreeMap<u64, Fed>,
}

#[derive(Clone, Copy)]
struct Fed {
    attempt: u64,
    /// Of the copy.
    first: u64,
    /// Of the last update.
    newest: u64,
    ended: bool,
}

impl Feeds {
    pub fn follow(&mut self, follow: v1::Follow) {
        self.followed = Some(follow);
        self.has_state = false;
        self.entering = None;
    }

    pub fn begin(&mut self, feed: v1::Feed, step: u64) {
        // Others may have begun to take the copy before.
        let age = feed.attempt % 3;
        let fed = Fed {
            attempt: feed.attempt,
            first: step.saturating_sub(age),
            newest: step,
            ended: false,
        };
        self.fed.insert(feed.worker, fed);
    }

    /// The member has made an update.
    pub fn publish(&mut self, step: u64) {
        for fed in self.fed.values_mut().filter(|fed| !fed.ended) {
            assert_eq!(fed.newest + 1, step, "a feed with a gap");
            fed.newest = step;
        }
    }

    /// The member got the state of others.
    pub fn end(&mut self) {
        for fed in self.fed.values_mut() {
            fed.ended = true;
        }
    }

    pub fn enter(&mut self, entering: Option<(u64, u64)>) {
        self.entering = entering;
        if entering.is_none() {
            self.followed = None;
        }
    }
}

impl World {
    /// Takes one thing from the feed.
    pub(super) fn follow(&mut self, id: WorkerId) {
        let Some(follow) = self
            .toys
            .get(&id)
            .and_then(|toy| toy.feeds.followed.clone())
        else {
            return;
        };
        if self.rng.below(PAUSES) > 0 {
            return;
        }
        let source = WorkerId(follow.source.as_ref().map_or(0, |source| source.worker));
        let source = self.toys.get(&source);
        if source.is_none() || self.rng.below(BREAKS) == 0 {
            return self.lose_feed(id, follow.attempt);
        }
        let fed = source.and_then(|source| source.feeds.fed.get(&id.0));
        // The source may not have heard of it yet.
        let Some(fed) = fed.filter(|fed| fed.attempt == follow.attempt).copied() else {
            return;
        };
        if fed.ended {
            return self.lose_feed(id, follow.attempt);
        }
        let Some(toy) = self.toys.get_mut(&id) else {
            return;
        };
        if !toy.feeds.has_state {
            toy.feeds.has_state = true;
            toy.step = fed.first;
            toy.accumulator.clear();
        } else if toy.step < fed.newest {
            toy.step += 1;
        } else {
            return;
        }
        let step = toy.step;
        let report = v1::StepReport {
            step,
            weights_digest: format!("weights-{step}"),
            ..Default::default()
        };
        let synced = v1::Synced {
            attempt: fed.attempt,
            step,
            report: (step > fed.first).then_some(report),
        };
        toy.up.push_back(Event::WorkerSynced { worker: id, synced });
        if let Some((generation, due)) = toy.feeds.entering
            && step >= due
        {
            toy.feeds.enter(None);
            toy.say_entered(generation);
            self.entered_by_feed += 1;
        }
    }

    fn lose_feed(&mut self, id: WorkerId, attempt: u64) {
        if let Some(toy) = self.toys.get_mut(&id) {
            toy.feeds.followed = None;
            toy.feeds.entering = None;
            let reason = "it broke off".to_owned();
            let lost = v1::FeedLost { attempt, reason };
            toy.up.push_back(Event::FeedLost { worker: id, lost });
        }
    }
}
