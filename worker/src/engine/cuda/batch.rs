//! A batch in the GPU's memory, as kernels read it: [`crate::engine::batch`] with the bounds of each token's segment.

use super::error::GpuError;
use super::gpu::{DeviceBuffer, Gpu};
use crate::engine::batch::Batch;

/// A batch in the GPU's memory, as kernels read it.
pub struct GpuBatch {
    pub tokens: usize,
    pub ids: DeviceBuffer<u32>,
    pub positions: DeviceBuffer<u32>,
    /// For each token, the first token of its segment.
    pub starts: DeviceBuffer<u32>,
    /// For each token, the one after the last token of its segment.
    pub ends: DeviceBuffer<u32>,
}

impl GpuBatch {
    pub fn upload(gpu: &Gpu, batch: &Batch) -> Result<Self, GpuError> {
        let tokens = batch.ids.len();
        let starts: Vec<u32> = (0..tokens as u32)
            .zip(batch.positions.iter())
            .map(|(token, position)| token - position)
            .collect();
        let mut ends = vec![tokens as u32; tokens];
        for token in (0..tokens.saturating_sub(1)).rev() {
            ends[token] = match starts[token + 1] == starts[token] {
                true => ends[token + 1],
                false => token as u32 + 1,
            };
        }
        Ok(Self {
            tokens,
            ids: gpu.upload(&batch.ids)?,
            positions: gpu.upload(&batch.positions)?,
            starts: gpu.upload(&starts)?,
            ends: gpu.upload(&ends)?,
        })
    }
}
