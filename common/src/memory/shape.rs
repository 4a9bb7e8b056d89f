//! A model, and the work on it, in numbers.

use crate::job::{BaseDtype, Reduction};

/// Bytes of a float32.
pub(crate) const F32: u64 = 4;

/// A decoder in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub key_value_heads: usize,
    pub head_dim: usize,
    /// The output layer is the embedding.
    pub tied: bool,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// Each query and key head is normalised.
    pub head_norms: bool,
}

/// Linears of a decoder layer: queries, keys, values, attention output, gate, up, down.
pub const LINEARS: usize = 7;

/// What is trained.
#[derive(Clone, Debug, PartialEq)]
pub enum Trained {
    All,
    Adapters {
        rank: usize,
        /// Something is dropped from their inputs.
        dropout: bool,
        /// By layer: which of its linears have one.
        adapted: Vec<[bool; LINEARS]>,
    },
}

/// What is computed with the model at a time.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    pub trained: Trained,
    pub dtype: BaseDtype,
    pub reduction: Reduction,
    /// Blocks of a slot.
    pub batch: usize,
    /// Tokens of a block.
    pub sequence_len: usize,
    /// Layers keep their inputs alone and run again in the backward pass.
    pub checkpointing: bool,
    /// No other worker takes part, so the mean gradient never stands in memory.
    pub alone: bool,
}
