//! [`crate::engine::ops::swiglu`] on the GPU.

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::Rows;
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{Gpu, Grid};
use crate::launch;

/// Computes `h`, with rows of `width`, from `gate_up` `[tokens][2 * width]`, the gates first.
pub fn forward<E: GpuElement>(
    gpu: &Gpu,
    gate_up: &CudaView<E>,
    (h, rows): (&mut CudaViewMut<E>, Rows),
) -> Result<(), GpuError> {
    assert!(
        gate_up.len() == 2 * rows.rows * rows.columns && h.len() >= rows.len(),
        "gates"
    );
    let name = format!("swiglu_forward_{}", E::SUFFIX);
    let grid = Grid::scalars(rows.rows * rows.columns);
    let (tokens, width, stride) = (rows.rows as i64, rows.columns as i32, rows.stride as i32);
    // SAFETY: both were checked to hold their rows.
    unsafe { launch!(gpu, &name, grid, [gate_up, h, &tokens, &width, &stride]) }
}

/// Writes the gradient of `gate_up`, and `h` as the forward pass had it.
pub fn backward<E: GpuElement>(
    gpu: &Gpu,
    gate_up: &CudaView<E>,
    dh: &CudaView<E>,
    (d_gate_up, d_rows): (&mut CudaViewMut<E>, Rows),
    (h, h_rows): (&mut CudaViewMut<E>, Rows),
) -> Result<(), GpuError> {
    let scalars = h_rows.rows * h_rows.columns;
    assert!(
        gate_up.len() == 2 * scalars
            && dh.len() == scalars
            && d_rows.columns == 2 * h_rows.columns
            && d_gate_up.len() >= d_rows.len()
            && h.len() >= h_rows.len(),
        "gates and their gradients"
    );
    let name = format!("swiglu_backward_{}", E::SUFFIX);
    let (tokens, width) = (h_rows.rows as i64, h_rows.columns as i32);
    let (d_stride, h_stride) = (d_rows.stride as i32, h_rows.stride as i32);
    let grid = Grid::scalars(scalars);
    // SAFETY: all were checked to hold their rows.
    unsafe {
        launch!(
            gpu,
            &name,
            grid,
            [
                gate_up, dh, d_gate_up, h, &tokens, &width, &d_stride, &h_stride
            ]
        )
    }
}
