//! A linear layer whose weight is stored `[in][out]`, as those of fused experts are: `y = x W + bias (+ scale · x Aᵀ Bᵀ)`.
//!
//! It is frozen, frozen with a LoRA update that drops no inputs, or trainable as a whole; what is frozen gets no gradient.

use super::column_sums;
use super::element::Element;
use super::lora_linear::{Adapters, Lora};
use super::matrix::{Along, MatrixMut, Part, Start, Target, Term, View};
use super::product::{multiply_turned, product};
use super::projection::LowRank;
use crate::engine::buffer::Pool;
use crate::engine::params::Weight;

/// A linear layer with its weight `[in][out]`.
#[derive(Clone, Debug)]
pub struct TransposedLinear {
    pub weight: Weight,
    pub bias: Weight,
    pub lora: Option<Lora>,
}

impl TransposedLinear {
    pub fn out(&self) -> usize {
        self.weight.matrix_dims().1
    }

    /// Whether a gradient of the layer itself is wanted.
    pub fn learns(&self) -> bool {
        self.weight.is_trainable() || self.bias.is_trainable() || self.lora.is_some()
    }

    /// Computes the output of `x`, `[tokens][in]`, in whichever type `y` has.
    pub fn forward<E: Element, Y: Element>(
        &self,
        x: &[E],
        y: &mut [Y],
        (tokens, pool): (usize, &Pool),
    ) {
        let (input, out) = self.weight.matrix_dims();
        let (weight, bias) = (self.weight.read(), self.bias.read_f32());
        let adapter = self.adapter::<E>(pool);
        let u = adapter.as_ref().map(|adapter| adapter.reduce(x, tokens));
        let frozen = Term {
            a: View::new(x, tokens, input),
            w: weight.matrix(input, out),
            along: Along::Rows,
        };
        let update = adapter.as_ref().zip(u.as_ref());
        let update = update.and_then(|(adapter, u)| adapter.expand(u, tokens, 0..out));
        let part = Part {
            first: 0,
            start: Start::Row(&bias),
            terms: [frozen].into_iter().chain(update).collect(),
        };
        product(Target::new(y, tokens, out), &[part]);
    }

    /// Writes the gradient of the input, and returns that of the low-rank part for [`Self::backward_weights`].
    pub fn backward_input<E: Element>(
        &self,
        dy: &[E],
        dx: &mut [f32],
        (tokens, pool): (usize, &Pool),
    ) -> LowRank<E> {
        let (input, out) = self.weight.matrix_dims();
        let weight = self.weight.read();
        let adapter = self.adapter::<E>(pool);
        let dy = View::new(dy, tokens, out);
        let du = adapter.as_ref().map(|adapter| adapter.reduce_gradient(dy));
        let frozen = Term {
            a: dy,
            w: weight.matrix(input, out),
            along: Along::Columns,
        };
        let update = adapter.as_ref().zip(du.as_ref());
        let update = update.and_then(|(adapter, du)| adapter.expand_gradient(du, tokens));
        let part = Part {
            first: 0,
            start: Start::Zero,
            terms: [frozen].into_iter().chain(update).collect(),
        };
        product(Target::new(dx, tokens, input), &[part]);
        du
    }

    /// Hands over the gradients of what is trainable.
    pub fn backward_weights<E: Element>(
        &self,
        x: &[E],
        dy: &[E],
        d_low_rank: &LowRank<E>,
        (tokens, pool): (usize, &Pool),
    ) {
        let (input, out) = self.weight.matrix_dims();
        if let (Some(adapter), Some(du)) = (self.adapter::<E>(pool), d_low_rank) {
            let u = adapter.reduce(x, tokens);
            adapter.backward(x, &u, View::new(dy, tokens, out), du, None);
        }
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
        if let Some(lora) = &self.lora {
            lora.hand_over_zeros();
        }
    }

    fn adapter<'a, E: Element>(&'a self, pool: &'a Pool) -> Option<Adapters<'a, E>> {
        Adapters::new(self.lora.iter().map(|lora| (lora, 0)), None, pool)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor};

    #[test]
    fn values_and_gradients_equal_the_reference() {
        const RANK: usize = 3;
        let weights = TestWeights::new(&[
            ("w", &[50, 70]),
            ("bias", &[70]),
            ("a", &[RANK, 50]),
            ("b", &[70, RANK]),
        ]);
        let lora = || Lora {
            a: weights.trainable("a"),
            b: weights.trainable("b"),
            scale: 0.5,
            trained: RANK,
            dropout: 0.0,
            module: 0,
            bias: None,
            magnitudes: None,
        };
        let pool = Pool::default();
        let check = |[weight, bias]: [Weight; 2], lora: Option<Lora>, frozen: &[&str]| {
            let is_adapted = lora.is_some();
            let layer = TransposedLinear { weight, bias, lora };
            check_op(
                &random_tensor(90, 50, 1),
                &weights,
                frozen,
                &|x, dy| {
                    let mut y = vec![f32::NAN; 90 * 70];
                    let mut dx = vec![f32::NAN; x.len()];
                    layer.forward(x, &mut y, (90, &pool));
                    let du = layer.backward_input(dy, &mut dx, (90, &pool));
                    if layer.learns() {
                        layer.backward_weights(x, dy, &du, (90, &pool));
                    }
                    (y, dx)
                },
                &|x| {
                    let y = x.matmul(&weights.variable("w"))?;
                    let y = y.broadcast_add(&weights.variable("bias"))?;
                    if !is_adapted {
                        return Ok(y);
                    }
                    let u = x.matmul(&weights.variable("a").t()?)?;
                    y + (u.matmul(&weights.variable("b").t()?)? * 0.5)?
                },
            );
        };
        let trainable = ["w", "bias"].map(|name| weights.trainable(name));
        check(trainable, None, &["a", "b"]);
        let frozen = || ["w", "bias"].map(|name| weights.frozen(name));
        check(frozen(), None, &["w", "bias", "a", "b"]);
        check(frozen(), Some(lora()), &["w", "bias"]);
    }
}
