//! The exact sum and the update on the GPU: rounding by rounding what [`common::exact`] and [`crate::engine::optim`] do.

use common::exact::FixedPoint;
use cudarc::driver::{CudaView, CudaViewMut};

use crate::engine::cuda::GpuError;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::cuda::moments::GpuMomentPart;
use crate::engine::optim::{
    Factors, LionFactors, NORM_CHUNK, Rule, SgdFactors, TensorUpdate, Update,
};
use crate::launch;

mod eight_bits;

use eight_bits::In8Bit;

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

/// Updates one tensor, or a part of it, in one pass. Muon, which needs all of a matrix, is refused where a job is loaded.
pub(in crate::engine) fn update_tensor(
    gpu: &Gpu,
    (rule, update): (&TensorUpdate, &Update),
    weights: &mut CudaViewMut<f32>,
    (mut moments, codebooks): (Vec<GpuMomentPart>, &DeviceBuffer<f32>),
    gradient: &CudaView<f32>,
) -> Result<(), GpuError> {
    use GpuMomentPart::Float32;
    let update = &update.at_rate(rule.rate);
    let in_8bit = In8Bit {
        gpu,
        gradient,
        codebooks,
    };
    match (&rule.rule, &mut moments[..]) {
        (Rule::AdamW(rule), [Float32(exp_avg), Float32(exp_avg_sq)]) => {
            let factors = rule.factors(update);
            adamw(gpu, &factors, weights, (exp_avg, exp_avg_sq), gradient)
        }
        (Rule::AdamW(rule), [exp_avg, exp_avg_sq]) => {
            in_8bit.adamw(&rule.factors(update), weights, [exp_avg, exp_avg_sq])
        }
        (Rule::Lion(rule), [Float32(moment)]) => {
            lion(gpu, &rule.factors(update), weights, moment, gradient)
        }
        (Rule::Lion(rule), [moment]) => in_8bit.lion(&rule.factors(update), weights, moment),
        (Rule::Sgd(rule), []) => sgd(gpu, &rule.factors(update), weights, None, gradient),
        (Rule::Sgd(rule), [Float32(momentum)]) => sgd(
            gpu,
            &rule.factors(update),
            weights,
            Some(momentum),
            gradient,
        ),
        (rule, moments) => unreachable!("{rule:?} with {} moments on a GPU", moments.len()),
    }
}

fn lion(
    gpu: &Gpu,
    factors: &LionFactors,
    weights: &mut CudaViewMut<f32>,
    moment: &mut CudaViewMut<f32>,
    gradient: &CudaView<f32>,
) -> Result<(), GpuError> {
    let scalars = weights.len();
    assert!(
        moment.len() == scalars && gradient.len() == scalars,
        "weights, moment and gradient differ in length"
    );
    let length = scalars as i64;
    let LionFactors {
        gradient_scale,
        keep,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        learning_rate,
    } = factors;
    // SAFETY: all are as long as the kernel goes.
    unsafe {
        launch!(
            gpu,
            "lion",
            Grid::scalars(scalars),
            [
                weights,
                moment,
                gradient,
                &length,
                gradient_scale,
                keep,
                beta1,
                one_minus_beta1,
                beta2,
                one_minus_beta2,
                learning_rate
            ]
        )
    }
}

fn sgd(
    gpu: &Gpu,
    factors: &SgdFactors,
    weights: &mut CudaViewMut<f32>,
    momentum: Option<&mut CudaViewMut<f32>>,
    gradient: &CudaView<f32>,
) -> Result<(), GpuError> {
    let scalars = weights.len();
    assert!(
        momentum
            .as_ref()
            .is_none_or(|momentum| momentum.len() == scalars)
            && gradient.len() == scalars,
        "weights, momentum and gradient differ in length"
    );
    let (length, grid) = (scalars as i64, Grid::scalars(scalars));
    let SgdFactors {
        gradient_scale,
        weight_decay,
        momentum: kept,
        one_minus_dampening,
        nesterov,
        learning_rate,
    } = factors;
    let (is_nesterov, share) = (i32::from(nesterov.is_some()), nesterov.unwrap_or(0.0));
    match momentum {
        // SAFETY: both are as long as the kernel goes.
        None => unsafe {
            launch!(
                gpu,
                "sgd",
                grid,
                [
                    weights,
                    gradient,
                    &length,
                    gradient_scale,
                    weight_decay,
                    learning_rate
                ]
            )
        },
        // SAFETY: all are as long as the kernel goes.
        Some(momentum) => unsafe {
            launch!(
                gpu,
                "sgd_momentum",
                grid,
                [
                    weights,
                    momentum,
                    gradient,
                    &length,
                    gradient_scale,
                    weight_decay,
                    kept,
                    one_minus_dampening,
                    &is_nesterov,
                    &share,
                    learning_rate
                ]
            )
        },
    }
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
mod tests;
