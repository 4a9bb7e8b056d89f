//! The states that workers were asked for, and the newest one that was stored.

use std::time::{Duration, Instant};

use super::checkpoint_interval::CheckpointInterval;
use crate::cluster::event::WorkerId;

#[derive(Clone, Debug)]
pub(in crate::cluster) struct Pending {
    pub(in crate::cluster) worker: WorkerId,
    pub(in crate::cluster) step: u64,
    pub(in crate::cluster) last: bool,
    /// Whether all of it is here, and on its way to the disk.
    pub(in crate::cluster) has_arrived: bool,
    /// When its step was committed, where that was seen.
    pub(in crate::cluster) since: Option<Instant>,
    /// Digest of the weights after its step, once that is settled. It is kept here because many later steps may have settled
    /// by the time a large state arrives.
    pub(in crate::cluster) weights_digest: Option<String>,
}

/// Why a state was not stored.
#[derive(Debug)]
pub struct Failure {
    pub reason: String,
    /// Whether the coordinator's disk is at fault.
    pub disk: bool,
}

/// Attempts to store a result that does not fit on the disk.
#[derive(Clone, Copy, Debug)]
pub(in crate::cluster) struct Retry {
    pub(in crate::cluster) since: Instant,
    pub(in crate::cluster) pause: Duration,
    /// When the result is asked for again; None once it was.
    pub(in crate::cluster) at: Option<Instant>,
}

/// The states that workers were asked for, and the newest one that was stored.
#[derive(Debug)]
pub struct Saving {
    pub(in crate::cluster) pending: Vec<Pending>,
    /// Whether a checkpoint could not be had when it was due: the next state that can be had is taken instead.
    pub(in crate::cluster) overdue: bool,
    /// Updates in the newest state on disk, or in the one that the run started from.
    pub(in crate::cluster) stored: u64,
    pub(in crate::cluster) interval: CheckpointInterval,
    /// Attempts to store the result that failed, where the disk was not at fault.
    pub(in crate::cluster) failed_attempts: u32,
    pub(in crate::cluster) retry: Option<Retry>,
}

impl Saving {
    pub fn new(start_step: u64) -> Self {
        Self {
            pending: Vec::new(),
            overdue: false,
            stored: start_step,
            interval: CheckpointInterval::default(),
            failed_attempts: 0,
            retry: None,
        }
    }

    /// When the result is asked for again.
    pub fn retries_at(&self) -> Option<Instant> {
        self.retry.and_then(|retry| retry.at)
    }

    /// Whether the result is to be asked for again now. True once.
    pub fn retry_is_due(&mut self, now: Instant) -> bool {
        let Some(retry) = &mut self.retry else {
            return false;
        };
        retry.at.take_if(|at| *at <= now).is_some()
    }

    /// Updates in the newest state on disk, or in the one that the run started from.
    pub fn stored(&self) -> u64 {
        self.stored
    }

    /// Makes a checkpoint due after the next step.
    #[cfg(test)]
    pub fn overdue(&mut self) {
        self.overdue = true;
    }

    #[cfg(test)]
    pub fn pending_count(&self) -> usize {
        self.pending.len()
    }

    /// Whether this worker was asked for a state that is not stored yet.
    pub fn is_asked(&self, worker: WorkerId) -> bool {
        self.pending.iter().any(|pending| pending.worker == worker)
    }

    /// Whether this worker has yet to hand over a state that it was asked for.
    pub fn is_owed_by(&self, worker: WorkerId) -> bool {
        let owes = |pending: &Pending| pending.worker == worker && !pending.has_arrived;
        self.pending.iter().any(owes)
    }

    pub(in crate::cluster) fn note_arrival(&mut self, worker: WorkerId, step: u64) {
        let is = |pending: &&mut Pending| pending.worker == worker && pending.step == step;
        for pending in self.pending.iter_mut().filter(is) {
            pending.has_arrived = true;
        }
    }

    /// Whether the state after `step` updates was asked for and is not stored yet.
    pub fn is_awaited(&self, step: u64) -> bool {
        self.pending.iter().any(|pending| pending.step == step)
    }

    /// Notes that the state after `step` updates exists: from now on it is on its way, where it was asked for.
    pub fn note_commit(&mut self, step: u64, now: Instant) {
        for pending in self.pending.iter_mut().filter(|p| p.step == step) {
            pending.since = Some(now);
            self.interval.restart(now);
        }
    }

    /// Drops the states between `before` and `step`: the run goes on from `step`, and nobody makes them any more. The next one
    /// that can be had is taken instead.
    pub fn pass_over(&mut self, before: u64, step: u64) {
        let is_made = |p: &Pending| p.since.is_some() || p.has_arrived || p.last;
        let is_passed = |p: &Pending| p.step > before && p.step < step && !is_made(p);
        self.overdue |= self.pending.iter().any(is_passed);
        self.pending.retain(|pending| !is_passed(pending));
    }

    /// Notes the digest of the weights with which `step` was settled.
    pub fn note_digest(&mut self, step: u64, digest: &str) {
        for pending in self.pending.iter_mut().filter(|p| p.step == step) {
            pending.weights_digest = Some(digest.to_owned());
        }
    }

    /// Digest of the weights of a state that is on its way, where its step is settled.
    pub fn digest_of(&self, step: u64) -> Option<&str> {
        let of_step = |pending: &&Pending| pending.step == step;
        let mut pending = self.pending.iter().filter(of_step);
        pending.find_map(|pending| pending.weights_digest.as_deref())
    }

    /// Drops the states that this worker was asked for; a lost checkpoint is made up for by the next one.
    pub fn worker_lost(&mut self, worker: WorkerId) {
        let lost = |pending: &Pending| pending.worker == worker;
        self.overdue |= self.pending.iter().any(|p| lost(p) && !p.last);
        self.pending.retain(|pending| !lost(pending));
    }

    pub(in crate::cluster) fn take(&mut self, is: impl Fn(&Pending) -> bool) -> Option<Pending> {
        let position = self.pending.iter().position(is)?;
        Some(self.pending.remove(position))
    }
}

/// Why a worker with an older state than the one on disk is sent away to begin anew.
pub fn only_saved(step: u64) -> String {
    format!("the state after step {step} is on disk and nobody else has it: it loads that one")
}
