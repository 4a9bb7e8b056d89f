//! What goes into an exchange, and what comes out of it.

use crate::engine::mean_gradient::MeanGradient;
use crate::engine::packed::PackedSums;
use crate::engine::slot::HeldSlots;

/// What one worker brings to an exchange.
#[derive(Clone, Copy, Debug)]
pub struct Contribution<'a> {
    pub step: u64,
    /// Slots of the step, over all workers.
    pub slots: u32,
    /// The slots whose gradients `sums` holds. Over all members they must make up the step, each exactly once.
    pub held: &'a HeldSlots,
    pub sums: LocalSums<'a>,
    /// Elements of the gradients that were not finite or out of range.
    pub invalid: u64,
}

/// The sums that a worker brings to an exchange, flat in layout order.
#[derive(Clone, Copy, Debug)]
pub enum LocalSums<'a> {
    /// Exact sums in fixed point (see `common::exact`), as plain integers.
    Exact(&'a [i64]),
    /// Exact sums as accumulators store them, in six or eight bytes each.
    Packed(&'a PackedSums),
    /// Float32 sums in fast mode, already in units of the mean gradient.
    Fast(&'a [f32]),
}

impl LocalSums<'_> {
    pub fn len(&self) -> usize {
        match self {
            Self::Exact(sums) => sums.len(),
            Self::Packed(sums) => sums.len(),
            Self::Fast(sums) => sums.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What an exchange comes to, the same bits on each member.
#[derive(Clone, Debug, PartialEq)]
pub struct AllReduced {
    pub mean: MeanGradient,
    /// The slots of the whole step with their outcomes, whoever held them.
    pub slots: HeldSlots,
}
