//! Totals over the lines of `metrics.jsonl`: how long a run computed and waited, and what each worker did. Lines in, the part
//! of `run.json` out. What an earlier term of the run wrote counts as what this one does.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::line::Line;
use crate::cluster::run_event::WorkerShare;

/// Most workers that a line names; what the others did is summed.
const MAX_IN_A_LINE: usize = 32;
/// Most workers that `run.json` names.
const MAX_WORKERS: usize = 1024;

/// A worker of the run, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerRecord {
    pub name: String,
    /// What it computed on.
    #[serde(default)]
    pub device: String,
    /// Slots of recorded steps that it computed.
    #[serde(default)]
    pub slots: u64,
    /// Compute time of those slots, one after the other.
    #[serde(default)]
    pub seconds: f64,
}

/// Sums over all steps on record.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Totals {
    /// Number of steps whose duration is known; `step_seconds` is their sum.
    timed_steps: u64,
    pub step_seconds: f64,
    pub waiting_seconds: f64,
    workers: BTreeMap<String, WorkerRecord>,
}

impl Totals {
    /// Takes a line of `metrics.jsonl`.
    pub fn add_line(&mut self, line: &Line) {
        if let Some(seconds) = number(line, "step_seconds") {
            self.timed_steps += 1;
            self.step_seconds += seconds;
        }
        self.waiting_seconds += number(line, "waiting_seconds").unwrap_or(0.0);
        let shares = line.get("by_worker").and_then(Value::as_array);
        for share in shares.into_iter().flatten() {
            let Some(name) = share.get("name").and_then(Value::as_str) else {
                continue;
            };
            if let Some(worker) = self.worker(name) {
                worker.slots += share.get("slots").and_then(Value::as_u64).unwrap_or(0);
                worker.seconds += share.get("seconds").and_then(Value::as_f64).unwrap_or(0.0);
            }
        }
    }

    /// The worker of that name, added where it is new; None where there are too many.
    fn worker(&mut self, name: &str) -> Option<&mut WorkerRecord> {
        if !self.workers.contains_key(name) && self.workers.len() >= MAX_WORKERS {
            return None;
        }
        let worker = self.workers.entry(name.to_owned()).or_default();
        name.clone_into(&mut worker.name);
        Some(worker)
    }

    pub fn note_device(&mut self, name: &str, device: &str) {
        if let Some(worker) = self.worker(name) {
            device.clone_into(&mut worker.device);
        }
    }

    /// Mean duration of the steps whose duration is known.
    pub fn mean_step_seconds(&self) -> Option<f64> {
        (self.timed_steps > 0).then(|| self.step_seconds / self.timed_steps as f64)
    }

    pub fn workers(&self) -> Vec<WorkerRecord> {
        self.workers.values().cloned().collect()
    }
}

fn number(line: &Line, name: &str) -> Option<f64> {
    line.get(name).and_then(Value::as_f64)
}

/// Adds `by_worker` to a line, the busiest worker first; and `others`, where there are more.
pub(super) fn add_shares(line: &mut Line, shares: &[WorkerShare]) {
    let mut shares: Vec<&WorkerShare> = shares.iter().collect();
    shares.sort_by(|a, b| b.slots.cmp(&a.slots).then_with(|| a.name.cmp(&b.name)));
    let named = shares.len().min(MAX_IN_A_LINE);
    let (named, others) = shares.split_at(named);
    let of_worker = |share: &&WorkerShare| json!({"name": share.name, "slots": share.slots, "seconds": share.seconds});
    let named: Vec<Value> = named.iter().map(of_worker).collect();
    line.insert("by_worker".to_owned(), named.into());
    if !others.is_empty() {
        let slots: u64 = others.iter().map(|share| share.slots).sum();
        let seconds: f64 = others.iter().map(|share| share.seconds).sum();
        let others = json!({"workers": others.len(), "slots": slots, "seconds": seconds});
        line.insert("others".to_owned(), others);
    }
}
