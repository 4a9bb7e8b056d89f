//! The decoder's layers, each built of fused ops.

pub mod attention;
pub mod chain;
pub mod decoder;
pub mod mlp;

use std::sync::Arc;

use super::batch::Batch;
use super::ops::lora_linear::MaskKey;
use super::ops::rope::RopeTable;
use super::ops::segments::Segments;

/// What every layer of a forward pass needs beside its input.
#[derive(Clone)]
pub struct Pass {
    pub positions: Arc<Vec<u32>>,
    pub segments: Arc<Segments>,
    pub rope: Arc<RopeTable>,
    /// None: nothing is dropped.
    pub mask: Option<MaskKey>,
}

impl Pass {
    pub fn new(batch: &Batch, rope: Arc<RopeTable>, mask: Option<MaskKey>) -> Self {
        Self {
            positions: batch.positions.clone(),
            segments: batch.segments.clone(),
            rope,
            mask,
        }
    }
}
