//! The mean gradient of a step, the same on every worker: as an exchange leaves it, and as the optimizer reads it.

use std::ops::Range;

use super::accumulator::Accumulator;

/// The mean gradient of a step over all workers, in this process's memory.
#[derive(Clone, Debug, PartialEq)]
pub struct MeanGradient {
    /// One for each trainable scalar, in layout order.
    pub values: Vec<f32>,
    /// Scalars of the gradient that were not finite or out of range, on any worker.
    pub invalid: u64,
}

/// Where the mean gradient is read from, in layout order.
#[derive(Clone, Copy)]
pub enum MeanSource<'a> {
    Values(&'a [f32]),
    /// An accumulator that holds every slot. The mean is computed chunk by chunk and never stands in memory.
    Sums(&'a Accumulator),
}

impl MeanSource<'_> {
    pub fn scalars(&self) -> usize {
        match self {
            Self::Values(mean) => mean.len(),
            Self::Sums(accumulator) => accumulator.scalars(),
        }
    }

    pub(super) fn read<'a>(&'a self, range: Range<usize>, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        match self {
            Self::Values(mean) => &mean[range],
            Self::Sums(accumulator) => {
                scratch.resize(range.len(), 0.0);
                accumulator.read_means(range.start, scratch);
                scratch
            }
        }
    }
}
