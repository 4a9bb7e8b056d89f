//! A decoder layer on the GPU: what [`crate::engine::model::layers`] does, from operations of [`super::ops`].
//!
//! The residual and its gradient are float32; what lies between is of the model's element type.

use cudarc::driver::{CudaView, CudaViewMut};

use super::blas::GpuElement;
use super::error::GpuError;
use super::gpu::{DeviceBuffer, Gpu};
use super::ops::attention::{Attention, Saved};
use super::ops::elementwise::{Rows, narrow_rows, swiglu_backward, swiglu_forward};
use super::ops::projection::{Place, Projection, Sink};
use super::ops::rms_norm::RmsNorm;
use super::ops::rope::{GpuRopeTable, HeadNorms, Rope};
use crate::engine::batch::Batch;
use crate::engine::ops::lora_linear::MaskKey;
use crate::engine::ops::rope::HeadLayout;

/// A vector of weights in float32.
pub struct Vector {
    values: DeviceBuffer<f32>,
    len: usize,
    /// Place of the vector among the trainable tensors, where it is trainable.
    pub place: Option<Place>,
}

impl Vector {
    pub fn new(gpu: &Gpu, values: &[f32], place: Option<Place>) -> Result<Self, GpuError> {
        Ok(Self {
            values: gpu.upload(values)?,
            len: values.len(),
            place,
        })
    }

    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        match self.place {
            Some(place) => gpu.copy(&place.of(flat), &mut self.values.slice_mut(..self.len)),
            None => Ok(()),
        }
    }

    pub fn view(&self) -> CudaView<'_, f32> {
        self.values.slice(..self.len)
    }

    pub fn norm(&self, epsilon: f32) -> RmsNorm<'_> {
        RmsNorm {
            weight: self.view(),
            epsilon,
        }
    }
}

/// A batch in the GPU's memory, as kernels read it.
pub struct GpuBatch {
    pub tokens: usize,
    pub ids: DeviceBuffer<u32>,
    pub positions: DeviceBuffer<u32>,
    /// For each token, the first token of its segment.
    pub starts: DeviceBuffer<u32>,
    /// For each token, the one after the last token of its segment.
    pub ends: DeviceBuffer<u32>,
}

impl GpuBatch {
    pub fn upload(gpu: &Gpu, batch: &Batch) -> Result<Self, GpuError> {
        let tokens = batch.ids.len();
        let starts: Vec<u32> = (0..tokens as u32)
            .zip(batch.positions.iter())
            .map(|(token, position)| token - position)
            .collect();
        let mut ends = vec![tokens as u32; tokens];
        for token in (0..tokens.saturating_sub(1)).rev() {
            ends[token] = match starts[token + 1] == starts[token] {
                true => ends[token + 1],
                false => token as u32 + 1,
            };
        }
        Ok(Self {
            tokens,
            ids: gpu.upload(&batch.ids)?,
            positions: gpu.upload(&batch.positions)?,
            starts: gpu.upload(&starts)?,
            ends: gpu.upload(&ends)?,
        })
    }
}

/// What every layer of a pass needs beside its input.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub gpu: &'a Gpu,
    pub batch: &'a GpuBatch,
    pub rope: &'a GpuRopeTable,
    /// Key of the dropout masks; None where nothing is dropped.
    pub mask: Option<MaskKey>,
}

/// A decoder layer on the GPU: attention, then feed-forward.
pub struct Layer<E> {
    pub attention_norm: Vector,
    /// The projections of queries, keys and values, side by side.
    pub qkv: Projection<E>,
    /// Norms of each query head and of each key head.
    pub head_norms: Option<[Vector; 2]>,
    pub output: Projection<E>,
    pub mlp_norm: Vector,
    /// The gate and up projections, side by side.
    pub gate_up: Projection<E>,
    pub down: Projection<E>,
    pub layout: HeadLayout,
    pub epsilon: f32,
}

/// What a layer has between its input and its output, as far as the backward pass needs it. Norms, positions and what
/// `down` reads are computed again.
pub struct Inner<E> {
    attended: Attended<E>,
    /// The residual between the layer's two halves, `[tokens][hidden]`.
    middle: DeviceBuffer<f32>,
    /// Output of the gate and up projections, `[tokens][2 * intermediate]`.
    gate_up: DeviceBuffer<E>,
}

/// Activations of the attention that are kept for the backward pass.
struct Attended<E> {
    /// Queries, keys and values as projected, without positions, `[tokens][layout.width()]`.
    qkv: DeviceBuffer<E>,
    /// `log(sum(exp(scores)))` of each row, `[heads][tokens]`.
    log_sums: DeviceBuffer<f32>,
    /// Attention output; the columns after `heads * head_dim` hold the low-rank activations of the output projection's
    /// adapter.
    context: DeviceBuffer<E>,
}

impl<E: GpuElement> Layer<E> {
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        for projection in [
            &mut self.qkv,
            &mut self.output,
            &mut self.gate_up,
            &mut self.down,
        ] {
            projection.refresh(gpu, flat)?;
        }
        let norms = [&mut self.attention_norm, &mut self.mlp_norm];
        for norm in norms
            .into_iter()
            .chain(self.head_norms.iter_mut().flatten())
        {
            norm.refresh(gpu, flat)?;
        }
        Ok(())
    }

    /// Bytes that the layer keeps for each token between the forward and the backward pass.
    pub fn kept_bytes(&self) -> usize {
        let hidden = self.output.out();
        let inner = self.qkv.out() + self.output.inputs(1).stride + self.gate_up.out();
        (2 * hidden + self.layout.heads) * size_of::<f32>() + inner * size_of::<E>()
    }

    /// Runs forward up to the last activation that backward reads, the output of gate and up. `x` is `[tokens][hidden]`.
    pub fn open(&self, pass: Pass, x: &CudaView<f32>) -> Result<Inner<E>, GpuError> {
        let Pass { gpu, batch, .. } = pass;
        let tokens = batch.tokens;
        let mut qkv = gpu.take::<E>(tokens * self.qkv.out())?;
        {
            let normed = self.normed(pass, &self.attention_norm, x, &self.qkv)?;
            self.qkv
                .forward(gpu, &normed.as_view(), &mut qkv.as_view_mut(), tokens)?;
        }
        let rows = self.output.inputs(tokens);
        let mut context = gpu.take::<E>(tokens * rows.stride)?;
        let mut log_sums = gpu.take::<f32>(tokens * self.layout.heads)?;
        {
            let rotated = self.rotated(pass, &qkv)?;
            let (out, log_sums) = (&mut context.as_view_mut(), &mut log_sums.as_view_mut());
            let attention = self.attention(batch);
            attention.forward(gpu, &rotated.as_view(), out, rows.stride, log_sums)?;
        }
        self.output
            .reduce(gpu, &mut context.as_view_mut(), tokens, pass.mask)?;
        let mut middle = gpu.take::<f32>(x.len())?;
        let out = &mut middle.as_view_mut();
        self.output
            .forward_onto(gpu, x, &context.as_view(), out, tokens)?;
        let mut gate_up = gpu.take::<E>(tokens * self.gate_up.out())?;
        let normed = self.normed(pass, &self.mlp_norm, &middle.as_view(), &self.gate_up)?;
        self.gate_up
            .forward(gpu, &normed.as_view(), &mut gate_up.as_view_mut(), tokens)?;
        Ok(Inner {
            attended: Attended {
                qkv,
                log_sums,
                context,
            },
            middle,
            gate_up,
        })
    }

    /// Runs the rest of the forward pass, and returns the result, `[tokens][hidden]`.
    pub fn close(&self, pass: Pass, inner: &Inner<E>) -> Result<DeviceBuffer<f32>, GpuError> {
        let Pass { gpu, batch, .. } = pass;
        let rows = self.down.inputs(batch.tokens);
        let mut h = gpu.take::<E>(batch.tokens * rows.stride)?;
        swiglu_forward(gpu, &inner.gate_up.as_view(), (&mut h.as_view_mut(), rows))?;
        self.down
            .reduce(gpu, &mut h.as_view_mut(), batch.tokens, pass.mask)?;
        let mut y = gpu.take::<f32>(inner.middle.len())?;
        let (middle, out) = (inner.middle.as_view(), &mut y.as_view_mut());
        self.down
            .forward_onto(gpu, &middle, &h.as_view(), out, batch.tokens)?;
        Ok(y)
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x`.
    pub fn backward(
        &self,
        pass: Pass,
        x: &CudaView<f32>,
        inner: Inner<E>,
        gradient: &mut CudaViewMut<f32>,
        sink: &mut dyn Sink,
    ) -> Result<(), GpuError> {
        let Inner {
            attended,
            middle,
            gate_up,
        } = inner;
        let d_gate_up = self.backward_to_gate_up(pass, gate_up, gradient, sink)?;
        let through = (&self.mlp_norm, &self.gate_up);
        self.backward_to_norm(pass, through, &middle.as_view(), &d_gate_up, gradient, sink)?;
        drop((d_gate_up, middle));
        let d_qkv = self.backward_to_qkv(pass, attended, gradient, sink)?;
        let through = (&self.attention_norm, &self.qkv);
        self.backward_to_norm(pass, through, x, &d_qkv, gradient, sink)
    }

    /// Runs backward through a projection and the norm before it, whose input is `x`: adds to `gradient`.
    fn backward_to_norm(
        &self,
        pass: Pass,
        (norm, projection): (&Vector, &Projection<E>),
        x: &CudaView<f32>,
        dy: &DeviceBuffer<E>,
        gradient: &mut CudaViewMut<f32>,
        sink: &mut dyn Sink,
    ) -> Result<(), GpuError> {
        let Pass { gpu, batch, .. } = pass;
        let mut d_normed = gpu.take::<f32>(x.len())?;
        let dx = &mut d_normed.as_view_mut();
        projection.backward_input(gpu, &dy.as_view(), dx, batch.tokens, pass.mask)?;
        if projection.learns() {
            let normed = self.normed(pass, norm, x, projection)?;
            projection.backward_weights(
                gpu,
                &normed.as_view(),
                &dy.as_view(),
                batch.tokens,
                pass.mask,
                sink,
            )?;
        }
        let (operation, d_normed) = (norm.norm(self.epsilon), d_normed.as_view());
        match norm.place {
            None => operation.backward(gpu, x, &d_normed, gradient, None),
            Some(place) => sink.add(gpu, place, &mut |weight| {
                operation.backward(gpu, x, &d_normed, gradient, Some(weight))
            }),
        }
    }

    fn backward_to_gate_up(
        &self,
        pass: Pass,
        gate_up: DeviceBuffer<E>,
        gradient: &CudaViewMut<f32>,
        sink: &mut dyn Sink,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let Pass { gpu, batch, .. } = pass;
        let tokens = batch.tokens;
        let dy = self.narrowed(pass, gradient, &self.down)?;
        let h_rows = self.down.inputs(tokens);
        let mut dh = gpu.take::<E>(tokens * h_rows.columns)?;
        self.down
            .backward_input(gpu, &dy.as_view(), &mut dh.as_view_mut(), tokens, pass.mask)?;
        let d_rows = self.gate_up.gradients(tokens);
        let mut d_gate_up = gpu.take::<E>(tokens * d_rows.stride)?;
        let mut h = gpu.take::<E>(tokens * h_rows.stride)?;
        swiglu_backward(
            gpu,
            &gate_up.as_view(),
            &dh.as_view(),
            (&mut d_gate_up.as_view_mut(), d_rows),
            (&mut h.as_view_mut(), h_rows),
        )?;
        drop((dh, gate_up));
        if self.down.learns() {
            self.down
                .reduce(gpu, &mut h.as_view_mut(), tokens, pass.mask)?;
            self.down.backward_weights(
                gpu,
                &h.as_view(),
                &dy.as_view(),
                tokens,
                pass.mask,
                sink,
            )?;
        }
        self.gate_up
            .reduce_gradient(gpu, &mut d_gate_up.as_view_mut(), tokens)?;
        Ok(d_gate_up)
    }

    fn backward_to_qkv(
        &self,
        pass: Pass,
        attended: Attended<E>,
        gradient: &CudaViewMut<f32>,
        sink: &mut dyn Sink,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let Pass { gpu, batch, .. } = pass;
        let tokens = batch.tokens;
        let rows = self.output.inputs(tokens);
        let mut d_context = gpu.take::<E>(tokens * rows.columns)?;
        {
            let dy = self.narrowed(pass, gradient, &self.output)?;
            self.output.backward_input(
                gpu,
                &dy.as_view(),
                &mut d_context.as_view_mut(),
                tokens,
                pass.mask,
            )?;
            if self.output.learns() {
                let x = attended.context.as_view();
                self.output
                    .backward_weights(gpu, &x, &dy.as_view(), tokens, pass.mask, sink)?;
            }
        }
        let mut d_rotated = gpu.take::<E>(attended.qkv.len())?;
        {
            let rotated = self.rotated(pass, &attended.qkv)?;
            let saved = Saved {
                qkv: &rotated.as_view(),
                context: &attended.context.as_view(),
                stride: rows.stride,
                d_context: &d_context.as_view(),
                log_sums: &attended.log_sums.as_view(),
            };
            let attention = self.attention(batch);
            attention.backward(gpu, &saved, &mut d_rotated.as_view_mut())?;
        }
        let Attended {
            qkv,
            log_sums,
            context,
        } = attended;
        drop((d_context, log_sums, context));
        let rows = self.qkv.gradients(tokens);
        let mut d_qkv = gpu.take::<E>(tokens * rows.stride)?;
        self.backward_rope(pass, &qkv, &d_rotated, (&mut d_qkv, rows.stride), sink)?;
        self.qkv
            .reduce_gradient(gpu, &mut d_qkv.as_view_mut(), tokens)?;
        Ok(d_qkv)
    }

    fn backward_rope(
        &self,
        pass: Pass,
        qkv: &DeviceBuffer<E>,
        d_rotated: &DeviceBuffer<E>,
        (d_qkv, stride): (&mut DeviceBuffer<E>, usize),
        sink: &mut dyn Sink,
    ) -> Result<(), GpuError> {
        let Pass { gpu, batch, .. } = pass;
        let positions = batch.positions.as_view();
        let rope = self.rope(pass, &positions);
        let from = (&qkv.as_view(), &d_rotated.as_view());
        let to = (&mut d_qkv.as_view_mut(), stride);
        let places = self
            .head_norms
            .as_ref()
            .and_then(|[query, key]| query.place.zip(key.place));
        let Some((query, key)) = places else {
            return rope.backward(gpu, from, to, None);
        };
        let mut gradients = gpu.take::<f32>(query.scalars + key.scalars)?;
        rope.backward(gpu, from, to, Some(&mut gradients.as_view_mut()))?;
        let parts = [(query, 0), (key, query.scalars)];
        parts.into_iter().try_for_each(|(place, first)| {
            let part = gradients.slice(first..first + place.scalars);
            sink.add(gpu, place, &mut |gradient| gpu.copy(&part, gradient))
        })
    }

    /// The normed input of a projection, with the low-rank activations of its adapters behind each row.
    fn normed(
        &self,
        pass: Pass,
        norm: &Vector,
        x: &CudaView<f32>,
        projection: &Projection<E>,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let rows = projection.inputs(pass.batch.tokens);
        let mut normed = pass.gpu.take::<E>(rows.rows * rows.stride)?;
        let out = (&mut normed.as_view_mut(), rows);
        norm.norm(self.epsilon).forward(pass.gpu, x, out)?;
        projection.reduce(pass.gpu, &mut normed.as_view_mut(), rows.rows, pass.mask)?;
        Ok(normed)
    }

    /// The gradient of a projection's output, rounded, with the gradients of the low-rank activations behind each row.
    fn narrowed(
        &self,
        pass: Pass,
        gradient: &CudaViewMut<f32>,
        projection: &Projection<E>,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let rows = projection.gradients(pass.batch.tokens);
        let mut dy = pass.gpu.take::<E>(rows.rows * rows.stride)?;
        let from = (&gradient.as_view(), Rows::new(rows.rows, rows.columns));
        narrow_rows(pass.gpu, from, (&mut dy.as_view_mut(), rows), 1.0)?;
        projection.reduce_gradient(pass.gpu, &mut dy.as_view_mut(), rows.rows)?;
        Ok(dy)
    }

    fn rotated(&self, pass: Pass, qkv: &DeviceBuffer<E>) -> Result<DeviceBuffer<E>, GpuError> {
        let mut rotated = pass.gpu.take::<E>(qkv.len())?;
        let positions = pass.batch.positions.as_view();
        let rope = self.rope(pass, &positions);
        rope.forward(pass.gpu, &qkv.as_view(), &mut rotated.as_view_mut())?;
        Ok(rotated)
    }

    fn rope<'a>(&'a self, pass: Pass<'a>, positions: &'a CudaView<'a, u32>) -> Rope<'a> {
        Rope {
            layout: self.layout,
            norms: self.head_norms.as_ref().map(|[query, key]| HeadNorms {
                query: query.view(),
                key: key.view(),
                epsilon: self.epsilon,
            }),
            positions,
            table: pass.rope,
        }
    }

    fn attention<'a>(&self, batch: &'a GpuBatch) -> Attention<'a> {
        Attention {
            layout: self.layout,
            starts: batch.starts.slice(..batch.tokens),
            ends: batch.ends.slice(..batch.tokens),
        }
    }
}
