//! What a job needs in memory here, before anything is loaded: [`common::memory`] for the engine's own configuration.

use common::job::JobSpec;
#[cfg(feature = "cuda")]
use common::memory::on_gpu;
use common::memory::{Bytes, Shape, Work, on_processor};
use common::model::{ModelConfig, adapter_ranks, unfrozen_sizes};

use super::EngineError;
use crate::engine::device::ComputeDevice;

/// Estimates the memory that a job needs on this device with one worker, before anything is loaded.
///
/// # Errors
/// Where the job's target modules name no linear.
pub fn estimate(
    config: &ModelConfig,
    job: &JobSpec,
    device: &ComputeDevice,
    checkpointing: bool,
) -> Result<Bytes, EngineError> {
    let (shape, work) = shapes(config, job, checkpointing)?;
    Ok(match device {
        ComputeDevice::Cpu => on_processor(&shape, &work),
        #[cfg(feature = "cuda")]
        ComputeDevice::Cuda { .. } => on_gpu(&shape, &work),
    })
}

/// The model's shape and a slot's work, as the formulas of [`common::memory`] take them, for one worker.
///
/// # Errors
/// As [`estimate`].
pub fn shapes(
    config: &ModelConfig,
    job: &JobSpec,
    checkpointing: bool,
) -> Result<(Shape, Work), EngineError> {
    let work = Work {
        alone: true,
        quantization: config.quantization_of(job),
        ..Work::of(job, adapter_ranks(config, job)?, checkpointing).on(unfrozen_sizes(config, job)?)
    };
    Ok((config.shape(), work))
}
