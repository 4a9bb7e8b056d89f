//! Linear layers that read the same input, side by side in one output: queries, keys and values; gate and up. Or one
//! layer on top of a residual: `y = residual + x Wᵀ`.
//!
//! A layer is frozen, frozen with a LoRA update, or trainable as a whole; what is frozen gets no gradient.

use rayon::prelude::*;

use super::element::Element;
use super::lora_linear::{Adapters, Lora, MaskKey};
use super::matrix::MatrixMut;
use super::matrix::{Along, Part, Start, Target, Term, View};
use super::product::{multiply_turned, product};
use super::{ROW_TILE, column_sums, vector};
use crate::engine::buffer::{Buffer, Pool};
use crate::engine::params::{Reading, Weight};

/// A linear layer, `y = x Wᵀ + bias (+ scale · x Aᵀ Bᵀ)`, with its weight `[out][in]`.
///
/// `B` starts at zero, so an untrained adapter leaves the base model unchanged.
#[derive(Clone, Debug)]
pub struct Linear {
    pub weight: Weight,
    pub bias: Option<Weight>,
    pub lora: Option<Lora>,
}

impl Linear {
    fn out(&self) -> usize {
        self.weight.matrix_dims().0
    }

    fn learns(&self) -> bool {
        let bias = self.bias.as_ref().is_some_and(Weight::is_trainable);
        self.weight.is_trainable() || bias || self.lora.is_some()
    }
}

/// Linear layers of one input width. Their outputs lie side by side in `[tokens][sum of outs]`.
#[derive(Clone, Debug)]
pub struct Projection(pub Vec<Linear>);

/// What a forward or backward run needs beside its input.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub tokens: usize,
    /// Key of the dropout masks; None where nothing is dropped.
    pub mask: Option<MaskKey>,
    pub pool: &'a Pool,
}

/// Low-rank activations `drop(x) Aᵀ` of the layers that have an adapter, or their gradient.
pub type LowRank<E> = Option<Buffer<E>>;

impl Projection {
    /// Width of all outputs together.
    pub fn out(&self) -> usize {
        self.0.iter().map(Linear::out).sum()
    }

    /// Whether a gradient of the layers themselves is wanted.
    pub fn learns(&self) -> bool {
        self.0.iter().any(Linear::learns)
    }

    /// Computes all outputs of `x`, `[tokens][in]`. Returns what the backward pass needs of the adapters.
    pub fn forward<E: Element>(&self, x: &[E], y: &mut [E], context: Context) -> LowRank<E> {
        self.run(x, Target::new(y, context.tokens, self.out()), None, context)
    }

    /// [`forward`](Self::forward) without rounding what comes out.
    pub fn forward_wide<E: Element>(&self, x: &[E], y: &mut [f32], context: Context) -> LowRank<E> {
        self.run(x, Target::new(y, context.tokens, self.out()), None, context)
    }

    /// `y = residual + layer(x)` with a single layer.
    pub fn forward_onto<E: Element>(
        &self,
        residual: &[f32],
        x: &[E],
        y: &mut [f32],
        context: Context,
    ) -> LowRank<E> {
        let target = Target::new(y, context.tokens, self.out());
        let low_rank = self.run(x, target, Some(residual), context);
        if let Some(bias) = self.0.first().and_then(|linear| linear.bias.as_ref()) {
            add_to_rows(y, &bias.read_f32());
        }
        low_rank
    }

    fn run<E: Element>(
        &self,
        x: &[E],
        y: Target,
        residual: Option<&[f32]>,
        context: Context,
    ) -> LowRank<E> {
        let adapters = self.adapters::<E>(context);
        let low_rank = adapters.as_ref().map(|a| a.reduce(x, context.tokens));
        let weights: Vec<Reading> = self.0.iter().map(|linear| linear.weight.read()).collect();
        let biases: Vec<_> = self
            .0
            .iter()
            .map(|linear| {
                let bias = linear.bias.as_ref().filter(|_| residual.is_none());
                bias.map(Weight::read_f32)
            })
            .collect();
        let layers = self.columns().zip(&weights).zip(&biases);
        let parts: Vec<Part<E>> = layers
            .map(|(((column, linear), weight), bias)| {
                let (out, width) = linear.weight.matrix_dims();
                let frozen = Term {
                    a: View::new(x, context.tokens, width),
                    w: weight.matrix(out, width),
                    along: Along::Columns,
                };
                let update = adapters.as_ref().zip(low_rank.as_ref());
                let update = update.and_then(|(a, u)| a.expand(u, context.tokens, column));
                Part {
                    first: column,
                    start: match (residual, bias) {
                        (Some(residual), _) => Start::Rows(residual),
                        (None, Some(bias)) => Start::Row(bias),
                        (None, None) => Start::Zero,
                    },
                    terms: [frozen].into_iter().chain(update).collect(),
                }
            })
            .collect();
        product(y, &parts);
        low_rank
    }

    /// Computes `drop(x) Aᵀ` once more, where the forward pass did not keep it.
    pub fn low_rank<E: Element>(&self, x: &[E], context: Context) -> LowRank<E> {
        let adapters = self.adapters::<E>(context)?;
        Some(adapters.reduce(x, context.tokens))
    }

    /// Computes the gradient of the low-rank part for [`Self::backward_weights`], where that of the input is of no use.
    pub fn backward_low_rank<E: Element>(&self, dy: &[E], context: Context) -> LowRank<E> {
        let dy = View::new(dy, context.tokens, self.out());
        let adapters = self.adapters::<E>(context)?;
        Some(adapters.reduce_gradient(dy))
    }

    /// Writes the gradient of the input, and returns that of the low-rank part for [`Self::backward_weights`].
    pub fn backward_input<E: Element>(
        &self,
        dy: &[E],
        dx: &mut [f32],
        context: Context,
    ) -> LowRank<E> {
        let dy = View::new(dy, context.tokens, self.out());
        let adapters = self.adapters::<E>(context);
        let du = adapters.as_ref().map(|a| a.reduce_gradient(dy));
        let weights: Vec<Reading> = self.0.iter().map(|linear| linear.weight.read()).collect();
        let frozen = self
            .columns()
            .zip(&weights)
            .map(|((column, linear), weight)| {
                let (out, width) = linear.weight.matrix_dims();
                Term {
                    a: dy.part(column, out),
                    w: weight.matrix(out, width),
                    along: Along::Rows,
                }
            });
        let update = adapters.as_ref().zip(du.as_ref());
        let update = update.and_then(|(a, du)| a.expand_gradient(du, context.tokens));
        let part = Part {
            first: 0,
            start: Start::Zero,
            terms: frozen.chain(update).collect(),
        };
        let width = dx.len() / context.tokens.max(1);
        product(Target::new(dx, context.tokens, width), &[part]);
        if let (Some(adapters), Some(du)) = (&adapters, &du) {
            adapters.add_masked_gradient(dx, du, context.tokens);
        }
        du
    }

    /// Hands over the gradients of what is trainable.
    pub fn backward_weights<E: Element>(
        &self,
        x: &[E],
        low_rank: &LowRank<E>,
        dy: &[E],
        d_low_rank: &LowRank<E>,
        context: Context,
    ) {
        let total = self.out();
        let dy = View::new(dy, context.tokens, total);
        for (column, linear) in self.columns() {
            let (out, width) = linear.weight.matrix_dims();
            let dy = dy.part(column, out);
            linear.weight.add_gradient(|rows, gradient, accumulate| {
                let target = MatrixMut::new(gradient, rows.len(), width);
                let dy = dy.part(rows.start, rows.len()).wide();
                let x = View::new(x, context.tokens, width).wide();
                multiply_turned(target, accumulate, dy, x);
            });
            if let Some(bias) = &linear.bias {
                bias.add_gradient(|_, gradient, accumulate| {
                    column_sums(gradient, accumulate, dy.data, total, context.tokens);
                });
            }
        }
        let adapters = self.adapters::<E>(context);
        if let (Some(adapters), Some(u), Some(du)) = (adapters, low_rank, d_low_rank) {
            adapters.backward(x, u, dy, du);
        }
    }

    fn adapters<'a, E: Element>(&'a self, context: Context<'a>) -> Option<Adapters<'a, E>> {
        let layers = self.columns();
        let adapted = layers.filter_map(|(column, linear)| Some((linear.lora.as_ref()?, column)));
        Adapters::new(adapted, context.mask, context.pool)
    }

    /// Each layer with the first column of its output.
    fn columns(&self) -> impl Iterator<Item = (usize, &Linear)> {
        self.0.iter().scan(0, |next, linear| {
            let first = *next;
            *next += linear.out();
            Some((first, linear))
        })
    }
}

/// Adds `row` to every row of `y`.
fn add_to_rows(y: &mut [f32], row: &[f32]) {
    y.par_chunks_mut(ROW_TILE * row.len()).for_each(|tile| {
        for y in tile.chunks_exact_mut(row.len()) {
            vector::dispatch(
                #[inline(always)]
                || vector::add_scaled(y, row, 1.0),
            );
        }
    });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor, random_values};
    use candle_core::{Result, Tensor};
    use half::bf16;

    fn reference(x: &Tensor, weights: &TestWeights, layer: &str, lora: bool) -> Result<Tensor> {
        let variable = |name: &str| weights.variable(&format!("{layer}.{name}"));
        let y = x
            .matmul(&variable("w").t()?)?
            .broadcast_add(&variable("bias"))?;
        match lora {
            false => Ok(y),
            true => y + (x.matmul(&variable("a").t()?)?.matmul(&variable("b").t()?)? * 0.5)?,
        }
    }

    fn weights(depth: usize) -> TestWeights {
        TestWeights::new(&[
            ("p.w", &[70, depth]),
            ("p.bias", &[70]),
            ("p.a", &[3, depth]),
            ("p.b", &[70, 3]),
            ("q.w", &[20, depth]),
            ("q.bias", &[20]),
            ("q.a", &[4, depth]),
            ("q.b", &[20, 4]),
        ])
    }

    fn lora(weights: &TestWeights, layer: &str, dropout: f64) -> Lora {
        Lora {
            a: weights.trainable(&format!("{layer}.a")),
            b: weights.trainable(&format!("{layer}.b")),
            scale: 0.5,
            dropout,
            module: 1,
        }
    }

    /// Forward and backward, as a decoder layer does it.
    fn run<E: Element>(
        projection: &Projection,
        x: &[f32],
        dy: &[f32],
        tokens: usize,
        mask: Option<MaskKey>,
    ) -> (Vec<f32>, Vec<f32>) {
        let pool = Pool::default();
        let context = Context {
            tokens,
            mask,
            pool: &pool,
        };
        let narrow = |values: &[f32]| values.iter().map(|x| E::round_from(*x)).collect::<Vec<E>>();
        let (narrow_x, narrow_dy) = (narrow(x), narrow(dy));
        let mut y = vec![E::zeroed(); tokens * projection.out()];
        let mut dx = vec![f32::NAN; x.len()];
        let u = projection.forward(&narrow_x, &mut y, context);
        let du = projection.backward_input(&narrow_dy, &mut dx, context);
        if projection.learns() {
            projection.backward_weights(&narrow_x, &u, &narrow_dy, &du, context);
        }
        (y.iter().map(|y| y.wide()).collect(), dx)
    }

    #[test]
    fn trainable_layers_side_by_side_equal_the_reference() {
        let weights = weights(50);
        let linear = |layer: &str| Linear {
            weight: weights.trainable(&format!("{layer}.w")),
            bias: Some(weights.trainable(&format!("{layer}.bias"))),
            lora: None,
        };
        let projection = Projection(vec![linear("p"), linear("q")]);
        check_op(
            &random_tensor(90, 50, 1),
            &weights,
            &["p.a", "p.b", "q.a", "q.b"],
            &|x, dy| run::<f32>(&projection, x, dy, 90, None),
            &|x| {
                let parts = ["p", "q"].map(|layer| reference(x, &weights, layer, false).unwrap());
                Tensor::cat(&parts, 1)
            },
        );
    }

    fn adapted(weights: &TestWeights, dropout: f64) -> Projection {
        let linear = |layer: &str| Linear {
            weight: weights.frozen(&format!("{layer}.w")),
            bias: Some(weights.frozen(&format!("{layer}.bias"))),
            lora: Some(lora(weights, layer, dropout)),
        };
        Projection(vec![linear("p"), linear("q")])
    }

    #[test]
    fn adapted_layers_equal_the_reference_and_their_base_gets_no_gradient() {
        let weights = weights(50);
        let projection = adapted(&weights, 0.0);
        check_op(
            &random_tensor(91, 50, 1),
            &weights,
            &["p.w", "p.bias", "q.w", "q.bias"],
            &|x, dy| run::<f32>(&projection, x, dy, 91, None),
            &|x| {
                let parts = ["p", "q"].map(|layer| reference(x, &weights, layer, true).unwrap());
                Tensor::cat(&parts, 1)
            },
        );
    }

    #[test]
    fn a_bfloat16_base_gives_nearly_the_same() {
        let weights = weights(50);
        let linear = |layer: &str| Linear {
            weight: weights.frozen_bf16(&format!("{layer}.w")),
            bias: Some(weights.frozen(&format!("{layer}.bias"))),
            lora: Some(lora(&weights, layer, 0.0)),
        };
        let narrow = Projection(vec![linear("p"), linear("q")]);
        let wide = adapted(&weights, 0.0);
        let (x, dy) = (random_values(33 * 50, 1), random_values(33 * 90, 2));
        let gradients = |run: &dyn Fn() -> (Vec<f32>, Vec<f32>)| {
            weights.reset_gradients();
            let (y, dx) = run();
            [
                y,
                dx,
                weights.gradients(&["p.w", "p.bias", "q.w", "q.bias"]),
            ]
        };
        let narrow = gradients(&|| run::<bf16>(&narrow, &x, &dy, 33, None));
        let wide = gradients(&|| run::<f32>(&wide, &x, &dy, 33, None));
        for (narrow, wide) in narrow.iter().zip(&wide) {
            let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
            let off = norm(&mut narrow.iter().zip(wide).map(|(a, b)| a - b));
            assert!(off.sqrt() < 0.01 * norm(&mut wide.iter().copied()).sqrt());
        }
    }

    #[test]
    fn a_residual_passes_its_value() {
        let weights = weights(70);
        let projection = Projection(vec![Linear {
            weight: weights.frozen("p.w"),
            bias: Some(weights.frozen("p.bias")),
            lora: Some(lora(&weights, "p", 0.0)),
        }]);
        check_op(
            &random_tensor(33, 70, 1),
            &weights,
            &["p.w", "p.bias", "q.w", "q.bias", "q.a", "q.b"],
            &|x, dy| {
                let (_, mut dx) = run::<f32>(&projection, x, dy, 33, None);
                super::super::add_in_place(&mut dx, dy);
                let pool = Pool::default();
                let context = Context {
                    tokens: 33,
                    mask: None,
                    pool: &pool,
                };
                let mut y = vec![f32::NAN; dy.len()];
                projection.forward_onto(x, x, &mut y, context);
                (y, dx)
            },
            &|x| x + reference(x, &weights, "p", true)?,
        );
    }

    #[test]
    fn dropout_is_drawn_from_its_key_and_keeps_the_mean() {
        let weights = weights(50);
        let key = |slot| MaskKey {
            seed: 1,
            step: 2,
            slot,
        };
        let (x, dy) = (random_values(90 * 50, 1), vec![0.0; 90 * 90]);
        let run = |dropout, mask| run::<f32>(&adapted(&weights, dropout), &x, &dy, 90, mask).0;
        let dropped = run(0.5, Some(key(0)));
        assert_eq!(run(0.5, Some(key(0))), dropped);
        assert_ne!(run(0.5, Some(key(1))), dropped);
        assert_eq!(run(0.5, None), run(0.0, Some(key(0))));
        let mean_over_masks: Vec<f32> = (0..400).map(|slot| run(0.5, Some(key(slot)))[7]).collect();
        let mean = mean_over_masks.iter().sum::<f32>() / 400.0;
        assert!((mean - run(0.0, None)[7]).abs() < 1.5, "{mean}");
    }

    #[test]
    fn dropout_s_gradient_goes_through_its_mask() {
        // x -> y is linear for one mask, so dx is exact by differences.
        let weights = weights(50);
        let projection = adapted(&weights, 0.4);
        let mask = Some(MaskKey {
            seed: 3,
            step: 1,
            slot: 0,
        });
        let (x, direction) = (random_values(70 * 50, 1), random_values(70 * 50, 2));
        let moved: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + d).collect();
        let run = |x: &[f32]| run::<f32>(&projection, x, &[1.0; 70 * 90], 70, mask);
        let ((y, dx), (moved, _)) = (run(&x), run(&moved));
        let sum = |values: &mut dyn Iterator<Item = f32>| values.map(f64::from).sum::<f64>();
        let expected = sum(&mut moved.iter().zip(&y).map(|(a, b)| a - b));
        let found = sum(&mut dx.iter().zip(&direction).map(|(a, b)| a * b));
        assert!((expected - found).abs() < 1e-2, "{expected} {found}");
    }

    /// The gradient of A is that of the dropped input: zero where a whole column was dropped.
    #[test]
    fn dropout_s_weight_gradient_sees_the_dropped_input() {
        let weights = weights(50);
        let projection = adapted(&weights, 0.5);
        let key = |slot| {
            Some(MaskKey {
                seed: 3,
                step: 1,
                slot,
            })
        };
        let (x, dy) = (random_values(50, 1), random_values(90, 2));
        let gradient = |mask| {
            weights.reset_gradients();
            run::<f32>(&projection, &x, &dy, 1, mask);
            weights.gradients(&["p.w", "p.bias", "q.w", "q.bias"])
        };
        // In layout order A of p comes first: three rows of 50 columns, of which about half are dropped.
        let dropped = |gradient: &[f32]| gradient[..150].iter().filter(|g| **g == 0.0).count();
        let count = dropped(&gradient(key(0)));
        assert!((30..120).contains(&count) && count % 3 == 0, "{count}");
        assert_ne!(gradient(key(0)), gradient(key(1)));
        assert_eq!(dropped(&gradient(None)), 0);
    }
}
