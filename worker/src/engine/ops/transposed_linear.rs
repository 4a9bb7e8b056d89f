//! A linear layer whose weight is stored `[in][out]`, as those of fused experts are: `y = x W + bias`.
//!
//! It is frozen, or trainable as a whole; what is frozen gets no gradient.

use super::column_sums;
use super::element::Element;
use super::matrix::{Along, MatrixMut, Part, Start, Target, Term, View};
use super::product::{multiply_turned, product};
use crate::engine::params::Weight;

/// A linear layer with its weight `[in][out]`.
#[derive(Clone, Debug)]
pub struct TransposedLinear {
    pub weight: Weight,
    pub bias: Weight,
}

impl TransposedLinear {
    pub fn out(&self) -> usize {
        self.weight.matrix_dims().1
    }

    /// Whether a gradient of the layer itself is wanted.
    pub fn learns(&self) -> bool {
        self.weight.is_trainable() || self.bias.is_trainable()
    }

    /// Computes the output of `x`, `[tokens][in]`, in whichever type `y` has.
    pub fn forward<E: Element, Y: Element>(&self, x: &[E], y: &mut [Y], tokens: usize) {
        let (input, out) = self.weight.matrix_dims();
        let (weight, bias) = (self.weight.read(), self.bias.read_f32());
        let part = Part {
            first: 0,
            start: Start::Row(&bias),
            terms: vec![Term {
                a: View::new(x, tokens, input),
                w: weight.matrix(input, out),
                along: Along::Rows,
            }],
        };
        product(Target::new(y, tokens, out), &[part]);
    }

    /// Writes the gradient of the input.
    pub fn backward_input<E: Element>(&self, dy: &[E], dx: &mut [f32], tokens: usize) {
        let (input, out) = self.weight.matrix_dims();
        let weight = self.weight.read();
        let part = Part {
            first: 0,
            start: Start::Zero,
            terms: vec![Term {
                a: View::new(dy, tokens, out),
                w: weight.matrix(input, out),
                along: Along::Columns,
            }],
        };
        product(Target::new(dx, tokens, input), &[part]);
    }

    /// Hands over the gradients of what is trainable.
    pub fn backward_weights<E: Element>(&self, x: &[E], dy: &[E], tokens: usize) {
        let (input, out) = self.weight.matrix_dims();
        let (x, columns) = (View::new(x, tokens, input), View::new(dy, tokens, out));
        self.weight.add_gradient(|rows, gradient, accumulate| {
            let target = MatrixMut::new(gradient, rows.len(), out);
            multiply_turned(target, accumulate, x.part(rows.start, rows.len()), columns);
        });
        self.bias.add_gradient(|columns, gradient, accumulate| {
            column_sums(gradient, accumulate, &dy[columns.start..], out, tokens);
        });
    }

    /// Hands over gradients of zero, where the layer computed nothing.
    pub fn hand_over_zeros(&self) {
        self.weight.add_gradient_rows(&[], &[]);
        self.bias.add_gradient_rows(&[], &[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor};

    #[test]
    fn values_and_gradients_equal_the_reference() {
        let weights = TestWeights::new(&[("w", &[50, 70]), ("bias", &[70])]);
        let check = |weight: Weight, bias: Weight, frozen: &[&str]| {
            let layer = TransposedLinear { weight, bias };
            check_op(
                &random_tensor(90, 50, 1),
                &weights,
                frozen,
                &|x, dy| {
                    let mut y = vec![f32::NAN; 90 * 70];
                    let mut dx = vec![f32::NAN; x.len()];
                    layer.forward(x, &mut y, 90);
                    layer.backward_input(dy, &mut dx, 90);
                    if layer.learns() {
                        layer.backward_weights(x, dy, 90);
                    }
                    (y, dx)
                },
                &|x| {
                    let y = x.matmul(&weights.variable("w"))?;
                    y.broadcast_add(&weights.variable("bias"))
                },
            );
        };
        check(weights.trainable("w"), weights.trainable("bias"), &[]);
        let both = ["w", "bias"];
        check(weights.frozen("w"), weights.frozen("bias"), &both);
    }
}
