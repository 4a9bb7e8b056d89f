//! What a job needs in memory here, before anything is loaded: [`common::memory`] for the engine's own configuration.

use common::job::{JobSpec, Method};
#[cfg(feature = "cuda")]
use common::memory::on_gpu;
use common::memory::{Bytes, LINEARS, Shape, Work, on_processor};

use super::EngineError;
use super::adapter::adapted_modules;
use crate::engine::device::ComputeDevice;
use crate::engine::model::config::ModelConfig;
use crate::engine::model::weights::linears;

/// For a worker alone.
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

/// As the formulas take them, for a worker alone.
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
        ..Work::of(job, adapted(config, job)?, checkpointing)
    };
    Ok((shape(config), work))
}

/// By layer: which linears have an adapter.
fn adapted(config: &ModelConfig, job: &JobSpec) -> Result<Vec<[bool; LINEARS]>, EngineError> {
    let Method::Lora(lora) = &job.method else {
        return Ok(Vec::new());
    };
    let modules = adapted_modules(config, &lora.target_modules)?;
    let has = |layer: usize, path: &str| {
        let path = format!("model.layers.{layer}.{path}");
        modules.iter().any(|module| module.path == path)
    };
    let linears = linears(config);
    Ok((0..config.layers)
        .map(|layer| std::array::from_fn(|index| has(layer, linears[index].path)))
        .collect())
}

fn shape(config: &ModelConfig) -> Shape {
    Shape {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        layers: config.layers,
        heads: config.heads,
        key_value_heads: config.key_value_heads,
        head_dim: config.head_dim,
        tied: config.tied,
        qkv_bias: config.qkv_bias,
        output_bias: config.output_bias,
        mlp_bias: config.mlp_bias,
        head_norms: config.head_norms,
    }
}
