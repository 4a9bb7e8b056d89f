//! Rows of tokens in their experts, on the GPU ([`crate::engine::ops::token_rows`] on the processor): taken out of the rows of all
//! tokens, and added to them again. What a token's experts give is summed in their order, by one thread for each column.

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::Rows;
use super::routing::Routes;
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{Gpu, Grid};
use crate::launch;

const THREADS: u32 = 256;

/// Takes the row of its token for each row out of `x`, `[tokens][width]`; zeros where it is nobody's.
pub fn gather<E: GpuElement>(
    gpu: &Gpu,
    x: &CudaView<E>,
    routes: &Routes,
    rows: &mut CudaViewMut<E>,
) -> Result<(), GpuError> {
    let name = format!("gather_tokens_{}", E::SUFFIX);
    gather_by(gpu, &name, x, routes, rows)
}

/// [`gather`] out of float32 rows, which are rounded.
pub fn gather_rounded<E: GpuElement>(
    gpu: &Gpu,
    x: &CudaView<f32>,
    routes: &Routes,
    rows: &mut CudaViewMut<E>,
) -> Result<(), GpuError> {
    let name = format!("gather_rounded_{}", E::SUFFIX);
    gather_by(gpu, &name, x, routes, rows)
}

fn gather_by<From: GpuElement, E: GpuElement>(
    gpu: &Gpu,
    name: &str,
    x: &CudaView<From>,
    routes: &Routes,
    rows: &mut CudaViewMut<E>,
) -> Result<(), GpuError> {
    let width = width_of(x.len(), routes.batch_tokens());
    assert_eq!(rows.len(), routes.rows() * width, "rows of all experts");
    if rows.is_empty() {
        return Ok(());
    }
    let (grid, tokens) = (Grid::rows(routes.rows(), THREADS), routes.tokens());
    let width = width as i32;
    // SAFETY: each row is of a token of x, or of nobody, and as wide.
    unsafe { launch!(gpu, name, grid, [x, &tokens, rows, &width]) }
}

/// `y = x +` what the experts of each token gave, each times its weight.
pub fn add_weighted(
    gpu: &Gpu,
    (x, rows): (&CudaView<f32>, &CudaView<f32>),
    routes: &Routes,
    y: &mut CudaViewMut<f32>,
) -> Result<(), GpuError> {
    let width = width_of(y.len(), routes.batch_tokens());
    assert!(
        x.len() == y.len() && rows.len() == routes.rows() * width,
        "rows of all experts"
    );
    if y.is_empty() {
        return Ok(());
    }
    let grid = Grid::rows(routes.batch_tokens(), THREADS);
    let (weights, of_token) = (routes.weights(), routes.of_token());
    let (per_token, width) = (routes.per_token() as i32, width as i32);
    // SAFETY: x and y have a row for each token, and rows those that the token has.
    unsafe {
        launch!(
            gpu,
            "add_expert_rows",
            grid,
            [x, rows, &weights, &of_token, y, &per_token, &width]
        )
    }
}

/// `y =` the sum of the rows of each token.
pub fn sum(
    gpu: &Gpu,
    rows: &CudaView<f32>,
    routes: &Routes,
    y: &mut CudaViewMut<f32>,
) -> Result<(), GpuError> {
    let width = width_of(y.len(), routes.batch_tokens());
    assert_eq!(rows.len(), routes.rows() * width, "rows of all experts");
    if y.is_empty() {
        return Ok(());
    }
    let (grid, of_token) = (
        Grid::rows(routes.batch_tokens(), THREADS),
        routes.of_token(),
    );
    let (per_token, width) = (routes.per_token() as i32, width as i32);
    // SAFETY: y has a row for each token, and rows those that the token has.
    unsafe {
        launch!(
            gpu,
            "sum_expert_rows",
            grid,
            [rows, &of_token, y, &per_token, &width]
        )
    }
}

/// Multiplies each row by its weight.
pub fn scale<E: GpuElement>(
    gpu: &Gpu,
    rows: &mut CudaViewMut<E>,
    weights: &CudaView<f32>,
) -> Result<(), GpuError> {
    let width = width_of(rows.len(), weights.len());
    if rows.is_empty() {
        return Ok(());
    }
    let (name, columns) = (format!("scale_rows_{}", E::SUFFIX), width as i32);
    let grid = Grid::rows(weights.len(), THREADS);
    // SAFETY: there is a weight of each row.
    unsafe { launch!(gpu, &name, grid, [rows, weights, &columns]) }
}

/// Adds to each row the bias of its expert, of `biases` `[experts][width]`.
pub fn add_biases<E: GpuElement>(
    gpu: &Gpu,
    rows: &mut CudaViewMut<E>,
    biases: &CudaView<f32>,
    experts: &CudaView<u32>,
) -> Result<(), GpuError> {
    let width = width_of(rows.len(), experts.len());
    if rows.is_empty() {
        return Ok(());
    }
    let (name, columns) = (format!("add_expert_biases_{}", E::SUFFIX), width as i32);
    let grid = Grid::rows(experts.len(), THREADS);
    // SAFETY: each row is of an expert, whose bias is as wide.
    unsafe { launch!(gpu, &name, grid, [rows, biases, experts, &columns]) }
}

/// Adds the product of each row with the bias of its expert, of `biases` `[experts][width]`, to `products`.
pub fn add_bias_products<E: GpuElement>(
    gpu: &Gpu,
    rows: &CudaView<E>,
    (biases, experts): (&CudaView<f32>, &CudaView<u32>),
    products: &mut CudaViewMut<f32>,
) -> Result<(), GpuError> {
    let width = width_of(rows.len(), experts.len());
    assert_eq!(products.len(), experts.len(), "a product of each row");
    if rows.is_empty() {
        return Ok(());
    }
    let (name, columns) = (format!("add_bias_products_{}", E::SUFFIX), width as i32);
    let grid = Grid::rows(experts.len(), THREADS);
    // SAFETY: each row is of an expert, whose bias is as wide, and has a product.
    unsafe {
        launch!(
            gpu,
            &name,
            grid,
            [rows, biases, experts, products, &columns]
        )
    }
}

/// `y +=` each row times its weight, of all tokens.
pub fn add_weighted_tokens(
    gpu: &Gpu,
    y: &mut CudaViewMut<f32>,
    rows: &CudaView<f32>,
    weights: &CudaView<f32>,
) -> Result<(), GpuError> {
    let width = width_of(rows.len(), weights.len());
    assert_eq!(y.len(), rows.len(), "rows of all tokens");
    if rows.is_empty() {
        return Ok(());
    }
    let (grid, columns) = (Grid::rows(weights.len(), THREADS), width as i32);
    // SAFETY: there is a weight of each row, and y has as many.
    unsafe { launch!(gpu, "add_weighted_rows", grid, [y, rows, weights, &columns]) }
}

/// Writes each row of `x` times its weight, rounded.
pub fn weigh<E: GpuElement>(
    gpu: &Gpu,
    (x, weights): (&CudaView<f32>, &CudaView<f32>),
    (out, rows): (&mut CudaViewMut<E>, Rows),
) -> Result<(), GpuError> {
    assert!(
        rows.rows == weights.len()
            && x.len() == rows.rows * rows.columns
            && out.len() >= rows.len(),
        "rows of all tokens"
    );
    if rows.is_empty() {
        return Ok(());
    }
    let name = format!("weigh_rows_{}", E::SUFFIX);
    let grid = Grid::rows(rows.rows, THREADS);
    let (columns, stride) = (rows.columns as i32, rows.stride as i32);
    // SAFETY: both sides were checked to hold their rows, and there is a weight of each.
    unsafe { launch!(gpu, &name, grid, [x, weights, out, &columns, &stride]) }
}

/// `x = sigmoid(x)`
pub fn sigmoid(gpu: &Gpu, x: &mut CudaViewMut<f32>) -> Result<(), GpuError> {
    let scalars = x.len() as i64;
    let grid = Grid::scalars(x.len());
    // SAFETY: the kernel goes as far as x is long.
    unsafe { launch!(gpu, "sigmoid_in_place", grid, [x, &scalars]) }
}

/// Writes the gradient of what goes through a sigmoid to each row's weight, rounded, from that of the weighted rows, `dy`. Numbers of
/// the result are the first of rows that are `stride` apart.
pub fn gate_gradient<E: GpuElement>(
    gpu: &Gpu,
    (dy, rows): (&CudaView<f32>, &CudaView<f32>),
    weights: &CudaView<f32>,
    (d_gate, stride): (&mut CudaViewMut<E>, usize),
) -> Result<(), GpuError> {
    let width = width_of(rows.len(), weights.len());
    assert!(
        dy.len() == rows.len() && d_gate.len() >= weights.len() * stride,
        "rows of all tokens"
    );
    if rows.is_empty() {
        return Ok(());
    }
    let name = format!("gate_gradient_{}", E::SUFFIX);
    let grid = Grid::rows(weights.len(), THREADS);
    let (columns, stride) = (width as i32, stride as i32);
    // SAFETY: both have a row for each weight, and the result a number.
    unsafe {
        launch!(
            gpu,
            &name,
            grid,
            [dy, rows, weights, d_gate, &columns, &stride]
        )
    }
}

/// Width of so many rows.
fn width_of(scalars: usize, rows: usize) -> usize {
    let width = scalars / rows.max(1);
    assert_eq!(scalars, rows * width, "whole rows");
    width
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
