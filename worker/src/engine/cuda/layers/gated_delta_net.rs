//! Linear attention in place of the attention half of a decoder layer:
//! `x + output(gated_norm(delta_rule(conv(qkv(norm(x)))), z(norm(x))))`. What lies between the projections is float32 where the rule
//! reads it; what is kept for the backward pass is of the model's element type.

use cudarc::driver::{CudaView, CudaViewMut};

use super::residual::Residual;
use super::{Pass, norm_backward, norm_forward, refresh_norm};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::chunks::Chunks;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::ops::causal_conv::CausalConv;
use crate::engine::cuda::ops::delta_gates::DeltaGates;
use crate::engine::cuda::ops::delta_rule::{DeltaRule, Prepared, RuleBuffers};
use crate::engine::cuda::ops::elementwise::Rows;
use crate::engine::cuda::ops::gated_norm::GatedNorm;
use crate::engine::cuda::ops::key_groups;
use crate::engine::cuda::ops::projection::Projection;
use crate::engine::cuda::ops::rms_norm::RmsNorm;
use crate::engine::cuda::params::GradientSink;
use crate::engine::ops::delta_rule::DeltaHeads;
use crate::engine::ops::key_groups::KeyGroups;

/// Linear attention in place of the attention half of a decoder layer.
pub struct GatedDeltaNet<E> {
    /// Of what it reads; none where that is the residual itself.
    pub norm: Option<RmsNorm>,
    /// The projections of queries, keys and values, of the gates of the output, and of how much is written and kept, side by side.
    pub input: Projection<E>,
    /// What puts these into that order, where the projections have them in another.
    pub groups: Option<KeyGroups>,
    pub heads: DeltaHeads,
    pub conv: CausalConv<E>,
    pub gates: DeltaGates,
    pub output_norm: GatedNorm,
    pub output: Projection<E>,
    pub residual: Residual,
}

/// What the backward pass needs beside the input. All else is computed again.
pub struct DeltaActivations<E> {
    /// What was projected, `[tokens][input.out()]`.
    projected: DeviceBuffer<E>,
    /// What was read of the states, `[tokens][heads.values()]`.
    read: DeviceBuffer<E>,
}

/// Where columns of what was projected begin, and how many there are.
#[derive(Clone, Copy)]
struct Columns {
    first: usize,
    rows: Rows,
}

impl<E: GpuElement> GatedDeltaNet<E> {
    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        self.input.refresh(gpu, flat)?;
        self.output.refresh(gpu, flat)?;
        self.conv.refresh(gpu, flat)?;
        self.gates.refresh(gpu, flat)?;
        self.output_norm.weight.refresh(gpu, flat)?;
        refresh_norm(&mut self.norm, gpu, flat)?;
        refresh_norm(&mut self.residual.norm, gpu, flat)
    }

    /// Bytes that are kept for each token.
    pub fn kept_bytes(&self) -> usize {
        (self.input.out() + self.heads.values()) * size_of::<E>()
    }

    /// Runs forward: `x` is `[tokens][hidden]`, and so is the result.
    pub fn forward(
        &self,
        x: &CudaView<f32>,
        pass: Pass,
    ) -> Result<(DeviceBuffer<f32>, DeltaActivations<E>), GpuError> {
        let projected = self.project(x, pass)?;
        let mut read = pass.gpu.take::<E>(pass.tokens() * self.heads.values())?;
        {
            let prepared = self.prepared(&projected, pass)?;
            let out = &mut read.as_view_mut();
            self.rule(pass).forward(pass.gpu, &prepared, out)?;
        }
        let opened = self.opened(&projected, &read, pass)?;
        let mut y = pass.gpu.take::<f32>(x.len())?;
        let out = &mut y.as_view_mut();
        self.residual
            .forward(&self.output, (x, &opened.as_view()), out, pass)?;
        Ok((y, DeltaActivations { projected, read }))
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x`.
    pub fn backward(
        &self,
        x: &CudaView<f32>,
        activations: DeltaActivations<E>,
        gradient: &mut CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let d_projected = self.backward_to_projected(activations, gradient, pass, sink)?;
        let (d_projected, context) = (d_projected.as_view(), pass.context());
        let mut d_normed = pass.gpu.take::<f32>(x.len())?;
        self.input
            .backward_input(&d_projected, &mut d_normed.as_view_mut(), context)?;
        if self.input.learns() {
            let normed = norm_forward(&self.norm, x, &self.input, pass)?;
            self.input
                .backward_weights(&normed.as_view(), &d_projected, context, sink)?;
        }
        norm_backward(&self.norm, (x, &d_normed.as_view()), gradient, pass, sink)
    }

    /// Computes the gradient of what the projections gave, in their order, with those of low-rank activations behind each row.
    fn backward_to_projected(
        &self,
        activations: DeltaActivations<E>,
        gradient: &CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let (gpu, rows) = (pass.gpu, self.input.gradients(pass.tokens()));
        let DeltaActivations { projected, read } = activations;
        let mut d_read = self.backward_to_opened((&projected, &read), gradient, pass, sink)?;
        let mut d_projected = gpu.take::<E>(rows.rows * rows.stride)?;
        {
            let [_, z, _] = self.columns(projected_rows(&self.input, pass));
            let [_, d_z, _] = self.columns(rows);
            let gates = projected.slice(z.first..);
            let to = (&mut d_projected.slice_mut(d_z.first..), d_z.rows);
            let (read, d_read) = (read.as_view(), &mut d_read.as_view_mut());
            self.output_norm
                .backward(gpu, &read, (&gates, z.rows), d_read, to, sink)?;
        }
        drop(read);
        let gradients = {
            let prepared = self.prepared(&projected, pass)?;
            let rule = self.rule(pass);
            rule.backward(gpu, prepared, &d_read.as_view())?
        };
        drop(d_read);
        let to = (&mut d_projected, rows);
        self.backward_to_columns(&projected, gradients, to, pass, sink)?;
        if let Some(groups) = self.groups {
            let own = Rows::strided(rows.rows, rows.columns, rows.stride);
            key_groups::join(gpu, groups, (&mut d_projected.as_view_mut(), own))?;
        }
        self.input
            .reduce_gradient(&mut d_projected.as_view_mut(), pass.context())?;
        Ok(d_projected)
    }

    /// Goes back through the output layer: computes the gradient of what it reads, `[tokens][heads.values()]`.
    fn backward_to_opened(
        &self,
        (projected, read): (&DeviceBuffer<E>, &DeviceBuffer<E>),
        gradient: &CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<DeviceBuffer<f32>, GpuError> {
        let opened = || self.opened(projected, read, pass);
        let dy = self
            .residual
            .backward(&self.output, opened, gradient, pass, sink)?;
        let mut d_opened = pass.gpu.take::<f32>(pass.tokens() * self.heads.values())?;
        let dx = &mut d_opened.as_view_mut();
        self.output
            .backward_input(&dy.as_view(), dx, pass.context())?;
        if self.output.learns() {
            let opened = opened()?;
            let factors = (&opened.as_view(), &dy.as_view());
            self.output
                .backward_weights(factors.0, factors.1, pass.context(), sink)?;
        }
        Ok(d_opened)
    }

    /// Goes back through the gates of the rule and the convolution, to their columns of what was projected.
    fn backward_to_columns(
        &self,
        projected: &DeviceBuffer<E>,
        mut gradients: RuleBuffers,
        (d_projected, rows): (&mut DeviceBuffer<E>, Rows),
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let gpu = pass.gpu;
        let [qkv, _, gates] = self.columns(projected_rows(&self.input, pass));
        let [d_qkv, _, d_gates] = self.columns(rows);
        let from = (&projected.slice(gates.first..), gates.rows);
        let to = (&mut d_projected.slice_mut(d_gates.first..), d_gates.rows);
        self.gates.backward(gpu, from, &gradients, to, sink)?;
        let (from, dy) = ((&projected.as_view(), qkv.rows), &mut gradients.qkv);
        let to = (&mut d_projected.as_view_mut(), d_qkv.rows);
        let borders = pass.batch.through(None);
        self.conv.backward(gpu, from, borders, dy, to, sink)
    }

    fn project(&self, x: &CudaView<f32>, pass: Pass) -> Result<DeviceBuffer<E>, GpuError> {
        let rows = projected_rows(&self.input, pass);
        let mut projected = pass.gpu.take::<E>(rows.rows * rows.columns)?;
        let normed = norm_forward(&self.norm, x, &self.input, pass)?;
        let out = &mut projected.as_view_mut();
        self.input.forward(&normed.as_view(), out, pass.context())?;
        if let Some(groups) = self.groups {
            key_groups::split(pass.gpu, groups, (out, rows))?;
        }
        Ok(projected)
    }

    /// What was projected in such rows: queries, keys and values; the gates of the output; and those of the rule.
    fn columns(&self, rows: Rows) -> [Columns; 3] {
        let widths = [
            self.heads.width(),
            self.heads.values(),
            2 * self.heads.value_heads,
        ];
        let mut before = 0;
        widths.map(|width| {
            let first = before;
            before += width;
            Columns {
                first,
                rows: Rows::strided(rows.rows, width, rows.stride),
            }
        })
    }

    /// Computes what the rule reads, and of each chunk what its rows have to do with each other.
    fn prepared(&self, projected: &DeviceBuffer<E>, pass: Pass) -> Result<Prepared, GpuError> {
        let gpu = pass.gpu;
        let [qkv, _, gates] = self.columns(projected_rows(&self.input, pass));
        let mut buffers = RuleBuffers::take(gpu, self.heads, pass.tokens())?;
        let from = (&projected.as_view(), qkv.rows);
        let borders = pass.batch.through(None);
        self.conv.forward(gpu, from, borders, &mut buffers.qkv)?;
        let from = (&projected.slice(gates.first..), gates.rows);
        self.gates.forward(gpu, from, &mut buffers)?;
        self.rule(pass).prepare(gpu, buffers)
    }

    /// What the output layer reads, with the low-rank activations of its adapter behind each row.
    fn opened(
        &self,
        projected: &DeviceBuffer<E>,
        read: &DeviceBuffer<E>,
        pass: Pass,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let (gpu, rows) = (pass.gpu, self.output.inputs(pass.tokens()));
        let [_, z, _] = self.columns(projected_rows(&self.input, pass));
        let mut opened = gpu.take::<E>(rows.rows * rows.stride)?;
        let gates = (&projected.slice(z.first..), z.rows);
        let to = (&mut opened.as_view_mut(), rows);
        self.output_norm.forward(gpu, &read.as_view(), gates, to)?;
        self.output
            .reduce(&mut opened.as_view_mut(), pass.context())?;
        Ok(opened)
    }

    fn rule<'a>(&self, pass: Pass<'a>) -> DeltaRule<'a> {
        DeltaRule {
            heads: self.heads,
            chunks: chunks(pass),
            tokens: pass.tokens(),
        }
    }
}

/// Rows of what was projected, without gaps.
fn projected_rows<E: GpuElement>(input: &Projection<E>, pass: Pass) -> Rows {
    Rows::new(pass.tokens(), input.out())
}

fn chunks<'a>(pass: Pass<'a>) -> &'a Chunks {
    let chunks = pass.batch.chunks.as_ref();
    chunks.expect("the batch of a model with linear attention has chunks")
}
