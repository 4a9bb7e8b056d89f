//! The decoder's layers on the GPU, each built of [`super::ops`]: what [`crate::engine::model::layers`] is on the processor,
//! file by file.

pub mod attention;
pub mod decoder;
pub mod experts;
pub mod feed_forward;
pub mod gated_delta_net;
pub mod mlp;
pub mod residual;
pub mod ropes;
pub mod shared_expert;
pub mod token_mixer;

use cudarc::driver::{CudaView, CudaViewMut};

use super::batch::GpuBatch;
use super::blas::GpuElement;
use super::error::GpuError;
use super::gpu::{DeviceBuffer, Gpu, Pace};
use super::ops::elementwise::{Rows, add_in_place, round_rows};
use super::ops::projection::{Context, Projection};
use super::ops::rms_norm::RmsNorm;
use super::params::GradientSink;
use crate::engine::abandon::Abandon;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::ops::router_loss::RouterLoss;
use ropes::GpuRopes;

/// What every layer of a pass needs beside its input.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub gpu: &'a Gpu,
    pub batch: &'a GpuBatch,
    pub ropes: &'a GpuRopes,
    /// Key of the dropout masks; None where nothing is dropped.
    pub mask: Option<MaskKey>,
    /// The loss that spreads tokens over experts, if the router has one.
    pub router_loss: Option<&'a RouterLoss>,
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

/// What a half of a layer reads: the residual, normed where there is a norm, with the low-rank activations of the adapters of
/// `reader` behind each row.
fn norm_forward<E: GpuElement>(
    norm: &Option<RmsNorm>,
    x: &CudaView<f32>,
    reader: &Projection<E>,
    pass: Pass,
) -> Result<DeviceBuffer<E>, GpuError> {
    let (gpu, rows) = (pass.gpu, reader.inputs(pass.tokens()));
    let mut read = gpu.take::<E>(rows.rows * rows.stride)?;
    let out = (&mut read.as_view_mut(), rows);
    match norm {
        Some(norm) => norm.forward(gpu, x, out)?,
        None => round_rows(gpu, (x, Rows::new(rows.rows, rows.columns)), out, 1.0)?,
    }
    reader.reduce(&mut read.as_view_mut(), pass.context())?;
    Ok(read)
}

/// Adds to `gradient` what comes back through [`norm_forward`].
fn norm_backward(
    norm: &Option<RmsNorm>,
    (x, d_read): (&CudaView<f32>, &CudaView<f32>),
    gradient: &mut CudaViewMut<f32>,
    pass: Pass,
    sink: &mut dyn GradientSink,
) -> Result<(), GpuError> {
    match norm {
        Some(norm) => norm.backward(pass.gpu, x, d_read, gradient, sink),
        None => add_in_place(pass.gpu, gradient, d_read),
    }
}

/// Takes over the trainable weights of a norm after an update, where there is one.
fn refresh_norm(
    norm: &mut Option<RmsNorm>,
    gpu: &Gpu,
    flat: &DeviceBuffer<f32>,
) -> Result<(), GpuError> {
    match norm {
        Some(norm) => norm.weight.refresh(gpu, flat),
        None => Ok(()),
    }
}
