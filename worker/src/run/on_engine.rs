//! The step's trainer on the engine: loaded from what a run starts from.

use std::path::Path;
use std::sync::Arc;

use common::data::block::Block;
use common::files::{Layout, Snapshot};
use common::job::JobSpec;

use super::backend::StepTrainer;
use super::error::RunError;
use crate::ComputeDevice;
#[cfg(feature = "cuda")]
use crate::engine::cuda::engine::GpuMeanGradient;
use crate::engine::slot::{HeldSlots, SlotOutcome};
use crate::engine::{Abandon, EngineError, MeanGradient, Trainer, TrainerOptions, UpdateOutcome};
use crate::rpc::fetch::Folder;
use crate::status::Status;

/// What the run starts from.
pub struct Start {
    pub job: Arc<JobSpec>,
    pub job_digest: String,
    pub threads: usize,
    pub device: ComputeDevice,
    pub model: Folder,
    /// Updates that the state has seen.
    pub start_step: u64,
    /// The adapter to start from at step 0, the checkpoint at any later step.
    pub state: Option<Folder>,
    pub status: Status,
}

/// Loads the model, and the checkpoint or adapter that the run starts from.
pub(super) fn load(start: &Start) -> Result<Trainer, RunError> {
    let state_dir = start.state.as_ref().map(Folder::path);
    let from_checkpoint = start.start_step > 0;
    let mut trainer = Trainer::load(TrainerOptions {
        job: start.job.clone(),
        model_dir: start.model.path().to_owned(),
        adapter_dir: state_dir.filter(|_| !from_checkpoint).map(Path::to_owned),
        threads: start.threads,
        device: start.device.clone(),
    })?;
    if let Some(dir) = state_dir.filter(|_| from_checkpoint) {
        let snapshot = Snapshot::read_files(dir, &trainer.layout())?;
        if snapshot.step != start.start_step {
            return Err(RunError::StartStep {
                found: snapshot.step,
                expected: start.start_step,
            });
        }
        trainer.restore(&snapshot)?;
    }
    Ok(trainer)
}

/// The mean gradient of a step, where an exchange of real workers leaves it.
pub enum Mean {
    Here(MeanGradient),
    /// Not computed: this worker holds every slot, so the mean gradient is that of its own sums.
    Held,
    /// The mean gradient on the GPU, where the exchange over NCCL left it. Its memory is free once this is dropped.
    #[cfg(feature = "cuda")]
    OnGpu {
        mean: GpuMeanGradient,
        invalid: u64,
    },
}

impl StepTrainer for Trainer {
    type Mean = Mean;

    fn step(&self) -> u64 {
        Self::step(self)
    }

    fn layout(&self) -> Arc<Layout> {
        Self::layout(self)
    }

    fn total_scalars(&self) -> u64 {
        Self::total_scalars(self)
    }

    fn peak_memory_bytes(&self) -> u64 {
        self.device().peak_memory_bytes()
    }

    fn open_step(&self) -> Option<u64> {
        Self::open_step(self)
    }

    fn held(&self) -> &HeldSlots {
        Self::held(self)
    }

    fn abandon(&self) -> Abandon {
        Self::abandon(self)
    }

    fn begin_step(
        &mut self,
        step: u64,
        trained_tokens: u64,
        slots: usize,
    ) -> Result<(), EngineError> {
        Self::begin_step(self, step, trained_tokens, slots)
    }

    fn forget_slots(&mut self) {
        Self::forget_slots(self);
    }

    async fn train_slot(
        &mut self,
        slot: u32,
        blocks: &[Block],
    ) -> Result<SlotOutcome, EngineError> {
        Self::train_slot(self, slot, blocks)
    }

    async fn eval_slot(&mut self, blocks: &[Block]) -> Result<SlotOutcome, EngineError> {
        Self::eval_slot(self, blocks)
    }

    fn apply(&mut self, mean: &Mean, learning_rate: f64) -> Result<UpdateOutcome, EngineError> {
        match mean {
            Mean::Here(mean) => Self::apply(self, mean, learning_rate),
            Mean::Held => self.apply_held(learning_rate),
            #[cfg(feature = "cuda")]
            Mean::OnGpu { mean, invalid } => self.apply_on_gpu(mean, *invalid, learning_rate),
        }
    }

    fn repeat(
        &mut self,
        mean: &MeanGradient,
        learning_rate: f64,
    ) -> Result<UpdateOutcome, EngineError> {
        Self::apply(self, mean, learning_rate)
    }

    fn mean_in_memory(&mut self, mean: Mean) -> Result<Vec<f32>, EngineError> {
        match mean {
            Mean::Here(mean) => Ok(mean.values),
            Mean::Held => {
                self.collect()?;
                Ok(self.accumulator().mean())
            }
            #[cfg(feature = "cuda")]
            Mean::OnGpu { mean, .. } => self.download_mean(&mean),
        }
    }

    fn weights_digest(&self) -> Result<String, EngineError> {
        Self::weights_digest(self)
    }

    fn snapshot(&self) -> Result<Snapshot, EngineError> {
        Self::snapshot(self)
    }

    fn restore(&mut self, snapshot: &Snapshot) -> Result<(), EngineError> {
        Self::restore(self, snapshot)
    }
}
