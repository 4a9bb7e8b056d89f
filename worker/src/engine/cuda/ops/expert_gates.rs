//! What is between an expert's layers, on the GPU: [`crate::engine::ops::swiglu`] or [`crate::engine::ops::clamped_swiglu`] on the
//! rows of all experts.

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::Rows;
use super::swiglu;
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{Gpu, Grid};
use crate::engine::model::layers::expert::Gating;
use crate::launch;

const THREADS: u32 = 256;

/// What the backward pass reads, all of it of the same rows.
pub struct Saved<'a, E> {
    /// Gates and ups, `[rows][2 * width]`.
    pub gate_up: &'a CudaView<'a, E>,
    /// Gradient of `h` as if it had no weight, `[rows][width]`.
    pub dh: &'a CudaView<'a, f32>,
    /// Weight of each row.
    pub weights: &'a CudaView<'a, f32>,
}

/// What it writes.
pub struct Gradients<'a, 'b, E> {
    pub d_gate_up: &'a mut CudaViewMut<'b, E>,
    /// `h` as the forward pass had it.
    pub h: &'a mut CudaViewMut<'b, E>,
    /// Gradient of the weight of each row, but for what a bias behind `h` adds to it.
    pub d_weights: &'a mut CudaViewMut<'b, f32>,
}

/// Computes `h`, `[rows][width]`, from `gate_up`, `[rows][2 * width]`.
pub fn forward<E: GpuElement>(
    gpu: &Gpu,
    gating: Gating,
    gate_up: &CudaView<E>,
    h: &mut CudaViewMut<E>,
    width: usize,
) -> Result<(), GpuError> {
    assert!(
        gate_up.len() == 2 * h.len() && h.len().is_multiple_of(width),
        "gates"
    );
    if h.is_empty() {
        return Ok(());
    }
    match gating {
        Gating::Halves(activation) => {
            let rows = Rows::new(h.len() / width, width);
            swiglu::forward(gpu, gate_up, (h, rows), activation)
        }
        Gating::Alternating(clamped) => {
            let scalars = h.len() as i64;
            // SAFETY: there are a gate and an up for each scalar.
            unsafe {
                launch!(
                    gpu,
                    &format!("clamped_swiglu_{}", E::SUFFIX),
                    Grid::scalars(h.len()),
                    [gate_up, h, &scalars, &clamped.alpha, &clamped.limit]
                )
            }
        }
    }
}

/// Computes the gradients of gate and up, and of the weights of rows.
pub fn backward<E: GpuElement>(
    gpu: &Gpu,
    gating: Gating,
    saved: &Saved<E>,
    gradients: Gradients<E>,
) -> Result<(), GpuError> {
    let Gradients {
        d_gate_up,
        h,
        d_weights,
    } = gradients;
    let (rows, scalars) = (saved.weights.len(), saved.dh.len());
    assert!(
        saved.gate_up.len() == 2 * scalars
            && d_gate_up.len() == 2 * scalars
            && h.len() == scalars
            && d_weights.len() == rows
            && scalars.is_multiple_of(rows.max(1)),
        "gates and their gradients"
    );
    if scalars == 0 {
        return Ok(());
    }
    let width = (scalars / rows) as i32;
    let (number, alpha, limit) = match gating {
        Gating::Halves(activation) => (swiglu::number(activation), 0.0, 0.0),
        Gating::Alternating(clamped) => (2, clamped.alpha, clamped.limit),
    };
    // SAFETY: all lengths have just been checked.
    unsafe {
        launch!(
            gpu,
            &format!("expert_gates_backward_{}", E::SUFFIX),
            Grid::rows(rows, THREADS),
            [
                saved.gate_up,
                saved.dh,
                saved.weights,
                d_gate_up,
                h,
                d_weights,
                &width,
                &number,
                &alpha,
                &limit
            ]
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use common::model::Activation;

    use super::*;
    use crate::engine::cuda::testing::{assert_near, gpu};
    use crate::engine::ops::clamped_swiglu::ClampedSwiglu;
    use crate::engine::ops::token_rows::{dots, scale};
    use crate::engine::testing::random_values;

    #[test]
    fn values_and_gradients_equal_those_of_the_processor() {
        let Some(gpu) = gpu() else { return };
        let (rows, width) = (9, 300);
        let gate_up: Vec<f32> = random_values(rows * 2 * width, 1)
            .into_iter()
            .map(|x| 4.0 * x)
            .collect();
        let (dh, weights) = (random_values(rows * width, 2), random_values(rows, 3));
        let [x, d, w] = [&gate_up, &dh, &weights].map(|values| gpu.upload(values).unwrap());
        let clamped = ClampedSwiglu {
            alpha: 1.7,
            limit: 2.0,
        };
        for gating in [
            Gating::Halves(Activation::Silu),
            Gating::Halves(Activation::GeluTanh),
            Gating::Alternating(clamped),
        ] {
            let mut expected = vec![0.0f32; rows * width];
            gating.forward(&gate_up, &mut expected, width);
            let mut h = gpu.take::<f32>(rows * width).unwrap();
            forward(gpu, gating, &x.as_view(), &mut h.as_view_mut(), width).unwrap();
            let found = gpu.download(&h, rows * width).unwrap();
            assert_near("h", &found, &expected, 1e-5);

            let mut products = vec![0.0; rows];
            dots(&dh, &expected, &mut products, width);
            let (mut weighted, mut again) = (dh.clone(), expected.clone());
            scale(&mut weighted, &weights, width);
            let mut d_expected = vec![0.0f32; gate_up.len()];
            gating.backward(&gate_up, &weighted, (&mut d_expected, &mut again), width);
            let mut d_gate_up = gpu.take::<f32>(gate_up.len()).unwrap();
            let mut h = gpu.take::<f32>(rows * width).unwrap();
            let mut d_weights = gpu.take::<f32>(rows).unwrap();
            let saved = Saved {
                gate_up: &x.as_view(),
                dh: &d.as_view(),
                weights: &w.as_view(),
            };
            let gradients = Gradients {
                d_gate_up: &mut d_gate_up.as_view_mut(),
                h: &mut h.as_view_mut(),
                d_weights: &mut d_weights.as_view_mut(),
            };
            backward(gpu, gating, &saved, gradients).unwrap();
            let read = |buffer, length| gpu.download(buffer, length).unwrap();
            assert_near("h again", &read(&h, expected.len()), &expected, 1e-5);
            let found = read(&d_gate_up, d_expected.len());
            assert_near("d_gate_up", &found, &d_expected, 1e-5);
            assert_near("d_weights", &read(&d_weights, rows), &products, 1e-5);
        }
    }
}
