//! Fused differentiable operations, one a file: forward, backward, and the tests that compare both with a plain
//! reference. Each is a candle `CustomOp`; gradients of weights go to the sink that travels with the weight.
//!
//! Activations are float32, `[tokens, width]`, row-major. Work is split over fixed tiles, so that the bits never
//! depend on the number of threads.

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

pub mod attention;
#[cfg(target_arch = "x86_64")]
pub mod avx512_bf16;
pub mod cross_entropy;
pub mod embedding;
pub mod gemm;
pub mod linear;
pub mod lora_linear;
pub mod projection;
pub mod rms_norm;
pub mod rope;
pub mod segments;
pub mod swiglu;
pub mod vector;
mod widened;

/// Rows in one task of an operation that goes row by row.
const ROW_TILE: usize = 64;

/// The contiguous float32 data of an op's argument.
fn f32_slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("an operand that is not contiguous"),
    }
}

/// Shows the float32 data of a tensor.
pub fn with_f32<R>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => read(f32_slice(storage, layout)?),
        _ => candle_core::bail!("a tensor that is not on the CPU"),
    }
}

/// `sum += x`, on a tensor that nobody else holds.
pub fn add_in_place(sum: &Tensor, x: &Tensor) -> Result<()> {
    sum.inplace_op2(x, &AddInPlace)
}

struct AddInPlace;

impl InplaceOp2 for AddInPlace {
    fn name(&self) -> &'static str {
        "add_in_place"
    }

    fn cpu_fwd(
        &self,
        sum: &mut CpuStorage,
        sum_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<()> {
        let x = f32_slice(x, x_layout)?;
        let CpuStorage::F32(sum) = sum else {
            candle_core::bail!("a sum that is not float32");
        };
        if !sum_layout.is_contiguous() || sum_layout.start_offset() != 0 || sum.len() != x.len() {
            candle_core::bail!("a sum of other shape");
        }
        const TILE: usize = 1 << 14;
        sum.par_chunks_mut(TILE)
            .zip(x.par_chunks(TILE))
            .for_each(|(sum, x)| {
                vector::dispatch(
                    #[inline(always)]
                    || vector::add_scaled(sum, x, 1.0),
                );
            });
        Ok(())
    }
}

/// What a forward pass returns: `[rows, width]`.
fn output(data: Vec<f32>, rows: usize, width: usize) -> (CpuStorage, Shape) {
    (CpuStorage::F32(data), Shape::from((rows, width)))
}

fn to_tensor(data: Vec<f32>, rows: usize, width: usize) -> Result<Tensor> {
    Tensor::from_vec(data, (rows, width), &candle_core::Device::Cpu)
}

/// Adds per-tile partial sums into a weight's gradient, in tile order.
fn add_partials(gradient: &mut [f32], accumulate: bool, partials: &[Vec<f32>]) {
    if !accumulate {
        gradient.fill(0.0);
    }
    for partial in partials {
        vector::dispatch(
            #[inline(always)]
            || vector::add_scaled(gradient, partial, 1.0),
        );
    }
}

/// Sums the rows of a strided matrix into `sums`, each column from top to bottom.
fn column_sums(sums: &mut [f32], accumulate: bool, data: &[f32], stride: usize, rows: usize) {
    const COLUMNS: usize = 128;
    sums.par_chunks_mut(COLUMNS)
        .enumerate()
        .for_each(|(tile, sums)| {
            if !accumulate {
                sums.fill(0.0);
            }
            for row in 0..rows {
                let start = row * stride + tile * COLUMNS;
                vector::dispatch(
                    #[inline(always)]
                    || vector::add_scaled(sums, &data[start..start + sums.len()], 1.0),
                );
            }
        });
}
