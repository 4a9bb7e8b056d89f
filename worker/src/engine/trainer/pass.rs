//! What the processor and a GPU take and give in a slot and an update.

use std::time::Duration;

#[cfg(feature = "cuda")]
use crate::engine::cuda::engine::GpuMean;
use crate::engine::model::causal_lm::PassTimes;

/// How long the parts of a slot took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SlotTimes {
    pub pass: PassTimes,
    /// Adding the gradient to the accumulator, where that comes last.
    pub accumulate: Duration,
}

/// Where the mean gradient of an update is.
#[derive(Clone, Copy)]
pub(super) enum MeanOf<'a> {
    Given(&'a [f32]),
    /// Every slot of the step is held here.
    Held,
    /// On the GPU, where an exchange over NCCL left it.
    #[cfg(feature = "cuda")]
    Reduced(&'a GpuMean),
}
