//! The trainer: slots in, gradients summed; a mean gradient in, weights updated.
//!
//! Lives on one thread and computes on a pool of its own. Everything it does is a function of its inputs alone: never
//! of the number of threads, of what ran before, or of time. Where it computes, on the processor or a GPU, is decided once
//! (`trainer/on_cpu.rs`, `trainer/on_gpu.rs`); everything else is the same.

mod checkpointing;
mod initial_weights;
mod on_cpu;
#[cfg(feature = "cuda")]
mod on_gpu;
mod pass;

use std::path::PathBuf;
use std::sync::Arc;

use common::data::block::Block;
use common::files::FlatWeights;
use common::files::layout::Layout;
use common::files::model::ModelFolder;
use common::files::snapshot::Snapshot;
use common::job::{InitWeights, JobSpec, Method};
use common::model::{ModelConfig, base_tensors};

use super::accumulator::Accumulator;
use super::batch::Batch;
#[cfg(feature = "cuda")]
use super::cuda::engine::{GpuMeanGradient, SumsOnGpu};
use super::mean_gradient::MeanGradient;
use super::ops::lora_linear::MaskKey;
use super::optim::{Optimizer, Update, clip_coefficient};
use super::{Abandon, EngineError};
use crate::engine::device::ComputeDevice;
use crate::engine::model::weights::WeightSource;
use crate::engine::slot::{HeldSlots, SlotOutcome};

use initial_weights::InitialWeights;
use on_cpu::OnCpu;
#[cfg(feature = "cuda")]
use on_gpu::OnGpu;
pub use pass::SlotTimes;
use pass::{MeanLocation, TrainedSlot, outcome};

/// What a trainer is loaded from.
pub struct TrainerOptions {
    pub job: Arc<JobSpec>,
    /// Where the base model is on this machine.
    pub model_dir: PathBuf,
    /// Where the PEFT adapter to start from is on this machine.
    pub adapter_dir: Option<PathBuf>,
    /// Threads to compute with, at least 1.
    pub threads: usize,
    pub device: ComputeDevice,
}

/// What an update came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateOutcome {
    /// Euclidean norm of the mean gradient before clipping.
    pub grad_norm: f64,
    /// Whether nothing was updated, because the gradient had scalars that were not finite or out of range.
    pub skipped: bool,
}

/// A job's model with its optimizer and accumulator: computes slots and makes updates.
pub struct Trainer {
    job: Arc<JobSpec>,
    config: ModelConfig,
    layout: Arc<Layout>,
    pool: rayon::ThreadPool,
    device: ComputeDevice,
    compute: Compute,
    total_scalars: u64,
    /// Which slots are held. Where the processor computes, it holds their sums too.
    accumulator: Accumulator,
    /// Outcomes of the slots held.
    outcomes: HeldSlots,
    optimizer: Optimizer,
    step: u64,
    slot_times: SlotTimes,
}

/// Model, weights and moments, on the device that computes.
enum Compute {
    Cpu(Box<OnCpu>),
    #[cfg(feature = "cuda")]
    Gpu(Box<OnGpu>),
}

impl Trainer {
    /// Loads the model and the values that training starts with.
    pub fn load(options: TrainerOptions) -> Result<Self, EngineError> {
        let TrainerOptions {
            job,
            model_dir,
            adapter_dir,
            threads,
            device,
        } = options;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|index| format!("engine-{index}"))
            .build()
            .map_err(|error| EngineError::Threads {
                threads,
                reason: error.to_string(),
            })?;
        let folder = ModelFolder::open(&model_dir, job.init_weights)?;
        let config = ModelConfig::of(&folder)?;
        let source = match job.init_weights {
            InitWeights::Pretrained => WeightSource::open(&folder, &base_tensors(&config))?,
            InitWeights::Random => WeightSource::Random {
                seed: job.seed,
                standard_deviation: config.initializer_range,
                norm: if config.norm_offset { 0.0 } else { 1.0 },
            },
        };
        let config = config.for_job(&job);
        config.check_vocabulary()?;
        let start = pool.install(|| InitialWeights::of(&job, &config, &source, adapter_dir))?;
        let scalars = start.layout.scalars;
        let layout = Arc::new(start.layout.clone());
        let (compute, summed_here) = match device.clone() {
            ComputeDevice::Cpu => {
                let cpu = pool.install(|| OnCpu::load(&job, &config, &source, start))?;
                (Compute::Cpu(Box::new(cpu)), scalars)
            }
            #[cfg(feature = "cuda")]
            ComputeDevice::Cuda { gpu, .. } => {
                let gpu = pool.install(|| OnGpu::load(gpu, &job, &config, &source, start))?;
                (Compute::Gpu(Box::new(gpu)), 0)
            }
        };
        Ok(Self {
            total_scalars: total_scalars(&config, &job, scalars),
            accumulator: Accumulator::new(job.reduction, summed_here),
            outcomes: HeldSlots::new(),
            optimizer: Optimizer::from_job(&job),
            step: 0,
            slot_times: SlotTimes::default(),
            config,
            layout,
            pool,
            device,
            compute,
            job,
        })
    }

    pub fn layout(&self) -> Arc<Layout> {
        self.layout.clone()
    }

    /// Scalars of the whole model, frozen and trainable.
    pub fn total_scalars(&self) -> u64 {
        self.total_scalars
    }

    /// The model on the processor, for tests.
    #[cfg(test)]
    pub fn model(&self) -> &crate::engine::model::causal_lm::CausalLm {
        match &self.compute {
            Compute::Cpu(cpu) => cpu.model(),
            #[cfg(feature = "cuda")]
            Compute::Gpu(_) => unreachable!("loaded on the processor"),
        }
    }

    pub fn device(&self) -> &ComputeDevice {
        &self.device
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Number of updates seen, skipped ones included.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Opens `step` for slots. What is held stays if it is this step's already.
    ///
    /// `trained_tokens` and `slots` are those of the whole step, over all workers.
    pub fn begin_step(
        &mut self,
        step: u64,
        trained_tokens: u64,
        slots: usize,
    ) -> Result<(), EngineError> {
        let (tokens, slots) = (trained_tokens.max(1), slots.max(1));
        #[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
        let is_new = self
            .pool
            .install(|| self.accumulator.begin(step, tokens, slots));
        let held = self.accumulator.held();
        self.outcomes.retain(|slot, _| held.contains(slot));
        match &mut self.compute {
            // Its sums are the accumulator's.
            Compute::Cpu(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Compute::Gpu(_) if !is_new => Ok(()),
            #[cfg(feature = "cuda")]
            Compute::Gpu(gpu) => gpu.open(tokens, slots),
        }
    }

    /// Adds the gradient of a slot of the open step. A slot that is already held is not computed again.
    pub fn train_slot(&mut self, slot: u32, blocks: &[Block]) -> Result<SlotOutcome, EngineError> {
        if let Some(outcome) = self.outcomes.get(&slot) {
            return Ok(*outcome);
        }
        let batch = Batch::from_blocks(blocks, self.config.vocab_size)?;
        let trained = match batch.targets.is_empty() {
            true => Ok(self.hold_empty(slot)),
            false => self.train(slot, &batch),
        };
        match trained {
            Ok(TrainedSlot {
                sum,
                invalid_scalars,
                times,
            }) => {
                let outcome = outcome(&batch, sum, invalid_scalars);
                self.outcomes.insert(slot, outcome);
                self.slot_times = times;
                Ok(outcome)
            }
            Err(error) => {
                let held = self.accumulator.held();
                self.outcomes.retain(|slot, _| held.contains(slot));
                Err(error)
            }
        }
    }

    /// Holds a slot of which nothing is learned, so that its gradient is zero.
    fn hold_empty(&mut self, slot: u32) -> TrainedSlot {
        self.accumulator.hold(slot);
        self.compute.forget();
        TrainedSlot::default()
    }

    fn train(&mut self, slot: u32, batch: &Batch) -> Result<TrainedSlot, EngineError> {
        let mask = MaskKey {
            seed: self.job.seed,
            step: self.accumulator.step().unwrap_or(self.step),
            slot,
            part: 0,
        };
        let (pool, accumulator) = (&self.pool, &mut self.accumulator);
        match &mut self.compute {
            Compute::Cpu(cpu) => pool.install(|| cpu.train(accumulator, slot, batch, mask)),
            #[cfg(feature = "cuda")]
            Compute::Gpu(gpu) => gpu.train(accumulator, slot, batch, mask),
        }
    }

    /// How long the parts of the last slot took.
    pub fn slot_times(&self) -> SlotTimes {
        self.slot_times
    }

    /// The handle by which another thread asks for the slot in hand to be given up.
    ///
    /// The slot ends with [`EngineError::Abandoned`] and leaves the accumulator as it was, unless gradients were added already
    /// that cannot be taken back, or it is as good as done. Must be cleared before another slot.
    pub fn abandon(&self) -> Abandon {
        match &self.compute {
            Compute::Cpu(cpu) => cpu.abandon(),
            #[cfg(feature = "cuda")]
            Compute::Gpu(gpu) => gpu.abandon(),
        }
    }

    /// Computes the loss of a slot: forward only, without dropout.
    pub fn eval_slot(&mut self, blocks: &[Block]) -> Result<SlotOutcome, EngineError> {
        let batch = Batch::from_blocks(blocks, self.config.vocab_size)?;
        if batch.targets.is_empty() {
            return Ok(SlotOutcome::default());
        }
        let sum = match &mut self.compute {
            Compute::Cpu(cpu) => self.pool.install(|| cpu.evaluate(&batch)),
            #[cfg(feature = "cuda")]
            Compute::Gpu(gpu) => gpu.evaluate(&batch)?,
        };
        let sum = sum.ok_or(EngineError::Abandoned)?;
        Ok(outcome(&batch, sum, 0))
    }

    /// The logits of one sequence, flat `[tokens][vocabulary]`.
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        let batch = Batch::from_tokens(tokens, self.config.vocab_size)?;
        match &mut self.compute {
            Compute::Cpu(cpu) => Ok(self.pool.install(|| cpu.logits(&batch))),
            #[cfg(feature = "cuda")]
            Compute::Gpu(gpu) => gpu.logits(&batch),
        }
    }

    /// The slots in the accumulator, with their outcomes.
    pub fn held(&self) -> &HeldSlots {
        &self.outcomes
    }

    /// Empties the accumulator.
    pub fn forget_slots(&mut self) {
        self.accumulator.clear();
        self.outcomes.clear();
        self.compute.forget();
    }

    /// Copies the sums from the GPU into [`Self::accumulator`], where a GPU computes.
    pub fn collect(&mut self) -> Result<(), EngineError> {
        match &mut self.compute {
            Compute::Cpu(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Compute::Gpu(gpu) => gpu.collect(&self.accumulator),
        }
    }

    /// The accumulator of the open step. On a GPU its sums are those of the last [`Self::collect`].
    pub fn accumulator(&self) -> &Accumulator {
        match &self.compute {
            Compute::Cpu(_) => &self.accumulator,
            #[cfg(feature = "cuda")]
            Compute::Gpu(gpu) => gpu.collected().unwrap_or(&self.accumulator),
        }
    }

    /// The step whose slots are held.
    pub fn open_step(&self) -> Option<u64> {
        self.accumulator.step()
    }

    /// Clips the mean gradient, updates weights and moments, and counts a step. An invalid gradient counts as a step too, but
    /// changes nothing.
    pub fn apply(
        &mut self,
        mean: &MeanGradient,
        learning_rate: f64,
    ) -> Result<UpdateOutcome, EngineError> {
        self.update(
            MeanLocation::Host(&mean.values),
            mean.invalid,
            learning_rate,
        )
    }

    /// Updates as [`apply`](Self::apply) does, by the mean of the accumulator, which never stands in memory. Every slot of the
    /// step must be held here.
    pub fn apply_held(&mut self, learning_rate: f64) -> Result<UpdateOutcome, EngineError> {
        let invalid = self.invalid()?;
        self.update(MeanLocation::Sums, invalid, learning_rate)
    }

    /// The sums of the slots held, on the GPU: for an exchange from GPU to GPU.
    #[cfg(feature = "cuda")]
    pub fn sums_on_gpu(&self) -> SumsOnGpu<'_> {
        match &self.compute {
            Compute::Cpu(_) => unreachable!("no exchange over NCCL on the processor"),
            Compute::Gpu(gpu) => gpu.sums(),
        }
    }

    /// Updates as [`apply`](Self::apply) does, by the mean gradient that an exchange of [`sums_on_gpu`](Self::sums_on_gpu) left
    /// on the GPU.
    #[cfg(feature = "cuda")]
    pub fn apply_on_gpu(
        &mut self,
        mean: &GpuMeanGradient,
        invalid: u64,
        learning_rate: f64,
    ) -> Result<UpdateOutcome, EngineError> {
        self.update(MeanLocation::Gpu(mean), invalid, learning_rate)
    }

    /// Copies a mean gradient from the GPU to this process's memory, in layout order.
    #[cfg(feature = "cuda")]
    pub fn download_mean(&self, mean: &GpuMeanGradient) -> Result<Vec<f32>, EngineError> {
        match &self.compute {
            Compute::Cpu(_) => unreachable!("no exchange over NCCL on the processor"),
            Compute::Gpu(gpu) => gpu.download_mean(mean),
        }
    }

    /// Scalars of the gradients of the slots held that were not finite or out of range.
    pub fn invalid(&self) -> Result<u64, EngineError> {
        match &self.compute {
            Compute::Cpu(_) => Ok(self.accumulator.invalid()),
            #[cfg(feature = "cuda")]
            Compute::Gpu(gpu) => gpu.invalid(),
        }
    }

    fn update(
        &mut self,
        mean: MeanLocation,
        invalid: u64,
        learning_rate: f64,
    ) -> Result<UpdateOutcome, EngineError> {
        let (number, max_norm) = (self.step + 1, self.job.max_grad_norm);
        let decide = |norm: f64| {
            let skipped = invalid > 0 || !norm.is_finite();
            (!skipped).then(|| Update {
                number,
                learning_rate,
                gradient_scale: clip_coefficient(norm, max_norm),
            })
        };
        let (optimizer, layout) = (&self.optimizer, &self.layout);
        let (grad_norm, updated) = match &mut self.compute {
            Compute::Cpu(cpu) => {
                let mean = (mean, &self.accumulator);
                self.pool
                    .install(|| cpu.update(optimizer, layout, mean, decide))
            }
            #[cfg(feature = "cuda")]
            Compute::Gpu(gpu) => gpu.update(optimizer, layout, mean, decide)?,
        };
        self.step = number;
        Ok(UpdateOutcome {
            grad_norm,
            skipped: !updated,
        })
    }

    /// Digest of the trainable weights as they are now.
    pub fn weights_digest(&self) -> Result<String, EngineError> {
        let digest = |weights: &FlatWeights| self.pool.install(|| weights.digest(&self.layout));
        match &self.compute {
            Compute::Cpu(cpu) => Ok(cpu.weights(digest)),
            #[cfg(feature = "cuda")]
            Compute::Gpu(gpu) => Ok(digest(&gpu.weights()?.into())),
        }
    }

    /// Takes a snapshot of weights, moments and step.
    ///
    /// On the processor nothing is copied at once: the next update makes a copy where somebody still reads this snapshot then.
    pub fn snapshot(&self) -> Result<Snapshot, EngineError> {
        let (weights, moments) = match &self.compute {
            Compute::Cpu(cpu) => cpu.state(),
            #[cfg(feature = "cuda")]
            Compute::Gpu(gpu) => gpu.state(&self.layout)?,
        };
        Ok(Snapshot {
            step: self.step,
            layout: self.layout(),
            weights,
            moments,
        })
    }

    /// Takes over a state of the same layout. Slots held are forgotten: their gradients were of other weights.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<(), EngineError> {
        let layout = self.layout();
        if *snapshot.layout != *layout {
            return Err(EngineError::LayoutMismatch {
                found: snapshot.layout.digest(),
                expected: layout.digest(),
            });
        }
        let (weights, moments) = (&snapshot.weights, &snapshot.moments);
        match &mut self.compute {
            Compute::Cpu(cpu) => cpu.set_state(weights.clone(), moments.clone()),
            #[cfg(feature = "cuda")]
            Compute::Gpu(gpu) => gpu.set_state(weights, moments)?,
        }
        self.step = snapshot.step;
        self.forget_slots();
        Ok(())
    }
}

impl Compute {
    /// Notes that other slots are held than those whose sums were last collected.
    fn forget(&mut self) {
        match self {
            // Its sums are the accumulator's.
            Self::Cpu(_) => {}
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.forget(),
        }
    }
}

fn total_scalars(config: &ModelConfig, job: &JobSpec, trainable: usize) -> u64 {
    let base: usize = base_tensors(config)
        .iter()
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum();
    match job.method {
        Method::Full => base as u64,
        Method::Lora(_) => (base + trainable) as u64,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
