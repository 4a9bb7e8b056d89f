//! The attention half of a decoder layer: `x + output(attention(rope(qkv(norm(x)))))`, where some models have a gate of what the
//! attention gives: `x + output(sigmoid(gate(norm(x))) · attention(...))`.

use std::borrow::Borrow;

use common::model::LayerKind;
use cudarc::driver::{CudaView, CudaViewMut};

use super::residual::Residual;
use super::{Pass, norm_backward, norm_forward, refresh_norm};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::ops::attention::{Attention, Saved};
use crate::engine::cuda::ops::elementwise::Rows;
use crate::engine::cuda::ops::output_gate;
use crate::engine::cuda::ops::projection::Projection;
use crate::engine::cuda::ops::rms_norm::RmsNorm;
use crate::engine::cuda::ops::rope::{HeadNorms, Rope};
use crate::engine::cuda::params::{GradientSink, Vector};
use crate::engine::ops::output_gate::gates_width;
use crate::engine::ops::rope::HeadLayout;

/// The attention half of a decoder layer.
pub struct AttentionBlock<E> {
    /// Of what it reads; none where that is the residual itself.
    pub norm: Option<RmsNorm>,
    /// The projections of queries, keys and values, side by side.
    pub qkv: Projection<E>,
    /// Whether each query is followed by a gate of what the attention gives.
    pub gated: bool,
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
    /// Gates of the context, `[tokens][heads * head_dim]`, where there are any.
    gates: Option<DeviceBuffer<E>>,
    /// `log(sum(exp(scores)))` of each row, `[heads][tokens]`.
    log_sums: DeviceBuffer<f32>,
    /// Output of the attention, before its gates and the output layer. Where there are no gates, columns after `heads * head_dim` hold
    /// the low-rank activations of the output layer's adapter.
    context: DeviceBuffer<E>,
}

/// Queries, keys and values as projected, and their gates where there are any.
type Projected<E> = (DeviceBuffer<E>, Option<DeviceBuffer<E>>);

/// What the output layer reads.
enum Read<'a, E> {
    Context(&'a DeviceBuffer<E>),
    Opened(DeviceBuffer<E>),
}

impl<E> Borrow<DeviceBuffer<E>> for Read<'_, E> {
    fn borrow(&self) -> &DeviceBuffer<E> {
        match self {
            Self::Context(context) => context,
            Self::Opened(opened) => opened,
        }
    }
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

    /// Bytes that are kept for each token.
    pub fn kept_bytes(&self) -> usize {
        let elements = self.qkv.out() + self.context_rows(1).stride;
        self.layout.heads * size_of::<f32>() + elements * size_of::<E>()
    }

    /// Runs forward: `x` is `[tokens][hidden]`, and so is the result.
    pub fn forward(
        &self,
        x: &CudaView<f32>,
        pass: Pass,
    ) -> Result<(DeviceBuffer<f32>, AttentionActivations<E>), GpuError> {
        let (gpu, tokens) = (pass.gpu, pass.tokens());
        let (qkv, gates) = self.project(x, pass)?;
        let rows = self.context_rows(tokens);
        let mut context = gpu.take::<E>(tokens * rows.stride)?;
        let mut log_sums = gpu.take::<f32>(tokens * self.layout.heads)?;
        {
            let rotated = self.rotated(&qkv, pass)?;
            let (out, log_sums) = (&mut context.as_view_mut(), &mut log_sums.as_view_mut());
            let attention = self.attention(pass);
            attention.forward(gpu, &rotated.as_view(), out, rows.stride, log_sums)?;
        }
        let opened = self.opened(&context, &gates, pass)?;
        if opened.is_none() {
            self.output
                .reduce(&mut context.as_view_mut(), pass.context())?;
        }
        let mut y = gpu.take::<f32>(x.len())?;
        let (h, out) = (opened.as_ref().unwrap_or(&context), &mut y.as_view_mut());
        self.residual
            .forward(&self.output, (x, &h.as_view()), out, pass)?;
        let activations = AttentionActivations {
            qkv,
            gates,
            log_sums,
            context,
        };
        Ok((y, activations))
    }

    /// Queries, keys and values as projected, `[tokens][layout.width()]`, and gates, `[tokens][heads * head_dim]`.
    fn project(&self, x: &CudaView<f32>, pass: Pass) -> Result<Projected<E>, GpuError> {
        let (gpu, tokens) = (pass.gpu, pass.tokens());
        let mut projected = gpu.take::<E>(tokens * self.qkv.out())?;
        {
            let normed = norm_forward(&self.norm, x, &self.qkv, pass)?;
            let out = &mut projected.as_view_mut();
            self.qkv.forward(&normed.as_view(), out, pass.context())?;
        }
        if !self.gated {
            return Ok((projected, None));
        }
        let mut qkv = gpu.take::<E>(tokens * self.layout.width())?;
        let mut gates = gpu.take::<E>(tokens * gates_width(self.layout))?;
        let to = (&mut qkv.as_view_mut(), &mut gates.as_view_mut());
        output_gate::split(gpu, &projected.as_view(), self.layout, to)?;
        Ok((qkv, Some(gates)))
    }

    /// Rows of what attention gives: where it goes through gates, those of what comes out have room for low-rank activations.
    fn context_rows(&self, tokens: usize) -> Rows {
        match self.gated {
            true => Rows::new(tokens, gates_width(self.layout)),
            false => self.output.inputs(tokens),
        }
    }

    /// What the output layer reads where there are gates, with the low-rank activations of its adapter behind each row.
    fn opened(
        &self,
        context: &DeviceBuffer<E>,
        gates: &Option<DeviceBuffer<E>>,
        pass: Pass,
    ) -> Result<Option<DeviceBuffer<E>>, GpuError> {
        let Some(gates) = gates else {
            return Ok(None);
        };
        let rows = self.output.inputs(pass.tokens());
        let mut opened = pass.gpu.take::<E>(rows.rows * rows.stride)?;
        let (from, to) = (
            (&context.as_view(), &gates.as_view()),
            (&mut opened.as_view_mut(), rows),
        );
        output_gate::forward(pass.gpu, from, to)?;
        self.output
            .reduce(&mut opened.as_view_mut(), pass.context())?;
        Ok(Some(opened))
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
        let mut d_context = self.backward_to_context(
            (&activations.context, &activations.gates),
            gradient,
            pass,
            sink,
        )?;
        let AttentionActivations {
            qkv,
            gates,
            log_sums,
            context,
        } = activations;
        let d_gates = match gates {
            Some(gates) => {
                let mut d_gates = gpu.take::<E>(gates.len())?;
                let from = (&context.as_view(), &gates.as_view());
                let (d, to) = (&mut d_context.as_view_mut(), &mut d_gates.as_view_mut());
                output_gate::backward(gpu, from, d, to)?;
                Some(d_gates)
            }
            None => None,
        };
        let rows = self.context_rows(tokens);
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
        let rows = match d_gates {
            Some(_) => Rows::new(tokens, self.layout.width()),
            None => self.qkv.gradients(tokens),
        };
        let mut d_qkv = gpu.take::<E>(tokens * rows.stride)?;
        let from = (&qkv.as_view(), &d_rotated.as_view());
        let to = (&mut d_qkv.as_view_mut(), rows.stride);
        let positions = pass.batch.rows.as_view();
        self.rope(&positions, pass).backward(gpu, from, to, sink)?;
        drop((d_rotated, qkv));
        let mut d_projected = match d_gates {
            Some(d_gates) => {
                let rows = self.qkv.gradients(tokens);
                let mut joined = gpu.take::<E>(tokens * rows.stride)?;
                let from = (&d_qkv.as_view(), &d_gates.as_view());
                let to = (&mut joined.as_view_mut(), rows);
                output_gate::join(gpu, from, self.layout, to)?;
                joined
            }
            None => d_qkv,
        };
        self.qkv
            .reduce_gradient(&mut d_projected.as_view_mut(), pass.context())?;
        Ok(d_projected)
    }

    /// Goes back through the output layer: computes the gradient of what it reads, `[tokens][heads * head_dim]`.
    fn backward_to_context(
        &self,
        (context, gates): (&DeviceBuffer<E>, &Option<DeviceBuffer<E>>),
        gradient: &CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let columns = gates_width(self.layout);
        let mut d_context = pass.gpu.take::<E>(pass.tokens() * columns)?;
        let read = || -> Result<Read<E>, GpuError> {
            let opened = self.opened(context, gates, pass)?;
            Ok(opened.map_or(Read::Context(context), Read::Opened))
        };
        let dy = self
            .residual
            .backward(&self.output, read, gradient, pass, sink)?;
        let (dy, dx) = (dy.as_view(), &mut d_context.as_view_mut());
        self.output.backward_input(&dy, dx, pass.context())?;
        if self.output.learns() {
            let read = read()?;
            let x = Borrow::<DeviceBuffer<E>>::borrow(&read).as_view();
            self.output
                .backward_weights(&x, &dy, pass.context(), sink)?;
        }
        Ok(d_context)
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
