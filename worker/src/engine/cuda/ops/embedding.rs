//! [`crate::engine::ops::embedding`] on the GPU.

use cudarc::driver::{CudaView, CudaViewMut};

use super::token_matrix::TokenMatrix;
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{Gpu, Grid};
use crate::engine::cuda::params::GradientSink;
use crate::launch;

const THREADS: u32 = 256;

/// Gathers rows `ids` of the `[vocabulary][width]` weight times `scale`, as float32 `[tokens][width]`. Every id is within the
/// vocabulary.
pub fn forward<E: GpuElement>(
    gpu: &Gpu,
    ids: &CudaView<u32>,
    weight: &TokenMatrix<E>,
    rows: &mut CudaViewMut<f32>,
    scale: f32,
) -> Result<(), GpuError> {
    weight.gather(gpu, ids, rows, scale)
}

/// Adds each token's gradient row times `scale` to its id's row, in token order, where the weight is trainable.
pub fn backward<E>(
    gpu: &Gpu,
    ids: &[u32],
    (weight, scale): (&TokenMatrix<E>, f32),
    gradient: &CudaView<f32>,
    sink: &mut dyn GradientSink,
) -> Result<(), GpuError> {
    let Some(range) = weight.range else {
        return Ok(());
    };
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|token| ids[*token as usize]);
    let (mut rows, mut ends) = (Vec::new(), Vec::new());
    for (index, token) in order.iter().enumerate() {
        let id = ids[*token as usize];
        if rows.last() == Some(&id) {
            ends.pop();
        } else {
            rows.push(id);
        }
        ends.push(index as u32 + 1);
    }
    let width = weight.width;
    let (order, ends, rows) = (gpu.upload(&order)?, gpu.upload(&ends)?, gpu.upload(&rows)?);
    let mut sums = gpu.take::<f32>(rows.len() * width)?;
    let grid = Grid::rows(ends.len(), THREADS);
    let columns = width as i32;
    // SAFETY: the groups hold each of the gradient's rows once, and there are sums for a row of each group.
    unsafe {
        launch!(
            gpu,
            "embedding_gradient",
            grid,
            [gradient, &order, &ends, &mut sums, &columns, &scale]
        )?;
    }
    sink.add_rows(gpu, range, &sums.as_view(), &rows.as_view())
}
