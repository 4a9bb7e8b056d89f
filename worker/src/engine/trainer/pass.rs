//! What training on the processor and on a GPU have in common: times of a slot, and where a mean gradient is.

use std::time::Duration;

#[cfg(feature = "cuda")]
use crate::engine::cuda::engine::GpuMean;
use crate::engine::model::causal_lm::PassTimes;

/// How long the parts of a slot took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SlotTimes {
    pub pass: PassTimes,
    /// Time to add the gradient to the accumulator, where that comes last.
    pub accumulate: Duration,
}

/// Where the mean gradient of an update is.
#[derive(Clone, Copy)]
pub(super) enum MeanOf<'a> {
    Given(&'a [f32]),
    /// The sums held here, which have every slot of the step.
    Held,
    /// The mean gradient on the GPU, where an exchange over NCCL left it.
    #[cfg(feature = "cuda")]
    Reduced(&'a GpuMean),
}
