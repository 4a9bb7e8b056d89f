//! The states that workers were asked for, and the newest one that was stored.

use std::time::{Duration, Instant};

use super::checkpoint_interval::CheckpointInterval;
use crate::cluster::event::WorkerId;

/// How often the result of the run is asked for before the run fails, where the disk is not at fault.
const MAX_LAST_ATTEMPTS: u32 = 3;
/// How long the result waits for room on the disk. Then the run ends, to be resumed by workers that keep what they hold.
const DISK_PATIENCE: Duration = Duration::from_secs(600);
/// Pause before the second attempt to store the result; each further one is twice as long, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// States that may be on their way at a time: each is held in a worker's memory. Training waits rather than leave one out.
const MAX_PENDING: usize = 2;

/// A state that a worker was asked for.
#[derive(Clone, Debug)]
struct Pending {
    worker: WorkerId,
    step: u64,
    last: bool,
    /// Whether all of it is here, and on its way to the disk.
    has_arrived: bool,
    /// When its step was committed, where that was seen.
    since: Option<Instant>,
    /// Digest of the weights after its step, once that is settled. It is kept here because many later steps may have settled
    /// by the time a large state arrives.
    weights_digest: Option<String>,
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
struct Retry {
    since: Instant,
    pause: Duration,
    /// When the result is asked for again; None once it was.
    at: Option<Instant>,
}

/// The states that workers were asked for, and the newest one that was stored.
#[derive(Debug)]
pub struct Saving {
    pending: Vec<Pending>,
    /// Whether a checkpoint could not be had when it was due: the next state that can be had is taken instead.
    overdue: bool,
    /// Updates in the newest state on disk, or in the one that the run started from.
    stored: u64,
    interval: CheckpointInterval,
    /// Attempts to store the result that failed, where the disk was not at fault.
    failed_attempts: u32,
    retry: Option<Retry>,
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

    /// Whether a checkpoint could not be had when it was due.
    pub fn is_overdue(&self) -> bool {
        self.overdue
    }

    /// Whether it is time for a checkpoint, where the job leaves that to the run.
    pub fn interval_is_over(&mut self, now: Instant) -> bool {
        self.interval.is_due(now)
    }

    /// Whether some state was asked for and is not stored yet.
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether one more state may be asked for.
    pub fn has_room(&self) -> bool {
        self.pending.len() < MAX_PENDING
    }

    /// Notes that the checkpoint which is due is asked for now.
    pub fn begin_checkpoint(&mut self, now: Instant) {
        self.overdue = false;
        self.interval.restart(now);
    }

    /// Notes that `worker` is asked for the state after `step` updates, whose weights have this digest, if that is known; `last`: it
    /// is the result of the run.
    pub fn request(
        &mut self,
        worker: WorkerId,
        (step, last): (u64, bool),
        weights_digest: Option<String>,
    ) {
        self.pending.push(Pending {
            worker,
            step,
            last,
            has_arrived: false,
            since: None,
            weights_digest,
        });
    }

    /// Notes that the state after `step` updates is on disk, in a checkpoint.
    pub fn note_stored(&mut self, now: Instant, step: u64) {
        self.stored = self.stored.max(step);
        // Whatever held states up is over.
        (self.retry, self.failed_attempts) = (None, 0);
        // Whoever is asked for the same state as the result has yet to hand that over.
        let pending = self.take(|pending| pending.step == step && !pending.last);
        if let Some(since) = pending.and_then(|pending| pending.since) {
            self.interval.learn(now.duration_since(since));
        }
    }

    /// Takes out a state that did not come or was not stored. Returns whether it was asked for as the result of the run; None where
    /// the worker is not asked for it any more.
    pub fn take_failed(&mut self, worker: WorkerId, step: u64) -> Option<bool> {
        let asked = |pending: &Pending| pending.worker == worker && pending.step == step;
        Some(self.take(asked)?.last)
    }

    /// Counts a failure that the disk's want of room does not explain. False where the result was asked for too often.
    pub fn count_failure(&mut self, last: bool) -> bool {
        self.failed_attempts += u32::from(last);
        self.interval.fail();
        !last || self.failed_attempts < MAX_LAST_ATTEMPTS
    }

    /// Waits for room on the disk for the result. Returns the pause until it is asked for again, and for how long that goes on; None
    /// where it has waited for long enough.
    pub fn wait_for_room(&mut self, now: Instant) -> Option<(Duration, Duration)> {
        let retry = self.retry.get_or_insert(Retry {
            since: now,
            pause: FIRST_PAUSE,
            at: None,
        });
        let waited = now.duration_since(retry.since);
        if waited >= DISK_PATIENCE {
            return None;
        }
        let pause = retry.pause;
        retry.at = Some(now + pause);
        retry.pause = (2 * pause).min(LONGEST_PAUSE);
        Some((pause, DISK_PATIENCE - waited))
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

    /// Notes that all of a state is here, and on its way to the disk.
    pub fn note_arrival(&mut self, worker: WorkerId, step: u64) {
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

    fn take(&mut self, is: impl Fn(&Pending) -> bool) -> Option<Pending> {
        let position = self.pending.iter().position(is)?;
        Some(self.pending.remove(position))
    }
}

/// Why a worker with an older state than the one on disk is sent away to begin anew.
pub fn only_saved(step: u64) -> String {
    format!("the state after step {step} is on disk and nobody else has it: it loads that one")
}
