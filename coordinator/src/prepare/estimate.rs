//! What a job needs in memory, before anything is loaded.
//!
//! Enters: the job and the sizes of the model. Leaves: bytes a worker needs on a processor and on a GPU, by the formulas of
//! [`common::memory`].

use common::flops::{self, PerToken};
use common::job::{BaseDtype, Checkpointing, JobSpec};
use common::memory::{Bytes, Work, on_gpu, on_processor};
use common::model::{ModelConfig, UnmatchedTarget, adapter_ranks, trained_ranks, unfrozen_sizes};
use serde::Serialize;

/// Bytes in one worker, and the scalars behind them.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    pub parameters: u64,
    /// Those that take part in a token: of a mixture of experts not all do.
    pub active_parameters: u64,
    /// Without the second halves of adapters that begin with a part of the weights.
    pub trainable_parameters: u64,
    pub processor: Need,
    pub gpu: Need,
    /// Floating-point operations that training needs per token. None where the job does not compute in bfloat16, for which the
    /// peaks of GPUs are known.
    pub flop_per_token: Option<PerToken>,
}

/// Memory that a worker needs, by what becomes of activations. At least one of the two is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Need {
    /// Activations are kept for the backward pass. None: the job forbids it.
    pub keeping: Option<Bytes>,
    /// Activations are computed again in the backward pass. None: the job forbids it.
    pub recomputing: Option<Bytes>,
}

impl Need {
    /// What a worker needs at least: with `gradient_checkpointing: auto` it takes more where it has more.
    pub fn least(&self) -> Bytes {
        self.recomputing.or(self.keeping).unwrap_or_default()
    }
}

impl Estimate {
    pub fn new(job: &JobSpec, config: &ModelConfig) -> Result<Self, UnmatchedTarget> {
        let adapted = adapter_ranks(config, job)?;
        let own = unfrozen_sizes(config, job)?;
        let trained = Work::of(job, trained_ranks(config, job)?, false).on(own.clone());
        let sizes = &config.shape();
        let work = |checkpointing| Work {
            quantization: config.quantization_of(job),
            ..Work::of(job, adapted.clone(), checkpointing).on(own.clone())
        };
        let (keeps, recomputes) = match job.gradient_checkpointing {
            Checkpointing::Never => (true, false),
            Checkpointing::Always => (false, true),
            Checkpointing::Auto => (true, true),
        };
        let need = |bytes: fn(&_, &_) -> Bytes| Need {
            keeping: keeps.then(|| bytes(sizes, &work(false))),
            recomputing: recomputes.then(|| bytes(sizes, &work(true))),
        };
        Ok(Self {
            parameters: sizes.parameters(),
            active_parameters: sizes.active_parameters(),
            trainable_parameters: trained.scalars(sizes),
            processor: need(on_processor),
            gpu: need(on_gpu),
            flop_per_token: (job.base_dtype == BaseDtype::Bfloat16)
                .then(|| flops::per_token(sizes, &work(false))),
        })
    }
}
