//! The failure detector: who has said nothing for too long. Any message is a sign of life, and without one a heartbeat comes
//! every second.
//!
//! In: who was heard when. Out: who has been silent beyond the deadline, and when to look again. It never asks why: a
//! process that hangs, a machine that sleeps and a network that is cut look the same from here.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use common::wire::HEARTBEAT_INTERVAL;

use crate::cluster::event::WorkerId;

/// Shortest time that a worker may be silent before it is given up, however short the steps are.
const SHORTEST_DEADLINE: Duration = Duration::from_secs(3);
/// Longest time that a worker may be silent, however long the steps are; also the deadline before a step was measured.
const LONGEST_DEADLINE: Duration = Duration::from_secs(30);
/// Longest time between two looks of the driver at the clock while anybody is connected: a longer pause was the driver's own.
const LONGEST_PAUSE: Duration = HEARTBEAT_INTERVAL;
/// A worker that was silent for so long may be lost together with one that has just been given up.
const SUSPICIOUS: Duration = Duration::from_secs(2);
/// Time between two looks while it is awaited whether suspicious workers are lost too.
const SUSPECTS_POLL: Duration = Duration::from_millis(100);

/// How long a worker may say nothing: two mean steps, within bounds. Before a step was measured, the longest.
pub fn deadline(mean_step_seconds: Option<f64>) -> Duration {
    let two_steps = mean_step_seconds
        .map(|seconds| Duration::try_from_secs_f64(2.0 * seconds).unwrap_or(LONGEST_DEADLINE));
    let deadline = two_steps.unwrap_or(LONGEST_DEADLINE);
    deadline.clamp(SHORTEST_DEADLINE, LONGEST_DEADLINE)
}

/// When each worker was heard last.
#[derive(Debug, Default)]
pub struct FailureDetector {
    heard: BTreeMap<WorkerId, Instant>,
    /// The entries of `heard` by time, the most silent worker first.
    by_time: BTreeSet<(Instant, WorkerId)>,
    /// When the driver was last awake.
    looked: Option<Instant>,
}

impl FailureDetector {
    /// Notes that the driver is awake, and returns for how long it was not.
    ///
    /// Silence counts only while somebody listens: a pause of the driver (the machine slept, the process was stopped) is nobody's
    /// silence, and after a long one everybody has the whole deadline again.
    pub fn listen(&mut self, now: Instant) -> Duration {
        let Some(looked) = self.looked.replace(now) else {
            return Duration::ZERO;
        };
        let unheard = now.duration_since(looked).saturating_sub(LONGEST_PAUSE);
        if unheard.is_zero() {
            return unheard;
        }
        for heard in self.heard.values_mut() {
            *heard = match unheard < LONGEST_PAUSE {
                true => (*heard + unheard).min(now),
                false => now,
            };
        }
        self.by_time = self.heard.iter().map(|(id, heard)| (*heard, *id)).collect();
        unheard
    }

    /// Notes a sign of life of `worker`.
    pub fn hear(&mut self, worker: WorkerId, now: Instant) {
        if let Some(heard) = self.heard.insert(worker, now) {
            self.by_time.remove(&(heard, worker));
        }
        self.by_time.insert((now, worker));
    }

    pub fn heard_at(&self, worker: WorkerId) -> Option<Instant> {
        self.heard.get(&worker).copied()
    }

    pub fn forget(&mut self, worker: WorkerId) {
        if let Some(heard) = self.heard.remove(&worker) {
            self.by_time.remove(&(heard, worker));
        }
    }

    /// The newest moment at which the driver was awake.
    pub fn looked(&self) -> Option<Instant> {
        self.looked
    }

    /// When to look for expired workers next; None while no worker is known.
    pub fn wakes_at(&self, deadline: Duration) -> Option<Instant> {
        let looked = self.looked?;
        let (heard, _) = self.by_time.first()?;
        let mut due = *heard + deadline;
        if due <= looked {
            due = looked + SUSPECTS_POLL;
        }
        Some(due.min(looked + LONGEST_PAUSE))
    }

    /// Workers that have been silent beyond the deadline, and for how long, the most silent first.
    ///
    /// A cut network silences many within one heartbeat of each other. Where others are suspicious too when the first
    /// one's time is up, they are awaited for that long, so that all go together.
    pub fn expired(&self, now: Instant, deadline: Duration) -> Vec<(WorkerId, Duration)> {
        let silent_for = |least: Duration| {
            let silence = self
                .by_time
                .iter()
                .map(move |(heard, worker)| (*worker, now.duration_since(*heard)));
            silence.take_while(move |(_, silence)| *silence >= least)
        };
        let expired: Vec<_> = silent_for(deadline).collect();
        let Some((_, longest)) = expired.first() else {
            return expired;
        };
        let awaits_suspects = silent_for(SUSPICIOUS).count() > expired.len();
        match awaits_suspects && *longest < deadline + HEARTBEAT_INTERVAL {
            true => Vec::new(),
            false => expired,
        }
    }
}
