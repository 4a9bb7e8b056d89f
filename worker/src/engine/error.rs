//! What can go wrong in the engine.

use common::files::FileError;
use common::model::{ModelError, UnmatchedTarget};
use thiserror::Error;

/// What can go wrong between a model folder and an update.
#[derive(Debug, Error)]
pub enum EngineError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    UnmatchedTarget(#[from] UnmatchedTarget),
    #[error("token id {token} is outside the model's vocabulary of {vocabulary}")]
    TokenOutOfRange { token: u32, vocabulary: usize },
    #[error("trainable tensor {name} got no gradient")]
    MissingGradient { name: String },
    #[error("the state is of layout {found}, but this job's is {expected}")]
    LayoutMismatch { found: String, expected: String },
    #[error("{threads} engine threads cannot be started: {reason}")]
    Threads { threads: usize, reason: String },
    #[error("tensor {name} {reason}")]
    NotQuantised {
        name: String,
        reason: common::nf4::NotQuantised,
    },
    #[error("not enough memory for {scalars} trainable scalars")]
    Memory { scalars: usize },
    /// The slot was given up because somebody asked for it; weights and accumulator are as before.
    #[error("the slot was abandoned")]
    Abandoned,
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Gpu(#[from] super::cuda::GpuError),
    #[cfg(feature = "cuda")]
    #[error(
        "{reason}: this job's weights and optimizer alone need about {}; train adapters instead of all weights, or a smaller model",
        common::memory::bytes(*needed)
    )]
    GpuWeights {
        reason: String,
        /// Bytes that weights and training state need.
        needed: u64,
    },
    #[cfg(feature = "cuda")]
    #[error(
        "{reason}, in a slot with micro_batch_size {micro_batch_size} and sequence_len {sequence_len}; lower one of them{or}"
    )]
    GpuMemory {
        reason: String,
        micro_batch_size: usize,
        sequence_len: usize,
        /// End of the message: what else helps.
        or: &'static str,
    },
    #[cfg(feature = "cuda")]
    #[error(
        "tokens' rows of the embedding and the output layer are not trained beside adapters on GPUs yet; join with --device cpu"
    )]
    GpuTokens,
    #[cfg(feature = "cuda")]
    #[error("weights are not trained in bfloat16 (pure_bf16) on GPUs yet; join with --device cpu")]
    GpuPureBf16,
    #[cfg(feature = "cuda")]
    #[error("{what} is not done on GPUs yet; join with --device cpu")]
    GpuAdapter { what: &'static str },
    #[cfg(feature = "cuda")]
    #[error("{family} with {feature} is not done on GPUs yet; join with --device cpu")]
    GpuFamily {
        family: &'static str,
        feature: &'static str,
    },
    #[cfg(feature = "cuda")]
    #[error(
        "{optimizer} is not done on GPUs yet; join with --device cpu, or give the job another optimizer (adamw, adamw_8bit, lion, sgd)"
    )]
    GpuOptimizer { optimizer: common::job::Optimizer },
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
