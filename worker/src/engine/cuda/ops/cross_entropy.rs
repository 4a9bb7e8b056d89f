//! [`crate::engine::ops::cross_entropy`] on the GPU: final norm, output layer and loss over the trained rows, chunk by
//! chunk.

use common::job::{Eaft, TokenLoss};
use common::memory::gpu::chunk_rows;
use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::{Rows, gather_rows, scatter_rows};
use super::rms_norm::RmsNorm;
use super::token_matrix::TokenMatrix;
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::{GpuElement, Matrix, Target as Product};
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::cuda::params::GradientSink;
use crate::engine::ops::cross_entropy::{LogitRule, LossSum, Target};
use crate::launch;

const THREADS: u32 = 512;

/// The part of the model behind its last layer.
pub struct LossHead<'a, E> {
    pub norm: &'a RmsNorm,
    /// Weights of the output layer, `[vocabulary][width]`.
    pub head: &'a TokenMatrix<E>,
    pub loss: TokenLoss,
    pub logits: LogitRule,
}

/// A loss as the kernel takes it: its number there, and its settings.
struct KernelLoss {
    number: i32,
    share: f32,
    alpha: f32,
    divisor: f32,
    k: i32,
}

impl KernelLoss {
    fn of(loss: TokenLoss) -> Self {
        let plain = Self {
            number: 0,
            share: 0.0,
            alpha: 1.0,
            divisor: 1.0,
            k: 1,
        };
        match loss {
            TokenLoss::CrossEntropy => plain,
            TokenLoss::Dft => Self { number: 1, ..plain },
            TokenLoss::Eaft(Eaft { alpha, k, divisor }) => Self {
                number: 2,
                alpha: alpha as f32,
                divisor: divisor as f32,
                k: k as i32,
                ..plain
            },
            TokenLoss::Smoothed { share } => Self {
                number: 3,
                share: share as f32,
                ..plain
            },
        }
    }
}

/// Memory for the trained rows that are computed together.
struct Chunk<E> {
    rows: DeviceBuffer<u32>,
    x: DeviceBuffer<f32>,
    normed: DeviceBuffer<E>,
    d_logits: DeviceBuffer<E>,
}

/// Loss and accuracy of a chunk's targets.
struct Losses {
    losses: DeviceBuffer<f32>,
    /// For each target, 1 where it was the likeliest.
    correct: DeviceBuffer<u32>,
    rows: usize,
}

/// Number of chunks: how often the output layer and the norm get a gradient.
pub fn chunk_count(targets: usize, vocabulary: usize) -> usize {
    targets.div_ceil(chunk_rows(vocabulary))
}

impl<E: GpuElement> LossHead<'_, E> {
    /// Sums the loss over the targets, whose rows are within `x` `[tokens][width]` and whose ids are within the vocabulary.
    ///
    /// With `dx` and a sink, the gradient of `x` is written and those of the weights are handed over.
    pub fn loss(
        &self,
        gpu: &Gpu,
        x: &CudaView<f32>,
        targets: &[Target],
        mut backward: Option<(&mut CudaViewMut<f32>, &mut dyn GradientSink)>,
    ) -> Result<LossSum, GpuError> {
        if let Some((dx, _)) = &mut backward {
            gpu.fill_zero(*dx)?;
        }
        let mut results = Vec::new();
        for targets in targets.chunks(chunk_rows(self.head.vocabulary)) {
            let (chunk, losses) = self.forward(gpu, x, targets, backward.is_some())?;
            if let Some((dx, sink)) = &mut backward {
                self.backward(gpu, &chunk, targets.len(), dx, *sink)?;
            }
            results.push(losses);
        }
        let mut sum = LossSum::default();
        // Only now is the GPU waited for.
        for Losses {
            losses,
            correct,
            rows,
        } in results
        {
            let losses = gpu.download(&losses, rows)?;
            sum.loss += losses.into_iter().map(f64::from).sum::<f64>();
            let correct = gpu.download(&correct, rows)?;
            sum.correct += correct.into_iter().map(u64::from).sum::<u64>();
        }
        Ok(sum)
    }

    fn forward(
        &self,
        gpu: &Gpu,
        x: &CudaView<f32>,
        targets: &[Target],
        wants_gradient: bool,
    ) -> Result<(Chunk<E>, Losses), GpuError> {
        let TokenMatrix {
            vocabulary, width, ..
        } = *self.head;
        let count = targets.len();
        let rows: Vec<u32> = targets.iter().map(|target| target.row as u32).collect();
        let ids: Vec<u32> = targets.iter().map(|target| target.id).collect();
        let mut chunk = Chunk {
            rows: gpu.upload(&rows)?,
            x: gpu.take::<f32>(count * width)?,
            normed: gpu.take::<E>(count * width)?,
            d_logits: gpu.take::<E>(if wants_gradient {
                count * vocabulary
            } else {
                0
            })?,
        };
        let mut gathered = chunk.x.slice_mut(..count * width);
        let gathered = (&mut gathered, width);
        gather_rows(gpu, x, &chunk.rows.slice(..count), gathered, 1.0)?;
        let normed = (&mut chunk.normed.as_view_mut(), Rows::new(count, width));
        self.norm
            .forward(gpu, &chunk.x.slice(..count * width), normed)?;
        let mut logits = gpu.take::<f32>(count * vocabulary)?;
        let read = (&chunk.normed.as_view(), count);
        let out = &mut logits.as_view_mut();
        self.head.logits(gpu, read, out, self.logits.scale)?;
        let ids = gpu.upload(&ids)?;
        let (mut losses, mut correct) = (gpu.take::<f32>(count)?, gpu.take::<u32>(count)?);
        let name = format!("cross_entropy_{}", E::SUFFIX);
        let (grid, columns) = (Grid::rows(count, THREADS), vocabulary as i32);
        let wanted = i32::from(wants_gradient);
        let d_logits = &mut chunk.d_logits;
        let KernelLoss {
            number,
            share,
            alpha,
            divisor,
            k,
        } = KernelLoss::of(self.loss);
        let (scale, cap) = (self.logits.scale, self.logits.cap.unwrap_or(0.0));
        // SAFETY: logits and, where it is wanted, their gradient have a row for each target; ids were checked.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [
                    &mut logits,
                    &ids,
                    d_logits,
                    &mut losses,
                    &mut correct,
                    &columns,
                    &wanted,
                    &number,
                    &share,
                    &alpha,
                    &divisor,
                    &k,
                    &scale,
                    &cap
                ]
            )?;
        }
        let losses = Losses {
            losses,
            correct,
            rows: count,
        };
        Ok((chunk, losses))
    }

    fn backward(
        &self,
        gpu: &Gpu,
        chunk: &Chunk<E>,
        rows: usize,
        dx: &mut CudaViewMut<f32>,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let TokenMatrix {
            vocabulary, width, ..
        } = *self.head;
        let (d_logits, normed) = (chunk.d_logits.as_view(), chunk.normed.as_view());
        let mut d_normed = gpu.take::<f32>(rows * width)?;
        let out = &mut d_normed.as_view_mut();
        self.head.backward_input(gpu, (&d_logits, rows), out)?;
        if let Some(range) = self.head.range {
            let tile = (sink.largest() / width).max(1);
            for first in (0..vocabulary).step_by(tile) {
                let ids = tile.min(vocabulary - first);
                let part = range.part(first * width, ids * width);
                let d_logits = d_logits.slice(first..);
                sink.add(gpu, part, &mut |gradient| {
                    let d_logits = Matrix::strided(&d_logits, rows, ids, vocabulary).transposed();
                    gpu.blas().product(
                        Product::new(gradient, width),
                        d_logits,
                        Matrix::new(&normed, rows, width),
                    )
                })?;
            }
        }
        let mut d_rows = gpu.zeroed::<f32>(rows * width)?;
        let (x, dy) = (
            chunk.x.slice(..rows * width),
            d_normed.slice(..rows * width),
        );
        self.norm
            .backward(gpu, &x, &dy, &mut d_rows.as_view_mut(), sink)?;
        scatter_rows(gpu, &d_rows.as_view(), &chunk.rows.slice(..rows), dx, width)
    }
}
