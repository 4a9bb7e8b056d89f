//! What goes into an exchange, and what comes out of it.

use crate::engine::packed::PackedSums;
use crate::engine::slot::HeldSlots;

/// What one worker brings to an exchange.
#[derive(Clone, Copy, Debug)]
pub struct Contribution<'a> {
    pub step: u64,
    /// Slots of the step, over all workers.
    pub slots: u32,
    /// Those that `sums` holds. Over all members they must make up the step, each exactly once.
    pub held: &'a HeldSlots,
    pub sums: Sums<'a>,
    /// Elements that were not finite or out of range.
    pub invalid: u64,
}

#[derive(Clone, Copy, Debug)]
pub enum Sums<'a> {
    /// Fixed point, see `common::exact`.
    Exact(&'a [i64]),
    /// The same, as accumulators have it.
    Packed(&'a PackedSums),
    /// Already in units of the mean gradient.
    Fast(&'a [f32]),
}

impl Sums<'_> {
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

/// The sum over all members, the same bits on each.
#[derive(Clone, Debug, PartialEq)]
pub struct ReducedSum {
    pub mean: Vec<f32>,
    pub invalid: u64,
    /// Of the whole step, whoever held them.
    pub slots: HeldSlots,
}
