//! A job's model, weights and moments on the processor.

use std::time::Instant;

use common::files::layout::Layout;
use common::files::moments::MomentPartMut;
use common::files::{FlatWeights, Moment, WeightsPartMut};
use common::host::available_bytes;
use common::job::{JobSpec, Method, TrainedRows};
use common::model::ModelConfig;
use rayon::prelude::*;

use super::checkpointing::is_checkpointing;
use super::initial_weights::{InitialWeights, no_moments};
use super::pass::{MeanLocation, SlotTimes, TrainedSlot};
use crate::engine::accumulator::Accumulator;
use crate::engine::adapter::{JobAdapter, SecondHalves};
use crate::engine::batch::Batch;
use crate::engine::mean_gradient::MeanSource;
use crate::engine::model::Parts;
use crate::engine::model::causal_lm::CausalLm;
use crate::engine::model::weights::WeightSource;
use crate::engine::ops::cross_entropy::LossSum;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::optim::{Optimizer, TensorUpdate, Update, gradient_norm};
use crate::engine::params::{Collect, Parameters};
use crate::engine::{Abandon, EngineError};

/// Model, weights and moments in this process's memory. Every method runs on the trainer's threads.
pub struct OnCpu {
    model: CausalLm,
    parameters: Parameters,
    /// As the layout says.
    moments: Vec<Moment>,
    /// What no update may move.
    second_halves: SecondHalves,
}

impl OnCpu {
    pub fn load(
        job: &JobSpec,
        config: &ModelConfig,
        source: &WeightSource,
        InitialWeights {
            layout,
            values,
            is_new,
        }: InitialWeights,
    ) -> Result<Self, EngineError> {
        let (scalars, moments) = (layout.scalars, no_moments(&layout)?);
        let trained_dtype = layout.weights;
        let (collect, lora) = match &job.method {
            Method::Full => (Collect::Sums, None),
            Method::Lora(lora) => {
                let whole =
                    [&lora.tokens.embedding, &lora.tokens.head].contains(&&TrainedRows::All);
                let collect = if whole { Collect::Sums } else { Collect::Slot };
                (collect, Some(lora))
            }
        };
        let second_halves = lora.map_or_else(SecondHalves::default, |lora| {
            SecondHalves::of(&layout, lora)
        });
        let parameters = Parameters::new(layout, values, collect);
        let parts = Parts {
            config,
            source,
            parameters: &parameters,
            lora: lora.map(JobAdapter::of),
            new_adapter: is_new.then_some(job.seed),
            dtype: match job.method {
                // What is left as it is is computed with in the type of what is trained.
                Method::Full => trained_dtype,
                Method::Lora(_) => job.base_dtype,
            },
            quantization: job.quantization,
        };
        let mut model = parts.model(job.sequence_len)?;
        model.set_token_loss(job.token_loss);
        let kept = |tokens| model.kept_bytes(tokens);
        let checkpointing = is_checkpointing(job, kept, || Ok(free_bytes(scalars)))?;
        model.set_checkpointing(checkpointing);
        Ok(Self {
            model,
            parameters,
            moments,
            second_halves,
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
        optimizer: &Optimizer,
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
        let moments = &mut self.moments;
        let halves = &self.second_halves;
        self.parameters.update(|weights| {
            // Those of an adapter, which is float32.
            let fixed = match weights {
                FlatWeights::Float32(flat) => halves.copy(flat),
                FlatWeights::Bfloat16(_) => Default::default(),
            };
            update_tensors(optimizer, &update, layout, weights, moments, mean);
            if let FlatWeights::Float32(flat) = weights {
                halves.put_back(flat, &fixed);
            }
        });
        (norm, true)
    }

    /// Calls `read` with the flat weights, in layout order.
    pub fn weights<R>(&self, read: impl FnOnce(&FlatWeights) -> R) -> R {
        self.parameters.read(read)
    }

    /// Weights and moments, in layout order, without a copy.
    pub fn state(&self) -> (FlatWeights, Vec<Moment>) {
        (self.parameters.share(), self.moments.clone())
    }

    pub fn set_state(&mut self, weights: FlatWeights, moments: Vec<Moment>) {
        self.parameters.replace(weights);
        self.moments = moments;
    }
}

/// One tensor in the flat buffers, with what becomes of it.
struct Part<'a> {
    update: TensorUpdate,
    weights: WeightsPartMut<'a>,
    moments: Vec<MomentPartMut<'a>>,
    offset: usize,
}

/// Updates all trainable tensors.
fn update_tensors(
    optimizer: &Optimizer,
    update: &Update,
    layout: &Layout,
    weights: &mut FlatWeights,
    moments: &mut [Moment],
    mean: MeanSource,
) {
    let moments = moments.iter_mut();
    let mut moments: Vec<_> = moments.map(|moment| moment.parts_mut(layout)).collect();
    let tensors = layout.tensors.iter().zip(weights.parts_mut(layout));
    let parts = tensors.map(|(tensor, weights)| Part {
        update: optimizer.of_tensor(tensor),
        weights,
        moments: moments.iter_mut().filter_map(Iterator::next).collect(),
        offset: tensor.offset,
    });
    let (wide, small): (Vec<_>, Vec<_>) = parts.partition(|part| part.update.is_wide());
    let apply = |part: Part| {
        let Part {
            update: rule,
            weights,
            moments,
            offset,
        } = part;
        rule.apply(update, weights, moments, (mean, offset));
    };
    // Small tensors beside each other: one alone does not keep all threads busy.
    small.into_par_iter().for_each(apply);
    wide.into_iter().for_each(apply);
}

/// Memory for activations, where the system says how much is free. All but the sums and gradients of `scalars` is in memory
/// already.
fn free_bytes(scalars: usize) -> Option<u64> {
    /// Bytes that the sums take, and the gradient of a slot or the mean of several workers.
    const BYTES_PER_SCALAR: u64 = 10;
    let free = available_bytes()?;
    Some(free.saturating_sub(BYTES_PER_SCALAR * scalars as u64))
}
