//! A job's model, weights and moments on the processor.

use std::time::Instant;

use common::files::Flat;
use common::files::layout::Layout;
use common::job::{JobSpec, Method};
use common::model::ModelConfig;
use rayon::prelude::*;

use super::checkpointing::is_checkpointing;
use super::initial_weights::{InitialWeights, zeros};
use super::pass::{MeanLocation, SlotTimes, TrainedSlot};
use crate::engine::accumulator::Accumulator;
use crate::engine::batch::Batch;
use crate::engine::mean_gradient::MeanSource;
use crate::engine::model::Parts;
use crate::engine::model::causal_lm::CausalLm;
use crate::engine::model::weights::WeightSource;
use crate::engine::ops::cross_entropy::LossSum;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::optim::{AdamW, Update, gradient_norm};
use crate::engine::params::{Collect, Parameters};
use crate::engine::{Abandon, EngineError, memory};

/// Model, weights and moments in this process's memory. Every method runs on the trainer's threads.
pub struct OnCpu {
    model: CausalLm,
    parameters: Parameters,
    exp_avg: Flat,
    exp_avg_sq: Flat,
}

impl OnCpu {
    pub fn load(
        job: &JobSpec,
        config: &ModelConfig,
        source: &WeightSource,
        InitialWeights { layout, values }: InitialWeights,
    ) -> Result<Self, EngineError> {
        let scalars = layout.scalars;
        let (collect, lora) = match &job.method {
            Method::Full => (Collect::Sums, None),
            Method::Lora(lora) => (Collect::Slot, Some(lora)),
        };
        let parameters = Parameters::new(layout, values, collect);
        let parts = Parts {
            config,
            source,
            parameters: &parameters,
            lora,
            dtype: job.base_dtype,
        };
        let mut model = parts.model(job.sequence_len)?;
        let (exp_avg, exp_avg_sq) = (zeros(scalars)?.into(), zeros(scalars)?.into());
        let kept = |tokens| model.kept_bytes(tokens);
        let checkpointing = is_checkpointing(job, kept, || Ok(free_bytes(scalars)))?;
        model.set_checkpointing(checkpointing);
        Ok(Self {
            model,
            parameters,
            exp_avg,
            exp_avg_sq,
        })
    }

    #[cfg(test)]
    pub fn model(&self) -> &CausalLm {
        &self.model
    }

    pub fn abandon(&self) -> Abandon {
        self.model.abandon().clone()
    }

    /// Computes a slot, forward and backward, and adds its gradient to the accumulator.
    pub fn train(
        &self,
        accumulator: &mut Accumulator,
        slot: u32,
        batch: &Batch,
        mask: MaskKey,
    ) -> Result<TrainedSlot, EngineError> {
        let invalid_before = accumulator.invalid();
        let gradients = self.parameters.gradients();
        gradients.begin(accumulator, self.model.gradient_parts(batch));
        let droppable = gradients.can_be_dropped();
        let Some((sum, pass)) = self.model.train(batch, Some(mask), droppable) else {
            gradients.drop_slot(accumulator);
            return Err(EngineError::Abandoned);
        };
        common::failpoint::reached("forward");
        let computed = Instant::now();
        gradients.finish(slot, accumulator)?;
        let accumulate = computed.elapsed();
        Ok(TrainedSlot {
            sum,
            invalid_scalars: accumulator.invalid() - invalid_before,
            times: SlotTimes { pass, accumulate },
        })
    }

    /// Computes the loss of a batch, forward only. None where it was abandoned.
    pub fn evaluate(&self, batch: &Batch) -> Option<LossSum> {
        self.model.evaluate(batch)
    }

    pub fn logits(&self, batch: &Batch) -> Vec<f32> {
        self.model.logits(batch)
    }

    /// Updates weights and moments as `decide` says, given the gradient's norm. Returns the norm, and whether it updated.
    pub fn update(
        &mut self,
        optimizer: &AdamW,
        layout: &Layout,
        (mean, accumulator): (MeanLocation, &Accumulator),
        decide: impl FnOnce(f64) -> Option<Update> + Send,
    ) -> (f64, bool) {
        let mean = match mean {
            MeanLocation::Host(mean) => MeanSource::Values(mean),
            MeanLocation::Sums => MeanSource::Sums(accumulator),
            #[cfg(feature = "cuda")]
            MeanLocation::Gpu(_) => unreachable!("no exchange over NCCL on the processor"),
        };
        let norm = gradient_norm(mean);
        let Some(update) = decide(norm) else {
            return (norm, false);
        };
        let (exp_avg, exp_avg_sq) = (&mut self.exp_avg[..], &mut self.exp_avg_sq[..]);
        self.parameters.update(|weights| {
            let moments = (exp_avg, exp_avg_sq);
            update_tensors(optimizer, &update, layout, weights, moments, mean);
        });
        (norm, true)
    }

    /// Calls `read` with the flat weights, in layout order.
    pub fn weights<R>(&self, read: impl FnOnce(&[f32]) -> R) -> R {
        self.parameters.read(read)
    }

    /// Weights and both moments, in layout order, without a copy.
    pub fn state(&self) -> [Flat; 3] {
        let weights = self.parameters.share();
        [weights, self.exp_avg.clone(), self.exp_avg_sq.clone()]
    }

    pub fn set_state(&mut self, [weights, exp_avg, exp_avg_sq]: [Flat; 3]) {
        self.parameters.replace(weights);
        (self.exp_avg, self.exp_avg_sq) = (exp_avg, exp_avg_sq);
    }
}

/// Updates all trainable tensors.
fn update_tensors(
    optimizer: &AdamW,
    update: &Update,
    layout: &Layout,
    weights: &mut [f32],
    (exp_avg, exp_avg_sq): (&mut [f32], &mut [f32]),
    mean: MeanSource,
) {
    let (mut weights, mut exp_avg, mut exp_avg_sq) = (weights, exp_avg, exp_avg_sq);
    let mut end = 0;
    let tensors: Vec<_> = layout
        .tensors
        .iter()
        .map(|tensor| {
            // One follows the other in the flat buffers.
            assert_eq!(tensor.offset, end, "{}", tensor.name);
            end += tensor.scalars();
            let [w, m, v] = [&mut weights, &mut exp_avg, &mut exp_avg_sq].map(|flat| {
                flat.split_off_mut(..tensor.scalars())
                    .expect("the buffers are as long as the layout")
            });
            (tensor, w, m, v)
        })
        .collect();
    // Small tensors beside each other: one alone does not keep all threads busy.
    tensors.into_par_iter().for_each(|(tensor, w, m, v)| {
        let optimizer = optimizer.of_tensor(tensor);
        optimizer.update(update, w, m, v, (mean, tensor.offset));
    });
}

/// Memory for activations, where the system says how much is free. All but the sums and gradients of `scalars` is in memory
/// already.
fn free_bytes(scalars: usize) -> Option<u64> {
    /// Bytes that the sums take, and the gradient of a slot or the mean of several workers.
    const BYTES_PER_SCALAR: u64 = 10;
    let free = memory::available_bytes()?;
    Some(free.saturating_sub(BYTES_PER_SCALAR * scalars as u64))
}
