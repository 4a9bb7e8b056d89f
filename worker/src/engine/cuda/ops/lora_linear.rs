//! The adapter of a linear layer, as [`super::projection`] computes with it.

use crate::engine::cuda::params::FlatRange;

/// The trainable update of one linear layer: `A` is `[rank][in]`, `B` is `[out][rank]`.
#[derive(Clone, Copy, Debug)]
pub struct Lora {
    pub a: FlatRange,
    pub b: FlatRange,
    pub rank: usize,
    pub scale: f32,
    /// Probability that an input is dropped.
    pub dropout: f64,
    /// Number of the adapted module, for the dropout mask.
    pub module: u64,
}
