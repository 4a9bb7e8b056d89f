//! What a run is from its beginning: its settings, and what the journal knows of its earlier terms.

use common::plan::BestSoFar;

/// What a run is, apart from its [`super::RunSchedule`]: version, identity, where it starts, how many workers it wants.
#[derive(Clone, Debug)]
pub struct Settings {
    pub version: String,
    pub job_digest: String,
    /// Random identifier of the run, drawn when it began; the same in every term of it.
    pub run: String,
    /// What the journal says of the terms before this one, if the run goes on from them.
    pub earlier: PreviousTerms,
    /// Number of optimizer updates in the state that the run starts from.
    pub start_step: u64,
    /// Digest of the weights in the checkpoint that the run starts from. None: it starts from no checkpoint.
    pub start_weights_digest: Option<String>,
    /// Numerics class of the workers that computed that checkpoint, if it is known.
    pub start_numerics_class: Option<String>,
    /// Step of the newest weights with an evaluation on record.
    pub last_evaluated: Option<u64>,
    /// What the evaluations on record amount to, where the job goes by them.
    pub best: Option<BestSoFar>,
    /// Step of the best weights, where a checkpoint on disk has them.
    pub best_saved: Option<u64>,
    pub min_workers: usize,
    pub max_workers: Option<usize>,
    /// The run fails after more consecutive skipped steps (gradients not finite or out of range) than this.
    pub max_skipped_steps: u64,
    /// Bytes that a state has of weights that training leaves as they are: full training of some writes them, too.
    pub frozen_bytes: u64,
    /// Floating-point operations that training needs per token, for the MFU. None where the job does not compute in bfloat16, for
    /// which peaks are known.
    pub flop_per_token: Option<f64>,
}

/// What the journal says of the terms before this one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PreviousTerms {
    /// Number of updates after the last step on record.
    pub recorded: u64,
    /// Digest of the weights after `recorded` updates, where it was asked for.
    pub weights_digest: Option<String>,
    /// Number of consecutive skipped steps up to `recorded`.
    pub skipped_in_a_row: u64,
    /// Number of the last generation.
    pub generation: u64,
    /// Number of its members, without those that died with the coordinator because they lived in its process.
    pub workers: usize,
    /// Numerics class of its members, if there was a generation.
    pub numerics_class: Option<String>,
}
