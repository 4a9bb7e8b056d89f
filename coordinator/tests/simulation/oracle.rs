//! What must be true of every run, whatever happens in it: the data ledger (every slot of every step in exactly one
//! accumulator of the exchange that updated the weights), the records, and the result.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use coordinator::cluster::Outcome;
use coordinator::cluster::run_event::RunEvent;
use proto::v1;

use crate::truth::{Expected, TOTAL_STEPS, Weights, digest};

/// Parts of the reasons for which a coordinator sends a worker away that breaks the protocol.
const ACCUSATIONS: [&str; 10] = [
    "not leased to it",
    "not due",
    "it entered with",
    "it holds slot",
    "a slot twice",
    "it counted",
    "said twice",
    "it gave slot",
    "it says that it has seen",
    "unknown kind",
];

/// Collects what went wrong.
pub struct Oracle {
    expected: Vec<Expected>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    violations: Vec<String>,
    /// Steps recorded by the coordinator that is alive.
    recorded: Vec<u64>,
    /// By coordinators before it.
    recorded_before: BTreeSet<u64>,
    /// Whose records were lost, as the coordinator said.
    excused: BTreeSet<u64>,
    evaluated: BTreeSet<u64>,
    excused_evaluations: BTreeSet<u64>,
    generations: u64,
    expulsions: u64,
}

impl Oracle {
    pub fn new(expected: Vec<Expected>) -> Self {
        Self {
            expected,
            state: Mutex::default(),
        }
    }

    pub fn violation(&self, text: String) {
        self.state().violations.push(text);
    }

    pub fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    /// Generations begun and workers sent away.
    pub fn counts(&self) -> (u64, u64) {
        let state = self.state();
        (state.generations, state.expulsions)
    }

    /// The members of an exchange have summed what they held.
    pub fn summed(&self, step: u64, slots: u32, held: &[v1::HeldSlot]) {
        let mut all: Vec<u32> = held.iter().map(|held| held.slot).collect();
        all.sort_unstable();
        if all != (0..slots).collect::<Vec<u32>>() {
            self.violation(format!("step {step} was made of the slots {held:?}"));
        }
    }

    /// A worker has updated its weights, with the sum of an exchange or as its feed said.
    pub fn updated(&self, step: u64, invalid: u64, weights: &Weights) {
        let expected = &self.expected[step as usize];
        if expected.skipped != (invalid > 0) {
            self.violation(format!("step {step}: {invalid} invalid scalars"));
        }
        if expected.weights != *weights {
            self.violation(format!("step {step}: other weights than in the quiet run"));
        }
    }

    /// What the coordinator tells its observers.
    pub fn observe(&self, event: &RunEvent) {
        match event {
            RunEvent::StepCommitted(record) => {
                let mut state = self.state();
                let due = state.recorded.last().map(|last| last + 1);
                let due = due.map(|due| (due..).find(|due| !state.excused.contains(due)));
                if due.is_some_and(|due| due != Some(record.step)) {
                    let text = format!("step {} was recorded out of turn", record.step);
                    state.violations.push(text);
                }
                state.recorded.push(record.step);
                drop(state);
                let expected = &self.expected[record.step as usize - 1];
                let found = (record.loss, record.skipped, record.weights_digest.clone());
                let right = (
                    expected.loss,
                    expected.skipped,
                    Some(digest(&expected.weights)),
                );
                if found != right {
                    self.violation(format!(
                        "step {} was recorded as {found:?}, not {right:?}",
                        record.step
                    ));
                }
            }
            RunEvent::Evaluated(record) => {
                let expected = &self.expected[record.step as usize - 1];
                if record.eval_loss != expected.eval_loss {
                    self.violation(format!("the evaluation after step {} is off", record.step));
                }
                if !self.state().evaluated.insert(record.step) {
                    self.violation(format!("step {} was evaluated twice", record.step));
                }
            }
            RunEvent::Started { .. } => self.state().generations += 1,
            RunEvent::Notice(text) if text.starts_with("the record of step ") => {
                self.violation(text.clone());
            }
            RunEvent::Notice(text) => {
                let lost = text.strip_prefix("the evaluation after step ");
                let step = lost.and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
                self.state().excused_evaluations.extend(step);
            }
            _ => {}
        }
    }

    /// A coordinator begins, with this many steps in its journal and a checkpoint of `start`.
    pub fn restarted(&self, journaled: u64, last_evaluated: Option<u64>, start: u64) {
        let mut state = self.state();
        let recorded = std::mem::take(&mut state.recorded);
        state.recorded_before.extend(recorded);
        state.recorded_before.retain(|step| *step <= journaled);
        // The end of the journal was lost, and with it the record of a step whose state is on disk.
        state.excused.extend(journaled + 1..=start);
        // A lost evaluation is made up for, unless the weights have moved on, which the coordinator says.
        let lost = |step: &u64| last_evaluated.is_none_or(|last| *step > last);
        state.evaluated.retain(|step| !lost(step));
        // A checkpoint is all that is left of them.
        state.excused_evaluations.extend((1..start).filter(lost));
    }

    /// The coordinator has found a machine that computes wrongly.
    pub fn found_wrong(&self) {
        self.state().expulsions += 1;
    }

    /// A worker hears that it is sent away. It follows the protocol, so it is never accused of breaking it: a coordinator
    /// that does so has lost count of what it leased or heard, which the run survives, as the worker comes back.
    pub fn sent_away(&self, node: u32, reason: &str) {
        if ACCUSATIONS.iter().any(|accuses| reason.contains(accuses)) {
            self.violation(format!("worker {node} is falsely accused: {reason}"));
        }
    }

    /// Looks at everything once the run has ended.
    pub fn ended(&self, outcome: &Outcome) {
        let last = &self.expected[TOTAL_STEPS as usize - 1];
        let expected = Outcome::Finished {
            step: TOTAL_STEPS,
            weights_digest: digest(&last.weights),
        };
        if *outcome != expected {
            self.violation(format!("the run ended with {outcome:?}, not {expected:?}"));
        }
        let state = self.state();
        let mut recorded: Vec<u64> = state.recorded_before.iter().copied().collect();
        recorded.extend(&state.recorded);
        let missing: Vec<u64> = state.excused.iter().copied().collect();
        recorded.extend(
            missing
                .iter()
                .filter(|step| !recorded.contains(step))
                .collect::<Vec<_>>(),
        );
        recorded.sort_unstable();
        let evaluated = state.evaluated.union(&state.excused_evaluations);
        let evaluated: Vec<u64> = evaluated
            .copied()
            .filter(|step| [3, 6, 7].contains(step))
            .collect();
        drop(state);
        if recorded != (1..=TOTAL_STEPS).collect::<Vec<u64>>() {
            self.violation(format!("the recorded steps are {recorded:?}"));
        }
        if evaluated != [3, 6, 7] {
            self.violation(format!("the evaluated steps are {evaluated:?}"));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
