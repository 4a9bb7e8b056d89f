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

use super::adapter::Adapter;
pub use super::adapter::Place;
use super::dropout::Mask;
use super::elementwise::{Rows, add_in_place, add_to_rows, column_sums, narrow_rows};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::{GpuElement, Matrix, Target};
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::ops::lora_linear::MaskKey;

/// One layer among those of a projection. A weight or bias without a place is frozen or absent.
#[derive(Clone, Debug)]
pub struct Layer {
    pub out: usize,
    pub weight: Option<Place>,
    pub bias: Option<Place>,
    pub adapter: Option<Adapter>,
}

/// A layer, and where its parts lie in the projection's matrix.
struct Placed {
    layer: Layer,
    /// First column of this layer's output among those of all layers.
    column: usize,
    /// First column of this adapter's low-rank activations `u = drop(x) Aᵀ` among those of all adapters.
    first: usize,
}

impl Placed {
    fn rank(&self) -> usize {
        let rank = self.layer.adapter.map_or(0, |adapter| adapter.rank);
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

/// Where gradients of trainable tensors are handed to.
pub trait Sink {
    /// Takes the gradient of the tensor at `place`: `write` gets memory for its scalars, which it must fill.
    fn add(
        &mut self,
        gpu: &Gpu,
        place: Place,
        write: &mut dyn FnMut(&mut CudaViewMut<f32>) -> Result<(), GpuError>,
    ) -> Result<(), GpuError>;

    /// Takes the gradients of some rows, all different, of the matrix at `place`.
    fn add_rows(
        &mut self,
        gpu: &Gpu,
        place: Place,
        gradient: &CudaView<f32>,
        rows: &CudaView<u32>,
    ) -> Result<(), GpuError>;

    /// Most scalars that one call of [`add`](Self::add) may take; a larger tensor is handed over in parts.
    fn largest(&self) -> usize;
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
    pub fn new(layers: Vec<Layer>, width: usize) -> Self {
        let (mut out, mut rank) = (0, 0);
        let mut placed = Vec::new();
        for layer in layers {
            let (column, first) = (out, rank);
            out += layer.out;
            placed.push(Placed {
                layer,
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

    /// Sets the weights of a layer, `[out][width]`.
    pub fn set(&mut self, layer: usize, weights: &[E]) {
        let (width, stride) = (self.width, self.width + self.rank);
        let placed = &self.placed[layer];
        assert_eq!(weights.len(), placed.layer.out * width, "a layer's weights");
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
            let Layer {
                weight,
                bias,
                adapter,
                ..
            } = &placed.layer;
            weight.is_some() || bias.is_some() || adapter.is_some()
        })
    }

    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        let (width, stride, out) = (self.width, self.stride(), self.out);
        for placed in &self.placed {
            let layer = &placed.layer;
            let mut write = |place: Place, first: usize, from: Rows, scale: f32| {
                let to = &mut self.matrix.slice_mut(first..);
                let rows = Rows::strided(from.rows, from.columns, stride);
                narrow_rows(gpu, (&place.of(flat), from), (to, rows), scale)
            };
            if let Some(place) = layer.weight {
                write(
                    place,
                    placed.column * stride,
                    Rows::new(layer.out, width),
                    1.0,
                )?;
            }
            if let Some(Adapter {
                a, b, rank, scale, ..
            }) = layer.adapter
            {
                write(
                    a,
                    (out + placed.first) * stride,
                    Rows::new(rank, width),
                    1.0,
                )?;
                let first = placed.column * stride + width + placed.first;
                write(b, first, Rows::new(layer.out, rank), scale)?;
            }
            if let (Some(place), Some(bias)) = (layer.bias, &mut self.bias) {
                let to = &mut bias.slice_mut(placed.column..placed.column + layer.out);
                gpu.copy(&place.of(flat), to)?;
            }
        }
        Ok(())
    }

    /// Computes the low-rank activations `u` and writes them behind each row of `x`.
    pub fn reduce(
        &self,
        gpu: &Gpu,
        x: &mut CudaViewMut<E>,
        tokens: usize,
        mask: Option<MaskKey>,
    ) -> Result<(), GpuError> {
        let Some(key) = self.drops(mask) else {
            let a = self.matrix.slice(self.out * self.stride()..);
            let a = Matrix::strided(&a, self.rank, self.width, self.stride());
            let x = (x, self.width, self.stride());
            return gpu.blas().product_behind(tokens, x, a.transposed());
        };
        for (placed, adapter) in self.adapted() {
            let dropped = self.dropped(gpu, &x.as_view(), tokens, &adapter, key)?;
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
    pub fn forward(
        &self,
        gpu: &Gpu,
        x: &CudaView<E>,
        y: &mut CudaViewMut<E>,
        tokens: usize,
    ) -> Result<(), GpuError> {
        self.forward_into(gpu, x, Target::new(y, self.out), tokens)?;
        self.add_bias(gpu, y, tokens)
    }

    /// `y = residual + layer(x)`, from inputs with `u` behind each row.
    pub fn forward_onto(
        &self,
        gpu: &Gpu,
        residual: &CudaView<f32>,
        x: &CudaView<E>,
        y: &mut CudaViewMut<f32>,
        tokens: usize,
    ) -> Result<(), GpuError> {
        let target = Target::new(y, self.out).onto(residual);
        self.forward_into(gpu, x, target, tokens)?;
        self.add_bias(gpu, y, tokens)
    }

    fn forward_into<O: GpuElement>(
        &self,
        gpu: &Gpu,
        x: &CudaView<E>,
        y: Target<O>,
        tokens: usize,
    ) -> Result<(), GpuError> {
        let w = self.matrix.slice(..self.out * self.stride());
        let x = Matrix::new(x, tokens, self.stride());
        let w = Matrix::new(&w, self.out, self.stride());
        gpu.blas().product(y, x, w.transposed())
    }

    fn add_bias<O: GpuElement>(
        &self,
        gpu: &Gpu,
        y: &mut CudaViewMut<O>,
        tokens: usize,
    ) -> Result<(), GpuError> {
        match &self.bias {
            Some(bias) => add_to_rows(
                gpu,
                (y, Rows::new(tokens, self.out)),
                &bias.slice(..self.out),
            ),
            None => Ok(()),
        }
    }

    /// Computes the gradient `du` of the low-rank activations and writes it behind each row of `dy`.
    pub fn reduce_gradient(
        &self,
        gpu: &Gpu,
        dy: &mut CudaViewMut<E>,
        tokens: usize,
    ) -> Result<(), GpuError> {
        if self.rank == 0 {
            return Ok(());
        }
        let s = self.matrix.slice(self.width..);
        let s = Matrix::strided(&s, self.out, self.rank, self.stride());
        let dy = (dy, self.out, self.out + self.rank);
        gpu.blas().product_behind(tokens, dy, s)
    }

    /// Computes the gradient of the input, `[tokens][in]`, from those of the output with `du` behind each row.
    pub fn backward_input<O: GpuElement>(
        &self,
        gpu: &Gpu,
        dy: &CudaView<E>,
        dx: &mut CudaViewMut<O>,
        tokens: usize,
        mask: Option<MaskKey>,
    ) -> Result<(), GpuError> {
        let stride = self.out + self.rank;
        let key = self.drops(mask);
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
        for (placed, adapter) in self.adapted() {
            let (a, du) = (self.factor_a(placed), dy.slice(self.out + placed.first..));
            gpu.blas().product(
                Target::new(&mut through.as_view_mut(), self.width),
                Matrix::strided(&du, tokens, placed.rank(), stride),
                Matrix::strided(&a, placed.rank(), self.width, self.stride()),
            )?;
            let to = (&mut dropped.as_view_mut(), shape);
            Mask::new(gpu, &adapter, key, tokens)?.apply(gpu, (&through.as_view(), shape), to)?;
            add_in_place(gpu, dx, &dropped.slice(..tokens * self.width))?;
        }
        Ok(())
    }

    /// Hands over the gradients of what is trainable, from inputs with `u` and output gradients with `du` behind each row.
    pub fn backward_weights(
        &self,
        gpu: &Gpu,
        x: &CudaView<E>,
        dy: &CudaView<E>,
        tokens: usize,
        mask: Option<MaskKey>,
        sink: &mut dyn Sink,
    ) -> Result<(), GpuError> {
        for placed in &self.placed {
            let layer = &placed.layer;
            if let Some(place) = layer.weight {
                self.backward_weight(gpu, (placed, place), (x, dy, tokens), sink)?;
            }
            if let Some(place) = layer.bias {
                let dy = dy.slice(placed.column..);
                let rows = Rows::strided(tokens, layer.out, self.out + self.rank);
                sink.add(gpu, place, &mut |gradient| {
                    column_sums(gpu, (&dy, rows), gradient)
                })?;
            }
            if let Some(adapter) = layer.adapter {
                let given = (x, dy, tokens);
                self.backward_adapter(gpu, (placed, adapter), given, mask, sink)?;
            }
        }
        Ok(())
    }

    /// Hands over the gradient of a layer's weight, in parts as large as the sink takes.
    fn backward_weight(
        &self,
        gpu: &Gpu,
        (placed, place): (&Placed, Place),
        (x, dy, tokens): (&CudaView<E>, &CudaView<E>, usize),
        sink: &mut dyn Sink,
    ) -> Result<(), GpuError> {
        let tile = (sink.largest() / self.width).max(1);
        for first in (0..placed.layer.out).step_by(tile) {
            let rows = tile.min(placed.layer.out - first);
            let part = Place {
                offset: place.offset + first * self.width,
                scalars: rows * self.width,
            };
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
    fn backward_adapter(
        &self,
        gpu: &Gpu,
        (placed, adapter): (&Placed, Adapter),
        (x, dy, tokens): (&CudaView<E>, &CudaView<E>, usize),
        mask: Option<MaskKey>,
        sink: &mut dyn Sink,
    ) -> Result<(), GpuError> {
        let (stride, dy_stride) = (self.stride(), self.out + self.rank);
        let Adapter { rank, scale, .. } = adapter;
        let du = dy.slice(self.out + placed.first..);
        let dropped = match self.drops(mask) {
            Some(key) => Some(self.dropped(gpu, x, tokens, &adapter, key)?),
            None => None,
        };
        let dropped = dropped
            .as_ref()
            .map(|dropped| dropped.slice(..tokens * self.width));
        sink.add(gpu, adapter.a, &mut |gradient| {
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
        sink.add(gpu, adapter.b, &mut |gradient| {
            let dy = Matrix::strided(&dy, tokens, placed.layer.out, dy_stride).transposed();
            let u = Matrix::strided(&u, tokens, rank, stride);
            let target = Target::new(gradient, rank).scaled(scale);
            gpu.blas().product(target, dy, u)
        })
    }

    /// The mask's key, where some adapter drops inputs.
    fn drops(&self, mask: Option<MaskKey>) -> Option<MaskKey> {
        mask.filter(|_| self.adapted().any(|(_, adapter)| adapter.dropout > 0.0))
    }

    fn dropped(
        &self,
        gpu: &Gpu,
        x: &CudaView<E>,
        tokens: usize,
        adapter: &Adapter,
        key: MaskKey,
    ) -> Result<DeviceBuffer<E>, GpuError> {
        let mut dropped = gpu.take::<E>(tokens * self.width)?;
        let to = (&mut dropped.as_view_mut(), Rows::new(tokens, self.width));
        Mask::new(gpu, adapter, key, tokens)?.apply(gpu, (x, self.inputs(tokens)), to)?;
        Ok(dropped)
    }

    fn adapted(&self) -> impl Iterator<Item = (&Placed, Adapter)> {
        let placed = self.placed.iter();
        placed.filter_map(|placed| Some((placed, placed.layer.adapter?)))
    }

    fn factor_a(&self, placed: &Placed) -> CudaView<'_, E> {
        self.matrix
            .slice((self.out + placed.first) * self.stride()..)
    }

    fn stride(&self) -> usize {
        self.width + self.rank
    }
}
