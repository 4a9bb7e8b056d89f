//! Speed of the GPU's matrix products alone, to measure training by.

use std::time::Instant;

use super::blas::{GpuElement, Matrix, Target};
use super::error::GpuError;
use super::gpu::Gpu;
use crate::engine::ops::element::Element;

/// Length of each side of the product: large enough for the chip, small enough for its memory.
const SIDE: usize = 8192;
const ROUNDS: usize = 10;

/// Speed of a large product in GFLOP/s.
pub fn product_gflops<E: GpuElement + Element>(gpu: &Gpu) -> Result<f64, GpuError> {
    let values: Vec<E> = (0..SIDE * SIDE)
        .map(|i| E::round_from((i * 2_654_435_761 % 1000) as f32 / 1000.0 - 0.5))
        .collect();
    let (a, b) = (gpu.upload(&values)?, gpu.upload(&values)?);
    let (a, b) = (a.as_view(), b.as_view());
    let mut out = gpu.take::<E>(SIDE * SIDE)?;
    let mut product = || {
        let factors = (Matrix::new(&a, SIDE, SIDE), Matrix::new(&b, SIDE, SIDE));
        let out = &mut out.as_view_mut();
        gpu.blas()
            .product(Target::new(out, SIDE), factors.0, factors.1.transposed())
    };
    product()?;
    gpu.wait()?;
    let started = Instant::now();
    for _ in 0..ROUNDS {
        product()?;
    }
    gpu.wait()?;
    let flop = 2.0 * (SIDE as f64).powi(3) * ROUNDS as f64;
    Ok(flop / started.elapsed().as_secs_f64() / 1e9)
}
