//! What a job needs in memory, before anything is loaded.
//!
//! Enters: the job and the sizes of the model. Leaves: bytes a worker needs on a processor and on a GPU, by the formulas of
//! [`common::memory`].

use common::flops::{self, PerToken};
use common::job::{BaseDtype, Checkpointing, JobSpec, Method};
use common::memory::{Bytes, LINEARS, Work, on_gpu, on_processor};
use serde::Serialize;

use super::ModelShape;

/// Bytes in one worker, and the scalars behind them.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    pub parameters: u64,
    pub trainable_parameters: u64,
    pub processor: Need,
    pub gpu: Need,
    /// Operations that the model needs for a token. None: not in bfloat16, which peaks of GPUs are known for.
    pub flop_per_token: Option<PerToken>,
}

/// By what becomes of activations. One of the two at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Need {
    /// They are kept for the backward pass. None: the job forbids it.
    pub keeping: Option<Bytes>,
    /// They are computed again. None: the job forbids it.
    pub recomputing: Option<Bytes>,
}

impl Need {
    /// What a worker needs at least: with `gradient_checkpointing: auto` it takes more where it has more.
    pub fn least(&self) -> Bytes {
        self.recomputing.or(self.keeping).unwrap_or_default()
    }
}

impl Estimate {
    pub fn new(job: &JobSpec, shape: &ModelShape) -> Result<Self, String> {
        let adapted = adapted(job, shape)?;
        let sizes = &shape.sizes;
        let work = |checkpointing| Work::of(job, adapted.clone(), checkpointing);
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
            trainable_parameters: work(false).scalars(sizes),
            processor: need(on_processor),
            gpu: need(on_gpu),
            flop_per_token: (job.base_dtype == BaseDtype::Bfloat16)
                .then(|| flops::per_token(sizes, &work(false))),
        })
    }
}

/// By layer: which of its linears have an adapter.
fn adapted(job: &JobSpec, shape: &ModelShape) -> Result<Vec<[bool; LINEARS]>, String> {
    let Method::Lora(lora) = &job.method else {
        return Ok(Vec::new());
    };
    let targets = shape.targets(&lora.target_modules)?;
    let all = shape.linears();
    let (layers, _) = all.as_chunks::<LINEARS>();
    Ok(layers
        .iter()
        .map(|layer| std::array::from_fn(|index| targets.contains(&layer[index])))
        .collect())
}
