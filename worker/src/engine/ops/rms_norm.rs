//! Root mean square norm of each row: `y = w · x / sqrt(mean(x²) + epsilon)` (Zhang & Sennrich, 2019). The backward pass
//! reads `x` alone and computes the rest again.

use std::borrow::Cow;

use rayon::prelude::*;

use super::element::Element;
use super::vector::{self, dispatch};
use super::{ROW_TILE, add_partials};
use crate::engine::params::Weight;

/// The norm, with its weight `[width]` in float32.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    pub weight: Weight,
    pub epsilon: f32,
    /// Whether it multiplies by 1 + weight.
    pub offset: bool,
}

/// What a norm multiplies by.
pub(super) fn factors(weight: &[f32], offset: bool) -> Cow<'_, [f32]> {
    match offset {
        false => Cow::Borrowed(weight),
        true => Cow::Owned(weight.iter().map(|w| 1.0 + w).collect()),
    }
}

impl RmsNorm {
    /// Norms each row of `x`; `x` and `y` are `[tokens][width]`.
    pub fn forward<E: Element>(&self, x: &[f32], y: &mut [E]) {
        let weight = self.weight.read_f32();
        let weight = factors(&weight, self.offset);
        let (weight, width) = (&*weight, weight.len());
        y.par_chunks_mut(ROW_TILE * width)
            .zip(x.par_chunks(ROW_TILE * width))
            .for_each(|(y, x)| {
                dispatch(
                    #[inline(always)]
                    || {
                        for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                            let inverse = inverse_rms(x, self.epsilon);
                            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                                *y = E::round_from(w * (x * inverse));
                            }
                        }
                    },
                );
            });
    }

    /// Adds the gradient of `x` to `dx`.
    pub fn backward(&self, x: &[f32], dy: &[f32], dx: &mut [f32]) {
        let weight = self.weight.read_f32();
        let weight = factors(&weight, self.offset);
        let (weight, width) = (&*weight, weight.len());
        let trainable = self.weight.is_trainable();
        let tile = ROW_TILE * width;
        let partials: Vec<Vec<f32>> = dx
            .par_chunks_mut(tile)
            .zip(x.par_chunks(tile).zip(dy.par_chunks(tile)))
            .map(|(dx, (x, g))| {
                let mut dw = vec![0.0; if trainable { width } else { 0 }];
                dispatch(
                    #[inline(always)]
                    || {
                        for ((dx, x), g) in dx
                            .chunks_exact_mut(width)
                            .zip(x.chunks_exact(width))
                            .zip(g.chunks_exact(width))
                        {
                            let dw = trainable.then_some(dw.as_mut_slice());
                            let row = RowGradient::new(x, weight, self.epsilon, g, dw);
                            for (((d, x), g), w) in dx.iter_mut().zip(x).zip(g).zip(weight) {
                                *d += row.of(*x, *g, *w);
                            }
                        }
                    },
                );
                dw
            })
            .collect();
        self.weight
            .add_gradient(|_, gradient, accumulate| add_partials(gradient, accumulate, &partials));
    }
}

/// Norms one row in place, whose [`inverse_rms`] is known.
#[inline(always)]
pub(super) fn normalize_row(x: &mut [f32], weight: &[f32], inverse: f32) {
    vector::update1(x, weight, |x, w| w * (x * inverse));
}

/// The backward pass of one row: `dx = w g r - x r³ mean(w g x)`.
pub(super) struct RowGradient {
    inverse: f32,
    factor: f32,
}

impl RowGradient {
    /// Prepares the gradient of a row, and adds `g x r` to `dw` where it is wanted.
    #[inline(always)]
    pub(super) fn new(
        x: &[f32],
        weight: &[f32],
        epsilon: f32,
        g: &[f32],
        dw: Option<&mut [f32]>,
    ) -> Self {
        let inverse = inverse_rms(x, epsilon);
        let mean = vector::sum3(g, weight, x, |g, w, x| g * w * x) / x.len() as f32;
        if let Some(dw) = dw {
            vector::update2(dw, g, x, |dw, g, x| dw + g * (x * inverse));
        }
        Self {
            inverse,
            factor: inverse * inverse * inverse * mean,
        }
    }

    #[inline(always)]
    pub(super) fn of(&self, x: f32, g: f32, w: f32) -> f32 {
        g * w * self.inverse - x * self.factor
    }
}

/// `1 / sqrt(mean(x²) + epsilon)`
#[inline(always)]
pub(super) fn inverse_rms(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (vector::sum_squares(x) / x.len() as f32 + epsilon).sqrt()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::buffer::Pool;
    use crate::engine::testing::{TestWeights, check_op, random_tensor, random_values};
    use candle_core::{Result, Tensor};

    fn reference(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(1)?;
        x.broadcast_div(&(mean + 1e-5)?.sqrt()?)?
            .broadcast_mul(weight)
    }

    fn run(weight: Weight, x: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let epsilon = 1e-5;
        let offset = false;
        let norm = RmsNorm {
            weight,
            epsilon,
            offset,
        };
        let (mut y, mut dx) = (vec![0.0f32; x.len()], vec![0.0; x.len()]);
        norm.forward(x, &mut y);
        norm.backward(x, dy, &mut dx);
        (y, dx)
    }

    #[test]
    fn values_and_gradients_equal_the_reference() {
        for (rows, width) in [(1, 5), (150, 40), (64, 33)] {
            let weights = TestWeights::new(&[("w", &[width])]);
            let x = random_tensor(rows, width, 1);
            let plain = |x: &Tensor| reference(x, &weights.variable("w"));
            let trainable = |x: &[f32], dy: &[f32]| run(weights.trainable("w"), x, dy);
            check_op(&x, &weights, &[], &trainable, &plain);
            let frozen = |x: &[f32], dy: &[f32]| run(weights.frozen("w"), x, dy);
            check_op(&x, &weights, &["w"], &frozen, &plain);
        }
    }

    #[test]
    fn a_norm_with_an_offset_is_one_of_weights_that_are_larger_by_one() {
        let weights = TestWeights::new(&[("w", &[5])]);
        let norm = |weight, offset| RmsNorm {
            weight,
            epsilon: 1e-5,
            offset,
        };
        let larger: Vec<f32> = weights
            .frozen("w")
            .read_f32()
            .iter()
            .map(|w| 1.0 + w)
            .collect();
        let mut values = Pool::default().take(5);
        values.copy_from_slice(&larger);
        let larger = Weight::frozen_f32(values, &[5]);
        let x = random_values(15, 3);
        let run = |norm: RmsNorm| {
            let (mut y, mut dx) = (vec![0.0f32; 15], vec![0.0; 15]);
            norm.forward(&x, &mut y);
            norm.backward(&x, &random_values(15, 4), &mut dx);
            (y, dx)
        };
        assert_eq!(
            run(norm(weights.frozen("w"), true)),
            run(norm(larger, false))
        );
    }

    #[test]
    fn the_input_gradient_is_added() {
        let weights = TestWeights::new(&[("w", &[3])]);
        let norm = RmsNorm {
            weight: weights.frozen("w"),
            epsilon: 0.0,
            offset: false,
        };
        let mut dx = [1.0f32, 2.0, 3.0];
        norm.backward(&[1.0, -1.0, 2.0], &[0.0; 3], &mut dx);
        assert_eq!(dx, [1.0, 2.0, 3.0]);
    }
}
