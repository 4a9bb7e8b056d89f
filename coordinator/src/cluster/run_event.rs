//! What a run tells its observers: the terminal ([`crate::report::terminal`]) and the metrics files ([`crate::store::output`]).
//!
//! Plain data only. The driver sends events in the order in which things happened; an observer never answers.

use std::path::PathBuf;

use common::plan::Best;

/// One committed step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepRecord {
    /// Optimizer updates after this one: the first is 1.
    pub step: u64,
    /// Epochs finished after this step.
    pub epoch: f64,
    /// Mean over the trained tokens of the step, in nats.
    pub loss: f64,
    /// Norm of the mean gradient, before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Tokens seen so far in the whole run, trained or not, without padding.
    pub num_tokens: u64,
    /// Share of the trained tokens that were the model's first choice.
    pub mean_token_accuracy: f64,
    /// Tokens without padding, of all workers together. Not a number where the beginning of the step was not seen.
    pub tokens_per_second: f64,
    pub workers: usize,
    pub generation: u64,
    /// Digest of the weights after this step. None where it was not asked for.
    pub weights_digest: Option<String>,
    /// The gradient was not finite or out of range: the weights are unchanged.
    pub skipped: bool,
    /// Time until the last step is done, at the mean step time so far.
    pub eta_seconds: f64,
    /// Model FLOP utilisation ([`common::flops`]): of the published peak of all its workers' GPUs together. None: there is one
    /// whose peak is not known, or none is meant for what the job computes in.
    pub mfu: Option<f64>,
    /// Peak memory of the worker that took the most. None: the workers do not say.
    pub peak_memory_bytes: Option<u64>,
    /// Time since the step before, or since the generation began. Not a number where the beginning of the step was not seen.
    pub seconds: f64,
    /// Time before this step in which nothing could be computed, because too few workers were ready.
    pub waiting_seconds: f64,
    /// What each worker whose slots are in the step computed of it, as far as that is known.
    pub shares: Vec<WorkerShare>,
}

/// What one worker computed of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerShare {
    pub name: String,
    pub slots: u64,
    /// Compute time of its slots, one after the other. Slots from before this coordinator began count as 0: theirs is not known.
    pub seconds: f64,
}

/// One pass over the validation blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalRecord {
    /// Updates that the evaluated weights have seen.
    pub step: u64,
    pub epoch: f64,
    /// Mean over all trained tokens of the validation blocks, in nats.
    pub eval_loss: f64,
    pub eval_mean_token_accuracy: f64,
    pub eval_runtime_seconds: f64,
    /// The best evaluation so far, this one or an earlier; where the job asks for the best weights.
    pub best: Option<Best>,
}

/// What happened in a run.
#[derive(Clone, Debug, PartialEq)]
pub enum RunEvent {
    /// A worker joined: it passed the checks of a newcomer. `workers` counts it.
    WorkerJoined {
        worker: u64,
        name: String,
        /// What the worker computes on, such as the name of its GPU.
        device: String,
        workers: usize,
    },
    /// A worker left or was sent away; `workers` are left.
    WorkerLost {
        worker: u64,
        name: String,
        reason: String,
        workers: usize,
    },
    /// Too few workers are here to compute: `have` of the `need` that the job asks for.
    WaitingForWorkers {
        have: usize,
        need: usize,
    },
    /// A generation began that can compute; `step` updates are behind it.
    Started {
        step: u64,
        total_steps: u64,
        workers: usize,
        generation: u64,
        /// Numerics class of all its members.
        numerics_class: String,
    },
    /// The run continues from this checkpoint.
    Resumed {
        step: u64,
        path: PathBuf,
    },
    StepCommitted(StepRecord),
    Evaluated(EvalRecord),
    /// The state after `step` updates is on disk.
    CheckpointSaved {
        step: u64,
        path: PathBuf,
    },
    /// A line for people; nothing depends on it.
    Notice(String),
    /// The run is over; no event follows.
    Ended(RunEnd),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum RunEnd {
    /// Every step was committed and the result was written.
    Done {
        step: u64,
        weights_digest: String,
    },
    /// Stopped before the last step; the next start goes on from `step`, where the state of that is on disk or with workers.
    Stopped {
        step: u64,
        reason: String,
    },
    Failed {
        reason: String,
    },
}
