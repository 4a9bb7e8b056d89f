//! [`crate::engine::ops::swiglu`] on the GPU.

use common::model::Activation;
use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::Rows;
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{Gpu, Grid};
use crate::launch;

/// The number of an activation in the kernels.
pub(super) fn number(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    }
}

/// Computes `h`, with rows of `width`, from `gate_up` `[tokens][2 * width]`, the gates first.
pub fn forward<E: GpuElement>(
    gpu: &Gpu,
    gate_up: &CudaView<E>,
    (h, rows): (&mut CudaViewMut<E>, Rows),
    activation: Activation,
) -> Result<(), GpuError> {
    assert!(
        gate_up.len() == 2 * rows.rows * rows.columns && h.len() >= rows.len(),
        "gates"
    );
    let name = format!("swiglu_forward_{}", E::SUFFIX);
    let grid = Grid::scalars(rows.rows * rows.columns);
    let (tokens, width, stride) = (rows.rows as i64, rows.columns as i32, rows.stride as i32);
    let activation = number(activation);
    // SAFETY: both were checked to hold their rows.
    unsafe {
        launch!(
            gpu,
            &name,
            grid,
            [gate_up, h, &tokens, &width, &stride, &activation]
        )
    }
}

/// Writes the gradient of `gate_up`, and `h` as the forward pass had it.
pub fn backward<E: GpuElement>(
    gpu: &Gpu,
    gate_up: &CudaView<E>,
    dh: &CudaView<E>,
    (d_gate_up, d_rows): (&mut CudaViewMut<E>, Rows),
    (h, h_rows): (&mut CudaViewMut<E>, Rows),
    activation: Activation,
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
    let (grid, activation) = (Grid::scalars(scalars), number(activation));
    // SAFETY: all were checked to hold their rows.
    unsafe {
        launch!(
            gpu,
            &name,
            grid,
            [
                gate_up,
                dh,
                d_gate_up,
                h,
                &tokens,
                &width,
                &d_stride,
                &h_stride,
                &activation
            ]
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::testing::{assert_near, gpu};
    use crate::engine::ops::swiglu as plain;
    use crate::engine::testing::random_values;

    #[test]
    fn values_and_gradients_equal_those_of_the_processor() {
        let Some(gpu) = gpu() else { return };
        let (tokens, width) = (7, 24);
        let gate_up: Vec<f32> = random_values(tokens * 2 * width, 1)
            .into_iter()
            .map(|x| 4.0 * x)
            .collect();
        let dh = random_values(tokens * width, 2);
        let on_gpu = [&gate_up, &dh].map(|values| gpu.upload(values).unwrap());
        let [x, d] = [0, 1].map(|which: usize| on_gpu[which].as_view());
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let mut expected = vec![0.0f32; tokens * width];
            plain::forward(&gate_up, &mut expected, width, activation);
            let rows = Rows::strided(tokens, width, width + 8);
            let read = |buffer: &_, rows: Rows| -> Vec<f32> {
                let wide = gpu.download(buffer, rows.rows * rows.stride).unwrap();
                let rows = wide
                    .chunks_exact(rows.stride)
                    .map(|row| &row[..rows.columns]);
                rows.flatten().copied().collect()
            };
            let mut h = gpu.zeroed::<f32>(tokens * rows.stride).unwrap();
            forward(gpu, &x, (&mut h.as_view_mut(), rows), activation).unwrap();
            assert_near("h", &read(&h, rows), &expected, 1e-5);

            let (mut d_expected, mut again) = (vec![0.0f32; gate_up.len()], expected.clone());
            let outs = (&mut d_expected[..], &mut again[..]);
            plain::backward(&gate_up, &dh, outs, width, activation);
            let d_rows = Rows::strided(tokens, 2 * width, 2 * width + 8);
            let mut d_gate_up = gpu.zeroed::<f32>(tokens * d_rows.stride).unwrap();
            let mut h = gpu.zeroed::<f32>(tokens * rows.stride).unwrap();
            let outs = (
                (&mut d_gate_up.as_view_mut(), d_rows),
                (&mut h.as_view_mut(), rows),
            );
            backward(gpu, &x, &d, outs.0, outs.1, activation).unwrap();
            assert_near("d_gate_up", &read(&d_gate_up, d_rows), &d_expected, 1e-5);
            assert_near("h again", &read(&h, rows), &expected, 1e-5);
        }
    }
}
