//! The expert that every token goes through beside its own, weighted by a gate: `sigmoid(gate(x)) · down(swiglu(gate_up(x)))`.

use common::model::Activation;
use cudarc::driver::{CudaView, CudaViewMut};

use super::{Pass, norm_forward};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::ops::elementwise::add_in_place;
use crate::engine::cuda::ops::expert_rows;
use crate::engine::cuda::ops::projection::Projection;
use crate::engine::cuda::ops::rms_norm::RmsNorm;
use crate::engine::cuda::ops::swiglu;
use crate::engine::cuda::params::GradientSink;

/// The expert that every token goes through.
pub struct SharedExpert<E> {
    /// The gate and up projections, side by side.
    pub gate_up: Projection<E>,
    pub down: Projection<E>,
    /// What the result is weighted by, one number for each token.
    pub gate: Projection<E>,
    pub activation: Activation,
}

/// What the backward pass needs beside the input. What `down` reads and gives is computed again.
pub struct SharedActivations<E> {
    /// Output of the gate and up projections, `[tokens][2 * intermediate]`.
    gate_up: DeviceBuffer<E>,
    /// Weight of each token's result.
    weights: DeviceBuffer<f32>,
}

/// Gradients of what the projections of a shared expert give, with those of the low-rank activations behind each row.
struct Through<E> {
    d_gate_up: DeviceBuffer<E>,
    d_gate: DeviceBuffer<E>,
}

impl<E: GpuElement> SharedExpert<E> {
    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        self.gate_up.refresh(gpu, flat)?;
        self.down.refresh(gpu, flat)?;
        self.gate.refresh(gpu, flat)
    }

    /// Bytes that are kept for each token.
    pub fn kept_bytes(&self) -> usize {
        self.gate_up.out() * size_of::<E>() + size_of::<f32>()
    }

    /// Runs forward up to the last activations that backward reads. `x` is `[tokens][hidden]`, before the `norm`.
    pub fn forward_saving(
        &self,
        norm: &Option<RmsNorm>,
        x: &CudaView<f32>,
        pass: Pass,
    ) -> Result<SharedActivations<E>, GpuError> {
        let (gpu, context) = (pass.gpu, pass.context());
        let mut gate_up = gpu.take::<E>(pass.tokens() * self.gate_up.out())?;
        {
            let read = norm_forward(norm, x, &self.gate_up, pass)?;
            let out = &mut gate_up.as_view_mut();
            self.gate_up.forward(&read.as_view(), out, context)?;
        }
        let mut weights = gpu.take::<f32>(pass.tokens())?;
        let read = norm_forward(norm, x, &self.gate, pass)?;
        let out = &mut weights.as_view_mut();
        self.gate.forward(&read.as_view(), out, context)?;
        expert_rows::sigmoid(gpu, out)?;
        Ok(SharedActivations { gate_up, weights })
    }

    /// Adds the result to `y`, `[tokens][hidden]`.
    pub fn forward_onto(
        &self,
        activations: &SharedActivations<E>,
        y: &mut CudaViewMut<f32>,
        pass: Pass,
    ) -> Result<(), GpuError> {
        let h = self.hidden(activations, pass)?;
        let mut results = pass.gpu.take::<f32>(y.len())?;
        let out = &mut results.as_view_mut();
        self.down.forward(&h.as_view(), out, pass.context())?;
        let (results, weights) = (results.as_view(), activations.weights.as_view());
        expert_rows::add_weighted_tokens(pass.gpu, y, &results, &weights)
    }

    /// Runs backward: adds to the gradient of what it reads, the normed `x`, from that of the result.
    pub fn backward(
        &self,
        (norm, x): (&Option<RmsNorm>, &CudaView<f32>),
        activations: SharedActivations<E>,
        (gradient, d_read): (&CudaView<f32>, &mut CudaViewMut<f32>),
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let context = pass.context();
        let through = self.backward_to_gates(activations, gradient, pass, sink)?;
        let Through { d_gate_up, d_gate } = through;
        for (projection, mut dy) in [(&self.gate_up, d_gate_up), (&self.gate, d_gate)] {
            projection.reduce_gradient(&mut dy.as_view_mut(), context)?;
            let dy = dy.as_view();
            let mut through = pass.gpu.take::<f32>(d_read.len())?;
            projection.backward_input(&dy, &mut through.as_view_mut(), context)?;
            add_in_place(pass.gpu, d_read, &through.as_view())?;
            drop(through);
            if projection.learns() {
                let read = norm_forward(norm, x, projection, pass)?;
                projection.backward_weights(&read.as_view(), &dy, context, sink)?;
            }
        }
        Ok(())
    }

    fn backward_to_gates(
        &self,
        activations: SharedActivations<E>,
        gradient: &CudaView<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<Through<E>, GpuError> {
        let (gpu, tokens, context) = (pass.gpu, pass.tokens(), pass.context());
        let weights = activations.weights.as_view();
        let mut h = self.hidden(&activations, pass)?;
        let rows = self.gate.gradients(tokens);
        let mut d_gate = gpu.take::<E>(tokens * rows.stride)?;
        {
            let mut results = gpu.take::<f32>(gradient.len())?;
            let out = &mut results.as_view_mut();
            self.down.forward(&h.as_view(), out, context)?;
            let both = (gradient, &results.as_view());
            let out = (&mut d_gate.as_view_mut(), rows.stride);
            expert_rows::gate_gradient(gpu, both, &weights, out)?;
        }
        let rows = self.down.gradients(tokens);
        let mut dy = gpu.take::<E>(tokens * rows.stride)?;
        let out = (&mut dy.as_view_mut(), rows);
        expert_rows::weigh(gpu, (gradient, &weights), out)?;
        self.down.reduce_gradient(&mut dy.as_view_mut(), context)?;
        let dy = dy.as_view();
        if self.down.learns() {
            self.down
                .backward_weights(&h.as_view(), &dy, context, sink)?;
        }
        let h_rows = self.down.inputs(tokens);
        let mut dh = gpu.take::<E>(tokens * h_rows.columns)?;
        self.down
            .backward_input(&dy, &mut dh.as_view_mut(), context)?;
        let rows = self.gate_up.gradients(tokens);
        let mut d_gate_up = gpu.take::<E>(tokens * rows.stride)?;
        swiglu::backward(
            gpu,
            &activations.gate_up.as_view(),
            &dh.as_view(),
            (&mut d_gate_up.as_view_mut(), rows),
            (&mut h.as_view_mut(), h_rows),
            self.activation,
        )?;
        Ok(Through { d_gate_up, d_gate })
    }

    /// What `down` reads, with the low-rank activations of its adapter behind each row.
    fn hidden(
        &self,
        activations: &SharedActivations<E>,
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
