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
//! rounded once. Weights of 4 bits are put there right before a product ([`super::projection_matrix`]).

mod gradients;

use std::sync::Arc;

use common::memory::gpu::RANK_MULTIPLE;
use cudarc::driver::{CudaView, CudaViewMut};

use super::dropout::Mask;
use super::elementwise::{Rows, add_in_place, add_to_rows, round_rows};
use super::frozen::{Frozen, Scratch};
use super::lora_linear::Lora;
use super::projection_matrix::{Part, Parts, ProjectionMatrix, Sizes};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::{GpuElement, Matrix, Target};
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::params::FlatRange;
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

/// Places the layers of one input, one behind the other.
fn place(linears: Vec<Linear>, width: usize) -> (Vec<Placed>, Sizes) {
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
    (placed, Sizes { out, width, rank })
}

/// Linear layers of one input, with their adapters, on the GPU.
pub struct Projection<E> {
    matrix: ProjectionMatrix<E>,
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
    sizes: Sizes,
}

impl<E: GpuElement> Staged<E> {
    pub fn new(linears: Vec<Linear>, width: usize) -> Self {
        let (placed, sizes) = place(linears, width);
        Self {
            matrix: vec![E::default(); (sizes.out + sizes.rank) * sizes.stride()],
            placed,
            sizes,
        }
    }

    /// Sets the weights of one layer, `[out][width]`.
    pub fn set(&mut self, index: usize, weights: &[E]) {
        let (width, stride) = (self.sizes.width, self.sizes.stride());
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
        let matrix = ProjectionMatrix::Whole(gpu.upload(&self.matrix)?);
        Projection::put_together(gpu, matrix, (self.placed, self.sizes), bias)
    }
}

impl<E: GpuElement> Projection<E> {
    /// A projection of frozen weights, some of which are in 4 bits. `bias` has the biases of all layers.
    pub fn frozen(
        gpu: &Gpu,
        (linears, width): (Vec<Linear>, usize),
        weights: Vec<Frozen<E>>,
        bias: Option<&[f32]>,
        scratch: &Arc<Scratch>,
    ) -> Result<Self, GpuError> {
        let rows: Vec<usize> = linears.iter().map(|linear| linear.out).collect();
        assert!(
            weights.len() == rows.len() && linears.iter().all(|linear| linear.weight.is_none()),
            "a frozen weight for each layer"
        );
        let (placed, sizes) = place(linears, width);
        let weights = weights.into_iter().zip(rows).collect();
        let parts = Parts::new(gpu, sizes, weights, scratch)?;
        let matrix = ProjectionMatrix::Parts(parts);
        Self::put_together(gpu, matrix, (placed, sizes), bias)
    }

    fn put_together(
        gpu: &Gpu,
        matrix: ProjectionMatrix<E>,
        (placed, sizes): (Vec<Placed>, Sizes),
        bias: Option<&[f32]>,
    ) -> Result<Self, GpuError> {
        let Sizes { out, width, rank } = sizes;
        assert!(
            bias.is_none_or(|bias| bias.len() == out),
            "biases of a projection"
        );
        Ok(Self {
            matrix,
            placed,
            width,
            out,
            rank,
            bias: bias.map(|bias| gpu.upload(bias)).transpose()?,
        })
    }

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
        let (width, sizes) = (self.width, self.sizes());
        for placed in &self.placed {
            let linear = &placed.linear;
            let write = |range: FlatRange, from: Rows, to: (CudaViewMut<E>, usize), scale: f32| {
                let (mut to, stride) = to;
                let rows = Rows::strided(from.rows, from.columns, stride);
                round_rows(gpu, (&range.of(flat), from), (&mut to, rows), scale)
            };
            if let Some(range) = linear.weight
                && let Some(to) = self.matrix.weights_mut(sizes, placed.column)
            {
                write(range, Rows::new(linear.out, width), to, 1.0)?;
            }
            if let Some(Lora {
                a, b, rank, scale, ..
            }) = linear.lora
            {
                let to = self.matrix.a_mut(sizes, placed.first);
                write(a, Rows::new(rank, width), to, 1.0)?;
                let to = self.matrix.s_mut(sizes, (placed.column, placed.first));
                write(b, Rows::new(linear.out, rank), to, scale)?;
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
        let (width, stride) = (self.width, self.stride());
        if self.rank == 0 {
            return Ok(());
        }
        self.read(Part::A, gpu, |matrix| {
            let Some(key) = self.drops(context) else {
                let a = matrix.slice(self.out * stride..);
                let a = Matrix::strided(&a, self.rank, width, stride);
                let x = (x, width, stride);
                return gpu.blas().product_behind(tokens, x, a.transposed());
            };
            for (placed, lora) in self.adapted() {
                let dropped = self.dropped(&x.as_view(), &lora, key, context)?;
                let a = self.factor_a(matrix, placed);
                let a = Matrix::strided(&a, placed.rank(), width, stride);
                let u = &mut x.slice_mut(width + placed.first..);
                let dropped = dropped.slice(..tokens * width);
                let dropped = Matrix::new(&dropped, tokens, width);
                gpu.blas()
                    .product(Target::new(u, stride), dropped, a.transposed())?;
            }
            Ok(())
        })
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
        let Context { gpu, tokens, .. } = context;
        let stride = self.stride();
        self.read(Part::Rows, gpu, |matrix| {
            let w = matrix.slice(..self.out * stride);
            let x = Matrix::new(x, tokens, stride);
            let w = Matrix::new(&w, self.out, stride);
            gpu.blas().product(y, x, w.transposed())
        })
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
        let Context { gpu, tokens, .. } = context;
        self.read(Part::S, gpu, |matrix| {
            let s = matrix.slice(self.width..);
            let s = Matrix::strided(&s, self.out, self.rank, self.stride());
            let dy = (dy, self.out, self.out + self.rank);
            gpu.blas().product_behind(tokens, dy, s)
        })
    }

    /// Computes the gradient of the input, `[tokens][in]`, from those of the output with `du` behind each row.
    pub fn backward_input<O: GpuElement>(
        &self,
        dy: &CudaView<E>,
        dx: &mut CudaViewMut<O>,
        context: Context,
    ) -> Result<(), GpuError> {
        self.read(Part::Columns, context.gpu, |matrix| {
            self.backward_through(matrix, dy, dx, context)
        })
    }

    /// [`backward_input`](Self::backward_input) through the weights and `A` of a matrix.
    fn backward_through<O: GpuElement>(
        &self,
        matrix: &CudaView<E>,
        dy: &CudaView<E>,
        dx: &mut CudaViewMut<O>,
        context: Context,
    ) -> Result<(), GpuError> {
        let Context { gpu, tokens, .. } = context;
        let stride = self.out + self.rank;
        let key = self.drops(context);
        // What goes through a mask is added below.
        let rows = if key.is_some() { self.out } else { stride };
        let w = Matrix::strided(matrix, rows, self.width, self.stride());
        let factor = Matrix::strided(dy, tokens, rows, stride);
        gpu.blas().product(Target::new(dx, self.width), factor, w)?;
        let Some(key) = key else {
            return Ok(());
        };
        let shape = Rows::new(tokens, self.width);
        let mut through = gpu.take::<O>(tokens * self.width)?;
        let mut dropped = gpu.take::<O>(tokens * self.width)?;
        for (placed, lora) in self.adapted() {
            let a = self.factor_a(matrix, placed);
            let du = dy.slice(self.out + placed.first..);
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

    fn factor_a<'a>(&self, matrix: &'a CudaView<E>, placed: &Placed) -> CudaView<'a, E> {
        matrix.slice((self.out + placed.first) * self.stride()..)
    }

    /// Hands `work` the matrix, of which this part is there.
    fn read(
        &self,
        part: Part,
        gpu: &Gpu,
        work: impl FnOnce(&CudaView<E>) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        self.matrix.read(gpu, (self.sizes(), part), work)
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            out: self.out,
            width: self.width,
            rank: self.rank,
        }
    }

    fn stride(&self) -> usize {
        self.sizes().stride()
    }
}
