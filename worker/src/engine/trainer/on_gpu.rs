//! A job's model, weights, moments and sums on a GPU.

use std::sync::Arc;
use std::time::Instant;

use common::files::layout::Layout;
use common::files::{FlatWeights, Moment};
use common::job::{BaseDtype, JobSpec, LoraSpec, Method, Optimizer as Kind, Reduction};
use common::memory::on_gpu;
use common::model::{ModelConfig, absent_parameters};
use half::bf16;

use super::checkpointing::is_checkpointing;
use super::initial_weights::InitialWeights;
use super::pass::{MeanLocation, SlotTimes, TrainedSlot};
use crate::engine::accumulator::Accumulator;
use crate::engine::batch::Batch;
use crate::engine::cuda::engine::{GpuMeanGradient, SumsOnGpu};
use crate::engine::cuda::ops::attention::check_heads;
use crate::engine::cuda::{Gpu, GpuEngine, GpuError};
use crate::engine::estimate::shapes;
use crate::engine::model::weights::WeightSource;
use crate::engine::ops::cross_entropy::LossSum;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::optim::{Optimizer, Update};
use crate::engine::{Abandon, EngineError};

/// Model, weights, moments and sums on a GPU.
pub struct OnGpu {
    engine: GpuEngine,
    job: Arc<JobSpec>,
    checkpointing: bool,
    reduction: Reduction,
    /// A copy of the sums in this process's memory, for what reads them there, once it was asked for.
    collected: Option<Accumulator>,
    /// Whether `collected` matches the sums on the GPU: no slot was added or forgotten since.
    is_current: bool,
}

impl OnGpu {
    pub fn load(
        gpu: Arc<Gpu>,
        job: &Arc<JobSpec>,
        config: &ModelConfig,
        source: &WeightSource,
        InitialWeights { layout, values, .. }: InitialWeights,
    ) -> Result<Self, EngineError> {
        let FlatWeights::Float32(values) = values else {
            return Err(EngineError::GpuPureBf16);
        };
        if let Kind::Muon { .. } = job.optimizer {
            return Err(EngineError::GpuOptimizer {
                optimizer: job.optimizer,
            });
        }
        if let Method::Lora(lora) = &job.method
            && !lora.tokens.is_none()
        {
            return Err(EngineError::GpuTokens);
        }
        if let Method::Lora(lora) = &job.method
            && let Some(what) = adapter_not_on_gpus(lora, config)
        {
            return Err(EngineError::GpuAdapter { what });
        }
        if let Some(feature) = not_on_gpus(config) {
            let family = config.architecture.name();
            return Err(EngineError::GpuFamily { family, feature });
        }
        match job.base_dtype {
            BaseDtype::Float32 => check_heads::<f32>(&gpu, config.head_dim)?,
            BaseDtype::Bfloat16 => check_heads::<bf16>(&gpu, config.head_dim)?,
        }
        let engine = GpuEngine::load(gpu, job, config, source, &layout, &values);
        let mut engine = match engine {
            Err(EngineError::Gpu(error @ GpuError::Memory { .. })) => {
                let (shape, work) = shapes(config, job, true)?;
                let needed = on_gpu(&shape, &work);
                return Err(EngineError::GpuWeights {
                    reason: error.to_string(),
                    needed: needed.weights + needed.training,
                });
            }
            engine => engine?,
        };
        let kept = |tokens| engine.kept_bytes(tokens);
        let free = || Ok(Some(engine.gpu().memory()?.0 as u64));
        let checkpointing = is_checkpointing(job, kept, free)?;
        engine.set_checkpointing(checkpointing);
        Ok(Self {
            engine,
            job: job.clone(),
            checkpointing,
            reduction: job.reduction,
            collected: None,
            is_current: false,
        })
    }

    pub fn abandon(&self) -> Abandon {
        self.engine.abandon().clone()
    }

    /// Empties the sums on the GPU for a step.
    pub fn open(&mut self, trained_tokens: u64, slots: usize) -> Result<(), EngineError> {
        self.is_current = false;
        Ok(self.engine.open(trained_tokens, slots)?)
    }

    /// Computes a slot, forward and backward, and adds its gradient to the sums; `accumulator` keeps which slots are in them.
    pub fn train(
        &mut self,
        accumulator: &mut Accumulator,
        slot: u32,
        batch: &Batch,
        mask: MaskKey,
    ) -> Result<TrainedSlot, EngineError> {
        self.is_current = false;
        let started = Instant::now();
        let is_first = accumulator.held().is_empty();
        let trained = match self.engine.train(batch, mask, is_first) {
            Ok(trained) => trained,
            Err(error) => {
                // A part of the slot may be in the sums.
                accumulator.clear();
                return Err(self.explain(error));
            }
        };
        let Some((sum, pass, invalid_scalars)) = trained else {
            return Err(EngineError::Abandoned);
        };
        common::failpoint::reached("forward");
        accumulator.hold(slot);
        let passed = pass.forward + pass.loss + pass.backward;
        let accumulate = started.elapsed().saturating_sub(passed);
        Ok(TrainedSlot {
            sum,
            invalid_scalars,
            times: SlotTimes { pass, accumulate },
        })
    }

    fn explain(&self, error: GpuError) -> EngineError {
        explain(error, &self.job, self.checkpointing)
    }

    /// Computes the loss of a batch, forward only.
    pub fn evaluate(&mut self, batch: &Batch) -> Result<Option<LossSum>, EngineError> {
        let evaluated = self.engine.evaluate(batch);
        evaluated.map_err(|error| self.explain(error))
    }

    pub fn logits(&mut self, batch: &Batch) -> Result<Vec<f32>, EngineError> {
        self.engine.logits(batch)?.ok_or(EngineError::Abandoned)
    }

    /// Notes that the copy of the sums is out of date.
    pub fn forget(&mut self) {
        self.is_current = false;
    }

    /// Copies the sums from the GPU. `held` says of which step and slots they are.
    pub fn collect(&mut self, held: &Accumulator) -> Result<(), EngineError> {
        if self.is_current {
            return Ok(());
        }
        let (reduction, scalars) = (self.reduction, self.engine.scalars());
        let collected = self
            .collected
            .get_or_insert_with(|| Accumulator::new(reduction, scalars));
        collected.hold_as(held);
        self.engine.copy_sums(collected)?;
        self.is_current = true;
        Ok(())
    }

    /// The copy of the sums, where it is up to date.
    pub fn collected(&self) -> Option<&Accumulator> {
        self.collected.as_ref().filter(|_| self.is_current)
    }

    pub fn sums(&self) -> SumsOnGpu<'_> {
        self.engine.sums()
    }

    pub fn download_mean(&self, mean: &GpuMeanGradient) -> Result<Vec<f32>, EngineError> {
        Ok(self.engine.download_mean(mean)?)
    }

    pub fn invalid(&self) -> Result<u64, EngineError> {
        Ok(self.engine.invalid()?)
    }

    /// Updates weights and moments as `decide` says, given the gradient's norm. Returns the norm, and whether it updated.
    pub fn update(
        &mut self,
        optimizer: &Optimizer,
        layout: &Layout,
        mean: MeanLocation,
        decide: impl FnOnce(f64) -> Option<Update>,
    ) -> Result<(f64, bool), EngineError> {
        let given;
        let mean = match mean {
            MeanLocation::Host(mean) => {
                given = self.engine.upload_mean(mean)?;
                &given
            }
            MeanLocation::Sums => &GpuMeanGradient::Sums,
            MeanLocation::Gpu(mean) => mean,
        };
        let norm = self.engine.norm(mean)?;
        let Some(update) = decide(norm) else {
            return Ok((norm, false));
        };
        self.engine.update(optimizer, &update, layout, mean)?;
        Ok((norm, true))
    }

    pub fn weights(&self) -> Result<Vec<f32>, EngineError> {
        Ok(self.engine.weights()?)
    }

    /// Weights and moments, in layout order, copied from the GPU.
    pub fn state(&self, layout: &Layout) -> Result<(FlatWeights, Vec<Moment>), EngineError> {
        let (weights, moments) = self.engine.state(layout)?;
        Ok((weights.into(), moments))
    }

    pub fn set_state(
        &mut self,
        weights: &FlatWeights,
        moments: &[Moment],
    ) -> Result<(), EngineError> {
        let FlatWeights::Float32(weights) = weights else {
            return Err(EngineError::GpuPureBf16);
        };
        Ok(self.engine.set_state(weights, moments)?)
    }
}

/// Turns a lack of memory on the GPU into an error that says what to do about it.
fn explain(error: GpuError, job: &JobSpec, checkpointing: bool) -> EngineError {
    let GpuError::Memory { .. } = error else {
        return error.into();
    };
    EngineError::GpuMemory {
        reason: error.to_string(),
        micro_batch_size: job.micro_batch_size,
        sequence_len: job.sequence_len,
        or: match checkpointing {
            true => "",
            false => ", or set gradient_checkpointing: true",
        },
    }
}

/// What of an adapter the kernels do not do, if anything.
fn adapter_not_on_gpus(lora: &LoraSpec, config: &ModelConfig) -> Option<&'static str> {
    if lora.use_dora {
        return Some("DoRA (use_dora)");
    }
    if !lora.biases.is_none() || lora.lora_bias {
        return Some("an adapter with biases (bias, lora_bias)");
    }
    if lora.adapts_tokens().contains(&true) {
        return Some("an adapter on the embedding or the output layer (lora_target_modules)");
    }
    let parameters = &lora.shape.parameters;
    if absent_parameters(config, parameters).len() < parameters.len() {
        return Some("an adapter on parameters of experts (lora_target_parameters)");
    }
    let is_from_base = lora.init.is_from_base();
    is_from_base.then_some("an adapter that begins with a part of the weights (init_lora_weights)")
}

/// What of a decoder the kernels do not do, if anything.
fn not_on_gpus(config: &ModelConfig) -> Option<&'static str> {
    (!config.layer_sizes.is_empty())
        .then_some("heads of two sizes, norms of values, and keys that layers share")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
