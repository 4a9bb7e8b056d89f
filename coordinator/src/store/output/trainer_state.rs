//! `trainer_state.json` as Transformers' Trainer writes it (`trainer_callback.py`, `TrainerState`): sorted keys, and a
//! history with an entry every `logging_steps`, whose loss is the mean since the entry before.

use std::time::Duration;

use common::job::{JobSpec, SaveSteps};
use common::plan::BestSoFar;
use serde_json::{Value, json};

use super::best::{self, BestRecord};
use super::line::{Line, object};

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunPlan {
    pub total_steps: u64,
    pub steps_per_epoch: u64,
}

/// How often things happen, as Transformers records it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cadence {
    logging_steps: u64,
    /// Whether the first step has an entry, too.
    logs_first: bool,
    eval_steps: u64,
    save_steps: u64,
    micro_batch_size: usize,
}

impl Cadence {
    pub fn of(job: &JobSpec) -> Self {
        Self {
            logging_steps: job.logging_steps.max(1),
            logs_first: job.logging_first_step,
            eval_steps: job.eval_steps.unwrap_or(0),
            save_steps: match job.save_steps {
                SaveSteps::Every(steps) => steps,
                SaveSteps::Auto | SaveSteps::Never => 0,
            },
            micro_batch_size: job.micro_batch_size,
        }
    }
}

/// What `trainer_state.json` says of a run, built line by line.
#[derive(Clone, Debug)]
pub struct TrainerState {
    cadence: Cadence,
    plan: RunPlan,
    best: BestRecord,
    step: u64,
    history: Vec<Line>,
    /// Sums over the steps since the last entry of the history.
    pending: Pending,
    /// Sum of every step's loss, for the summary at the end.
    loss_sum: f64,
    losses: u64,
    num_tokens: u64,
}

#[derive(Clone, Debug, Default)]
struct Pending {
    loss_sum: f64,
    accuracy_sum: f64,
    steps: u64,
    last: Line,
}

impl TrainerState {
    pub(super) fn new(cadence: Cadence, plan: RunPlan, best: BestRecord) -> Self {
        Self {
            cadence,
            plan,
            best,
            step: 0,
            history: Vec::new(),
            pending: Pending::default(),
            loss_sum: 0.0,
            losses: 0,
            num_tokens: 0,
        }
    }

    /// Takes a line of `metrics.jsonl`.
    pub(super) fn add_line(&mut self, line: &Line) {
        let Some(step) = line.get("step").and_then(Value::as_u64) else {
            return;
        };
        if line.contains_key("eval_loss") {
            let mut entry = line.clone();
            // Transformers has none, and readers of its files may take every key for a number.
            for name in ["time", "best_metric", "best_global_step"] {
                entry.remove(name);
            }
            self.history.push(entry);
            return;
        }
        let number = |name: &str| line.get(name).and_then(Value::as_f64);
        let loss = number("loss").unwrap_or(f64::NAN);
        self.step = step;
        self.loss_sum += loss;
        self.losses += 1;
        self.num_tokens = line.get("num_tokens").and_then(Value::as_u64).unwrap_or(0);
        self.pending.loss_sum += loss;
        self.pending.accuracy_sum += number("mean_token_accuracy").unwrap_or(0.0);
        self.pending.steps += 1;
        self.pending.last = line.clone();
        let is_first = self.cadence.logs_first && step == 1;
        if is_first || step.is_multiple_of(self.cadence.logging_steps) {
            self.log_pending();
        }
    }

    fn log_pending(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        let steps = pending.steps as f64;
        let of_last = |name: &str| pending.last.get(name).cloned().unwrap_or(Value::Null);
        self.history.push(object(json!({
            "epoch": of_last("epoch"),
            "grad_norm": of_last("grad_norm"),
            "learning_rate": of_last("learning_rate"),
            "loss": pending.loss_sum / steps,
            "mean_token_accuracy": pending.accuracy_sum / steps,
            "num_tokens": of_last("num_tokens"),
            "step": of_last("step"),
        })));
    }

    /// Updates that the newest evaluated weights have seen.
    pub(super) fn last_evaluated(&self) -> Option<u64> {
        let evaluated = |line: &Line| {
            let step = line.get("step").and_then(Value::as_u64);
            step.filter(|_| line.contains_key("eval_loss"))
        };
        self.history.iter().rev().find_map(evaluated)
    }

    /// What the evaluations up to those of the weights after `step` updates amount to, where the job goes by them.
    pub(super) fn best_at(&self, step: u64) -> Option<BestSoFar> {
        let lines = self.history.iter();
        let is_before = |line: &&Line| {
            let at = line.get("step").and_then(Value::as_u64);
            at.is_some_and(|at| at <= step)
        };
        self.best.after(lines.filter(is_before))
    }

    /// Notes that the run goes on after `step` updates, which another folder may have the lines of. Best weights of before then that
    /// no checkpoint has are gone.
    pub(super) fn begin_after(&mut self, step: u64) {
        self.step = self.step.max(step);
        if let Some(so_far) = self.best_at(u64::MAX) {
            self.best.pass_over(step, &so_far);
        }
    }

    /// Folder of the checkpoint of these best weights, where the job has one saved.
    pub(super) fn best_checkpoint(&self, so_far: &BestSoFar) -> Option<String> {
        self.best.checkpoint(so_far)
    }

    /// Adds the summary that ends a history.
    pub(super) fn finish(&mut self, runtime: Duration) {
        let seconds = runtime.as_secs_f64();
        // Said again where the files could not be written.
        let is_end = |line: &mut Line| line.contains_key("train_runtime");
        self.history.pop_if(is_end);
        self.history.push(object(json!({
            "epoch": self.epoch_at(self.step),
            "step": self.step,
            "total_flos": 0.0,
            "train_loss": self.loss_sum / self.losses.max(1) as f64,
            "train_runtime": seconds,
            "train_steps_per_second": self.losses as f64 / seconds.max(1e-9),
        })));
    }

    /// The file's text after `step` updates, or after all that were made.
    pub(super) fn json_at(&self, step: u64) -> String {
        let step = step.min(self.step);
        let is_before = |line: &&Line| {
            line.get("step")
                .and_then(Value::as_u64)
                .is_some_and(|at| at <= step)
        };
        let history: Vec<&Line> = self.history.iter().filter(is_before).collect();
        let logged_tokens = || {
            history
                .iter()
                .rev()
                .find_map(|line| line.get("num_tokens")?.as_u64())
        };
        let num_tokens = match step == self.step {
            true => self.num_tokens,
            false => logged_tokens().unwrap_or(0),
        };
        let so_far = self.best_at(step);
        let best = so_far.as_ref().and_then(BestSoFar::best);
        let checkpoint = so_far
            .as_ref()
            .and_then(|so_far| self.best_checkpoint(so_far));
        let state = json!({
            "best_global_step": best.map(|best| best.step),
            "best_metric": best.map(|best| best.metric),
            "best_model_checkpoint": checkpoint,
            "epoch": self.epoch_at(step),
            "eval_steps": self.cadence.eval_steps,
            "global_step": step,
            "is_hyper_param_search": false,
            "is_local_process_zero": true,
            "is_world_process_zero": true,
            "log_history": history,
            "logging_steps": self.cadence.logging_steps,
            "max_steps": self.plan.total_steps,
            "num_input_tokens_seen": num_tokens,
            "num_train_epochs": self.epochs(),
            "save_steps": self.cadence.save_steps,
            "stateful_callbacks": best::callbacks(so_far.as_ref()),
            "total_flos": 0.0,
            "train_batch_size": self.cadence.micro_batch_size,
            "trial_name": null,
            "trial_params": null,
        });
        let mut text = serde_json::to_string_pretty(&state).unwrap_or_default();
        text.push('\n');
        text
    }

    fn epoch_at(&self, step: u64) -> f64 {
        step as f64 / self.plan.steps_per_epoch.max(1) as f64
    }

    /// Number of epochs that the run needs, rounded up.
    fn epochs(&self) -> u64 {
        self.plan
            .total_steps
            .div_ceil(self.plan.steps_per_epoch.max(1))
    }
}
