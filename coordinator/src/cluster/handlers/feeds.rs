//! Joining: a newcomer that is behind copies the state of a member and repeats its updates, while the members go on. It
//! enters at the next end of a step once it is as far as they are, or nearly, and nobody waits for it before that.
//!
//! A source or a newcomer that dies changes no generation: the newcomer gets another source, and a feed without a
//! follower ends by itself. The whole state travels within a generation only where too few would be left to compute
//! without it, and to a spare that replaces a member.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::time::Instant;

use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::feeds::{MAX_FAILURES, MAX_FEEDS_PER_SOURCE};
use crate::cluster::parts::membership::Worker;
use crate::cluster::parts::step_stats::disagreement;
use crate::cluster::run_event::RunEvent;

/// A newcomer may enter if it lacks the updates of less than this, and takes them then: where steps are so short, being at most
/// one behind would be too much to ask for.
const LAG_SECONDS: f64 = 0.5;
/// Most updates that a newcomer may lack when it enters, however short the steps are.
const MAX_LAG: u64 = 64;
/// Characters kept of a worker's reason for a failure, which is shown to people.
const MAX_REASON_CHARS: usize = 200;

impl Cluster {
    /// Gives every newcomer that is behind a source, as far as there is room for newcomers.
    pub(super) fn feed_newcomers(&mut self, now: Instant, commands: &mut Vec<Command>) {
        self.feeds.end_pauses(now);
        let nobody_waits = self.members.ready_count() <= self.members.ranks().len();
        if !self.generation.is_running() || self.term.is_stopping() || nobody_waits {
            return;
        }
        let kept_out = self.kept_out();
        for id in self.members.ids() {
            if kept_out.contains(&id) {
                continue;
            }
            let waits =
                |worker: &Worker| worker.ready.is_some() && worker.seen < self.progress.committed();
            let is_behind = self.members.get(id).is_some_and(waits);
            self.await_synced(now, id);
            let is_cared_for = self.members.rank_of(id).is_some() || self.feeds.follows(id);
            if !is_behind || is_cared_for || self.feeds.pauses(id) {
                continue;
            }
            if !self.has_room() {
                return;
            }
            if let Some(source) = self.choose_source(id) {
                self.begin_feed(id, source, commands);
            }
        }
    }

    /// Whether there is room for one more newcomer, beside those who follow already.
    fn has_room(&self) -> bool {
        let newcomer = |id: &WorkerId| self.members.rank_of(*id).is_none();
        let expected = self.feeds.followers().filter(newcomer).count();
        let taken = self.members.ranks().len() + expected;
        self.settings.max_workers.is_none_or(|max| taken < max)
    }

    /// The member that a newcomer should follow: rather another than the one that failed last, then the one with the fewest
    /// followers, then rather a late rank than the first, which also saves checkpoints.
    fn choose_source(&self, follower: WorkerId) -> Option<WorkerId> {
        let failed = self.feeds.last_failed_source(follower);
        // Who was asked to stop would soon leave its followers without a source: they rather wait for another's state.
        let stays = |id: WorkerId| !self.members.is_draining(id);
        let ranks = self.members.ranks();
        let somebody_stays = ranks.iter().any(|id| stays(*id));
        let by_rank = |(rank, id): (usize, WorkerId)| {
            let feeds = self.feeds.count_of(id);
            let has_room = feeds < MAX_FEEDS_PER_SOURCE;
            let may_feed = self.is_source(id) && has_room && (stays(id) || !somebody_stays);
            may_feed.then_some((Some(id) == failed, feeds, Reverse(rank), id))
        };
        let best = ranks.iter().copied().enumerate().filter_map(by_rank).min();
        best.map(|(.., id)| id)
    }

    /// Whether this worker is a member that has the committed state.
    fn is_source(&self, id: WorkerId) -> bool {
        let has_state = |worker: &Worker| worker.seen == self.progress.committed();
        self.members.rank_of(id).is_some() && self.members.get(id).is_some_and(has_state)
    }

    fn begin_feed(&mut self, id: WorkerId, source: WorkerId, commands: &mut Vec<Command>) {
        let Some(member) = self.members.get(source) else {
            return;
        };
        let attempt = self.feeds.begin(id, source);
        commands.push(Command::SendFeed {
            worker: source,
            feed: v1::Feed {
                attempt,
                worker: id.0,
            },
        });
        commands.push(Command::SendFollow {
            worker: id,
            follow: v1::Follow {
                attempt,
                worker: id.0,
                step: self.progress.committed(),
                source: Some(v1::Member {
                    worker: source.0,
                    name: member.name.clone(),
                    address: member.address.clone(),
                }),
            },
        });
        let (name, source) = (self.members.name(id), self.members.name(source));
        let text = format!("worker {name} copies the state of {source} while the others go on");
        commands.push(Command::Emit(RunEvent::Notice(text)));
    }

    /// A follower has come to another step of its feed.
    pub(super) fn synced(
        &mut self,
        now: Instant,
        id: WorkerId,
        synced: v1::Synced,
        commands: &mut Vec<Command>,
    ) {
        if !self.feeds.note_state(id, synced.attempt) {
            return;
        }
        let step = synced.step;
        // Its source may have made an update that nobody has reported yet.
        let possible = self.progress.committed().max(self.stats.recorded()) + 1;
        if step > possible {
            let reason = format!("it says that it has seen {step} updates of {possible}");
            return self.expel(now, id, reason, commands);
        }
        self.members.note_seen(id, step);
        if let Some(report) = synced.report.filter(|report| report.step == step) {
            let known = self.stats.digest_of(step);
            if let Some(digest) = known.filter(|_| !report.weights_digest.is_empty())
                && digest != report.weights_digest
            {
                let reason = disagreement(step, &report.weights_digest, digest);
                return self.expel(now, id, reason, commands);
            }
            self.feeds.note_report(id, report);
        }
        if step > self.progress.committed() && step <= self.stats.recorded() {
            // Everyone else who had that state is lost.
            self.roll_forward_to_held_state(now, id, step, commands);
        }
    }

    /// A follower's feed broke off: it gets another one, or is expelled after [`MAX_FAILURES`].
    pub(super) fn feed_lost(
        &mut self,
        now: Instant,
        id: WorkerId,
        lost: &v1::FeedLost,
        commands: &mut Vec<Command>,
    ) {
        if self.needs_no_feed(id) {
            // Its source heard of the generation before it did, and has nothing more for it.
            return self.feeds.end_feed(id, lost.attempt);
        }
        let Some((source, failures)) = self.feeds.fail(now, id, lost.attempt) else {
            return;
        };
        let reason: String = lost.reason.chars().take(MAX_REASON_CHARS).collect();
        if failures >= MAX_FAILURES {
            let reason = format!("its state could not be copied {failures} times: {reason}");
            return self.expel(now, id, reason, commands);
        }
        commands.push(Command::Emit(RunEvent::Notice(format!(
            "worker {} could not copy the state of {}: {reason}; it begins anew",
            self.members.name(id),
            self.members.name(source)
        ))));
        self.try_source(now, id, source, commands);
        self.send_back(now, id, commands);
    }

    /// Whether this worker is a member that has the state of its generation, so that it enters without a feed.
    fn needs_no_feed(&self, id: WorkerId) -> bool {
        let has_state = |worker: &Worker| worker.seen >= self.progress.committed();
        self.members.rank_of(id).is_some() && self.members.get(id).is_some_and(has_state)
    }

    /// Makes a newcomer that was let in too early wait again; it enters another time.
    pub(super) fn send_back(&mut self, now: Instant, id: WorkerId, commands: &mut Vec<Command>) {
        if self.members.demote(id) {
            self.feeds.drop_feed(id);
            self.progress.ledger_mut().release(id);
            self.start_generation(now, commands);
        }
    }

    /// Ends the feeds of a worker that is gone. Its followers need another source, and those of them that were let in before they
    /// had the last update must wait again: the others do not wait for a whole state.
    pub(super) fn end_feeds(&mut self, gone: WorkerId) {
        self.feeds.end(gone);
        for id in self.feeds.drop_feeds_of(gone) {
            let lacks = |worker: &Worker| worker.seen < self.progress.committed();
            if self.members.get(id).is_some_and(lacks) && self.members.demote(id) {
                self.generation.lose_member();
                self.progress.ledger_mut().release(id);
            }
        }
    }

    /// Newcomers that may be members of a generation that begins now.
    pub(in crate::cluster) fn entrants(&self) -> BTreeSet<WorkerId> {
        let kept_out = self.kept_out();
        let newcomers: Vec<WorkerId> = self
            .members
            .ids()
            .into_iter()
            .filter(|id| self.members.rank_of(*id).is_none() && !kept_out.contains(id))
            .filter(|id| self.members.get(*id).is_some_and(|w| w.ready.is_some()))
            .collect();
        let in_step = newcomers.iter().copied().filter(|id| self.is_in_step(*id));
        let mut entrants: BTreeSet<WorkerId> = in_step.collect();
        let members = self.members.ranks().len() + entrants.len();
        if members < self.settings.min_workers.max(1) {
            // Nothing goes on without them, so nobody is held up.
            return newcomers.into_iter().collect();
        }
        let fallen = self.generation.size().saturating_sub(members);
        let is_spare = |id: &WorkerId| !self.feeds.is_arriving(*id);
        let spares = newcomers.into_iter().filter(is_spare);
        entrants.extend(spares.take(fallen));
        entrants
    }

    /// Whether a newcomer has the committed state, or gets what it lacks at once.
    fn is_in_step(&self, id: WorkerId) -> bool {
        let seen = self.members.get(id).map_or(0, |worker| worker.seen);
        seen == self.progress.committed() || self.is_fed(id)
    }

    /// Whether the worker lacks only a few updates, which are on their way to it over its feed.
    pub(super) fn is_fed(&self, id: WorkerId) -> bool {
        let seen = self.members.get(id).map_or(0, |worker| worker.seen);
        let lag = self.progress.committed().saturating_sub(seen);
        (1..=self.allowed_lag()).contains(&lag)
            && self
                .feeds
                .live_source(id)
                .is_some_and(|source| self.is_source(source))
    }

    fn allowed_lag(&self) -> u64 {
        let seconds = self.stats.mean_step_seconds();
        seconds.map_or(1, |seconds| {
            ((LAG_SECONDS / seconds.max(1e-6)) as u64).clamp(1, MAX_LAG)
        })
    }

    /// Whether somebody waits who may enter, and there is room.
    pub(super) fn may_grow(&self) -> bool {
        let ranks = self.members.ranks().len();
        let has_room = self.settings.max_workers.is_none_or(|max| ranks < max);
        has_room && self.members.ready_count() > ranks && !self.entrants().is_empty()
    }

    /// Notes who is in the generation that begins. Those who get the whole state from it follow nobody any more.
    pub(super) fn note_generation(&mut self) {
        let ranks = self.members.ranks().to_vec();
        for id in ranks {
            if !self.is_in_step(id) {
                self.feeds.end(id);
            } else if !self.is_fed(id) {
                self.feeds.note_over(id);
            }
        }
    }
}
