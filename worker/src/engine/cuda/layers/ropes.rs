//! The tables of rotary positions on the GPU: what [`crate::engine::model::layers::RopeTables`] is on the processor.

use std::sync::Arc;

use common::model::{ModelConfig, Rotation};

use crate::engine::cuda::GpuError;
use crate::engine::cuda::gpu::Gpu;
use crate::engine::cuda::ops::rope::GpuRopeTable;
use crate::engine::model::layers::RopeTables;

/// The tables of rotary positions on the GPU.
pub struct GpuRopes {
    /// The same on the processor, which says where in them each token's row is.
    tables: RopeTables,
    usual: Option<GpuRopeTable>,
    /// Of layers with a window, where these have their own.
    local: Option<GpuRopeTable>,
}

impl GpuRopes {
    /// Makes tables that reach to so many positions.
    pub fn new(gpu: &Gpu, config: &ModelConfig, positions: usize) -> Result<Self, GpuError> {
        let tables = RopeTables::new(config, positions);
        let table = |rotation: Rotation| -> Result<Option<GpuRopeTable>, GpuError> {
            let is_used = config
                .layer_kinds
                .iter()
                .any(|kind| kind.rotation == rotation);
            let table = tables.of(rotation).filter(|_| is_used);
            table
                .map(|table| GpuRopeTable::upload(gpu, table))
                .transpose()
        };
        Ok(Self {
            usual: table(Rotation::Usual)?,
            local: table(Rotation::Local)?,
            tables,
        })
    }

    pub fn positions(&self) -> usize {
        self.tables.positions()
    }

    /// The row of each token of a batch in the tables.
    pub fn rows(&self, positions: &Arc<Vec<u32>>) -> Arc<Vec<u32>> {
        self.tables.rows(positions)
    }

    /// The table of a layer; none where it rotates nothing.
    pub fn of(&self, rotation: Rotation) -> Option<&GpuRopeTable> {
        match rotation {
            Rotation::None => None,
            Rotation::Usual => self.usual.as_ref(),
            Rotation::Local => self.local.as_ref(),
        }
    }
}
