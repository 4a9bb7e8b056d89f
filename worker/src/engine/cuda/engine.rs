//! One job's model, weights, moments and sums on one GPU. In: batches and mean gradients. Out: losses, sums and states.

use std::sync::Arc;

use common::files::Moment;
use common::files::layout::Layout;
use common::files::moments::BLOCK_SCALARS;
use common::job::{BaseDtype, JobSpec, Method};
use common::memory::gpu::MEAN_TILE;
use common::model::ModelConfig;
use half::bf16;

use super::build::Parts;
use super::causal_lm::CausalLm;
use super::error::GpuError;
use super::gpu::{DeviceBuffer, Gpu};
use super::moments::{GpuMoment, upload_codebooks};
use super::ops::update::{squares, update_tensor};
use super::sums::{DeviceSums, GpuSums, SlotGradient, SumsSink};
use crate::engine::accumulator::Accumulator;
use crate::engine::adapter::JobAdapter;
use crate::engine::batch::Batch;
use crate::engine::model::causal_lm::PassTimes;
use crate::engine::model::weights::WeightSource;
use crate::engine::ops::cross_entropy::LossSum;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::optim::{NORM_CHUNK, Optimizer, Update};
use crate::engine::{Abandon, EngineError};

const _: () = assert!(MEAN_TILE.is_multiple_of(NORM_CHUNK));
const _: () = assert!(MEAN_TILE.is_multiple_of(BLOCK_SCALARS));

/// The model, in the type that it computes in.
enum Model {
    F32(CausalLm<f32>),
    Bf16(CausalLm<bf16>),
}

macro_rules! each {
    ($model:expr, $inner:ident => $work:expr) => {
        match $model {
            Model::F32($inner) => $work,
            Model::Bf16($inner) => $work,
        }
    };
}

/// A mean gradient on the GPU, in layout order.
pub enum GpuMeanGradient {
    Values(DeviceBuffer<f32>),
    /// Computed from the sums held here, which have every slot.
    Sums,
}

/// One worker's sums of a step, on its GPU.
#[derive(Clone, Copy)]
pub struct SumsOnGpu<'a> {
    pub gpu: &'a Gpu,
    pub sums: DeviceSums<'a>,
    pub scalars: usize,
}

/// One job's model, trainable weights, moments and sums on a GPU.
pub struct GpuEngine {
    gpu: Arc<Gpu>,
    model: Model,
    scalars: usize,
    /// The trainable weights and their moments, in layout order.
    flat: DeviceBuffer<f32>,
    moments: Vec<GpuMoment>,
    /// What the codes of moments of 8 bits stand for.
    codebooks: DeviceBuffer<f32>,
    sums: GpuSums,
    /// The gradient of a slot, where it is kept until the slot is done.
    slot: Option<SlotGradient>,
    /// Gives memory back to the device; last, so that everything above is freed before.
    _release: Release,
}

/// Gives the device's memory back when an engine ends, for whoever else computes there.
struct Release(Arc<Gpu>);

impl Drop for Release {
    fn drop(&mut self) {
        // Whoever ends has no use for an error.
        let _ = self.0.release_kept_memory();
    }
}

impl GpuEngine {
    /// Loads a job's model onto the GPU. `values` are those of the trainable tensors, in layout order.
    pub fn load(
        gpu: Arc<Gpu>,
        job: &JobSpec,
        config: &ModelConfig,
        source: &WeightSource,
        layout: &Layout,
        values: &[f32],
    ) -> Result<Self, EngineError> {
        let lora = match &job.method {
            Method::Lora(lora) => Some(lora),
            Method::Full => None,
        };
        let parts = Parts {
            gpu: &gpu,
            config,
            source,
            layout,
            lora: lora.map(JobAdapter::of),
            dtype: job.base_dtype,
            quantization: job.quantization,
            scratch: Arc::default(),
        };
        let mut model = match job.base_dtype {
            BaseDtype::Float32 => Model::F32(parts.model(job.sequence_len)?),
            BaseDtype::Bfloat16 => Model::Bf16(parts.model(job.sequence_len)?),
        };
        each!(&mut model, model => model.set_token_loss(job.token_loss));
        let scalars = layout.scalars;
        let slot = match lora {
            Some(_) => Some(SlotGradient(gpu.zeroed(scalars)?)),
            None => None,
        };
        let mut engine = Self {
            flat: gpu.upload(values)?,
            moments: (0..layout.moments.count)
                .map(|_| GpuMoment::zeros(&gpu, layout))
                .collect::<Result<_, _>>()?,
            codebooks: upload_codebooks(&gpu)?,
            sums: GpuSums::new(&gpu, job.reduction, scalars)?,
            slot,
            scalars,
            model,
            _release: Release(gpu.clone()),
            gpu,
        };
        engine.refresh()?;
        Ok(engine)
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Number of trainable scalars.
    pub fn scalars(&self) -> usize {
        self.scalars
    }

    /// Bytes that a training pass without checkpointing keeps for so many tokens.
    pub fn kept_bytes(&self, tokens: usize) -> usize {
        each!(&self.model, model => model.kept_bytes(tokens))
    }

    pub fn set_checkpointing(&mut self, checkpointing: bool) {
        each!(&mut self.model, model => model.set_checkpointing(checkpointing));
    }

    pub fn abandon(&self) -> &Abandon {
        each!(&self.model, model => model.abandon())
    }

    /// Empties the sums for a step.
    pub fn open(&mut self, trained_tokens: u64, slots: usize) -> Result<(), GpuError> {
        self.sums.open(&self.gpu, trained_tokens, slots)
    }

    /// Computes a slot's gradient and adds it to the sums. Returns how many of its scalars were invalid.
    ///
    /// None where the slot was abandoned, and nothing was added. `is_first`: the sums hold nothing yet.
    ///
    /// # Errors
    /// After an error, what the sums hold is of no use in full training.
    pub fn train(
        &mut self,
        batch: &Batch,
        mask: MaskKey,
        is_first: bool,
    ) -> Result<Option<(LossSum, PassTimes, u64)>, GpuError> {
        let Self {
            gpu,
            model,
            sums,
            slot,
            ..
        } = self;
        let before = sums.invalid(gpu)?;
        let trained = each!(model, model => {
            model.prepare(gpu, batch)?;
            match slot {
                Some(slot) => model.train(gpu, batch, Some(mask), (slot, true))?,
                None => {
                    let parts = model.gradient_parts(batch);
                    let mut sink = SumsSink::new(gpu, sums, self.scalars, parts)?;
                    // Of the first slot a part can be taken back, together with all else.
                    model.train(gpu, batch, Some(mask), (&mut sink, is_first))?
                }
            }
        });
        let Some((loss, times)) = trained else {
            if slot.is_none() && is_first {
                sums.clear(gpu)?;
            }
            return Ok(None);
        };
        if let Some(slot) = slot {
            sums.add(gpu, 0, &slot.0.slice(..self.scalars), 1)?;
        }
        Ok(Some((loss, times, sums.invalid(gpu)? - before)))
    }

    pub fn evaluate(&mut self, batch: &Batch) -> Result<Option<LossSum>, GpuError> {
        let gpu = &self.gpu;
        each!(&mut self.model, model => {
            model.prepare(gpu, batch)?;
            model.evaluate(gpu, batch)
        })
    }

    pub fn logits(&mut self, batch: &Batch) -> Result<Option<Vec<f32>>, GpuError> {
        let gpu = &self.gpu;
        each!(&mut self.model, model => {
            model.prepare(gpu, batch)?;
            model.logits(gpu, batch)
        })
    }

    /// Copies the sums into the processor's accumulator, which is open for the same step.
    pub fn copy_sums(&self, accumulator: &mut Accumulator) -> Result<(), GpuError> {
        self.sums.copy_to(&self.gpu, accumulator)
    }

    pub fn invalid(&self) -> Result<u64, GpuError> {
        self.sums.invalid(&self.gpu)
    }

    /// This worker's sums, for an exchange from GPU to GPU.
    pub fn sums(&self) -> SumsOnGpu<'_> {
        SumsOnGpu {
            gpu: &self.gpu,
            sums: self.sums.on_device(),
            scalars: self.scalars,
        }
    }

    /// Copies a mean gradient from the GPU, in layout order.
    pub fn download_mean(&self, mean: &GpuMeanGradient) -> Result<Vec<f32>, GpuError> {
        match mean {
            GpuMeanGradient::Values(mean) => self.gpu.download(mean, self.scalars),
            GpuMeanGradient::Sums => {
                let means = self.sums.means(&self.gpu, 0..self.scalars)?;
                self.gpu.download(&means, self.scalars)
            }
        }
    }

    pub fn upload_mean(&self, mean: &[f32]) -> Result<GpuMeanGradient, GpuError> {
        Ok(GpuMeanGradient::Values(self.gpu.upload(mean)?))
    }

    /// The Euclidean norm of a mean gradient.
    ///
    /// Squares are summed in float64: within chunks in a block's order, and then chunk by chunk.
    pub fn norm(&self, mean: &GpuMeanGradient) -> Result<f64, GpuError> {
        let mut chunks = Vec::new();
        for start in (0..self.scalars).step_by(MEAN_TILE) {
            let range = start..self.scalars.min(start + MEAN_TILE);
            chunks.extend(match mean {
                GpuMeanGradient::Values(mean) => squares(&self.gpu, &mean.slice(range))?,
                GpuMeanGradient::Sums => {
                    let means = self.sums.means(&self.gpu, range.clone())?;
                    squares(&self.gpu, &means.slice(..range.len()))?
                }
            });
        }
        Ok(chunks.iter().sum::<f64>().sqrt())
    }

    /// Updates weights and moments.
    pub fn update(
        &mut self,
        optimizer: &Optimizer,
        update: &Update,
        layout: &Layout,
        mean: &GpuMeanGradient,
    ) -> Result<(), GpuError> {
        for (tensor, place) in layout.tensors.iter().zip(layout.moment_places()) {
            let rule = optimizer.of_tensor(tensor);
            let end = tensor.offset + tensor.scalars();
            for start in (tensor.offset..end).step_by(MEAN_TILE) {
                let range = start..end.min(start + MEAN_TILE);
                let computed;
                let gradient = match mean {
                    GpuMeanGradient::Values(mean) => mean.slice(range.clone()),
                    GpuMeanGradient::Sums => {
                        computed = self.sums.means(&self.gpu, range.clone())?;
                        computed.slice(..range.len())
                    }
                };
                let weights = &mut self.flat.slice_mut(range.clone());
                let scalars = start - tensor.offset..range.end - tensor.offset;
                let moments = self.moments.iter_mut();
                let moments = moments.map(|moment| moment.part(place, scalars.clone()));
                let moments = (moments.collect(), &self.codebooks);
                update_tensor(&self.gpu, (&rule, update), weights, moments, &gradient)?;
            }
        }
        self.refresh()
    }

    /// Copies weights and moments from the GPU, in layout order.
    pub fn state(&self, layout: &Layout) -> Result<(Vec<f32>, Vec<Moment>), GpuError> {
        let moments = self.moments.iter();
        let moments = moments.map(|moment| moment.download(&self.gpu, layout));
        Ok((self.weights()?, moments.collect::<Result<_, _>>()?))
    }

    pub fn weights(&self) -> Result<Vec<f32>, GpuError> {
        self.gpu.download(&self.flat, self.scalars)
    }

    /// Takes over a state of the same layout.
    pub fn set_state(&mut self, weights: &[f32], moments: &[Moment]) -> Result<(), GpuError> {
        self.gpu.write(weights, &mut self.flat)?;
        for (from, to) in moments.iter().zip(&mut self.moments) {
            to.write(&self.gpu, from)?;
        }
        self.refresh()
    }

    fn refresh(&mut self) -> Result<(), GpuError> {
        let (gpu, flat) = (&self.gpu, &self.flat);
        each!(&mut self.model, model => model.refresh(gpu, flat))?;
        gpu.wait()
    }
}
