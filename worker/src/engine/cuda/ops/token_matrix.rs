//! Matrices with a row for each token of the vocabulary, the embedding and the output layer: what is read of them, and what is
//! multiplied by them. In 4 bits they are widened tile by tile, because whole they would be as large as in 16 bits.

use std::sync::Arc;

use common::memory::gpu::widened_tile;
use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::{Rows, gather_rows, round_rows};
use super::four_bits::{FourBits, Window};
use super::frozen::{Frozen, Scratch};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::{GpuElement, Matrix, Target};
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::params::FlatRange;

/// A matrix with a row for each token of the vocabulary, `[vocabulary][width]`.
pub struct TokenMatrix<E> {
    values: Values<E>,
    pub vocabulary: usize,
    pub width: usize,
    /// Range of the matrix among the trainable scalars, where it is trainable.
    pub range: Option<FlatRange>,
}

enum Values<E> {
    Wide(DeviceBuffer<E>),
    FourBits {
        matrix: FourBits,
        /// Rows that are widened at a time, and columns where whole columns are.
        tile: [usize; 2],
        scratch: Arc<Scratch>,
    },
}

impl<E: GpuElement> TokenMatrix<E> {
    /// A matrix that is trained; the first refresh writes it.
    pub fn trainable(
        gpu: &Gpu,
        [vocabulary, width]: [usize; 2],
        range: FlatRange,
    ) -> Result<Self, GpuError> {
        Ok(Self {
            values: Values::Wide(gpu.take(vocabulary * width)?),
            vocabulary,
            width,
            range: Some(range),
        })
    }

    pub fn frozen(
        [vocabulary, width]: [usize; 2],
        values: Frozen<E>,
        scratch: &Arc<Scratch>,
    ) -> Self {
        let values = match values {
            Frozen::Wide(values) => Values::Wide(values),
            Frozen::FourBits(matrix) => Values::FourBits {
                matrix,
                tile: widened_tile(vocabulary, width),
                scratch: scratch.clone(),
            },
        };
        Self {
            values,
            vocabulary,
            width,
            range: None,
        }
    }

    /// Announces that the matrix is multiplied, and not only read.
    pub fn reserve(&self) {
        if let Values::FourBits { tile, scratch, .. } = &self.values {
            let [rows, columns] = *tile;
            scratch.reserve::<E>((rows * self.width).max(self.vocabulary * columns));
        }
    }

    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        let rows = Rows::new(self.vocabulary, self.width);
        match (&mut self.values, self.range) {
            (Values::Wide(values), Some(range)) => {
                let to = (&mut values.as_view_mut(), rows);
                round_rows(gpu, (&range.of(flat), rows), to, 1.0)
            }
            _ => Ok(()),
        }
    }

    /// Gathers rows `ids` times `scale`, `[ids][width]`. Every id is within the vocabulary.
    pub fn gather(
        &self,
        gpu: &Gpu,
        ids: &CudaView<u32>,
        out: &mut CudaViewMut<f32>,
        scale: f32,
    ) -> Result<(), GpuError> {
        let out = (out, self.width);
        match &self.values {
            Values::Wide(values) => gather_rows(gpu, &values.as_view(), ids, out, scale),
            Values::FourBits { matrix, .. } => matrix.gather::<E>(gpu, ids, out, scale),
        }
    }

    /// Computes `logits = scale · x Wᵀ`, `[rows][vocabulary]`, from `x`, `[rows][width]`.
    pub fn logits(
        &self,
        gpu: &Gpu,
        (x, rows): (&CudaView<E>, usize),
        logits: &mut CudaViewMut<f32>,
        scale: f32,
    ) -> Result<(), GpuError> {
        let Self {
            vocabulary, width, ..
        } = *self;
        let mut product = |first: usize, tokens: usize, weights: &CudaView<E>| {
            let logits = &mut logits.slice_mut(first..);
            let out = Target::new(logits, vocabulary).scaled(scale);
            let weights = Matrix::new(weights, tokens, width).transposed();
            gpu.blas()
                .product(out, Matrix::new(x, rows, width), weights)
        };
        match &self.values {
            Values::Wide(values) => product(0, vocabulary, &values.as_view()),
            Values::FourBits {
                matrix,
                tile: [tile, _],
                scratch,
            } => {
                for first in (0..vocabulary).step_by(*tile) {
                    let tokens = (*tile).min(vocabulary - first);
                    let window = Window {
                        first_row: first,
                        rows: tokens,
                        ..Window::whole([vocabulary, width])
                    };
                    let product = |weights: &CudaView<E>| product(first, tokens, weights);
                    widened(gpu, (matrix, window), scratch, product)?;
                }
                Ok(())
            }
        }
    }

    /// Computes the gradient `dx = d_logits W`, `[rows][width]`.
    pub fn backward_input(
        &self,
        gpu: &Gpu,
        (d_logits, rows): (&CudaView<E>, usize),
        dx: &mut CudaViewMut<f32>,
    ) -> Result<(), GpuError> {
        let Self {
            vocabulary, width, ..
        } = *self;
        let mut product = |first: usize, columns: usize, weights: &CudaView<E>| {
            let dx = &mut dx.slice_mut(first..);
            let d_logits = Matrix::new(d_logits, rows, vocabulary);
            let weights = Matrix::new(weights, vocabulary, columns);
            gpu.blas()
                .product(Target::new(dx, width), d_logits, weights)
        };
        match &self.values {
            Values::Wide(values) => product(0, width, &values.as_view()),
            Values::FourBits {
                matrix,
                tile: [_, tile],
                scratch,
            } => {
                // Of columns, so that no sum is cut.
                for first in (0..width).step_by(*tile) {
                    let columns = (*tile).min(width - first);
                    let window = Window {
                        first_column: first,
                        columns,
                        ..Window::whole([vocabulary, width])
                    };
                    let product = |weights: &CudaView<E>| product(first, columns, weights);
                    widened(gpu, (matrix, window), scratch, product)?;
                }
                Ok(())
            }
        }
    }
}

/// Hands `work` a window of a matrix in 4 bits, widened, without gaps between its rows.
fn widened<E: GpuElement>(
    gpu: &Gpu,
    (matrix, window): (&FourBits, Window),
    scratch: &Scratch,
    work: impl FnOnce(&CudaView<E>) -> Result<(), GpuError>,
) -> Result<(), GpuError> {
    let write = |to: &mut CudaViewMut<E>| matrix.widen(gpu, window, (to, window.columns));
    scratch.with(gpu, window.rows * window.columns, write, work)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
