//! What a job trains, and the values that it starts with: the whole base model, or adapters.

use std::path::PathBuf;

use bytemuck::Zeroable;
use common::files::FlatWeights;
use common::files::adapter::{Factor, parse_tensor_name};
use common::files::layout::Layout;
use common::files::moments::{EightBits, Moment};
use common::job::{BaseDtype, JobSpec, Method, MomentDtype, TrainedRows, TrainedTokens};
use common::model::{
    AdaptedModule, EMBEDDING, HEAD, ModelConfig, adapted_modules, tensors_beside, token_tensor,
    unfrozen_tensors,
};
use half::bf16;

use crate::engine::adapter::{adapter_layout, initial_values, values_from};
use crate::engine::model::weights::WeightSource;
use crate::engine::{EngineError, memory};

/// The trainable tensors, and the values that they start with.
pub(super) struct InitialWeights {
    pub layout: Layout,
    /// Starting values in layout order.
    pub values: FlatWeights,
    /// Whether no adapter gave them.
    pub is_new: bool,
}

impl InitialWeights {
    /// Reads or draws the values that a job starts with.
    pub fn of(
        job: &JobSpec,
        config: &ModelConfig,
        source: &WeightSource,
        adapter_dir: Option<PathBuf>,
    ) -> Result<Self, EngineError> {
        let moments = job.optimizer.moments();
        match &job.method {
            Method::Full => {
                let layout = Layout::new(unfrozen_tensors(config, &job.unfrozen)?)
                    .with_moments(moments)
                    .with_weights(job.trained_dtype());
                Ok(Self {
                    values: base_values(source, &layout)?,
                    layout,
                    is_new: true,
                })
            }
            Method::Lora(lora) => {
                let modules = adapted_modules(config, lora)?;
                let beside = tensors_beside(config, &modules, lora);
                let layout = adapter_layout(&modules, lora, beside.clone()).with_moments(moments);
                let is_new = adapter_dir.is_none();
                let values = match adapter_dir {
                    Some(dir) => values_from(&dir, (&modules, &beside), lora, config.tied)?,
                    None => {
                        let experts = |module: &str| {
                            let found = modules.iter().find(|found| found.module() == module);
                            found.map_or(1, AdaptedModule::experts)
                        };
                        let mut values = initial_values(&layout, job.seed, lora.init, &experts)?;
                        read_biases(source, &layout, &mut values)?;
                        for (name, rows) in of_tokens(&lora.tokens) {
                            let Some(tensor) = layout.find(&token_tensor(name, rows)) else {
                                continue;
                            };
                            let range = tensor.offset..tensor.offset + tensor.scalars();
                            source.read_rows(config, name, rows, &mut values[range])?;
                        }
                        values
                    }
                };
                Ok(Self {
                    layout,
                    values: values.into(),
                    is_new,
                })
            }
        }
    }
}

/// Reads or draws the tensors of the base that are trained, in the layout's type.
fn base_values(source: &WeightSource, layout: &Layout) -> Result<FlatWeights, EngineError> {
    let places = layout.tensors.iter().map(|tensor| {
        let range = tensor.offset..tensor.offset + tensor.scalars();
        (tensor.name.as_str(), tensor.shape.as_slice(), range)
    });
    Ok(match layout.weights {
        BaseDtype::Float32 => {
            let mut values = zeros::<f32>(layout.scalars)?;
            for (name, shape, range) in places {
                source.read_f32(name, shape, &mut values[range])?;
            }
            FlatWeights::Float32(values.into())
        }
        BaseDtype::Bfloat16 => {
            let mut values = zeros::<bf16>(layout.scalars)?;
            for (name, shape, range) in places {
                source.read_bf16(name, shape, &mut values[range])?;
            }
            FlatWeights::Bfloat16(values.into())
        }
    })
}

/// Reads the biases of the base that are trained.
fn read_biases(
    source: &WeightSource,
    layout: &Layout,
    values: &mut [f32],
) -> Result<(), EngineError> {
    for tensor in &layout.tensors {
        if let Some((module, Factor::Bias | Factor::BiasAlone)) = parse_tensor_name(&tensor.name) {
            let range = tensor.offset..tensor.offset + tensor.scalars();
            source.read_f32(&format!("{module}.bias"), &tensor.shape, &mut values[range])?;
        }
    }
    Ok(())
}

/// What is trained of the embedding and the output layer beside an adapter.
fn of_tokens(trained: &TrainedTokens) -> [(&'static str, &TrainedRows); 2] {
    [(EMBEDDING, &trained.embedding), (HEAD, &trained.head)]
}

/// Moments as they are before the first update.
///
/// # Errors
/// Where the machine has not the memory.
pub(super) fn no_moments(layout: &Layout) -> Result<Vec<Moment>, EngineError> {
    let lengths = layout.eight_bit_lengths();
    let moment = |_| match layout.moments.dtype {
        MomentDtype::Float32 => Ok(Moment::Float32(zeros(layout.scalars)?.into())),
        MomentDtype::EightBits => Ok(Moment::EightBits(EightBits {
            codes: zeros(lengths.codes)?.into(),
            absmax: zeros(lengths.blocks)?.into(),
            float32: zeros(lengths.float32)?.into(),
        })),
    };
    (0..layout.moments.count).map(moment).collect()
}

/// Zeros for so many scalars.
///
/// # Errors
/// Where the machine has not the memory.
fn zeros<T: Zeroable + Copy>(scalars: usize) -> Result<Vec<T>, EngineError> {
    memory::try_zeros(scalars).map_err(|_| EngineError::Memory { scalars })
}
