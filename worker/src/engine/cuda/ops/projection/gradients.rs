//! The gradients of a projection's trainable weights, biases and adapters. In: its inputs and the gradients of its outputs. Out: to
//! a sink, each tensor's.

use cudarc::driver::CudaView;

use super::{Context, Placed, Projection};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::{GpuElement, Matrix, Target};
use crate::engine::cuda::ops::elementwise::{Rows, column_sums};
use crate::engine::cuda::ops::lora_linear::Lora;
use crate::engine::cuda::params::{FlatRange, GradientSink};

impl<E: GpuElement> Projection<E> {
    /// Hands over the gradients of what is trainable, from inputs with `u` and output gradients with `du` behind each row.
    pub fn backward_weights(
        &self,
        x: &CudaView<E>,
        dy: &CudaView<E>,
        context: Context,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        for placed in &self.placed {
            let linear = &placed.linear;
            if let Some(range) = linear.weight {
                self.backward_weight((placed, range), (x, dy), context, sink)?;
            }
            if let Some(range) = linear.bias {
                let dy = dy.slice(placed.column..);
                let rows = Rows::strided(context.tokens, linear.out, self.out + self.rank);
                sink.add(context.gpu, range, &mut |gradient| {
                    column_sums(context.gpu, (&dy, rows), gradient)
                })?;
            }
            if let Some(lora) = linear.lora {
                self.backward_lora((placed, lora), (x, dy), context, sink)?;
            }
        }
        Ok(())
    }

    /// Hands over the gradient of a layer's weight, in parts as large as the sink takes.
    fn backward_weight(
        &self,
        (placed, range): (&Placed, FlatRange),
        (x, dy): (&CudaView<E>, &CudaView<E>),
        context: Context,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let Context { gpu, tokens, .. } = context;
        let tile = (sink.largest() / self.width).max(1);
        for first in (0..placed.linear.out).step_by(tile) {
            let rows = tile.min(placed.linear.out - first);
            let part = range.part(first * self.width, rows * self.width);
            let dy = dy.slice(placed.column + first..);
            sink.add(gpu, part, &mut |gradient| {
                let dy = Matrix::strided(&dy, tokens, rows, self.out + self.rank).transposed();
                let x = Matrix::strided(x, tokens, self.width, self.stride());
                gpu.blas().product(Target::new(gradient, self.width), dy, x)
            })?;
        }
        Ok(())
    }

    /// Hands over the gradients of both of an adapter's factors.
    fn backward_lora(
        &self,
        (placed, lora): (&Placed, Lora),
        (x, dy): (&CudaView<E>, &CudaView<E>),
        context: Context,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let Context { gpu, tokens, .. } = context;
        let (stride, dy_stride) = (self.stride(), self.out + self.rank);
        let Lora { rank, scale, .. } = lora;
        let du = dy.slice(self.out + placed.first..);
        let dropped = match self.drops(context) {
            Some(key) => Some(self.dropped(x, &lora, key, context)?),
            None => None,
        };
        let dropped = dropped
            .as_ref()
            .map(|dropped| dropped.slice(..tokens * self.width));
        sink.add(gpu, lora.a, &mut |gradient| {
            let du = Matrix::strided(&du, tokens, rank, dy_stride).transposed();
            let x = match &dropped {
                Some(dropped) => Matrix::new(dropped, tokens, self.width),
                None => Matrix::strided(x, tokens, self.width, stride),
            };
            gpu.blas().product(Target::new(gradient, self.width), du, x)
        })?;
        let (dy, u) = (
            dy.slice(placed.column..),
            x.slice(self.width + placed.first..),
        );
        sink.add(gpu, lora.b, &mut |gradient| {
            let dy = Matrix::strided(&dy, tokens, placed.linear.out, dy_stride).transposed();
            let u = Matrix::strided(&u, tokens, rank, stride);
            let target = Target::new(gradient, rank).scaled(scale);
            gpu.blas().product(target, dy, u)
        })
    }
}
