//! The attention half of a decoder layer: `x + output(attention(rope(qkv(norm(x)))))`.

use cudarc::driver::{CudaView, CudaViewMut};

use super::{Pass, output_gradient};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::ops::attention::{Attention, Saved};
use crate::engine::cuda::ops::projection::Projection;
use crate::engine::cuda::ops::rms_norm::RmsNorm;
use crate::engine::cuda::ops::rope::{HeadNorms, Rope};
use crate::engine::cuda::params::GradientSink;
use crate::engine::ops::rope::HeadLayout;

/// The attention half of a decoder layer.
pub struct AttentionBlock<E> {
    pub norm: RmsNorm,
    /// The projections of queries, keys and values, side by side.
    pub qkv: Projection<E>,
    pub output: Projection<E>,
    pub layout: HeadLayout,
    pub head_norms: Option<HeadNorms>,
}

/// What the backward pass needs beside the input. Norms and positions are computed again.
pub struct AttentionActivations<E> {
    /// Queries, keys and values as projected, without positions, `[tokens][layout.width()]`.
    qkv: DeviceBuffer<E>,
    /// `log(sum(exp(scores)))` of each row, `[heads][tokens]`.
    log_sums: DeviceBuffer<f32>,
    /// Output of the attention, before the output layer. Columns after `heads * head_dim` hold the low-rank activations of
    /// the output layer's adapter.
    context: DeviceBuffer<E>,
}

impl<E: GpuElement> AttentionBlock<E> {
    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        self.qkv.refresh(gpu, flat)?;
        self.output.refresh(gpu, flat)?;
        self.norm.weight.refresh(gpu, flat)?;
        if let Some(norms) = &mut self.head_norms {
            norms.query.refresh(gpu, flat)?;
            norms.key.refresh(gpu, flat)?;
        }
        Ok(())
    }

    /// Runs forward: `x` is `[tokens][hidden]`, and so is the result.
    pub fn forward(
        &self,
        x: &CudaView<f32>,
        pass: Pass,
    ) -> Result<(DeviceBuffer<f32>, AttentionActivations<E>), GpuError> {
        let (gpu, tokens, context_of_pass) = (pass.gpu, pass.tokens(), pass.context());
        let mut qkv = gpu.take::<E>(tokens * self.qkv.out())?;
        {
            let normed = self.normed(x, pass)?;
            let out = &mut qkv.as_view_mut();
            self.qkv.forward(&normed.as_view(), out, context_of_pass)?;
        }
        let rows = self.output.inputs(tokens);
        let mut context = gpu.take::<E>(tokens * rows.stride)?;
        let mut log_sums = gpu.take::<f32>(tokens * self.layout.heads)?;
        {
            let rotated = self.rotated(&qkv, pass)?;
            let (out, log_sums) = (&mut context.as_view_mut(), &mut log_sums.as_view_mut());
            let attention = self.attention(pass);
            attention.forward(gpu, &rotated.as_view(), out, rows.stride, log_sums)?;
        }
        self.output
            .reduce(&mut context.as_view_mut(), context_of_pass)?;
        let mut y = gpu.take::<f32>(x.len())?;
        let out = &mut y.as_view_mut();
        self.output
            .forward_onto(x, &context.as_view(), out, context_of_pass)?;
        let activations = AttentionActivations {
            qkv,
            log_sums,
            context,
        };
        Ok((y, activations))
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x`.
    pub fn backward(
        &self,
        x: &CudaView<f32>,
        activations: AttentionActivations<E>,
        gradient: &mut CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let d_qkv = self.backward_to_qkv(activations, gradient, pass, sink)?;
        let (d_qkv, context) = (d_qkv.as_view(), pass.context());
        let mut d_normed = pass.gpu.take::<f32>(x.len())?;
        self.qkv
            .backward_input(&d_qkv, &mut d_normed.as_view_mut(), context)?;
        if self.qkv.learns() {
            let normed = self.normed(x, pass)?;
            self.qkv
                .backward_weights(&normed.as_view(), &d_qkv, context, sink)?;
        }
        self.norm
            .backward(pass.gpu, x, &d_normed.as_view(), gradient, sink)
    }

    fn backward_to_qkv(
        &self,
        activations: AttentionActivations<E>,
        gradient: &CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let (gpu, tokens) = (pass.gpu, pass.tokens());
        let AttentionActivations {
            qkv,
            log_sums,
            context,
        } = activations;
        let rows = self.output.inputs(tokens);
        let mut d_context = gpu.take::<E>(tokens * rows.columns)?;
        {
            let dy = output_gradient(gradient, &self.output, pass)?;
            let dx = &mut d_context.as_view_mut();
            self.output
                .backward_input(&dy.as_view(), dx, pass.context())?;
            if self.output.learns() {
                let x = context.as_view();
                self.output
                    .backward_weights(&x, &dy.as_view(), pass.context(), sink)?;
            }
        }
        let mut d_rotated = gpu.take::<E>(qkv.len())?;
        {
            let rotated = self.rotated(&qkv, pass)?;
            let saved = Saved {
                qkv: &rotated.as_view(),
                context: &context.as_view(),
                stride: rows.stride,
                d_context: &d_context.as_view(),
                log_sums: &log_sums.as_view(),
            };
            let attention = self.attention(pass);
            attention.backward(gpu, &saved, &mut d_rotated.as_view_mut())?;
        }
        drop((d_context, log_sums, context));
        let rows = self.qkv.gradients(tokens);
        let mut d_qkv = gpu.take::<E>(tokens * rows.stride)?;
        let from = (&qkv.as_view(), &d_rotated.as_view());
        let to = (&mut d_qkv.as_view_mut(), rows.stride);
        let positions = pass.batch.positions.as_view();
        self.rope(&positions, pass).backward(gpu, from, to, sink)?;
        self.qkv
            .reduce_gradient(&mut d_qkv.as_view_mut(), pass.context())?;
        Ok(d_qkv)
    }

    /// The normed input, with the low-rank activations of the adapters behind each row.
    fn normed(&self, x: &CudaView<f32>, pass: Pass) -> Result<DeviceBuffer<E>, GpuError> {
        let rows = self.qkv.inputs(pass.tokens());
        let mut normed = pass.gpu.take::<E>(rows.rows * rows.stride)?;
        let out = (&mut normed.as_view_mut(), rows);
        self.norm.forward(pass.gpu, x, out)?;
        self.qkv.reduce(&mut normed.as_view_mut(), pass.context())?;
        Ok(normed)
    }

    fn rotated(&self, qkv: &DeviceBuffer<E>, pass: Pass) -> Result<DeviceBuffer<E>, GpuError> {
        let mut rotated = pass.gpu.take::<E>(qkv.len())?;
        let (positions, out) = (pass.batch.positions.as_view(), &mut rotated.as_view_mut());
        self.rope(&positions, pass)
            .forward(pass.gpu, &qkv.as_view(), out)?;
        Ok(rotated)
    }

    fn rope<'a>(&'a self, positions: &'a CudaView<'a, u32>, pass: Pass<'a>) -> Rope<'a> {
        Rope {
            layout: self.layout,
            norms: self.head_norms.as_ref(),
            positions,
            table: pass.rope,
        }
    }

    fn attention<'a>(&self, pass: Pass<'a>) -> Attention<'a> {
        let (batch, tokens) = (pass.batch, pass.tokens());
        Attention {
            layout: self.layout,
            starts: batch.starts.slice(..tokens),
            ends: batch.ends.slice(..tokens),
        }
    }
}
