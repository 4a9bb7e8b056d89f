//! The matrix of a projection in memory: as products read it, or with weights of 4 bits, which are widened, and put together with the
//! adapters' factors, right before a product. What a product reads is the same to the bit, and lies the same.

use std::sync::Arc;

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::Rows;
use super::four_bits::copy_rows;
use super::frozen::{Frozen, Scratch};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};

/// Sizes of the matrix `[W S; A .]`: `W` is `[out][width]`, `S` `[out][rank]`, `A` `[rank][width]`.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub out: usize,
    pub width: usize,
    pub rank: usize,
}

impl Sizes {
    /// Scalars from one row to the next.
    pub fn stride(&self) -> usize {
        self.width + self.rank
    }

    fn scalars(&self) -> usize {
        (self.out + self.rank) * self.stride()
    }
}

/// What a product reads of the matrix; nothing else of it need be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    A,
    S,
    /// `[W S]`.
    Rows,
    /// `[W; A]`.
    Columns,
}

/// The matrix of a projection.
pub enum ProjectionMatrix<E> {
    /// As products read it.
    Whole(DeviceBuffer<E>),
    /// In parts, because some weights are in 4 bits.
    Parts(Parts<E>),
}

/// The parts of a matrix whose weights are frozen.
pub struct Parts<E> {
    /// The weights of each layer, and its rows.
    weights: Vec<(Frozen<E>, usize)>,
    a: DeviceBuffer<E>,
    s: DeviceBuffer<E>,
    scratch: Arc<Scratch>,
}

impl<E: GpuElement> Parts<E> {
    /// Puts the weights of all layers, each with its rows, beside factors that are zeros.
    pub fn new(
        gpu: &Gpu,
        sizes: Sizes,
        weights: Vec<(Frozen<E>, usize)>,
        scratch: &Arc<Scratch>,
    ) -> Result<Self, GpuError> {
        let rows = weights.iter().map(|(_, rows)| rows).sum::<usize>();
        assert_eq!(rows, sizes.out, "rows of a projection");
        let zeros = |scalars| gpu.upload(&vec![E::default(); scalars]);
        scratch.reserve::<E>(sizes.scalars());
        Ok(Self {
            weights,
            a: zeros(sizes.rank * sizes.width)?,
            s: zeros(sizes.out * sizes.rank)?,
            scratch: scratch.clone(),
        })
    }

    fn write(
        &self,
        gpu: &Gpu,
        sizes: Sizes,
        part: Part,
        to: &mut CudaViewMut<E>,
    ) -> Result<(), GpuError> {
        let Sizes { out, width, rank } = sizes;
        let stride = sizes.stride();
        if matches!(part, Part::Rows | Part::Columns) {
            let mut first = 0;
            for (weights, rows) in &self.weights {
                let to = &mut to.slice_mut(first * stride..);
                weights.write(gpu, [*rows, width], (to, stride))?;
                first += rows;
            }
        }
        if rank == 0 {
            return Ok(());
        }
        match part {
            Part::A | Part::Columns => {
                let to = &mut to.slice_mut(out * stride..);
                let from = (&self.a.as_view(), Rows::new(rank, width));
                copy_rows(gpu, from, (to, stride))
            }
            Part::S | Part::Rows => {
                let to = &mut to.slice_mut(width..);
                let from = (&self.s.as_view(), Rows::new(out, rank));
                copy_rows(gpu, from, (to, stride))
            }
        }
    }
}

impl<E: GpuElement> ProjectionMatrix<E> {
    /// Hands `work` a matrix of which this part is there.
    pub fn read(
        &self,
        gpu: &Gpu,
        (sizes, part): (Sizes, Part),
        work: impl FnOnce(&CudaView<E>) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        match self {
            Self::Whole(matrix) => work(&matrix.as_view()),
            Self::Parts(parts) => {
                let write = |to: &mut CudaViewMut<E>| parts.write(gpu, sizes, part, to);
                parts.scratch.with(gpu, sizes.scalars(), write, work)
            }
        }
    }

    /// The weights from this row on, to be written, and their stride. Those that are kept in parts are frozen.
    pub fn weights_mut(&mut self, sizes: Sizes, row: usize) -> Option<(CudaViewMut<'_, E>, usize)> {
        match self {
            Self::Whole(matrix) => {
                let stride = sizes.stride();
                Some((matrix.slice_mut(row * stride..), stride))
            }
            Self::Parts(_) => None,
        }
    }

    /// `A` from this row on, to be written, and its stride.
    pub fn a_mut(&mut self, sizes: Sizes, row: usize) -> (CudaViewMut<'_, E>, usize) {
        let (width, stride) = (sizes.width, sizes.stride());
        match self {
            Self::Whole(matrix) => (matrix.slice_mut((sizes.out + row) * stride..), stride),
            Self::Parts(parts) => (parts.a.slice_mut(row * width..), width),
        }
    }

    /// `S` from this row and column on, to be written, and its stride.
    pub fn s_mut(
        &mut self,
        sizes: Sizes,
        (row, column): (usize, usize),
    ) -> (CudaViewMut<'_, E>, usize) {
        let Sizes { width, rank, .. } = sizes;
        let stride = sizes.stride();
        match self {
            Self::Whole(matrix) => (matrix.slice_mut(row * stride + width + column..), stride),
            Self::Parts(parts) => (parts.s.slice_mut(row * rank + column..), rank),
        }
    }
}
