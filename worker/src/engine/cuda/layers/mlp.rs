//! The feed-forward half of a decoder layer: `x + down(swiglu(gate_up(norm(x))))`.

use common::model::Activation;
use cudarc::driver::{CudaView, CudaViewMut};

use super::residual::Residual;
use super::{Pass, norm_backward, norm_forward, refresh_norm};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::ops::projection::Projection;
use crate::engine::cuda::ops::rms_norm::RmsNorm;
use crate::engine::cuda::ops::swiglu;
use crate::engine::cuda::params::GradientSink;

/// The feed-forward half of a decoder layer.
pub struct Mlp<E> {
    /// Of what it reads; none where that is the residual itself.
    pub norm: Option<RmsNorm>,
    /// The gate and up projections, side by side.
    pub gate_up: Projection<E>,
    pub down: Projection<E>,
    pub residual: Residual,
    pub activation: Activation,
}

/// What the backward pass needs beside the input. The norm and what `down` reads are computed again.
pub struct MlpActivations<E> {
    /// Output of the gate and up projections, `[tokens][2 * intermediate]`.
    gate_up: DeviceBuffer<E>,
}

impl<E: GpuElement> Mlp<E> {
    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        self.gate_up.refresh(gpu, flat)?;
        self.down.refresh(gpu, flat)?;
        refresh_norm(&mut self.norm, gpu, flat)?;
        refresh_norm(&mut self.residual.norm, gpu, flat)
    }

    /// Runs forward up to the last activation that backward reads, the output of gate and up. `x` is `[tokens][hidden]`.
    pub fn forward_saving(
        &self,
        x: &CudaView<f32>,
        pass: Pass,
    ) -> Result<MlpActivations<E>, GpuError> {
        let mut gate_up = pass.gpu.take::<E>(pass.tokens() * self.gate_up.out())?;
        let normed = norm_forward(&self.norm, x, &self.gate_up, pass)?;
        let out = &mut gate_up.as_view_mut();
        self.gate_up
            .forward(&normed.as_view(), out, pass.context())?;
        Ok(MlpActivations { gate_up })
    }

    /// Runs the rest of the forward pass, and returns the result, `[tokens][hidden]`.
    pub fn forward_output(
        &self,
        x: &CudaView<f32>,
        activations: &MlpActivations<E>,
        pass: Pass,
    ) -> Result<DeviceBuffer<f32>, GpuError> {
        let h = self.hidden(activations, pass)?;
        let mut y = pass.gpu.take::<f32>(x.len())?;
        let out = &mut y.as_view_mut();
        self.residual
            .forward(&self.down, (x, &h.as_view()), out, pass)?;
        Ok(y)
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x`.
    pub fn backward(
        &self,
        x: &CudaView<f32>,
        activations: MlpActivations<E>,
        gradient: &mut CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let d_gate_up = self.backward_to_gate_up(activations, gradient, pass, sink)?;
        let (d_gate_up, context) = (d_gate_up.as_view(), pass.context());
        let mut d_normed = pass.gpu.take::<f32>(x.len())?;
        self.gate_up
            .backward_input(&d_gate_up, &mut d_normed.as_view_mut(), context)?;
        if self.gate_up.learns() {
            let normed = norm_forward(&self.norm, x, &self.gate_up, pass)?;
            self.gate_up
                .backward_weights(&normed.as_view(), &d_gate_up, context, sink)?;
        }
        norm_backward(&self.norm, (x, &d_normed.as_view()), gradient, pass, sink)
    }

    fn backward_to_gate_up(
        &self,
        activations: MlpActivations<E>,
        gradient: &CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let (gpu, tokens, context) = (pass.gpu, pass.tokens(), pass.context());
        let hidden = || self.hidden(&activations, pass);
        let dy = self
            .residual
            .backward(&self.down, hidden, gradient, pass, sink)?;
        let h_rows = self.down.inputs(tokens);
        let mut dh = gpu.take::<E>(tokens * h_rows.columns)?;
        self.down
            .backward_input(&dy.as_view(), &mut dh.as_view_mut(), context)?;
        let d_rows = self.gate_up.gradients(tokens);
        let mut d_gate_up = gpu.take::<E>(tokens * d_rows.stride)?;
        let mut h = gpu.take::<E>(tokens * h_rows.stride)?;
        swiglu::backward(
            gpu,
            &activations.gate_up.as_view(),
            &dh.as_view(),
            (&mut d_gate_up.as_view_mut(), d_rows),
            (&mut h.as_view_mut(), h_rows),
            self.activation,
        )?;
        drop((dh, activations));
        if self.down.learns() {
            self.down.reduce(&mut h.as_view_mut(), context)?;
            self.down
                .backward_weights(&h.as_view(), &dy.as_view(), context, sink)?;
        }
        self.gate_up
            .reduce_gradient(&mut d_gate_up.as_view_mut(), context)?;
        Ok(d_gate_up)
    }

    /// What `down` reads, with the low-rank activations of its adapter behind each row.
    fn hidden(
        &self,
        activations: &MlpActivations<E>,
        pass: Pass,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let rows = self.down.inputs(pass.tokens());
        let mut h = pass.gpu.take::<E>(rows.rows * rows.stride)?;
        let gate_up = activations.gate_up.as_view();
        let out = (&mut h.as_view_mut(), rows);
        swiglu::forward(pass.gpu, &gate_up, out, self.activation)?;
        self.down.reduce(&mut h.as_view_mut(), pass.context())?;
        Ok(h)
    }
}
