//! Matrices of 4 bits a scalar on the GPU, as [`common::nf4`] has them. In: the parts of a matrix. Out: some of its scalars, in the
//! type that products are computed in, with the bits that they have on the processor.

use common::nf4::{Nf4, Scales};
use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::Rows;
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::launch;

/// Scalars that a thread widens at a time (`GROUP` in the kernel).
const GROUP: usize = 8;

/// A matrix of 4 bits a scalar, row after row; a block may go on in the next row.
pub struct FourBits {
    /// All of its parts one after the other, as the kernel has them.
    bytes: DeviceBuffer<u8>,
    scalars: usize,
    /// Where the codes begin, and those of scales that are nested.
    codes: i64,
    scale_codes: i64,
    /// Logarithms of the scalars that share a scale, and of the scales that do; negative where none are nested.
    block: i32,
    nested_block: i32,
    /// What was subtracted from each scale that is nested.
    offset: f32,
}

/// Some columns of some rows of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Columns of the whole matrix.
    pub width: usize,
    pub first_row: usize,
    pub rows: usize,
    pub first_column: usize,
    pub columns: usize,
}

impl Window {
    /// A whole matrix.
    pub fn whole([rows, width]: [usize; 2]) -> Self {
        Self {
            width,
            first_row: 0,
            rows,
            first_column: 0,
            columns: width,
        }
    }
}

impl FourBits {
    /// Copies a matrix to the GPU.
    pub fn upload(gpu: &Gpu, matrix: &Nf4) -> Result<Self, GpuError> {
        let mut floats = matrix.levels().to_vec();
        let (scale_codes, nested_block, offset) = match matrix.scales() {
            Scales::Plain(absmax) => {
                floats.extend_from_slice(absmax);
                (&[][..], -1, 0.0)
            }
            Scales::Nested(nested) => {
                let (codes, absmax, offset) = nested.parts();
                floats.extend_from_slice(nested.map());
                floats.extend_from_slice(absmax);
                (codes, nested.block().trailing_zeros() as i32, offset)
            }
        };
        let floats: &[u8] = bytemuck::cast_slice(&floats);
        let bytes = [floats, matrix.codes(), scale_codes].concat();
        Ok(Self {
            bytes: gpu.upload(&bytes)?,
            scalars: matrix.scalars(),
            codes: floats.len() as i64,
            scale_codes: (floats.len() + matrix.codes().len()) as i64,
            block: matrix.block().trailing_zeros() as i32,
            nested_block,
            offset,
        })
    }

    /// Bytes that the matrix takes.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Writes a window of the matrix to rows `stride` apart.
    pub fn widen<E: GpuElement>(
        &self,
        gpu: &Gpu,
        window: Window,
        (to, stride): (&mut CudaViewMut<E>, usize),
    ) -> Result<(), GpuError> {
        let Window {
            width,
            first_row,
            rows,
            first_column,
            columns,
        } = window;
        assert!(
            (first_row + rows) * width <= self.scalars && first_column + columns <= width,
            "a window of {window:?} in {} scalars",
            self.scalars
        );
        let written = Rows::strided(rows, columns, stride);
        assert!(to.len() >= written.len(), "room for {window:?}");
        if written.is_empty() {
            return Ok(());
        }
        let name = format!("widen_4bit_{}", E::SUFFIX);
        let grid = Grid::scalars(rows * columns.div_ceil(GROUP));
        let first = (first_row * width + first_column) as i64;
        let (rows, columns, width) = (rows as i64, columns as i32, width as i32);
        let stride = stride as i32;
        // SAFETY: the window lies in the matrix, whose parts fit each other, and there is room for it.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [
                    &self.bytes,
                    &self.codes,
                    &self.scale_codes,
                    &self.block,
                    &self.nested_block,
                    &self.offset,
                    to,
                    &first,
                    &rows,
                    &columns,
                    &width,
                    &stride
                ]
            )
        }
    }

    /// `out[i] = scale · matrix[rows[i]]`, of what each scalar is when rounded to `E`. Every number is that of a row.
    pub fn gather<E: GpuElement>(
        &self,
        gpu: &Gpu,
        rows: &CudaView<u32>,
        (out, width): (&mut CudaViewMut<f32>, usize),
        scale: f32,
    ) -> Result<(), GpuError> {
        assert_eq!(out.len(), rows.len() * width, "rows by number");
        let name = format!("gather_4bit_{}", E::SUFFIX);
        let grid = Grid::scalars(out.len());
        let (count, width) = (rows.len() as i64, width as i32);
        // SAFETY: the batch was checked to name rows that there are.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [
                    &self.bytes,
                    &self.codes,
                    &self.scale_codes,
                    &self.block,
                    &self.nested_block,
                    &self.offset,
                    rows,
                    out,
                    &count,
                    &width,
                    &scale
                ]
            )
        }
    }
}

/// `to = from`, row by row.
pub fn copy_rows<E: GpuElement>(
    gpu: &Gpu,
    (from, from_rows): (&CudaView<E>, Rows),
    (to, to_stride): (&mut CudaViewMut<E>, usize),
) -> Result<(), GpuError> {
    let Rows { rows, columns, .. } = from_rows;
    let to_rows = Rows::strided(rows, columns, to_stride);
    assert!(
        from.len() >= from_rows.len() && to.len() >= to_rows.len(),
        "rows to copy"
    );
    if from_rows.is_empty() {
        return Ok(());
    }
    let name = format!("copy_rows_{}", E::SUFFIX);
    let grid = Grid::scalars(rows * columns);
    let (rows, columns) = (rows as i64, columns as i32);
    let (from_stride, to_stride) = (from_rows.stride as i32, to_stride as i32);
    // SAFETY: both sides were checked to hold their rows.
    unsafe {
        launch!(
            gpu,
            &name,
            grid,
            [from, to, &rows, &columns, &from_stride, &to_stride]
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
