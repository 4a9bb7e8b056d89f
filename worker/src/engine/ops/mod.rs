//! Fused differentiable operations, one a file: forward, backward, and the tests that compare both with a plain
//! reference. They read and write buffers that the caller hands them; gradients of weights go to the sink that travels
//! with the weight.
//!
//! Activations are `[tokens, width]`, row-major, stored as an [`element::Element`]. Work is split over fixed tiles, so
//! that the bits never depend on the number of threads.

use rayon::prelude::*;

pub mod attention;
pub mod causal_conv;
pub mod clamped_swiglu;
pub mod cross_entropy;
pub mod delta_gates;
pub mod delta_rule;
pub mod dora;
pub mod element;
pub mod embedding;
pub mod gated_norm;
mod kernels;
pub mod key_groups;
pub mod lora_embedding;
pub mod lora_linear;
pub mod matrix;
pub mod nf4;
pub mod output_gate;
pub mod output_layer;
pub mod product;
pub mod projection;
pub mod rms_norm;
pub mod rope;
pub mod router_loss;
pub mod routing;
pub mod segments;
pub mod swiglu;
mod token_loss;
pub mod token_matrix;
pub mod token_rows;
pub mod transposed_linear;
pub mod vector;

use element::Element;

/// Rows in one task of an operation that goes row by row.
pub(in crate::engine) const ROW_TILE: usize = 64;

/// `sum += x`
pub fn add_in_place(sum: &mut [f32], x: &[f32]) {
    add_scaled_in_place(sum, x, 1.0);
}

/// `sum += scale · x`
pub fn add_scaled_in_place(sum: &mut [f32], x: &[f32], scale: f32) {
    const TILE: usize = 1 << 14;
    assert_eq!(sum.len(), x.len(), "a sum of another shape");
    sum.par_chunks_mut(TILE)
        .zip(x.par_chunks(TILE))
        .for_each(|(sum, x)| {
            vector::dispatch(
                #[inline(always)]
                || vector::add_scaled(sum, x, scale),
            );
        });
}

/// `x = scale · x`
pub fn scale_in_place(x: &mut [f32], scale: f32) {
    const TILE: usize = 1 << 14;
    x.par_chunks_mut(TILE).for_each(|x| {
        vector::dispatch(
            #[inline(always)]
            || vector::scale(x, scale),
        );
    });
}

/// `to = from`, rounded where `to` is narrower.
pub fn round_into<E: Element>(from: &[f32], to: &mut [E]) {
    const TILE: usize = 1 << 14;
    to.par_chunks_mut(TILE)
        .zip(from.par_chunks(TILE))
        .for_each(|(to, from)| element::round_slice(from, 1.0, to));
}

/// Adds per-tile partial sums into a weight's gradient, in tile order.
pub fn add_partials(gradient: &mut [f32], accumulate: bool, partials: &[Vec<f32>]) {
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
fn column_sums<E: Element>(
    sums: &mut [f32],
    accumulate: bool,
    data: &[E],
    stride: usize,
    rows: usize,
) {
    const COLUMNS: usize = 128;
    sums.par_chunks_mut(COLUMNS)
        .enumerate()
        .for_each(|(tile, sums)| {
            if !accumulate {
                sums.fill(0.0);
            }
            for row in 0..rows {
                let start = row * stride + tile * COLUMNS;
                let row = &data[start..start + sums.len()];
                vector::dispatch(
                    #[inline(always)]
                    || {
                        for (sum, x) in sums.iter_mut().zip(row) {
                            *sum += x.wide();
                        }
                    },
                );
            }
        });
}
