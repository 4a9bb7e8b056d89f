//! Muon (Jordan et al., 2024): momentum that five Newton-Schulz iterations bring near to an orthogonal matrix, scaled so that an
//! update is as large as AdamW's (Liu et al., 2025), as Axolotl and LLaMA-Factory have it. They iterate in bfloat16; here it is
//! float32.

use rayon::prelude::*;

use super::norm::gradient_norm;
use super::{UPDATE_CHUNK, Update};
use crate::engine::mean_gradient::MeanSource;
use crate::engine::memory;
use crate::engine::ops::matrix::{Along, MatrixMut, Target, View};
use crate::engine::ops::product::{multiply, multiply_turned};
use crate::engine::ops::vector::{self, dispatch};

const MOMENTUM: f32 = 0.95;
const ITERATIONS: usize = 5;
/// Coefficients of the quintic, whose slope at 0 is as steep as it gets.
const QUINTIC: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// Added to the norm that a direction is divided by.
const EPSILON: f64 = 1e-7;

/// The update of a matrix `[rows][columns]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Muon {
    pub rows: usize,
    pub columns: usize,
    pub weight_decay: f64,
}

impl Muon {
    /// Updates a matrix and its momentum in place, on all threads.
    pub fn update(
        &self,
        update: &Update,
        weights: &mut [f32],
        momentum: &mut [f32],
        mean: (MeanSource, usize),
    ) {
        let mut direction = memory::zeros(weights.len());
        move_momentum(update.gradient_scale, momentum, &mut direction, mean);
        orthogonalize(&mut direction, self.rows, self.columns);
        let keep = (1.0 - update.learning_rate * self.weight_decay) as f32;
        let scale = 0.2 * (self.rows.max(self.columns) as f64).sqrt();
        let step = (update.learning_rate * scale) as f32;
        each_chunk(weights, &direction, |w, direction| {
            w * keep - step * direction
        });
    }
}

/// Adds the gradient to the momentum, and writes Nesterov's direction.
fn move_momentum(
    gradient_scale: f32,
    momentum: &mut [f32],
    direction: &mut [f32],
    (mean, first): (MeanSource, usize),
) {
    momentum
        .par_chunks_mut(UPDATE_CHUNK)
        .zip(direction.par_chunks_mut(UPDATE_CHUNK))
        .enumerate()
        .for_each_init(Vec::new, |scratch, (index, (m, direction))| {
            let start = first + index * UPDATE_CHUNK;
            let gradient = mean.read(start..start + m.len(), scratch);
            dispatch(
                #[inline(always)]
                || {
                    for ((m, direction), g) in m.iter_mut().zip(direction).zip(gradient) {
                        let g = g * gradient_scale;
                        *m = *m * MOMENTUM + g;
                        *direction = g + *m * MOMENTUM;
                    }
                },
            );
        });
}

/// Brings the singular values of `x` `[rows][columns]` near to 1. Those of zeros stay 0.
///
/// The owners turn a tall matrix and turn the result back; here the small square stands on its other side instead, which is the
/// same.
fn orthogonalize(x: &mut [f32], rows: usize, columns: usize) {
    let [a, b, c] = QUINTIC;
    let norm = gradient_norm(MeanSource::Values(x));
    let inverse = (1.0 / (norm + EPSILON)) as f32;
    x.par_chunks_mut(UPDATE_CHUNK).for_each(|x| {
        dispatch(
            #[inline(always)]
            || vector::scale(x, inverse),
        );
    });
    let (is_tall, side) = (rows > columns, rows.min(columns));
    let mut square = memory::zeros(side * side);
    let mut polynomial = memory::zeros(side * side);
    let mut product = memory::zeros(x.len());
    for _ in 0..ITERATIONS {
        let view = View::new(x, rows, columns);
        match is_tall {
            true => multiply_turned(MatrixMut::new(&mut square, side, side), false, view, view),
            false => multiply(
                Target::new(&mut square, side, side),
                view,
                view,
                Along::Columns,
            ),
        }
        let view = View::new(&square, side, side);
        multiply(
            Target::new(&mut polynomial, side, side),
            view,
            view,
            Along::Rows,
        );
        each_chunk(&mut polynomial, &square, |p, s| b * s + c * p);
        let (x_view, view) = (
            View::new(x, rows, columns),
            View::new(&polynomial, side, side),
        );
        let target = Target::new(&mut product, rows, columns);
        match is_tall {
            true => multiply(target, x_view, view, Along::Rows),
            false => multiply(target, view, x_view, Along::Rows),
        }
        each_chunk(x, &product, |x, p| a * x + p);
    }
}

/// `x = f(x, y)` for every scalar.
fn each_chunk(x: &mut [f32], y: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) {
    x.par_chunks_mut(UPDATE_CHUNK)
        .zip(y.par_chunks(UPDATE_CHUNK))
        .for_each(|(x, y)| {
            for (x, y) in x.iter_mut().zip(y) {
                *x = f(*x, *y);
            }
        });
}
