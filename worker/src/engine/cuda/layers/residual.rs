//! What a half of a decoder layer adds to the residual: `y = x + scale · norm(output(h))`, where most models have neither
//! scale nor norm.

use std::borrow::Borrow;

use cudarc::driver::{CudaView, CudaViewMut};

use super::Pass;
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::DeviceBuffer;
use crate::engine::cuda::ops::elementwise::{Rows, round_rows};
use crate::engine::cuda::ops::projection::Projection;
use crate::engine::cuda::ops::rms_norm::RmsNorm;
use crate::engine::cuda::params::GradientSink;

/// How the result of a half's last layer is added.
pub struct Residual {
    pub norm: Option<RmsNorm>,
    pub scale: f32,
}

impl Residual {
    /// Writes `y`, `[tokens][hidden]` as `x` is, from what the last layer reads.
    pub fn forward<E: GpuElement>(
        &self,
        output: &Projection<E>,
        (x, h): (&CudaView<f32>, &CudaView<E>),
        y: &mut CudaViewMut<f32>,
        pass: Pass,
    ) -> Result<(), GpuError> {
        let Some(norm) = &self.norm else {
            return output.forward_onto((x, self.scale), h, y, pass.context());
        };
        let result = result(output, h, pass)?;
        norm.forward_onto(pass.gpu, (x, self.scale), &result.as_view(), y)
    }

    /// The gradient of the last layer's result from that of `y`, rounded, with the gradients of the low-rank activations behind each
    /// row. What a norm reads is computed again from `h`.
    pub fn backward<E: GpuElement, H: Borrow<DeviceBuffer<E>>>(
        &self,
        output: &Projection<E>,
        h: impl FnOnce() -> Result<H, GpuError>,
        gradient: &CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let (gpu, rows) = (pass.gpu, output.gradients(pass.tokens()));
        let take = || gpu.take::<E>(rows.rows * rows.stride);
        let mut dy = match &self.norm {
            None => {
                let mut dy = take()?;
                let from = (&gradient.as_view(), Rows::new(rows.rows, rows.columns));
                round_rows(gpu, from, (&mut dy.as_view_mut(), rows), self.scale)?;
                dy
            }
            Some(norm) => {
                let read = result(output, &h()?.borrow().as_view(), pass)?;
                let mut dy = take()?;
                let from = (&gradient.as_view(), self.scale);
                let to = (&mut dy.as_view_mut(), rows);
                norm.backward_rounded(gpu, &read.as_view(), from, to, sink)?;
                dy
            }
        };
        output.reduce_gradient(&mut dy.as_view_mut(), pass.context())?;
        Ok(dy)
    }
}

/// The result of a half's last layer, `[tokens][hidden]`, from inputs with the low-rank activations behind each row.
fn result<E: GpuElement>(
    output: &Projection<E>,
    h: &CudaView<E>,
    pass: Pass,
) -> Result<DeviceBuffer<f32>, GpuError> {
    let mut result = pass.gpu.take::<f32>(pass.tokens() * output.out())?;
    output.forward(h, &mut result.as_view_mut(), pass.context())?;
    Ok(result)
}
