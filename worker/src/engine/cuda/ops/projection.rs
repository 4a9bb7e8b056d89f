//! [`crate::engine::ops::projection`] on the GPU: linear layers of one input with their adapters, in one product.
//!
//! The frozen weights and the adapters' factors stand in one matrix of E, `[out + rank, in + rank]`:
//!
//! ```text
//!     W  S      W  [out, in]    the layers' weights, one above the other
//!     A  .      S  [out, rank]  scale · B of each layer, in the columns of its own u
//!               A  [rank, in]   one above the other
//! ```
//!
//! Inputs lie in rows of `in + rank`, with `u = x Aᵀ` behind `x`, and output gradients in rows of `out + rank`, with
//! `du = dy S` behind `dy`. So `y = [x u] [W S]ᵀ` and `dx = [dy du] [W; A]` are one product each, summed in float32 and
//! rounded once.

use common::memory::gpu::RANK_MULTIPLE;
use cudarc::driver::{CudaView, CudaViewMut};

use super::dropout::Mask;
use super::elementwise::{Rows, add_in_place, add_to_rows, column_sums, round_rows};
use super::lora_linear::Lora;
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::{GpuElement, Matrix, Target};
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::params::{FlatRange, GradientSink};
use crate::engine::ops::lora_linear::MaskKey;

/// A linear layer among those of a projection. A weight or bias without a range is frozen or absent.
#[derive(Clone, Debug)]
pub struct Linear {
    pub out: usize,
    pub weight: Option<FlatRange>,
    pub bias: Option<FlatRange>,
    pub lora: Option<Lora>,
}

/// A linear layer, and where its parts lie in the projection's matrix.
struct Placed {
    linear: Linear,
    /// First column of this layer's output among those of all layers.
    column: usize,
    /// First column of this adapter's low-rank activations `u = drop(x) Aᵀ` among those of all adapters.
    first: usize,
}

impl Placed {
    fn rank(&self) -> usize {
        let rank = self.linear.lora.map_or(0, |lora| lora.rank);
        rank.next_multiple_of(RANK_MULTIPLE)
    }
}

/// Linear layers of one input, with their adapters, on the GPU.
pub struct Projection<E> {
    matrix: DeviceBuffer<E>,
    placed: Vec<Placed>,
    width: usize,
    out: usize,
    rank: usize,
    /// Biases of all layers, one after the other.
    bias: Option<DeviceBuffer<f32>>,
}

/// What a forward or backward run needs beside its input.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub gpu: &'a Gpu,
    pub tokens: usize,
    /// Key of the dropout masks; None where nothing is dropped.
    pub mask: Option<MaskKey>,
}

/// A projection whose matrix is still on the processor: zeros but for what was set.
pub struct Staged<E> {
    matrix: Vec<E>,
    placed: Vec<Placed>,
    width: usize,
    out: usize,
    rank: usize,
}

impl<E: GpuElement> Staged<E> {
    pub fn new(linears: Vec<Linear>, width: usize) -> Self {
        let (mut out, mut rank) = (0, 0);
        let mut placed = Vec::new();
        for linear in linears {
            let (column, first) = (out, rank);
            out += linear.out;
            placed.push(Placed {
                linear,
                column,
                first,
            });
            rank += placed.last().map_or(0, Placed::rank);
        }
        Self {
            matrix: vec![E::default(); (out + rank) * (width + rank)],
            placed,
            width,
            out,
            rank,
        }
    }

    /// Sets the weights of one layer, `[out][width]`.
    pub fn set(&mut self, index: usize, weights: &[E]) {
        let (width, stride) = (self.width, self.width + self.rank);
        let placed = &self.placed[index];
        assert_eq!(
            weights.len(),
            placed.linear.out * width,
            "a layer's weights"
        );
        let rows = self.matrix.chunks_exact_mut(stride).skip(placed.column);
        for (row, weights) in rows.zip(weights.chunks_exact(width)) {
            row[..width].copy_from_slice(weights);
        }
    }

    /// Uploads the projection to the GPU. `bias` has the biases of all layers.
    pub fn upload(self, gpu: &Gpu, bias: Option<&[f32]>) -> Result<Projection<E>, GpuError> {
        assert!(
            bias.is_none_or(|bias| bias.len() == self.out),
            "biases of a projection"
        );
        Ok(Projection {
            matrix: gpu.upload(&self.matrix)?,
            placed: self.placed,
            width: self.width,
            out: self.out,
            rank: self.rank,
            bias: bias.map(|bias| gpu.upload(bias)).transpose()?,
        })
    }
}

impl<E: GpuElement> Projection<E> {
    /// Width of all outputs together.
    pub fn out(&self) -> usize {
        self.out
    }

    /// Rows of `tokens` inputs, with room behind each for the low-rank activations `u`.
    pub fn inputs(&self, tokens: usize) -> Rows {
        Rows::strided(tokens, self.width, self.stride())
    }

    /// Rows of `tokens` output gradients, with room behind each for `du`.
    pub fn gradients(&self, tokens: usize) -> Rows {
        Rows::strided(tokens, self.out, self.out + self.rank)
    }

    /// Whether a gradient of the layers themselves is wanted.
    pub fn learns(&self) -> bool {
        self.placed.iter().any(|placed| {
            let Linear {
                weight, bias, lora, ..
            } = &placed.linear;
            weight.is_some() || bias.is_some() || lora.is_some()
        })
    }

    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        let (width, stride, out) = (self.width, self.stride(), self.out);
        for placed in &self.placed {
            let linear = &placed.linear;
            let mut write = |range: FlatRange, first: usize, from: Rows, scale: f32| {
                let to = &mut self.matrix.slice_mut(first..);
                let rows = Rows::strided(from.rows, from.columns, stride);
                round_rows(gpu, (&range.of(flat), from), (to, rows), scale)
            };
            if let Some(range) = linear.weight {
                write(
                    range,
                    placed.column * stride,
                    Rows::new(linear.out, width),
                    1.0,
                )?;
            }
            if let Some(Lora {
                a, b, rank, scale, ..
            }) = linear.lora
            {
                write(
                    a,
                    (out + placed.first) * stride,
                    Rows::new(rank, width),
                    1.0,
                )?;
                let first = placed.column * stride + width + placed.first;
                write(b, first, Rows::new(linear.out, rank), scale)?;
            }
            if let (Some(range), Some(bias)) = (linear.bias, &mut self.bias) {
                let to = &mut bias.slice_mut(placed.column..placed.column + linear.out);
                gpu.copy(&range.of(flat), to)?;
            }
        }
        Ok(())
    }

    /// Computes the low-rank activations `u` and writes them behind each row of `x`.
    pub fn reduce(&self, x: &mut CudaViewMut<E>, context: Context) -> Result<(), GpuError> {
        let Context { gpu, tokens, .. } = context;
        let Some(key) = self.drops(context) else {
            let a = self.matrix.slice(self.out * self.stride()..);
            let a = Matrix::strided(&a, self.rank, self.width, self.stride());
            let x = (x, self.width, self.stride());
            return gpu.blas().product_behind(tokens, x, a.transposed());
        };
        for (placed, lora) in self.adapted() {
            let dropped = self.dropped(&x.as_view(), &lora, key, context)?;
            let a = self.factor_a(placed);
            let a = Matrix::strided(&a, placed.rank(), self.width, self.stride());
            let u = &mut x.slice_mut(self.width + placed.first..);
            let dropped = dropped.slice(..tokens * self.width);
            let dropped = Matrix::new(&dropped, tokens, self.width);
            gpu.blas()
                .product(Target::new(u, self.stride()), dropped, a.transposed())?;
        }
        Ok(())
    }

    /// `y = layer(x)`, `[tokens][out]`, from inputs with `u` behind each row.
    pub fn forward<O: GpuElement>(
        &self,
        x: &CudaView<E>,
        y: &mut CudaViewMut<O>,
        context: Context,
    ) -> Result<(), GpuError> {
        self.forward_into(x, Target::new(y, self.out), context)?;
        self.add_bias(y, 1.0, context)
    }

    /// `y = residual + scale · layer(x)`, from inputs with `u` behind each row.
    pub fn forward_onto(
        &self,
        (residual, scale): (&CudaView<f32>, f32),
        x: &CudaView<E>,
        y: &mut CudaViewMut<f32>,
        context: Context,
    ) -> Result<(), GpuError> {
        let target = Target::new(y, self.out).onto(residual).scaled(scale);
        self.forward_into(x, target, context)?;
        self.add_bias(y, scale, context)
    }

    fn forward_into<O: GpuElement>(
        &self,
        x: &CudaView<E>,
        y: Target<O>,
        context: Context,
    ) -> Result<(), GpuError> {
        let w = self.matrix.slice(..self.out * self.stride());
        let x = Matrix::new(x, context.tokens, self.stride());
        let w = Matrix::new(&w, self.out, self.stride());
        context.gpu.blas().product(y, x, w.transposed())
    }

    fn add_bias<O: GpuElement>(
        &self,
        y: &mut CudaViewMut<O>,
        scale: f32,
        context: Context,
    ) -> Result<(), GpuError> {
        match &self.bias {
            Some(bias) => add_to_rows(
                context.gpu,
                (y, Rows::new(context.tokens, self.out)),
                &bias.slice(..self.out),
                scale,
            ),
            None => Ok(()),
        }
    }

    /// Computes the gradient `du` of the low-rank activations and writes it behind each row of `dy`.
    pub fn reduce_gradient(
        &self,
        dy: &mut CudaViewMut<E>,
        context: Context,
    ) -> Result<(), GpuError> {
        if self.rank == 0 {
            return Ok(());
        }
        let s = self.matrix.slice(self.width..);
        let s = Matrix::strided(&s, self.out, self.rank, self.stride());
        let dy = (dy, self.out, self.out + self.rank);
        context.gpu.blas().product_behind(context.tokens, dy, s)
    }

    /// Computes the gradient of the input, `[tokens][in]`, from those of the output with `du` behind each row.
    pub fn backward_input<O: GpuElement>(
        &self,
        dy: &CudaView<E>,
        dx: &mut CudaViewMut<O>,
        context: Context,
    ) -> Result<(), GpuError> {
        let Context { gpu, tokens, .. } = context;
        let stride = self.out + self.rank;
        let key = self.drops(context);
        // What goes through a mask is added below.
        let rows = if key.is_some() { self.out } else { stride };
        let matrix = self.matrix.slice(..);
        let w = Matrix::strided(&matrix, rows, self.width, self.stride());
        let factor = Matrix::strided(dy, tokens, rows, stride);
        gpu.blas().product(Target::new(dx, self.width), factor, w)?;
        let Some(key) = key else {
            return Ok(());
        };
        let shape = Rows::new(tokens, self.width);
        let mut through = gpu.take::<O>(tokens * self.width)?;
        let mut dropped = gpu.take::<O>(tokens * self.width)?;
        for (placed, lora) in self.adapted() {
            let (a, du) = (self.factor_a(placed), dy.slice(self.out + placed.first..));
            gpu.blas().product(
                Target::new(&mut through.as_view_mut(), self.width),
                Matrix::strided(&du, tokens, placed.rank(), stride),
                Matrix::strided(&a, placed.rank(), self.width, self.stride()),
            )?;
            let to = (&mut dropped.as_view_mut(), shape);
            Mask::new(gpu, &lora, key, tokens)?.apply(gpu, (&through.as_view(), shape), to)?;
            add_in_place(gpu, dx, &dropped.slice(..tokens * self.width))?;
        }
        Ok(())
    }

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

    /// The mask's key, where some adapter drops inputs.
    fn drops(&self, context: Context) -> Option<MaskKey> {
        let drops = |(_, lora): (&Placed, Lora)| lora.dropout > 0.0;
        context.mask.filter(|_| self.adapted().any(drops))
    }

    fn dropped(
        &self,
        x: &CudaView<E>,
        lora: &Lora,
        key: MaskKey,
        context: Context,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let Context { gpu, tokens, .. } = context;
        let mut dropped = gpu.take::<E>(tokens * self.width)?;
        let to = (&mut dropped.as_view_mut(), Rows::new(tokens, self.width));
        Mask::new(gpu, lora, key, tokens)?.apply(gpu, (x, self.inputs(tokens)), to)?;
        Ok(dropped)
    }

    fn adapted(&self) -> impl Iterator<Item = (&Placed, Lora)> {
        let placed = self.placed.iter();
        placed.filter_map(|placed| Some((placed, placed.linear.lora?)))
    }

    fn factor_a(&self, placed: &Placed) -> CudaView<'_, E> {
        self.matrix
            .slice((self.out + placed.first) * self.stride()..)
    }

    fn stride(&self) -> usize {
        self.width + self.rank
    }
}
