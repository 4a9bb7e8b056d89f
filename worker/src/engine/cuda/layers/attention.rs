//! The attention half of a decoder layer: `x + output(attention(rope(qkv(norm(x)))))`.

use common::model::LayerKind;
use cudarc::driver::{CudaView, CudaViewMut};

use super::residual::Residual;
use super::{Pass, norm_backward, norm_forward, refresh_norm};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::ops::attention::{Attention, Saved};
use crate::engine::cuda::ops::projection::Projection;
use crate::engine::cuda::ops::rms_norm::RmsNorm;
use crate::engine::cuda::ops::rope::{HeadNorms, Rope};
use crate::engine::cuda::params::{GradientSink, Vector};
use crate::engine::ops::rope::HeadLayout;

/// The attention half of a decoder layer.
pub struct AttentionBlock<E> {
    /// Of what it reads; none where that is the residual itself.
    pub norm: Option<RmsNorm>,
    /// The projections of queries, keys and values, side by side.
    pub qkv: Projection<E>,
    pub output: Projection<E>,
    pub residual: Residual,
    pub layout: HeadLayout,
    pub head_norms: Option<HeadNorms>,
    pub kind: LayerKind,
    /// What scores are multiplied by.
    pub scale: f32,
    /// What they are limited to then.
    pub cap: Option<f32>,
    /// A logit of each head that stands for no token, where they have some.
    pub sinks: Option<Vector>,
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
        refresh_norm(&mut self.norm, gpu, flat)?;
        refresh_norm(&mut self.residual.norm, gpu, flat)?;
        if let Some(norms) = &mut self.head_norms {
            norms.query.refresh(gpu, flat)?;
            norms.key.refresh(gpu, flat)?;
        }
        match &mut self.sinks {
            Some(sinks) => sinks.refresh(gpu, flat),
            None => Ok(()),
        }
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
            let normed = norm_forward(&self.norm, x, &self.qkv, pass)?;
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
        self.residual
            .forward(&self.output, (x, &context.as_view()), out, pass)?;
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
            let normed = norm_forward(&self.norm, x, &self.qkv, pass)?;
            self.qkv
                .backward_weights(&normed.as_view(), &d_qkv, context, sink)?;
        }
        norm_backward(&self.norm, (x, &d_normed.as_view()), gradient, pass, sink)
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
            let dy = self
                .residual
                .backward(&self.output, || Ok(&context), gradient, pass, sink)?;
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
            if let Some(range) = self.sinks.as_ref().and_then(|sinks| sinks.range) {
                sink.add(gpu, range, &mut |d_sinks| {
                    attention.backward_sinks(gpu, &saved, d_sinks)
                })?;
            }
        }
        drop((d_context, log_sums, context));
        let rows = self.qkv.gradients(tokens);
        let mut d_qkv = gpu.take::<E>(tokens * rows.stride)?;
        let from = (&qkv.as_view(), &d_rotated.as_view());
        let to = (&mut d_qkv.as_view_mut(), rows.stride);
        let rows = pass.batch.rows.as_view();
        self.rope(&rows, pass).backward(gpu, from, to, sink)?;
        self.qkv
            .reduce_gradient(&mut d_qkv.as_view_mut(), pass.context())?;
        Ok(d_qkv)
    }

    fn rotated(&self, qkv: &DeviceBuffer<E>, pass: Pass) -> Result<DeviceBuffer<E>, GpuError> {
        let mut rotated = pass.gpu.take::<E>(qkv.len())?;
        let (rows, out) = (pass.batch.rows.as_view(), &mut rotated.as_view_mut());
        self.rope(&rows, pass)
            .forward(pass.gpu, &qkv.as_view(), out)?;
        Ok(rotated)
    }

    fn rope<'a>(&'a self, rows: &'a CudaView<'a, u32>, pass: Pass<'a>) -> Rope<'a> {
        Rope {
            layout: self.layout,
            norms: self.head_norms.as_ref(),
            rows,
            table: pass.ropes.of(self.kind.rotation),
        }
    }

    fn attention<'a>(&'a self, pass: Pass<'a>) -> Attention<'a> {
        let (borders, tokens) = (pass.batch.through(self.kind.window), pass.tokens());
        Attention {
            layout: self.layout,
            starts: borders.starts.slice(..tokens),
            ends: borders.ends.slice(..tokens),
            scale: self.scale,
            cap: self.cap,
            sinks: self.sinks.as_ref().map(Vector::view),
        }
    }
}
