//! The exact sum and the update on the GPU: rounding by rounding what [`common::exact`] and [`crate::engine::optim`] do.

use common::exact::FixedPoint;
use cudarc::driver::{CudaView, CudaViewMut};

use crate::engine::cuda::GpuError;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::optim::{Factors, NORM_CHUNK};
use crate::launch;

const THREADS: u32 = 256;

/// Adds gradients to sums in fixed point, and counts in `invalid` those that were not finite or out of range.
pub fn exact_accumulate(
    gpu: &Gpu,
    rule: &FixedPoint,
    sums: &mut CudaViewMut<i64>,
    gradient: &CudaView<f32>,
    invalid: &mut DeviceBuffer<u64>,
) -> Result<(), GpuError> {
    assert_eq!(sums.len(), gradient.len(), "a gradient of another layout");
    let (scalars, tokens, limit) = (sums.len() as i64, rule.trained_tokens(), rule.limit());
    let grid = Grid::scalars(sums.len());
    // SAFETY: sums and gradient are as long as the kernel goes, and the count is one number.
    unsafe {
        launch!(
            gpu,
            "exact_accumulate",
            grid,
            [sums, gradient, invalid, &scalars, &tokens, &limit]
        )
    }
}

/// `sums += factor · gradient` in float32.
pub fn fast_accumulate(
    gpu: &Gpu,
    sums: &mut CudaViewMut<f32>,
    gradient: &CudaView<f32>,
    factor: f32,
) -> Result<(), GpuError> {
    assert_eq!(sums.len(), gradient.len(), "a gradient of another layout");
    let scalars = sums.len() as i64;
    // SAFETY: both are as long as the kernel goes.
    unsafe {
        launch!(
            gpu,
            "fast_accumulate",
            Grid::scalars(sums.len()),
            [sums, gradient, &scalars, &factor]
        )
    }
}

/// Adds as [`exact_accumulate`] does, to some rows of a matrix: `gradient` has one for each of `rows`, which are different ones.
pub fn exact_accumulate_rows(
    gpu: &Gpu,
    rule: &FixedPoint,
    sums: &mut CudaViewMut<i64>,
    (gradient, rows): (&CudaView<f32>, &CudaView<u32>),
    invalid: &mut DeviceBuffer<u64>,
) -> Result<(), GpuError> {
    let (count, width) = shape_of(rows, gradient);
    let (tokens, limit) = (rule.trained_tokens(), rule.limit());
    let grid = Grid::scalars(gradient.len());
    // SAFETY: the rows are ids of the vocabulary, which has a row of sums for each.
    unsafe {
        launch!(
            gpu,
            "exact_accumulate_rows",
            grid,
            [
                sums, gradient, rows, invalid, &count, &width, &tokens, &limit
            ]
        )
    }
}

/// Adds as [`fast_accumulate`] does, to some rows of a matrix.
pub fn fast_accumulate_rows(
    gpu: &Gpu,
    sums: &mut CudaViewMut<f32>,
    (gradient, rows): (&CudaView<f32>, &CudaView<u32>),
    factor: f32,
) -> Result<(), GpuError> {
    let (count, width) = shape_of(rows, gradient);
    let grid = Grid::scalars(gradient.len());
    // SAFETY: the rows are ids of the vocabulary, which has a row of sums for each.
    unsafe {
        launch!(
            gpu,
            "fast_accumulate_rows",
            grid,
            [sums, gradient, rows, &count, &width, &factor]
        )
    }
}

/// Number of rows, and the width of each one's gradient.
fn shape_of(rows: &CudaView<u32>, gradient: &CudaView<f32>) -> (i64, i32) {
    let width = gradient.len() / rows.len().max(1);
    assert_eq!(
        rows.len() * width,
        gradient.len(),
        "a gradient for each row"
    );
    (rows.len() as i64, width as i32)
}

/// Computes the mean gradients that finished sums stand for.
pub fn exact_means(
    gpu: &Gpu,
    sums: &CudaView<i64>,
    means: &mut CudaViewMut<f32>,
) -> Result<(), GpuError> {
    assert_eq!(sums.len(), means.len(), "a mean for each sum");
    let scalars = sums.len() as i64;
    // SAFETY: both are as long as the kernel goes.
    unsafe {
        launch!(
            gpu,
            "exact_means",
            Grid::scalars(sums.len()),
            [sums, means, &scalars]
        )
    }
}

/// Sums the squares, in float64, of each chunk of 65,536 scalars.
pub fn squares(gpu: &Gpu, x: &CudaView<f32>) -> Result<Vec<f64>, GpuError> {
    let chunks = x.len().div_ceil(NORM_CHUNK);
    if chunks == 0 {
        return Ok(Vec::new());
    }
    let mut sums = gpu.take::<f64>(chunks)?;
    let grid = Grid {
        shared: THREADS * size_of::<f64>() as u32,
        ..Grid::rows(chunks, THREADS)
    };
    let (scalars, chunk) = (x.len() as i64, NORM_CHUNK as i64);
    // SAFETY: there is a sum for each chunk, and shared memory for a number of each thread.
    unsafe { launch!(gpu, "squares", grid, [x, &mut sums, &scalars, &chunk])? };
    gpu.download(&sums, chunks)
}

/// Updates one tensor by AdamW, in one pass.
pub(in crate::engine) fn adamw(
    gpu: &Gpu,
    factors: &Factors,
    weights: &mut CudaViewMut<f32>,
    (exp_avg, exp_avg_sq): (&mut CudaViewMut<f32>, &mut CudaViewMut<f32>),
    gradient: &CudaView<f32>,
) -> Result<(), GpuError> {
    let scalars = weights.len();
    assert!(
        exp_avg.len() == scalars && exp_avg_sq.len() == scalars && gradient.len() == scalars,
        "weights, moments and gradient differ in length"
    );
    let length = scalars as i64;
    let Factors {
        gradient_scale,
        keep,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        correction2_sqrt,
        epsilon,
        step_size,
    } = factors;
    let grid = Grid::scalars(scalars);
    // SAFETY: all are as long as the kernel goes.
    unsafe {
        launch!(
            gpu,
            "adamw",
            grid,
            [
                weights,
                exp_avg,
                exp_avg_sq,
                gradient,
                &length,
                gradient_scale,
                keep,
                one_minus_beta1,
                beta2,
                one_minus_beta2,
                correction2_sqrt,
                epsilon,
                step_size
            ]
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::testing::gpu;
    use crate::engine::mean_gradient::MeanSource;
    use crate::engine::optim::{AdamW, Update, gradient_norm};
    use crate::engine::testing::random_values;

    #[test]
    fn sums_and_means_are_those_of_the_processor_to_the_bit() {
        let Some(gpu) = gpu() else { return };
        let rule = FixedPoint::new(37, 8);
        let mut gradient = random_values(1000, 1);
        gradient.extend([f32::NAN, f32::INFINITY, 1e30, -1e30, 0.0, 1e-20]);
        let mut expected = vec![0i64; gradient.len()];
        let mut sums = gpu.zeroed::<i64>(gradient.len()).unwrap();
        let mut invalid = gpu.zeroed::<u64>(1).unwrap();
        let mut count = 0;
        for scale in [1.0f32, -0.3, 1e-6] {
            let gradient: Vec<f32> = gradient.iter().map(|g| g * scale).collect();
            count += rule.accumulate(&mut expected, &gradient);
            let gradient = gpu.upload(&gradient).unwrap();
            let mut view = sums.as_view_mut();
            exact_accumulate(gpu, &rule, &mut view, &gradient.as_view(), &mut invalid).unwrap();
        }
        assert_eq!(gpu.download(&sums, expected.len()).unwrap(), expected);
        assert_eq!(gpu.download(&invalid, 1).unwrap(), [count]);
        let mut means = gpu.take::<f32>(expected.len()).unwrap();
        exact_means(gpu, &sums.as_view(), &mut means.as_view_mut()).unwrap();
        let means = gpu.download(&means, expected.len()).unwrap();
        let expected: Vec<f32> = expected
            .into_iter()
            .map(common::exact::dequantize)
            .collect();
        assert_eq!(means, expected);
    }

    #[test]
    fn updates_are_those_of_the_processor_to_the_bit() {
        let Some(gpu) = gpu() else { return };
        let optimizer = AdamW {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
        };
        let scalars = 70_000;
        let (mut w, mut m, mut v) = (
            random_values(scalars, 1),
            vec![0.0; scalars],
            vec![0.0; scalars],
        );
        let on_gpu = |values: &[f32]| gpu.upload(values).unwrap();
        let (mut w_gpu, mut m_gpu, mut v_gpu) = (on_gpu(&w), on_gpu(&m), on_gpu(&v));
        for number in 1..4 {
            let gradient = random_values(scalars, 10 + number);
            let update = Update {
                number,
                learning_rate: 0.01,
                gradient_scale: 0.7,
            };
            optimizer.update(
                &update,
                &mut w,
                &mut m,
                &mut v,
                (MeanSource::Values(&gradient), 0),
            );
            let uploaded = on_gpu(&gradient);
            let found = squares(gpu, &uploaded.as_view())
                .unwrap()
                .iter()
                .sum::<f64>()
                .sqrt();
            assert!((found / gradient_norm(MeanSource::Values(&gradient)) - 1.0).abs() < 1e-12);
            let moments = (&mut m_gpu.as_view_mut(), &mut v_gpu.as_view_mut());
            let factors = optimizer.factors(&update);
            adamw(
                gpu,
                &factors,
                &mut w_gpu.as_view_mut(),
                moments,
                &uploaded.as_view(),
            )
            .unwrap();
        }
        for (found, expected) in [(w_gpu, w), (m_gpu, m), (v_gpu, v)] {
            assert_eq!(gpu.download(&found, scalars).unwrap(), expected);
        }
    }
}
