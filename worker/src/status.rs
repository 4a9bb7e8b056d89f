//! What a worker is at, for people: noted by whoever works, read by whoever shows it. Neither waits for the other, and
//! nothing depends on it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What a worker does, or waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Doing {
    #[default]
    Connecting,
    /// The coordinator has no run yet; [`State::moment`] says what it is at.
    Preparing,
    Fetching,
    Loading,
    /// The worker is in no generation yet: others load, or too few workers are here.
    WaitingToBegin,
    /// Nothing is leased to the worker: others compute what is left of the step, or somebody is missing.
    WaitingForSlots,
    Computing,
    Exchanging,
    Copying,
}

/// What a worker is at, shared by all who note and show it.
#[derive(Clone, Debug, Default)]
pub struct Status(Arc<Mutex<State>>);

/// A moment of a worker's life.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    pub doing: Doing,
    /// When the worker began to do that.
    pub since: Instant,
    /// What a coordinator that prepares says of itself.
    pub moment: String,
    /// Why the worker takes no part for now, where it waits for that.
    pub aside: Option<String>,
    /// Updates that the worker's weights have seen.
    pub step: u64,
    /// Steps of the whole run; 0 where they are not known yet.
    pub total_steps: u64,
    /// Members of the worker's generation.
    pub workers: usize,
    /// Slots computed by this process, in all.
    pub slots: u64,
    /// Tokens in those slots, without padding.
    pub tokens: u64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            doing: Doing::default(),
            since: Instant::now(),
            moment: String::new(),
            aside: None,
            step: 0,
            total_steps: 0,
            workers: 0,
            slots: 0,
            tokens: 0,
        }
    }
}

impl Status {
    pub fn now(&self) -> State {
        self.lock().clone()
    }

    /// Notes what the worker does now.
    pub fn set(&self, doing: Doing) {
        let mut state = self.lock();
        if state.doing != doing {
            state.doing = doing;
            state.since = Instant::now();
        }
    }

    /// Notes what the coordinator is at while it prepares: `tokenising the data, 41%`.
    pub fn preparing(&self, moment: String) {
        self.set(Doing::Preparing);
        self.lock().moment = moment;
    }

    pub fn joined(&self, total_steps: u64) {
        self.lock().total_steps = total_steps;
    }

    /// Notes that a generation of so many members has begun.
    pub fn entered(&self, workers: usize) {
        let mut state = self.lock();
        state.workers = workers;
        state.aside = None;
    }

    /// Notes that the coordinator leaves this worker out for now, and why.
    pub fn set_aside(&self, reason: &str) {
        self.lock().aside = Some(reason.to_owned());
    }

    pub fn reached(&self, step: u64) {
        self.lock().step = step;
    }

    pub fn slot_done(&self, tokens: u64) {
        let mut state = self.lock();
        state.slots += 1;
        state.tokens += tokens;
    }

    /// A poisoned lock only says that another thread panicked; the numbers are valid at every moment.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
