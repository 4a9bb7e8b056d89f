//! The member's side of its feeds: which followers there are, what each still needs, and what is kept for them.
//!
//! A copy of the state (12 bytes per trainable scalar) is kept only while a follower still lacks pieces of it, and there
//! is never a second one: whoever comes while another takes it shares it, and gets the updates since then as well. Where
//! nobody is there to take it, whoever comes gets a new one, and so do those who come back for the old. The log of updates
//! (4 bytes per scalar each) begins at the oldest one that a follower still lacks and is bounded in bytes; a follower that
//! falls further behind is let go and must begin anew. Where nobody follows, nothing is kept or copied.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use common::files::snapshot::MAX_STATE_BYTES_PER_SCALAR;

use super::super::greeting::FeedHello;
use super::super::lock::lock;
use super::super::state::{StateCopy, StateHeader};
use super::{Request, Update};
use crate::collective::generation_token::GenerationToken;

/// Least bound of the log of updates, in bytes, however small the state is.
const MIN_LOG_BYTES: usize = 256 << 20;
/// Feeds remembered after their end, so that their followers learn why.
const MAX_ENDED: usize = 64;
/// Time between two looks for followers that do not come (back).
const WATCH: Duration = Duration::from_millis(500);

pub const MEMBER: &str = "its follower has become a member";

/// Bounds of what a member keeps for its followers.
#[derive(Clone, Copy, Debug)]
pub struct FeedLimits {
    /// Most bytes of updates that are kept; default: as much as the state itself, and at least 256 MiB.
    pub log_bytes: Option<usize>,
    /// How long a follower may be without a connection.
    pub absence: Duration,
    /// How long a follower may send and take nothing.
    pub silence: Duration,
}

impl Default for FeedLimits {
    fn default() -> Self {
        Self {
            log_bytes: None,
            absence: Duration::from_secs(20),
            silence: Duration::from_secs(20),
        }
    }
}

/// All feeds of one member.
pub struct Feeds {
    pub(super) limits: FeedLimits,
    pub(super) token: GenerationToken,
    state: Mutex<State>,
    /// Woken by every update and every change of a feed.
    pub(super) changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The copy of the state, kept while a follower lacks pieces of it.
    offer: Option<Arc<Offer>>,
    /// The newest updates without a gap, the last of which led to `step`.
    log: VecDeque<Arc<Update>>,
    log_bytes: usize,
    /// Updates that this member has seen, as far as its feeds go.
    step: u64,
    /// Feeds by the follower's number.
    feeds: BTreeMap<u64, Feed>,
    connections: u64,
    watched: bool,
}

/// A copy of a state, on its way to followers.
pub(super) struct Offer {
    pub state: StateCopy,
    header: OnceLock<StateHeader>,
}

impl Offer {
    /// Header of the state, with its digests: computed by whoever needs it first, not by the engine.
    pub fn header(&self) -> &StateHeader {
        self.header.get_or_init(|| StateHeader::of(&self.state))
    }
}

struct Feed {
    run_id: [u8; 32],
    attempt: u64,
    place: Place,
    /// Step at which the feed is over, because the follower has become a member.
    until: Option<u64>,
    /// Number of the follower's newest connection; an older one is over.
    connection: u64,
    absent_since: Option<Instant>,
}

impl Feed {
    fn is_over(&self) -> bool {
        matches!(self.place, Place::Ended(_))
    }

    fn is_absent(&self) -> bool {
        self.absent_since.is_some()
    }
}

enum Place {
    /// The follower lacks pieces of the state.
    Pieces,
    /// The follower has the state after so many updates.
    Updates(u64),
    Ended(String),
}

/// What one connection must do next.
pub(super) enum Deed {
    SendState(Arc<Offer>),
    SendUpdate(Arc<Update>),
    Wait,
    Later,
    End(String),
}

impl Feeds {
    pub fn new(limits: FeedLimits) -> Self {
        Self {
            limits,
            token: GenerationToken::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Lets `worker` follow. `copy` is called only where there is no copy of the state to share. Whoever followed under another
    /// `run_id` does so no more.
    ///
    /// # Errors
    /// Those of `copy`. No feed has begun then.
    pub fn begin<E>(
        self: &Arc<Self>,
        run_id: [u8; 32],
        worker: u64,
        attempt: u64,
        copy: impl FnOnce() -> Result<StateCopy, E>,
    ) -> Result<(), E> {
        let mut state = lock(&self.state);
        let is_foreign = |feed: &Feed| feed.run_id != run_id && !feed.is_over();
        if state.feeds.values().any(is_foreign) {
            state.end_all("its source has another coordinator");
        }
        state.expire(self.limits.absence);
        if !state.is_offer_shared() {
            // First, so that there are never two.
            state.offer = None;
            let copy = copy()?;
            let step = copy.snapshot.step;
            if step != state.step {
                state.end_all("its source was itself left behind");
                state.step = step;
            }
            state.offer = Some(Arc::new(Offer {
                state: copy,
                header: OnceLock::new(),
            }));
        }
        let feed = Feed {
            run_id,
            attempt,
            place: Place::Pieces,
            until: None,
            connection: 0,
            absent_since: Some(Instant::now()),
        };
        state.feeds.insert(worker, feed);
        state.trim();
        let watch = !std::mem::replace(&mut state.watched, true);
        drop(state);
        self.changed.notify_all();
        if watch {
            let feeds = self.clone();
            std::thread::spawn(move || feeds.watch());
        }
        Ok(())
    }

    /// Hands an update to whoever follows. Costs nothing where nobody does.
    pub fn publish(&self, update: Update) {
        let mut state = lock(&self.state);
        if !state.is_followed() {
            state.step = update.step + 1;
            return;
        }
        if update.step != state.step {
            state.end_all("its source was itself left behind");
        }
        state.step = update.step + 1;
        state.log_bytes += update.bytes();
        // As much as a state with two moments.
        let least = MAX_STATE_BYTES_PER_SCALAR * update.mean.len();
        let budget = self.limits.log_bytes.unwrap_or(least.max(MIN_LOG_BYTES));
        state.log.push_back(Arc::new(update));
        state.trim();
        while state.log_bytes > budget && state.is_followed() {
            state.end_slowest();
            state.trim();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Ends the feeds of followers that are now `members`: they need the updates up to `step` and no more.
    ///
    /// A follower that still lacks pieces of the state gets all of it from its generation, unless it is one of the `fed`: these
    /// have the state, and their word for that is still on its way here.
    pub fn conclude(&self, members: &[u64], fed: &[u64], step: u64) {
        let mut state = lock(&self.state);
        for worker in members {
            let Some(feed) = state.feeds.get_mut(worker) else {
                continue;
            };
            feed.until = Some(step);
            if matches!(feed.place, Place::Pieces) && !fed.contains(worker) {
                feed.place = Place::Ended(MEMBER.to_owned());
            }
        }
        state.trim();
        drop(state);
        self.changed.notify_all();
    }

    /// Whether anyone follows.
    pub fn is_followed(&self) -> bool {
        lock(&self.state).is_followed()
    }

    /// Bytes kept for followers.
    pub fn kept_bytes(&self) -> usize {
        let state = lock(&self.state);
        let scalars = state
            .offer
            .as_ref()
            .map(|offer| &offer.state.snapshot.layout);
        let offer = scalars.map_or(0, |layout| layout.state_bytes());
        offer + state.log_bytes
    }

    /// Ends every feed at once.
    pub fn close(&self) {
        self.token.close();
        lock(&self.state).end_all("its source has left");
        self.changed.notify_all();
    }

    fn watch(&self) {
        loop {
            std::thread::sleep(WATCH);
            let mut state = lock(&self.state);
            state.expire(self.limits.absence);
            if !state.is_followed() || self.token.check().is_err() {
                state.watched = false;
                return;
            }
        }
    }

    /// Takes a follower's call and returns the connection's number, or what to do instead. An earlier connection of it is over.
    pub(super) fn connect(&self, hello: &FeedHello, request: &Request) -> Result<u64, Deed> {
        let mut state = lock(&self.state);
        let begun = state.feeds.get(&hello.worker).filter(|feed| {
            // One that is older than the call is about to be replaced.
            feed.run_id == hello.run_id && feed.attempt >= hello.attempt
        });
        let feed = begun.ok_or(Deed::Later)?;
        if feed.attempt != hello.attempt {
            return Err(Deed::End("a newer feed has replaced it".to_owned()));
        }
        if let Place::Ended(reason) = &feed.place {
            return Err(Deed::End(reason.clone()));
        }
        if let Some(step) = request.step
            && !state.reaches(step)
        {
            return Err(Deed::End(format!("the updates after step {step} are gone")));
        }
        state.connections += 1;
        let connection = state.connections;
        if let Some(feed) = state.feeds.get_mut(&hello.worker) {
            feed.connection = connection;
            feed.absent_since = None;
            if let Some(step) = request.step {
                feed.place = Place::Updates(step);
            }
        }
        state.trim();
        drop(state);
        self.changed.notify_all();
        Ok(connection)
    }

    /// Notes that a follower's connection has ended, so that its absence is timed.
    pub(super) fn disconnect(&self, worker: u64, connection: u64) {
        let mut state = lock(&self.state);
        if let Some(feed) = state.feeds.get_mut(&worker)
            && feed.connection == connection
        {
            feed.absent_since = Some(Instant::now());
        }
    }

    /// What to send to the follower next; waits for at most `wait` where there is nothing.
    pub(super) fn next(&self, worker: u64, connection: u64, wait: Duration) -> Deed {
        let state = lock(&self.state);
        let idle = |state: &mut State| matches!(state.deed(worker, connection), Deed::Wait);
        let waited = self.changed.wait_timeout_while(state, wait, idle);
        let (state, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        state.deed(worker, connection)
    }

    /// Notes that the follower has the state after `step` updates.
    pub(super) fn advance(&self, worker: u64, connection: u64, step: u64) {
        let mut state = lock(&self.state);
        if let Some(feed) = state.feeds.get_mut(&worker)
            && feed.connection == connection
            && !feed.is_over()
        {
            feed.place = Place::Updates(step);
        }
        state.trim();
    }
}

impl State {
    fn is_followed(&self) -> bool {
        self.feeds.values().any(|feed| !feed.is_over())
    }

    /// Returns whether a newcomer gets the copy of the state that there is. One that nobody takes at the moment would grow old
    /// for a follower that may be dead.
    fn is_offer_shared(&self) -> bool {
        let takes = |feed: &Feed| matches!(feed.place, Place::Pieces) && !feed.is_absent();
        let is_newest = |offer: &Arc<Offer>| offer.state.snapshot.step == self.step;
        let is_taken = self.feeds.values().any(takes);
        self.offer
            .as_ref()
            .is_some_and(|offer| is_taken || is_newest(offer))
    }

    fn deed(&self, worker: u64, connection: u64) -> Deed {
        let newest = self
            .feeds
            .get(&worker)
            .filter(|feed| feed.connection == connection);
        let Some(feed) = newest else {
            return Deed::End("it is over".to_owned());
        };
        match (&feed.place, &self.offer) {
            (Place::Ended(reason), _) => Deed::End(reason.clone()),
            (Place::Pieces, Some(offer)) => Deed::SendState(offer.clone()),
            (Place::Pieces, None) => Deed::End("its source has no state for it".to_owned()),
            (Place::Updates(step), _) => match self.update(*step) {
                Some(update) => Deed::SendUpdate(update.clone()),
                None => Deed::Wait,
            },
        }
    }

    /// Number of updates before the first one in the log.
    fn log_start(&self) -> u64 {
        self.step - self.log.len() as u64
    }

    fn update(&self, step: u64) -> Option<&Arc<Update>> {
        let index = step.checked_sub(self.log_start())?;
        self.log.get(index as usize)
    }

    /// Returns whether every update after `step` is in the log or still to come.
    fn reaches(&self, step: u64) -> bool {
        (self.log_start()..=self.step).contains(&step)
    }

    /// Updates that a feed's follower has, or will have with the copy of the state. None where the feed is over.
    fn has(&self, feed: &Feed) -> Option<u64> {
        match &feed.place {
            Place::Ended(_) => None,
            Place::Pieces => self.offer.as_ref().map(|offer| offer.state.snapshot.step),
            Place::Updates(step) => Some(*step),
        }
    }

    /// Drops the copy of the state and the updates that no follower lacks any more.
    fn trim(&mut self) {
        for feed in self.feeds.values_mut() {
            if let (Place::Updates(step), Some(until)) = (&feed.place, feed.until)
                && *step >= until
            {
                feed.place = Place::Ended(MEMBER.to_owned());
            }
        }
        let lacks_pieces = |feed: &Feed| matches!(feed.place, Place::Pieces);
        if !self.feeds.values().any(lacks_pieces) {
            self.offer = None;
        }
        let oldest = self.feeds.values().filter_map(|feed| self.has(feed)).min();
        let oldest = oldest.unwrap_or(self.step);
        while self.log_start() < oldest
            && let Some(update) = self.log.pop_front()
        {
            self.log_bytes -= update.bytes();
        }
        while self.feeds.values().filter(|feed| feed.is_over()).count() > MAX_ENDED {
            let oldest = self.feeds.iter().find(|(_, feed)| feed.is_over());
            let Some(worker) = oldest.map(|(worker, _)| *worker) else {
                break;
            };
            self.feeds.remove(&worker);
        }
    }

    fn end_slowest(&mut self) {
        let oldest = self.feeds.values().filter_map(|feed| self.has(feed)).min();
        let slowest: Vec<u64> = self
            .feeds
            .iter()
            .filter(|(_, feed)| self.has(feed).is_some_and(|has| Some(has) == oldest))
            .map(|(worker, _)| *worker)
            .collect();
        for worker in slowest {
            if let Some(feed) = self.feeds.get_mut(&worker) {
                let reason = "its follower fell too far behind";
                feed.place = Place::Ended(reason.to_owned());
            }
        }
    }

    fn end_all(&mut self, reason: &str) {
        for feed in self.feeds.values_mut() {
            if !feed.is_over() {
                feed.place = Place::Ended(reason.to_owned());
            }
        }
        self.trim();
    }

    fn expire(&mut self, absence: Duration) {
        for feed in self.feeds.values_mut() {
            let absent = feed
                .absent_since
                .is_some_and(|since| since.elapsed() >= absence);
            if absent && !feed.is_over() {
                feed.place = Place::Ended("its follower was gone for too long".to_owned());
            }
        }
        self.trim();
    }
}
