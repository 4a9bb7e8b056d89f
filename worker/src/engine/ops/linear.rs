//! A linear layer `y = x Wᵀ + bias`: the arithmetic of both passes. [`super::projection`] puts it on candle's graph.

use candle_core::Result;

use super::column_sums;
use super::gemm::{
    Matrix, MatrixMut, all_threads, multiply, multiply_by_transposed_weight, multiply_by_weight,
};
use crate::engine::params::Weight;

/// Adds the layer's output to `y` `[tokens, out]`, or stores it there.
pub(super) fn forward(
    y: &mut MatrixMut,
    accumulate: bool,
    x: Matrix,
    weight: &Weight,
) -> Result<()> {
    weight.with(|weight| {
        multiply_by_transposed_weight(y, accumulate, x, weight);
        Ok(())
    })
}

/// `dx (+)= dy W`.
pub(super) fn backward_input(
    dx: &mut MatrixMut,
    accumulate: bool,
    dy: Matrix,
    weight: &Weight,
) -> Result<()> {
    weight.with(|weight| {
        multiply_by_weight(dx, accumulate, dy, weight);
        Ok(())
    })
}

/// `dW += dyᵀ x`, where the weight is trainable.
pub(super) fn backward_weight(x: Matrix, dy: Matrix, weight: &Weight) -> Result<()> {
    let (out, width) = weight.matrix_dims()?;
    weight.add_gradient(|gradient, accumulate| {
        multiply(
            &mut MatrixMut::new(gradient, out, width),
            accumulate,
            1.0,
            dy.transposed(),
            x,
            all_threads(),
        );
        Ok(())
    })
}

/// `dbias += sum over tokens of dy`, where the bias is trainable. `dy` begins at the layer's first column.
pub(super) fn backward_bias(dy: &[f32], stride: usize, tokens: usize, bias: &Weight) -> Result<()> {
    bias.add_gradient(|gradient, accumulate| {
        column_sums(gradient, accumulate, dy, stride, tokens);
        Ok(())
    })
}
