//! Statistics of the steps on record: how long they take, the tokens so far, the digests of their weights.

use std::collections::BTreeMap;
use std::time::Instant;

use super::membership::short;
use crate::cluster::schedule::RunSchedule;
use crate::cluster::settings::PreviousTerms;

/// Number of weight digests that are kept, to compare steps that are computed again or that a worker comes back with.
const MAX_DIGESTS: usize = 64;
/// Weight of the newest step in the moving mean of step times.
const PACE_WEIGHT: f64 = 0.1;

/// Statistics kept from step to step for the records: mean step time, tokens so far, digests of weights.
#[derive(Debug)]
pub struct StepStats {
    step_started: Option<Instant>,
    mean_step_seconds: Option<f64>,
    /// When too few workers were left to compute; None while there are enough.
    waiting_since: Option<Instant>,
    /// Seconds of waiting for workers before the next step on record.
    waited_seconds: f64,
    /// Tokens (without padding) of the first `recorded` steps.
    num_tokens: u64,
    /// Updates after the last step that was recorded.
    recorded: u64,
    skipped_in_a_row: u64,
    /// Digests of the weights by step: the newest settled ones whose digest was asked for.
    digests: BTreeMap<u64, String>,
}

impl StepStats {
    /// Statistics of a run after `recorded` updates. What is known of an earlier term counts where it ended there.
    pub fn new(course: &RunSchedule, recorded: u64, earlier: &PreviousTerms) -> Self {
        let is_there = earlier.recorded == recorded;
        let digest = earlier.weights_digest.clone().filter(|_| is_there);
        Self {
            step_started: None,
            mean_step_seconds: None,
            waiting_since: None,
            waited_seconds: 0.0,
            num_tokens: (0..recorded).map(|step| course.tokens(step)).sum(),
            recorded,
            skipped_in_a_row: if is_there {
                earlier.skipped_in_a_row
            } else {
                0
            },
            digests: digest
                .into_iter()
                .map(|digest| (recorded, digest))
                .collect(),
        }
    }

    /// Moving mean of the step times, in seconds; None before the first step of this term.
    pub fn mean_step_seconds(&self) -> Option<f64> {
        self.mean_step_seconds
    }

    /// Number of updates after the last step that was recorded.
    pub fn recorded(&self) -> u64 {
        self.recorded
    }

    /// Puts the step that led to `step` updates on record; it had so many tokens.
    pub fn record(&mut self, step: u64, tokens: u64) {
        self.recorded = step;
        self.num_tokens += tokens;
    }

    /// Tokens (without padding) of all steps on record.
    pub fn num_tokens(&self) -> u64 {
        self.num_tokens
    }

    /// Seconds of waiting for workers since the step that was recorded last.
    pub fn take_waited_seconds(&mut self) -> f64 {
        std::mem::take(&mut self.waited_seconds)
    }

    /// Number of skipped steps in a row up to the recorded one, which was skipped or not.
    pub fn count_skipped(&mut self, is_skipped: bool) -> u64 {
        self.skipped_in_a_row = match is_skipped {
            true => self.skipped_in_a_row + 1,
            false => 0,
        };
        self.skipped_in_a_row
    }

    /// Digest of the weights after `step` updates, where it is on record.
    pub fn digest_of(&self, step: u64) -> Option<&str> {
        self.digests.get(&step).map(String::as_str)
    }

    /// Puts the digest of the weights after `step` updates on record.
    pub fn note_digest(&mut self, step: u64, digest: &str) {
        self.digests.insert(step, digest.to_owned());
        while self.digests.len() > MAX_DIGESTS {
            self.digests.pop_first();
        }
    }

    /// Goes on after `step` updates without the records up to there.
    pub fn skip_to(&mut self, course: &RunSchedule, step: u64) {
        let unrecorded = self.recorded..step;
        self.num_tokens += unrecorded.map(|step| course.tokens(step)).sum::<u64>();
        self.recorded = self.recorded.max(step);
    }

    /// Notes that nothing can be computed from here on, if that was not so before.
    pub fn wait(&mut self, now: Instant) {
        self.waiting_since.get_or_insert(now);
    }

    /// Restarts the clock of the current step, because a generation begins.
    pub fn restart(&mut self, now: Instant) {
        self.step_started = Some(now);
        if let Some(since) = self.waiting_since.take() {
            self.waited_seconds += now.duration_since(since).as_secs_f64();
        }
    }

    /// Seconds since the last step, or since the generation began.
    pub fn lap(&mut self, now: Instant) -> f64 {
        let started = self.step_started.replace(now).unwrap_or(now);
        let seconds = now.duration_since(started).as_secs_f64();
        let mean = self.mean_step_seconds.unwrap_or(seconds);
        self.mean_step_seconds = Some(mean + PACE_WEIGHT * (seconds - mean));
        seconds
    }
}

/// Why a worker is sent away whose weights after `step` updates differ from the others'.
pub fn disagreement(step: u64, own: &str, agreed: &str) -> String {
    format!(
        "its weights after step {step} are {} where the others have {}; this machine computes wrongly",
        short(own),
        short(agreed)
    )
}
