//! The decoder's layers on the GPU, each built of [`super::ops`]: what [`crate::engine::model::layers`] is on the processor,
//! file by file.

pub mod attention;
pub mod decoder;
pub mod mlp;

use cudarc::driver::CudaViewMut;

use super::batch::GpuBatch;
use super::blas::GpuElement;
use super::error::GpuError;
use super::gpu::{DeviceBuffer, Gpu, Pace};
use super::ops::elementwise::{Rows, round_rows};
use super::ops::projection::{Context, Projection};
use super::ops::rope::GpuRopeTable;
use crate::engine::abandon::Abandon;
use crate::engine::ops::lora_linear::MaskKey;

/// What every layer of a pass needs beside its input.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub gpu: &'a Gpu,
    pub batch: &'a GpuBatch,
    pub rope: &'a GpuRopeTable,
    /// Key of the dropout masks; None where nothing is dropped.
    pub mask: Option<MaskKey>,
    /// The request to give up the pass: once it is asked, what the pass computes is of no use. None where nobody may ask.
    pub abandon: Option<&'a Abandon>,
}

impl Pass<'_> {
    /// Where somebody may ask for it, keeps the GPU few layers behind, so that a request comes in time to save work.
    fn is_abandoned(&self, pace: &mut Pace) -> Result<bool, GpuError> {
        let Some(abandon) = self.abandon else {
            return Ok(false);
        };
        pace.step(self.gpu)?;
        Ok(abandon.is_asked())
    }

    pub fn tokens(&self) -> usize {
        self.batch.tokens
    }

    fn context(&self) -> Context<'_> {
        Context {
            gpu: self.gpu,
            tokens: self.tokens(),
            mask: self.mask,
        }
    }
}

/// The gradient of a projection's output, rounded, with the gradients of the low-rank activations behind each row.
fn output_gradient<E: GpuElement>(
    gradient: &CudaViewMut<f32>,
    projection: &Projection<E>,
    pass: Pass,
) -> Result<DeviceBuffer<E>, GpuError> {
    let rows = projection.gradients(pass.tokens());
    let mut dy = pass.gpu.take::<E>(rows.rows * rows.stride)?;
    let from = (&gradient.as_view(), Rows::new(rows.rows, rows.columns));
    round_rows(pass.gpu, from, (&mut dy.as_view_mut(), rows), 1.0)?;
    projection.reduce_gradient(&mut dy.as_view_mut(), pass.context())?;
    Ok(dy)
}
