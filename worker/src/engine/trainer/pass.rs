//! What training on the processor and on a GPU have in common: what a slot came to, and where a mean gradient is.

use std::time::Duration;

use crate::engine::batch::Batch;
#[cfg(feature = "cuda")]
use crate::engine::cuda::engine::GpuMeanGradient;
use crate::engine::model::causal_lm::PassTimes;
use crate::engine::ops::cross_entropy::LossSum;
use crate::engine::slot::SlotOutcome;

/// How long the parts of a slot took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SlotTimes {
    pub pass: PassTimes,
    /// Time to add the gradient to the accumulator, where that comes last.
    pub accumulate: Duration,
}

/// A slot whose gradient was added to the sums.
#[derive(Default)]
pub(super) struct TrainedSlot {
    pub sum: LossSum,
    /// Scalars of its gradient that were not finite or out of range.
    pub invalid_scalars: u64,
    pub times: SlotTimes,
}

/// What a batch came to, given the loss over its targets.
pub(super) fn outcome(batch: &Batch, sum: LossSum, invalid_scalars: u64) -> SlotOutcome {
    SlotOutcome {
        loss_sum: sum.loss,
        trained_tokens: batch.targets.len() as u64,
        correct_tokens: sum.correct,
        invalid_scalars,
    }
}

/// Where the mean gradient of an update is.
#[derive(Clone, Copy)]
pub(super) enum MeanLocation<'a> {
    /// In this process's memory.
    Host(&'a [f32]),
    /// The sums held here, which have every slot of the step.
    Sums,
    /// The mean gradient on the GPU, where an exchange over NCCL left it.
    #[cfg(feature = "cuda")]
    Gpu(&'a GpuMeanGradient),
}
